"""Reading a weights file runs nothing in it, whatever it asks for and however it is wrapped; arrays come out whole."""

import io
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvit.weight_files import read_checkpoint
from mvit.weights import load_weights
from tests.mvit.model.test_weights import assert_same_except, detector_state, small_model, state_of

SUFFIXES = (".pkl", ".pth", ".pyth", ".pt")


class Calls:
    """Pickles as a call, which an ordinary unpickler makes."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class State:
    """Pickles as an array whose state is taken from a hostile call."""

    def __init__(self, inner: object) -> None:
        self.inner = inner

    def __reduce__(self) -> tuple[Any, ...]:
        return (*np.zeros(1, np.float32).__reduce__()[:2], self.inner)


TOUCH = "touch executed"
EVAL = "open('executed', 'w').close()"
# what the file asks for → its content
HOSTILE: dict[str, Callable[[], object]] = {
    f"{os.name}.system": lambda: {"model": {"a.weight": torch.zeros(1)}, "extra": Calls(os.system, TOUCH)},
    "builtins.eval": lambda: Calls(eval, EVAL),
    "builtins.exec": lambda: {"model": OrderedDict(weight=Calls(exec, EVAL))},
    "shutil.copy": lambda: {"model": Calls(shutil.copy, "weights.pth", "executed")},
    "getattr": lambda: {"model": {"weight": Calls(Path.touch, Path("executed"))}},  # so pickles name a method
}
NESTED: dict[str, Callable[[], object]] = {
    f"{os.name}.system": lambda: {"model": {"a": np.array([1.0, Calls(os.system, TOUCH)], dtype=object)}},
    "builtins.eval": lambda: {"model": {"a": State(Calls(eval, EVAL))}},
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_refused(path: Path, asked_for: str) -> None:
    with pytest.raises(ValueError, match=rf"{path.name}: refused.*asks for \S*{asked_for}.*could run code"):
        load_weights(small_model(), path)
    assert not Path("executed").exists()


def test_the_hostile_files_do_run_code_where_nobody_refuses_them() -> None:
    """Else the tests below would show nothing."""
    pickle.loads(pickle.dumps(Calls(os.system, TOUCH)))
    assert Path("executed").exists()
    Path("executed").unlink()
    pickle.loads(pickle.dumps(NESTED[f"{os.name}.system"]()))
    assert Path("executed").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("asked_for", HOSTILE)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_torch_file_that_would_run_code_is_refused(suffix: str, asked_for: str, form: str) -> None:
    path = Path(f"weights{suffix}")
    torch.save(HOSTILE[asked_for](), path, _use_new_zipfile_serialization=form == "zip")
    assert_refused(path, asked_for.removeprefix("builtins."))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("asked_for", NESTED)
def test_a_plain_pickle_that_would_run_code_is_refused(suffix: str, protocol: int, asked_for: str) -> None:
    path = Path(f"weights{suffix}")
    path.write_bytes(pickle.dumps(NESTED[asked_for](), protocol))
    assert_refused(path, asked_for.replace("builtins", "__builtin__" if protocol == 2 else "builtins"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_hostile_calls_within_arrays_in_torch_files_are_refused(suffix: str, form: str) -> None:
    """torch's own reader refuses already the array."""
    for content in NESTED.values():
        torch.save(content(), f"weights{suffix}", _use_new_zipfile_serialization=form == "zip")
        assert_refused(Path(f"weights{suffix}"), "")


@pytest.mark.parametrize(
    "content", [b"cposix\nsystem\n(S'touch executed'\ntR.", b"(S'touch executed'\niposix\nsystem\n."]
)
def test_pickles_of_the_first_protocol_are_refused_as_well(content: bytes) -> None:
    Path("old.pkl").write_bytes(content)
    assert_refused(Path("old.pkl"), "posix.system")


