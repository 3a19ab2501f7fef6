"""Read a weights file without running code from it: safetensors, torch's formats, plain pickles of numpy arrays."""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the long with which torch's format before zip files begins
_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
_REFUSED_BY_TORCH = re.compile(r"\bGLOBAL\s+([\w.]*\w)")


def read_checkpoint(path: str | Path) -> Mapping[str, object]:
    """Read a .safetensors file, a torch file, or detectron2's .pkl without executing anything in it.

    Tensors may be mapped from the file rather than read. Raises ValueError if the file is not there, is damaged, or
    holds more than tensors and plain values; it then names the global that the file asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file")
    try:
        content = _read(path)
    except SafetensorError as error:
        raise ValueError(f"weights {path}: not a readable safetensors file ({error})") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights {path}: refused, because it is not a file of tensors and plain values alone: {_reason(error)}. "
            "Loading it could run code. If you trust its origin, re-save only its state dict, for instance as "
            "safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"weights {path}: damaged or not a torch file ({error})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"weights {path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    with open(path, "rb") as file:
        head = file.read(32)
    zipped = head.startswith(b"PK")
    if not zipped and _LEGACY_TORCH not in head and (head.startswith(b"\x80") or path.suffix == ".pkl"):
        return _read_plain_pickle(path)
    return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped and _is_stored(path))


def _is_stored(path: Path) -> bool:
    """Tell whether a zip file is uncompressed, as torch writes it: only then are its bytes the tensors' bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except zipfile.BadZipFile:
        return False


def _reason(error: pickle.UnpicklingError) -> str:
    found = [error.name] if isinstance(error, _RefusedGlobal) else _REFUSED_BY_TORCH.findall(str(error))
    return f"it asks for {found[0]}" if found else str(error).splitlines()[0]


# --- plain pickles of numpy arrays, as detectron2 publishes them --------------------------------------------------
# numpy's own functions are never called with what the file says: its dtype accepts flags from a pickle that make it
# take bytes for pointers. Stand-ins collect type, shape and bytes; what is none of these types is refused.


class _RefusedGlobal(pickle.UnpicklingError):
    """A pickle asked for something that is not on the list."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Dtype:
    """Stands in for numpy's dtype while a pickle is read: a number type and its byte order, judged when used."""

    def __init__(self, code: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        _, order, *rest = state
        if order not in ("<", ">", "=", "|") or any(item is not None for item in rest[:3]):
            raise pickle.UnpicklingError("an array with fields or another structure; only plain numbers are read")
        self.order = order


class _Array:
    """Stands in for numpy's array while a pickle is read; `tensor` is set by its state."""

    tensor: Tensor

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.tensor = _tensor(data, dtype, shape, "F" if fortran else "C")


def _tensor(data: Any, dtype: object, shape: Any, order: object) -> Tensor:
    import numpy as np

    if isinstance(data, str):  # Python 2 has no bytes
        data = data.encode("latin1")
    if not isinstance(dtype, _Dtype) or dtype.code not in _DTYPES:
        code = repr(dtype.code) if isinstance(dtype, _Dtype) else "no type"
        raise pickle.UnpicklingError(f"an array of type {code}; only numbers ({', '.join(_DTYPES)}) are read")
    if not isinstance(data, (bytes, bytearray)) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array that is not stored as numbers")
    flat = np.frombuffer(bytearray(data), dtype.order + dtype.code) if data else np.zeros(0, dtype.code)
    found = flat.reshape(shape, order=cast(Any, order))
    return torch.from_numpy(np.ascontiguousarray(found, dtype.code).reshape(found.shape))


def _allowed_globals() -> dict[tuple[str, str], object]:
    """Return all that a pickle may ask for; made anew for each file, as it can set attributes of what it is given."""

    def dtype(code: object, *flags: object) -> _Dtype:
        return _Dtype(code)

    def reconstruct(*arguments: object) -> _Array:
        return _Array()

    def scalar(dtype: object, data: object) -> Tensor:
        return _tensor(data, dtype, (), "C")

    def frombuffer(data: object, dtype: object, shape: object, order: object, *axes: object) -> Tensor:
        return _tensor(data, dtype, shape, order)

    def encode(text: str, codec: str) -> bytes:  # how pickles of protocol 2 spell bytes
        return text.encode("latin1")

    def no_bytes() -> bytes:  # and empty ones
        return b""

    allowed: dict[tuple[str, str], object] = {
        ("numpy", "ndarray"): object(),  # only ever passed to `reconstruct`
        ("numpy", "dtype"): dtype,
        ("_codecs", "encode"): encode,
        ("__builtin__", "bytes"): no_bytes,
        ("collections", "OrderedDict"): OrderedDict,
    }
    for core in ("numpy.core", "numpy._core"):  # before numpy 2, and since
        allowed[f"{core}.multiarray", "_reconstruct"] = reconstruct
        allowed[f"{core}.multiarray", "scalar"] = scalar
        allowed[f"{core}.numeric", "_frombuffer"] = frombuffer
    return allowed


class _Unpickler(pickle.Unpickler):
    """Knows only the globals of `_allowed_globals`."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self._allowed = _allowed_globals()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise _RefusedGlobal(f"{module}.{name}")
        return self._allowed[module, name]


def _read_plain_pickle(path: Path) -> object:
    with open(path, "rb") as file:
        try:
            return _with_tensors(_Unpickler(file).load())
        except (pickle.UnpicklingError, OSError):
            raise
        except Exception as error:  # a damaged pickle fails in any way
            raise RuntimeError(f"not a readable pickle: {error!r}") from error


def _with_tensors(value: object) -> object:
    """Replace the stand-ins of a dictionary, at any depth, by their tensors."""
    if isinstance(value, Mapping):
        return {key: _with_tensors(item) for key, item in value.items()}
    return value.tensor if isinstance(value, _Array) else value
