"""A bounded node-local folder of remote shards, shared by all processes of a node and safe against losing any of them.

Locks are the kernel's (flock), which it releases when a process dies. One file per shard says who fetches it. A reader
holds a shared lock on the shard itself; what is removed must be locked alone, so no shard in use ever is. Removed are
whole shards, the one that was used longest ago first.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from data_pipeline.download import FetchCounts, Remote, download, note_path
from data_pipeline.shard_index import IndexHead, build_index, find_index, write_atomically
from data_pipeline.tar_scan import ShardError
from data_pipeline.transfer import without_password

logger = logging.getLogger(__name__)

GIB = 2**30
_SPARE = 0.05
"""Part of the disk that is left free where no limit is given."""
_ROOM_PATIENCE_S = 600.0
_TELL_EVERY_S = 30.0


class _Held(NamedTuple):
    used_ns: int
    num_bytes: int
    """With what a copy under way has reserved."""
    written: int
    tar: Path | None
    """None for a copy under way or cut."""
    folder: Path


class ShardCache:
    """The copies of remote shards in `folder`, together at most `limit_gib` (None: what the disk has, but for 5 %)."""

    def __init__(self, folder: Path, limit_gib: float | None = None) -> None:
        self.folder, self.limit_gib = folder, limit_gib
        self.counts, self._taken = FetchCounts(), FetchCounts()

    def path(self, remote: Remote) -> Path:
        """Return where the copy of a shard lies while there is one; its name is the shard's own."""
        return self.folder / _entry(remote) / remote.name

    def head(self, remote: Remote) -> IndexHead | None:
        """Return what an earlier copy of the shard told of it, whether or not that is still here."""
        try:
            return IndexHead(**json.loads((self.folder / f"{_entry(remote)}.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def pin(
        self, remote: Remote, stopped: Callable[[], bool] = lambda: False, *, reader: bool = True
    ) -> tuple[int, str] | None:
        """Return (file descriptor, index) of a whole copy that nobody removes while the descriptor is open and held.

        Fetches the shard if it is not here. None only if `stopped` came true. A `reader` counts its waiting.
        """
        start = None
        while not stopped():
            file = _held_open(self.path(remote))
            if file is not None:
                try:
                    index, _ = find_index(str(self.path(remote)), self.folder)
                except BaseException:
                    os.close(file)
                    raise
                if start is not None and reader:
                    self.counts.add(waits=1, wait_s=time.monotonic() - start)
                return file, index
            start = time.monotonic() if start is None else start
            self.fetch(remote, stopped)
        return None

    def fetch(self, remote: Remote, stopped: Callable[[], bool] = lambda: False) -> IndexHead | None:
        """Copy the shard here if it is not yet, or wait until another process has; None only if `stopped` came true.

        Raises ShardError naming the URL when the copy fails, or what came is no whole tar.
        """
        place = self.path(remote)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{_entry(remote)}.lock", stopped, f"another process fetches {place.name}") as ours:
            if not ours:
                return None
            if not place.exists():
                place.parent.mkdir(exist_ok=True)
                partial = place.with_name(f"{place.name}.partial")
                download(remote, partial, lambda size: self._make_room(place, size, stopped), self.counts, stopped)
                _accept(remote, partial, place)
                self.counts.add(shards=1)
                self._make_room(place, None, stopped)  # a source that told no length may have exceeded the limit
            _, head = find_index(str(place), self.folder)
            if self.head(remote) is None:
                write_atomically(self.folder / f"{_entry(remote)}.json", json.dumps(asdict(head)).encode())
            return head

    def take_counts(self) -> FetchCounts:
        """Return what this process has fetched and waited since it was last asked."""
        now = replace(self.counts)
        taken, self._taken = now.since(self._taken), now
        return taken

    def limit(self) -> int:
        """Return the bytes that the copies may take together."""
        if self.limit_gib is not None:
            return int(self.limit_gib * GIB)
        self.folder.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize - _SPARE * disk.f_blocks * disk.f_frsize
        return max(0, int(free)) + sum(held.written for held in self._held())

    def _make_room(self, place: Path, size: int | None, stopped: Callable[[], bool]) -> None:
        """Remove what was used longest ago until `size` more bytes fit, and reserve them; wait if all is in use."""
        start, told = time.monotonic(), 0.0
        while True:
            missing = self._remove_old(place, size or 0)
            if missing <= 0:
                return
            if size is None:
                return  # nothing more can be removed now; the next copy will see to it
            waited = time.monotonic() - start
            if stopped() or waited > _ROOM_PATIENCE_S:
                raise ShardError(
                    f"There is no room for shard {place.name} ({size / GIB:.3g} GiB) in data.cache_dir {self.folder}: "
                    f"its limit is {self.limit() / GIB:.3g} GiB and all copies there are in use. Raise data.cache_gib, "
                    "lower data.shuffle_window, or give each job of the node a folder of its own."
                )
            if waited - told > _TELL_EVERY_S:
                told = waited
                logger.warning("Waiting for room in %s since %.0f s; all shards there are in use", self.folder, waited)
            time.sleep(0.2)

    def _remove_old(self, place: Path, size: int) -> int:
        """Return how many bytes are missing for `size` more; 0 or less: they are reserved."""
        with _locked(self.folder / "room.lock"):
            others = [held for held in self._held() if held.folder != place.parent or not size]
            missing = sum(held.num_bytes for held in others) + size - self.limit()
            for held in sorted(others, key=lambda one: one.used_ns):
                if missing <= 0:
                    break
                if held.folder != place.parent and self._removed(held):
                    missing -= held.num_bytes
            if missing <= 0 and size:
                note_path(place.with_name(f"{place.name}.partial")).write_text(json.dumps({"bytes": size}))
            return missing

    def _held(self) -> list[_Held]:
        """List the copies, and the room that those under way will take."""
        found = []
        for folder in self.folder.iterdir() if self.folder.exists() else ():
            if not folder.is_dir():
                continue
            tar, size, written, used = None, 0, 0, 0
            try:
                for file in os.scandir(folder):
                    stat = file.stat()
                    size, written = size + stat.st_size, written + stat.st_size
                    if file.name.endswith(".partial.json"):
                        reserved = json.loads(Path(file.path).read_bytes() or b"{}").get("bytes") or 0
                        size += max(0, reserved - _size(folder / file.name.removesuffix(".json")))
                    elif file.name.endswith(".tar"):
                        tar = folder / file.name
                        used = stat.st_atime_ns
            except (FileNotFoundError, ValueError):  # removed or replaced while we looked: it counts from now on
                continue
            found.append(_Held(used, size, written, tar, folder))
        return found

    def _removed(self, held: _Held) -> bool:
        """Remove a copy, or what is left of a cut one, unless a process uses it."""
        with _locked(self.folder / f"{held.folder.name}.lock", lambda: True) as ours:
            if not ours:
                return False
            if held.tar is not None:
                try:
                    file = os.open(held.tar, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    return False
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.tar.unlink()
                    os.ftruncate(file, 0)  # readers that keep it open without holding it must not keep the disk full
                except BlockingIOError:
                    return False
                finally:
                    os.close(file)
            for rest in held.folder.iterdir():
                rest.unlink(missing_ok=True)
            held.folder.rmdir()
        return True


def hold(file: int) -> bool:
    """Hold a shard that `ShardCache.pin` opened and `let_go` let go; False if it has been removed since."""
    fcntl.flock(file, fcntl.LOCK_SH)
    return os.fstat(file).st_nlink > 0


def let_go(file: int) -> None:
    """Allow an open shard to be removed when room is needed."""
    fcntl.flock(file, fcntl.LOCK_UN)


def _held_open(place: Path) -> int | None:
    """Open and hold a copy, and note that it is used now; None if there is none."""
    try:
        file = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        stat = os.fstat(file)
        if stat.st_nlink > 0:
            os.utime(file, ns=(time.time_ns(), stat.st_mtime_ns))
            return file
    except BlockingIOError:  # being removed
        time.sleep(0.001)
    os.close(file)
    return None


def _accept(remote: Remote, partial: Path, place: Path) -> None:
    """Give a copy its name, once it is known to be a whole tar."""
    try:
        content, _ = build_index(str(partial))
    except ShardError as error:
        partial.unlink(missing_ok=True)
        raise ShardError(f"What came from {without_password(remote.url)} is no whole tar: {error}") from error
    finally:
        note_path(partial).unlink(missing_ok=True)
    write_atomically(f"{place}.idx", content)
    os.replace(partial, place)


@contextmanager
def _locked(path: Path, stopped: Callable[[], bool] | None = None, why: str = "") -> Iterator[bool]:
    """Hold the lock file; with `stopped`, give up and yield False when that comes true while another has it."""
    with open(path, "w") as lock:
        start, told = time.monotonic(), 0.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if stopped is None else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                assert stopped is not None
                if stopped():
                    yield False
                    return
                waited = time.monotonic() - start
                if waited - told > _TELL_EVERY_S:
                    told = waited
                    logger.warning("Waiting since %.0f s: %s", waited, why)
                time.sleep(0.02)
        yield True


def _entry(remote: Remote) -> str:
    """Return a name of its own for each content: the URL or command, and its hash where that is known."""
    return hashlib.blake2b((remote.url + (remote.sha256 or "")).encode(), digest_size=8).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
