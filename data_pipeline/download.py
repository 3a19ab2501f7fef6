"""One remote file to one local file: resumed where it was cut, tried again with growing pauses, verified to the end."""

import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from data_pipeline.tar_scan import ShardError
from data_pipeline.transfer import RefusedError, TransferError, has_folders, open_at, without_password

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a source that fails is asked again: three minutes and a half if it answers at once."""

    tries: int = 10
    """Failures in a row, without one new byte, that end it."""
    command_tries: int = 4
    """The same for commands, which have a patience of their own and are more often misspelt."""
    first_pause_s: float = 0.5
    longest_pause_s: float = 60.0
    timeout_s: float = 60.0
    """Seconds without a byte after which a connection counts as failed."""


PATIENCE = Patience()

_lock = threading.Lock()


@dataclass(frozen=True)
class Remote:
    """A remote shard, and what its manifest says about it (None without one)."""

    url: str
    name: str
    num_bytes: int | None = None
    sha256: str | None = None
    num_samples: int | None = None


@dataclass
class FetchCounts:
    """What fetching remote shards has cost a process so far."""

    shards: int = 0
    num_bytes: int = 0
    retries: int = 0
    waits: int = 0
    """How often a reader found its shard missing and had to wait for it."""
    wait_s: float = 0.0

    def add(self, other: "FetchCounts | None" = None, **more: float) -> None:
        """Add another process's, or single figures by name; threads may do so at the same time."""
        with _lock:
            for field in fields(self):
                extra = more.get(field.name, 0) if other is None else getattr(other, field.name)
                setattr(self, field.name, getattr(self, field.name) + extra)

    def since(self, earlier: "FetchCounts") -> "FetchCounts":
        """Return what has been added since these were `earlier`."""
        return FetchCounts(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    def __str__(self) -> str:
        return (
            f"{self.num_bytes / 2**20:.0f} MiB in {self.shards} shards fetched, {self.retries} retries, "
            f"readers waited {self.waits} times, {self.wait_s:.1f} s"
        )


def download(
    remote: Remote,
    partial: Path,
    room: Callable[[int | None], None],
    counts: FetchCounts,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Copy `remote` to `partial`, going on where an earlier copy, of any process, was cut; raises ShardError.

    `room` is called with the length before the first byte is written. Length and SHA-256 are the manifest's where there
    is one; else the length is what the source says. `stopped` ends the waiting between tries.
    """
    said: list[str] = []
    fruitless, best = 0, _size(partial)
    tries = PATIENCE.tries if has_folders(remote.url) else PATIENCE.command_tries
    while True:
        try:
            return _attempt(remote, partial, room, counts)
        except RefusedError as error:
            raise _failed(remote, [*said, str(error)], partial) from error
        except TransferError as error:
            said.append(str(error))
            fruitless = 1 if _size(partial) > best else fruitless + 1
            best = max(best, _size(partial))
            if fruitless >= tries or len(said) >= 20 * tries or stopped():
                raise _failed(remote, said, partial) from error
            counts.add(retries=1)
            pause = min(PATIENCE.first_pause_s * 2 ** (fruitless - 1), PATIENCE.longest_pause_s)
            # Thousands of readers that failed together must not come back together.
            pause = max(pause * random.uniform(0.5, 1.5), min(error.retry_after_s, PATIENCE.longest_pause_s))
            logger.warning("Shard %s: %s; trying again in %.1f s", without_password(remote.url), error, pause)
            time.sleep(pause)


def read_whole(url: str) -> bytes:
    """Return a small remote file. Raises RefusedError if it does not exist, ShardError if it cannot be fetched."""
    said: list[str] = []
    while True:
        try:
            with open_at(url, 0, None, PATIENCE.timeout_s) as answer:
                content = b"".join(answer.chunks)
            if answer.total is not None and len(content) != answer.total:
                raise TransferError(f"the connection ended after {len(content)} of {answer.total} bytes")
            return content
        except TransferError as error:
            said.append(str(error))
            if len(said) >= PATIENCE.tries:
                raise _failed(Remote(url, url), said) from error
            pause = min(PATIENCE.first_pause_s * 2 ** (len(said) - 1), PATIENCE.longest_pause_s)
            time.sleep(pause * random.uniform(0.5, 1.5))


def note_path(partial: Path) -> Path:
    """Return the file beside a partial copy that says how long it will be, and of what content it is a part."""
    return partial.with_name(partial.name + ".json")


def _attempt(remote: Remote, partial: Path, room: Callable[[int | None], None], counts: FetchCounts) -> None:
    identity = _identity(partial)
    resumable = identity is not None or remote.sha256 is not None
    with open_at(remote.url, _size(partial) if resumable else 0, identity, PATIENCE.timeout_s) as answer:
        total = remote.num_bytes if answer.total is None else answer.total
        if remote.num_bytes is not None and total != remote.num_bytes:
            partial.unlink(missing_ok=True)
            raise TransferError(f"it is {total} bytes long there, its manifest says {remote.num_bytes}")
        room(total)
        with open(partial, "r+b" if answer.start else "wb") as file:
            note_path(partial).write_text(json.dumps({"bytes": total, "identity": answer.identity}))
            digest = hashlib.sha256()
            if remote.sha256 is not None:
                for begin in range(0, answer.start, 1 << 20):
                    digest.update(file.read(min(1 << 20, answer.start - begin)))
            file.seek(answer.start)
            file.truncate()
            for chunk in answer.chunks:
                file.write(chunk)
                counts.add(num_bytes=len(chunk))
                if remote.sha256 is not None:
                    digest.update(chunk)
            file.flush()
            length = file.tell()
            if total is None or length == total:
                os.fsync(file.fileno())  # the name that it gets next promises that it is whole
    if total is not None and length < total:
        raise TransferError(f"the connection ended after {length} of {total} bytes")
    if total is not None and length > total:
        partial.unlink()
        raise TransferError(f"{length} bytes came, {total} were announced")
    if remote.sha256 is not None and digest.hexdigest() != remote.sha256:
        partial.unlink()
        raise TransferError("what came has another SHA-256 than its manifest says")


def _identity(partial: Path) -> str | None:
    """Return of which content a partial copy is a part, None if that is not known."""
    try:
        return json.loads(note_path(partial).read_bytes())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _failed(remote: Remote, said: list[str], partial: Path | None = None) -> ShardError:
    """Return the error that ends it; a partial copy stays if the next start can go on from it."""
    kept = ""
    if partial is not None and partial.exists():
        if _identity(partial) is not None or remote.sha256 is not None:
            kept = f" The next start goes on from the {_size(partial)} bytes that have arrived."
        else:
            partial.unlink()
    last = said[-5:]
    told = "; ".join(f"try {len(said) - len(last) + 1 + number}: {what}" for number, what in enumerate(last))
    return ShardError(
        f"Shard {without_password(remote.url)} cannot be fetched: {told}. Try the URL or command by hand on this node "
        f"(curl -I, aws s3 ls), and mend the address, the access or the source.{kept}"
    )
