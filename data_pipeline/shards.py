"""A set of tar shards as one indexed sequence of samples, read at random by pread.

Opening checks everything that needs no pixel: every tar is whole, every sample has its required members, the manifest
agrees. What is wrong is named before training starts.
"""

import copy
import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.cache import GIB, ShardCache, hold, let_go
from data_pipeline.decode import IMAGE_EXTENSIONS, LABEL_EXTENSION
from data_pipeline.download import FetchCounts, Remote
from data_pipeline.manifest import MANIFEST, read_manifest
from data_pipeline.naming import check_presence, expand_braces, first_shard, local_shards
from data_pipeline.remote import remote_heads, remote_shards
from data_pipeline.shard_index import IndexHead, ShardIndex, find_index, load_index
from data_pipeline.tar_scan import ShardError
from data_pipeline.transfer import is_remote

__all__ = ["MANIFEST", "ShardError", "ShardSet", "check_presence", "first_shard", "open_shards", "read_manifest"]

logger = logging.getLogger(__name__)

REQUIRED_FOR_CLASSIFICATION: tuple[tuple[str, ...], ...] = (IMAGE_EXTENSIONS, (LABEL_EXTENSION,))
"""What an image classification sample must have: one of the picture extensions, and a label."""

_MAX_OPEN = 64
_OPENERS = 16
_AHEAD_PART = 0.75
"""Part of the cache for training shards that are in use or copied ahead; the rest is for what evaluation reads."""


