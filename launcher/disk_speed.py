"""How fast a file system takes and gives bytes, measured now."""

import os
import tempfile
import time
from pathlib import Path

_PIECE = 1 << 23
_SYNC_EVERY = 1 << 26  # so that a limit of time holds on a slow disk, too


def existing_parent(folder: Path) -> Path:
    """Return the folder itself, or its nearest parent that exists: it is on the same file system."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def write_speed(folder: Path, num_bytes: int, limit_s: float) -> float:
    """Write a file of `num_bytes`, or as much as `limit_s` allows, sync and remove it; return bytes per second.

    Raises OSError where the folder cannot be written, or is full.
    """
    piece = os.urandom(min(_PIECE, num_bytes))  # nothing that a file system could compress
    written, start = 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=folder, prefix=".mvit-doctor-", buffering=0) as file:
        while written < num_bytes and time.perf_counter() - start < limit_s:
            written += file.write(piece)
            if written % _SYNC_EVERY == 0:
                os.fdatasync(file.fileno())
        os.fsync(file.fileno())
        return written / (time.perf_counter() - start)


def read_speed(path: Path, num_bytes: int) -> float:
    """Read the first `num_bytes` of a file, from its medium where the system allows; return bytes per second."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size, start = 0, time.perf_counter()
        while size < num_bytes and (piece := file.read(min(_PIECE, num_bytes - size))):
            size += len(piece)
        return size / max(time.perf_counter() - start, 1e-9)