def test_what_the_list_allows_cannot_be_turned_into_a_call() -> None:
    """Attributes set on the allowed functions, arguments of all kinds, names with dots: no way to a call outside."""
    dtype, system = b"cnumpy\ndtype\n", b"cposix\nsystem\n"
    for content in (
        b"\x80\x04\x8c\x05numpy\x8c\x13dtype.__class__.mro\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        dtype + b"}S'__call__'\n" + system + b"sb.",
        dtype + b"(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\n" + system + b"tb.",
    ):
        Path("sly.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=r"sly.pkl: refused.*asks for (posix|numpy|collections)"):
            read_checkpoint("sly.pkl")
    Path("sly.pkl").write_bytes(dtype + b"(S'f4'\nI0\nI1\ntR}S'code'\nS'O8'\nsb.")  # a state that is none
    with pytest.raises(ValueError, match=r"sly.pkl: damaged"):
        read_checkpoint("sly.pkl")


def test_an_array_of_objects_without_the_flags_of_one_is_refused() -> None:
    """numpy would believe the flags and take the bytes for pointers."""
    array = python_2_array(b"O8", bytes(8))
    Path("pointers.pkl").write_bytes(b"}S'weight'\n" + array + b"s.")
    with pytest.raises(ValueError, match="an array of type 'O8'; only numbers"):
        read_checkpoint("pointers.pkl")


def python_2_array(code: bytes, raw: bytes) -> bytes:
    """Pickle a 1-D array of 8 bytes as Python 2 did: its content is text in latin-1."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\nt" % (8 // int(code[1:]))
    array += b"cnumpy\ndtype\n(S'%s'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n" % code
    return array + b"U" + bytes([len(raw)]) + raw + b"tb"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_arrays_come_out_of_a_pickle_whole(protocol: int, core: bytes) -> None:
    """Every number type and layout, written by numpy of before and since version 2."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        code: (rng.standard_normal((2, 3, 4)) * 50).astype(code) for code in ("f2", "f4", "f8", "i4", "i8", "u1", "?")
    }
    arrays["big_endian"] = arrays["f4"].astype(">f4")
    arrays["columns_first"] = np.asfortranarray(arrays["f4"])
    arrays["strided"] = arrays["f8"][::2, ::-1]
    arrays["number"] = np.float32(2.5)
    arrays["zero_d"] = np.array(7.0)
    arrays["empty"] = np.zeros((0, 3), np.float32)
    content = pickle.dumps({"model": OrderedDict(arrays), "__author__": "somebody"}, protocol)
    if protocol < 4:  # later ones count the bytes of their frames
        content = content.replace(b"numpy._core.", core)
    Path("arrays.pkl").write_bytes(content)
    found = read_checkpoint("arrays.pkl")
    assert found["__author__"] == "somebody"
    tensors: Any = found["model"]
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        expected = torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))
        assert tensors[name].dtype == expected.dtype, name
        assert torch.equal(tensors[name], expected), name


def test_an_array_pickled_by_python_2_is_read() -> None:
    array = python_2_array(b"f4", struct.pack("<2f", 1.5, -300.0))
    Path("two.pkl").write_bytes(b"}S'weight'\n" + array + b"s.")
    assert torch.equal(read_checkpoint("two.pkl")["weight"], torch.tensor([1.5, -300.0]))  # type: ignore[arg-type]


def test_detectron2s_pickle_loads_into_a_classifier() -> None:
    state = state_of(small_model(1))
    arrays = {name: tensor.numpy() for name, tensor in detector_state(state).items()}
    Path("model_final.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    model = small_model(2)
    report = load_weights(model, "model_final.pkl", allow_new_head=True)
    assert_same_except(model, state, set(report.missing))
    assert report.naming == "detectron2"


def test_damaged_pickles_are_named() -> None:
    whole = pickle.dumps({"model": {"a": np.arange(1000.0)}})
    for content in (whole[:500], whole[:-1], b"", b"no pickle at all", whole.replace(b"f8", b"f4")):
        Path("damaged.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged.pkl"):
            read_checkpoint("damaged.pkl")
    Path("list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"list.pkl: holds a list, not a dictionary"):
        read_checkpoint("list.pkl")


def test_a_torch_file_that_somebody_compressed_is_read_right() -> None:
    """Mapping it would take compressed bytes for numbers."""
    state = state_of(small_model(1))
    torch.save(state, "stored.pt")
    with zipfile.ZipFile("stored.pt") as stored, zipfile.ZipFile("deflated.pt", "w", zipfile.ZIP_DEFLATED) as deflated:
        for entry in stored.infolist():
            deflated.writestr(entry.filename, stored.read(entry))
    for name in ("stored.pt", "deflated.pt"):
        found = read_checkpoint(name)
        assert all(torch.equal(found[key], state[key]) for key in state)  # type: ignore[arg-type]


def test_a_legacy_torch_file_and_one_without_a_suffix_are_read() -> None:
    state = state_of(small_model(1))
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    for name in ("legacy.pth", "legacy.pkl", "legacy"):
        Path(name).write_bytes(buffer.getvalue())
        found = read_checkpoint(name)
        assert all(torch.equal(found[key], state[key]) for key in state)  # type: ignore[arg-type]