class ShardSet:
    """The samples 0 … N-1 of a list of shards; make it with `open_shards`. Cheap to pickle; not for several threads."""

    def __init__(
        self,
        paths: Sequence[str],
        indexes: Sequence[str],
        heads: Sequence[IndexHead],
        manifests: Sequence[dict[str, Any]],
        remote: Sequence[Remote | None] = (),
        cache: ShardCache | None = None,
        required: Sequence[Sequence[str]] = (),
    ) -> None:
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()  # first: __del__ follows any error below
        self.paths = tuple(paths)
        self.names = tuple(os.path.basename(path) for path in paths)
        self.shard_sizes = np.array([head.num_samples for head in heads], dtype=np.int64)
        self.manifests = tuple(manifests)
        self.manifest: dict[str, Any] | None = manifests[0] if len(manifests) == 1 else None
        self.class_names: tuple[str, ...] | None = _same_classes(manifests)
        self.num_classes: int | None = len(self.class_names) if self.class_names else None
        self._indexes = tuple(indexes)
        self._bytes = tuple(head.tar_bytes for head in heads)
        self._labels = [label for head in heads for label in (head.lowest_label, head.highest_label)]
        self._ends = np.cumsum(self.shard_sizes)
        self._chosen: np.ndarray | None = None
        self.remote = tuple(remote) or (None,) * len(paths)
        """For each shard where it is copied from, None for those that are read where they lie."""
        self.cache = cache
        self._required = required

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())

    def select(self, samples: np.ndarray) -> "ShardSet":
        """Return a set with these samples alone, which must rise; they are numbered anew from 0."""
        assert self._chosen is None, "a selection of a selection"
        assert (np.diff(samples, prepend=-1, append=len(self)) > 0).all(), samples
        selection = copy.copy(self)
        selection._open = OrderedDict()
        selection._chosen = np.asarray(samples, dtype=np.int64)
        shards = np.searchsorted(self._ends, selection._chosen, side="right")
        selection.shard_sizes = np.bincount(shards, minlength=len(self.shard_sizes)).astype(np.int64)
        return selection

    def fingerprint(self) -> str:
        """Return a short identity of the content: names, sample counts and sizes of the shards, not their folder."""
        facts = [self.names, self.shard_sizes.tolist(), self._bytes]
        facts += [] if self._chosen is None else [self._chosen.tolist()]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()

    def key(self, sample: int) -> str:
        """Return "shard-000003.tar/000123", for messages."""
        shard, place = self._locate(sample)
        return f"{self.names[shard]}/{self._index(shard).key(place)}"

    def read(self, sample: int, only: Container[str] | None = None) -> dict[str, bytes]:
        """Return a sample's members by extension, or of them `only` some.

        Raises ShardError if the shard has changed since it was opened.
        """
        shard, place = self._locate(sample)
        file, index = self._opened(shard)
        try:
            members = {}
            for extension, offset, size in index.members(place):
                if only is None or extension in only:
                    members[extension] = _read_fully(file, offset, size, self.paths[shard])
            return members
        finally:
            if self.remote[shard] is not None:
                let_go(file)

    def label(self, sample: int) -> int:
        """Return a sample's class label from the index, without reading the shard."""
        shard, place = self._locate(sample)
        return int(self._index(shard).labels[place])

    def check_labels(self, num_classes: int) -> None:
        """Raise ValueError naming a sample whose label is not in 0 … num_classes-1."""
        listed = max((len(manifest["class_names"]) for manifest in self.manifests), default=0)
        if any(self.remote) and listed > num_classes:  # of a shard not fetched yet there is only the manifest's word
            raise ValueError(f"The shards have {listed} classes, but the model has {num_classes}: set num_classes.")
        for shard, found in enumerate(self._labels):
            if found is not None and not 0 <= found[0] < num_classes:
                name = self.names[shard // 2]
                raise ValueError(
                    f"Sample {name}/{found[1]} has label {found[0]}, but the model has {num_classes} classes "
                    f"(labels 0 to {num_classes - 1}): set num_classes to the data's, or check the shards."
                )

    def _locate(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        if self._chosen is not None:
            sample = int(self._chosen[sample])
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, int(sample - (self._ends[shard - 1] if shard else 0))

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._open:
            file, _ = self._opened(shard)
            if self.remote[shard] is not None:
                let_go(file)
        return self._open[shard][1]

    def _opened(self, shard: int) -> tuple[int, ShardIndex]:
        """Return (file descriptor, index) of a shard, keeping the most recently used ones open.

        A copy of a remote shard is fetched if it is not here, and is held: nobody may remove it until `let_go`.
        """
        remote = self.remote[shard]
        if shard in self._open:
            self._open.move_to_end(shard)
            if remote is None or hold(self._open[shard][0]):
                return self._open[shard]
            os.close(self._open.pop(shard)[0])
        if remote is None:
            file, place = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC), self._indexes[shard]
        else:
            assert self.cache is not None
            pinned = self.cache.pin(remote)
            assert pinned is not None
            file, place = pinned
        try:
            if os.fstat(file).st_size != self._bytes[shard]:
                raise ShardError(
                    f"Shard {self.paths[shard]} has changed since this run opened it; start the run again."
                )
            index = load_index(place)
            if remote is not None:
                check_members(remote.url, index.head, self._required)
        except BaseException:
            os.close(file)
            raise
        self._open[shard] = file, index
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[shard]

    def take_counts(self) -> FetchCounts | None:
        """Return what this process has fetched since it was last asked; None if no shard is remote."""
        return None if self.cache is None else self.cache.take_counts()

    def ahead_bytes(self) -> int:
        """Return how many bytes of remote shards training may hold at a time."""
        return 0 if self.cache is None else int(_AHEAD_PART * self.cache.limit())

    def spare_bytes(self) -> int:
        """Return how many bytes of remote shards evaluation may hold beside them: readers need the rest."""
        return 0 if self.cache is None else int((1 - _AHEAD_PART) / 2 * self.cache.limit())

    def copy_bytes(self, shard: int) -> int:
        """Return what the copy of a remote shard and its index take, about."""
        return self._bytes[shard] + 128 * int(self.shard_sizes[shard]) + 4096

    def check_cache(self, window: int) -> None:
        """Raise ShardError unless the cache holds the remote shards of two windows of `window`, or all of them."""
        sizes = [self.copy_bytes(shard) for shard, remote in enumerate(self.remote) if remote is not None]
        sizes.sort(reverse=True)
        if self.cache is None or not sizes:
            return
        # Where one window ends and the next begins, samples of both are on their way.
        least, limit = sum(sizes[: 2 * window]) / _AHEAD_PART, self.cache.limit()
        if limit < min(least, sum(sizes) / _AHEAD_PART):
            said = f"data.cache_gib = {self.cache.limit_gib}"
            if self.cache.limit_gib is None:
                said = f"data.cache_dir {self.cache.folder} has {limit / GIB:.3g} GiB to spare"
            raise ShardError(
                f"{said}: training mixes data.shuffle_window = {window} shards and holds two such windows, which takes "
                f"{least / GIB:.3g} GiB (of {sum(sizes) / GIB:.3g}); give it that, lower data.shuffle_window, or pack "
                "smaller shards."
            )

    def close(self) -> None:
        """Close the open shard files; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def open_shards(
    spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    cache_dir: Path | None = None,
    cache_gib: float | None = None,
    required: Sequence[Sequence[str]] = REQUIRED_FOR_CLASSIFICATION,
) -> ShardSet:
    """Open shards for reading: scan (or find) their indexes and check that all is there.

    `spec` is a packed folder, a folder of tars, a tar, a brace or glob pattern, the same as a URL, "pipe:COMMAND", or a
    list of these. Remote shards are fetched when they are read, into `cache_dir`, of at most `cache_gib`. `required`:
    every sample must have one member of each group. Raises ShardError naming shard, offset or sample, and the way out.
    """
    specs = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    paths: list[str] = []
    remote: list[Remote | None] = []
    manifests: list[dict[str, Any]] = []
    expected: dict[str, dict[str, Any]] = {}
    cache = None if cache_dir is None else ShardCache(cache_dir, cache_gib)
    for one in [os.fspath(one) for one in specs]:
        if is_remote(one):
            if cache is None:
                raise ShardError(
                    f"Shard {one} is remote and needs a copy here: set data.cache_dir to a folder on a local disk."
                )
            shards, manifest = remote_shards(one, expand_braces(one))
            found = [str(cache.path(shard)) for shard in shards]
            remote += shards
        else:
            found, manifest = local_shards(one)
            remote += [None] * len(found)
        paths += found
        if manifest is not None:
            manifests.append(manifest)
            expected |= {path: entry for path, entry in zip(found, manifest["shards"], strict=True)}
    if not paths:
        raise ShardError("The list of shards is empty; name a packed folder, a pattern or URLs.")
    repeated = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if repeated:
        raise ShardError(f"Shard {repeated[0]} is listed more than once; its samples would count twice an epoch.")
    indexes, heads = _indexes_and_heads(paths, remote, cache)
    for path, head, far in zip(paths, heads, remote, strict=True):
        if far is None or head.num_members:  # else it is known from its manifest alone, and looked at when it is here
            check_members(path, head, required)
        if path in expected:
            _check_manifest_entry(path, head, expected[path])
    all_packed = manifests if len(manifests) == len(specs) else []
    return ShardSet(paths, indexes, heads, all_packed, remote, cache if any(remote) else None, required)


def _indexes_and_heads(
    paths: list[str], remote: list[Remote | None], cache: ShardCache | None
) -> tuple[list[str], list[IndexHead]]:
    local = [place for place, shard in enumerate(remote) if shard is None]
    found = dict(zip(local, _find_indexes([paths[place] for place in local], cache and cache.folder), strict=True))
    far = [(place, shard) for place, shard in enumerate(remote) if shard is not None]
    if far:
        assert cache is not None
        heads = remote_heads([shard for _, shard in far], cache, logger.warning)
        found |= {place: (f"{paths[place]}.idx", head) for (place, _), head in zip(far, heads, strict=True)}
    return [found[place][0] for place in range(len(paths))], [found[place][1] for place in range(len(paths))]


def _find_indexes(paths: list[str], cache_dir: Path | None) -> list[tuple[str, IndexHead]]:
    """Find or build all indexes; starts at a place of its own, so that ranks opening at once share the scanning."""
    if not paths:
        return []
    first = os.getpid() * 7919 % len(paths)
    turned = [*paths[first:], *paths[:first]]

    def find(part: Sequence[str]) -> list[tuple[str, IndexHead]]:
        return [find_index(path, cache_dir) for path in part]

    # Threads, since on a network file system every index costs a round trip; slices, since a task costs as much as one.
    with ThreadPoolExecutor(_OPENERS) as pool:
        parts = pool.map(find, [turned[at : at + 32] for at in range(0, len(turned), 32)])
        found = [index for part in parts for index in part]
    return [*found[len(paths) - first :], *found[: len(paths) - first]]


def check_members(path: str, head: IndexHead, required: Sequence[Sequence[str]]) -> None:
    if head.num_samples == 0:
        raise ShardError(f"Shard {path} holds no sample; leave it out of the list.")
    for extensions, number, key in head.member_sets:
        for group in required:
            if not set(group) & set(extensions):
                wanted = " or ".join(f".{name}" for name in group)
                raise ShardError(
                    f"Shard {path}: {number} sample(s) lack {wanted}, the first is {key} with {', '.join(extensions)}. "
                    "The shard was cut, or packed without it (members of a sample must be neighbours): pack it again."
                )
    if head.bad_label and any(LABEL_EXTENSION in group for group in required):
        key, text = head.bad_label
        raise ShardError(
            f"Shard {path}: the label of sample {key} is {text!r}, no integer. Pack it with class numbers."
        )


def _check_manifest_entry(path: str, head: IndexHead, entry: dict[str, Any]) -> None:
    if (head.num_samples, head.tar_bytes) != (entry["samples"], entry["bytes"]):
        raise ShardError(
            f"Shard {path} has {head.num_samples} samples in {head.tar_bytes} bytes, the manifest says "
            f"{entry['samples']} in {entry['bytes']}: it was replaced or copied incompletely. "
            "Copy it again; `mvit data check` compares all."
        )


def _same_classes(manifests: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    lists = {tuple(manifest["class_names"]) for manifest in manifests}
    if len(lists) > 1:
        raise ShardError("The packed folders have different class lists; their labels mean different things.")
    return next(iter(lists), None)


def _read_fully(file: int, offset: int, size: int, path: str) -> bytes:
    data = os.pread(file, size, offset)
    while len(data) < size:  # one pread returns at most 2 GiB
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            raise ShardError(f"Shard {path}: it was cut before byte {offset + size} after this run opened it.")
        data += more
    return data
