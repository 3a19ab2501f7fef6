"""Writing weights to files one tensor at a time: safetensors, and torch's zip files by way of it."""

import ctypes
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from mvit.safetensors_file import DTYPES, write_pieces

_WORTH_RETURNING = 1 << 20  # bytes


def free_each(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on and free the memory of each before the next is made, although others may still hold it."""
    for name, tensor in tensors:
        yield name, tensor
        freed = tensor.nbytes
        for holder in (tensor._base, tensor):  # the maker's own, of which it is a view, and the user's
            if holder is not None:
                holder.set_()  # pyright: ignore[reportCallIssue] - to nothing
        if freed >= _WORTH_RETURNING:
            return_freed_memory()


def return_freed_memory() -> None:
    """Give what was freed back to the system; the C library would keep it, in pieces of no use to the next tensor."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have no such habit
    if trim is not None:
        trim(0)


def write_safetensors(
    path: Path,
    tensors: Iterator[tuple[str, Tensor]],
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    names: Mapping[str, str],
    metadata: Mapping[str, str],
    count: Callable[[], None],
) -> None:
    """Write tensors, which must come in the order of `layout`, under new `names`, and wait for the disk."""

    def pieces() -> Iterator[Tensor]:
        for (name, tensor), (expected, (dtype, _)) in zip(tensors, layout.items(), strict=True):
            assert (name, tensor.dtype) == (expected, dtype), name
            yield tensor.contiguous()
            count()

    renamed = {names[name]: kind for name, kind in layout.items()}
    write_pieces(path, renamed, pieces(), metadata, hashed=False)


def write_torch(path: Path, source: Path, wrapping: Mapping[str, object] | None) -> None:
    """Write the tensors of the safetensors file `source` as a torch file that loads with weights_only.

    They are mapped, not read. None gives the plain state dict, else it is the `model_state` beside `wrapping`.
    Raises OSError if the disk is full.
    """
    with open(source, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    # Copy-on-write: no page becomes memory of our own, since none is written to
    mapped = np.memmap(source, dtype=np.uint8, mode="c", offset=8 + length)
    state: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            own = torch.from_numpy(mapped[slice(*entry["data_offsets"])])  # a storage of its own
            state[name] = own.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    content = state if wrapping is None else {"model_state": state, **wrapping}
    with open(path, "wb") as file:
        watched = _Watched(file)
        try:
            torch.save(content, cast(IO[bytes], watched))
        except Exception:
            if watched.error is not None:  # torch tells of a full disk in words of its own
                raise watched.error from None
            raise
        _sync(file)


class _Watched:
    """A file that keeps the error of its first failed write."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
