"""Writing safetensors files from pieces, in the memory of one piece, hashed on the way.

The library's own writer wants every tensor whole and in memory. The format: 8 bytes with the length of the header
(little-endian), the header in JSON, the numbers.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 8  # the header's length is a multiple of it, so that every number lies where a processor wants it
_WAITING = 8  # pieces that may wait to be hashed
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of number types."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Written:
    """A file that is on disk."""

    num_bytes: int
    sha256: str


def write_pieces(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    pieces: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    hashed: bool = True,
) -> Written:
    """Write the tensors of `layout` {name: (type, shape)} and wait for the disk.

    `pieces` are their elements in order, cut anywhere between elements. Hashing runs beside writing: whoever makes the
    pieces must not change or free one after it was given away. Without `hashed` the piece before the one asked for is
    done with, and the SHA-256 is empty. Raises OSError if the disk is full.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    stop = 0
    for name, (dtype, shape) in layout.items():
        start, stop = stop, stop + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head, written = len(text).to_bytes(8, "little") + text, 0
    with open(path, "wb", buffering=0) as file, _Hasher() as hasher:
        _write_all(file.fileno(), memoryview(head))
        hasher.add(head)
        for piece in pieces:
            data = piece.detach().reshape(-1).view(torch.uint8).numpy().data
            if hashed:
                hasher.add(data)
            _write_all(file.fileno(), data)
            written += len(data)
            del piece, data  # before the next one is made
        assert written == stop, f"{written} bytes of tensors were given, {stop} were promised"
        os.fsync(file.fileno())
    return Written(len(head) + stop, hasher.hexdigest() if hashed else "")


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data[: 1 << 30]) :]  # a call takes at most 2 GiB


class _Hasher:
    """SHA-256 in a thread of its own: hashing and writing take about as long, and neither holds Python's lock."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._waiting: Queue[Any] = Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, daemon=True, name="mvit-hash")

    def _run(self) -> None:
        while (data := self._waiting.get()) is not None:
            self._digest.update(data)

    def add(self, data: Any) -> None:
        self._waiting.put(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> "_Hasher":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.put(None)
        self._thread.join()
