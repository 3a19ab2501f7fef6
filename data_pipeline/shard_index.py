"""The sidecar index of one tar shard: which samples it holds and where their members lie, memory-mapped.

File layout (little endian): magic, 8-byte length of a JSON head, the head, then int64 arrays first_member (n+1),
key_end (n+1), labels (n), offset, size, extension (one per member) and the UTF-8 keys. It is valid for a tar of exactly
the recorded size and modification time, and is written by rename, so that several ranks may race to write it.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.decode import LABEL_EXTENSION
from data_pipeline.tar_scan import Member, ShardError, scan_tar

logger = logging.getLogger(__name__)

MAGIC = b"mvit-idx-2\n"
NO_LABEL = np.iinfo(np.int64).min
_NAME = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$")  # webdataset's rule: the key ends at the first dot of the file name
_META = re.compile(r"__[^/]*__($|/)")  # webdataset skips these


@dataclass(frozen=True)
class IndexHead:
    """What can be known of a shard without looking at single samples."""

    tar_bytes: int
    tar_mtime_ns: int
    num_samples: int
    num_members: int
    key_bytes: int
    extensions: list[str]
    """Names of the extension numbers in the member table."""
    member_sets: list[tuple[list[str], int, str]]
    """Each distinct set of extensions: how many samples have it, and the key of the first."""
    lowest_label: tuple[int, str] | None
    highest_label: tuple[int, str] | None
    """Extreme class labels with the key of a sample that has them; None without labels."""
    bad_label: tuple[str, str] | None
    """Key and text of the first label that is no integer."""


@dataclass(frozen=True)
class ShardIndex:
    """A loaded index: arrays mapped from the file, so that all workers of a node share the pages."""

    head: IndexHead
    first_member: np.ndarray
    key_end: np.ndarray
    labels: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    extension: np.ndarray
    keys: np.ndarray

    def key(self, sample: int) -> str:
        """Return the webdataset key of a sample."""
        return bytes(self.keys[self.key_end[sample] : self.key_end[sample + 1]]).decode("utf-8", "surrogateescape")

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """Return (extension, byte offset, size) of each member of a sample."""
        rows = range(int(self.first_member[sample]), int(self.first_member[sample + 1]))
        names = self.head.extensions
        return [(names[self.extension[row]], int(self.offset[row]), int(self.size[row])) for row in rows]


def find_index(tar: str, cache_dir: Path | None) -> tuple[str, IndexHead]:
    """Return (path, head) of a valid index of `tar`, scanning the tar if there is none.

    The index lies beside the tar, or in `cache_dir` (default: a per-user folder in the system's temporary one) if that
    folder cannot be written. Raises ShardError for a tar that is not whole.
    """
    stat = os.stat(tar)
    places = [tar + ".idx"]
    for number in range(2):
        head = _read_head(places[number])
        if head and (head.tar_bytes, head.tar_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return places[number], head
        if number == 0:
            places.append(str(_private_place(tar, cache_dir)))
    content, head = build_index(tar)
    for place in places:
        try:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, content)
        except OSError as error:
            logger.info("Cannot write the index %s (%s)", place, error)
            continue
        return place, head
    raise ShardError(
        f"Shard {tar}: its index can be written neither to {places[0]} nor to {places[1]}; set data.cache_dir."
    )


def build_index(tar: str) -> tuple[bytes, IndexHead]:
    """Scan `tar` and return its index as bytes, and the head. Raises ShardError for a tar that is not whole."""
    stat = os.stat(tar)
    keys: list[str] = []
    first_member, labels, rows = [0], [], []
    numbers: dict[str, int] = {}
    member_sets: dict[tuple[str, ...], tuple[int, str]] = {}
    bad_label: tuple[str, str] | None = None
    with open(tar, "rb", buffering=0) as file:
        for key, members in _samples(tar):
            label, bad = _label(file.fileno(), members)
            bad_label = bad_label or (None if bad is None else (key, bad))
            kinds = tuple(sorted(members))
            number, first = member_sets.get(kinds, (0, key))
            member_sets[kinds] = (number + 1, first)
            rows += [(m.offset, m.size, numbers.setdefault(e, len(numbers))) for e, m in members.items()]
            first_member.append(len(rows))
            labels.append(label)
            keys.append(key)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    known = [(label, key) for label, key in zip(labels, keys, strict=True) if label != NO_LABEL]
    head = IndexHead(
        tar_bytes=stat.st_size,
        tar_mtime_ns=stat.st_mtime_ns,
        num_samples=len(keys),
        num_members=len(rows),
        key_bytes=sum(map(len, encoded)),
        extensions=list(numbers),
        member_sets=[(list(kinds), number, first) for kinds, (number, first) in member_sets.items()],
        lowest_label=min(known, default=None),
        highest_label=max(known, default=None),
        bad_label=bad_label,
    )
    table = np.array(rows, dtype="<i8").reshape(len(rows), 3).T
    arrays = [first_member, np.cumsum([0, *map(len, encoded)]), labels, *table]
    text = json.dumps(asdict(head)).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % 8)
    parts = [
        MAGIC,
        len(text).to_bytes(8, "little"),
        text,
        *(np.asarray(a, dtype="<i8").tobytes() for a in arrays),
    ]
    return b"".join([*parts, *encoded]), head


def load_index(path: str) -> ShardIndex:
    """Map an index file. Raises ShardError if it is damaged."""
    head = _read_head(path)
    if head is None:
        raise ShardError(f"Index {path} vanished or is damaged; delete it, it is built again from the tar.")
    return split_index(np.asarray(np.memmap(path, dtype=np.uint8, mode="r")), head)


def split_index(raw: np.ndarray, head: IndexHead) -> ShardIndex:
    """View an index's bytes (uint8) as its arrays."""
    n, m = head.num_samples, head.num_members
    lengths = [n + 1, n + 1, n, m, m, m]
    keys = len(raw) - head.key_bytes
    table = raw[keys - 8 * sum(lengths) : keys].view("<i8")
    return ShardIndex(head, *np.split(table, np.cumsum(lengths)[:-1]), keys=raw[keys:])


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it: a reader sees the old file, the new one, or none."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _samples(tar: str) -> "list[tuple[str, dict[str, Member]]]":
    """Group consecutive members by key, as webdataset does."""
    samples: list[tuple[str, dict[str, Member]]] = []
    for member in scan_tar(tar):
        match = _NAME.match(member.name)
        if not match or _META.match(member.name):
            continue
        key, extension = match[1], match[2].lower()
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        if extension in samples[-1][1]:
            raise ShardError(
                f"Shard {tar}: at byte {member.header}, a second member {member.name} of the same sample. "
                "Pack this shard again with one file per name."
            )
        samples[-1][1][extension] = member
    return samples


def _label(file: int, members: dict[str, Member]) -> tuple[int, str | None]:
    """Return a sample's class label (NO_LABEL if it has none) and, if it is no integer, its text."""
    member = members.get(LABEL_EXTENSION)
    if member is None:
        return NO_LABEL, None
    text = os.pread(file, min(member.size, 32), member.offset)
    try:
        return int(text), None
    except ValueError:
        return NO_LABEL, text.decode("utf-8", "replace")


def _read_head(path: str) -> IndexHead | None:
    """Return the head of an index file, None if there is none or it is not ours or torn."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(MAGIC) + 8)
            if not start.startswith(MAGIC):
                return None
            size = os.fstat(file.fileno()).st_size
            length = min(int.from_bytes(start[len(MAGIC) :], "little"), size)
            head = IndexHead(**json.loads(file.read(length)))
            arrays = 8 * (3 * head.num_samples + 2 + 3 * head.num_members)
            whole = len(start) + length + arrays + head.key_bytes == size
    except (OSError, ValueError, TypeError):
        return None
    return head if whole else None


def _private_place(tar: str, cache_dir: Path | None) -> Path:
    folder = cache_dir or Path(tempfile.gettempdir()) / f"mvit-index-{os.getuid()}"
    name = hashlib.blake2b(os.path.abspath(tar).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return folder / f"{name}-{os.path.basename(tar)}.idx"
