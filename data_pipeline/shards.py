"""A set of tar shards as one indexed sequence of samples, read at random by pread.

Opening checks everything that needs no pixel: every tar is whole, every sample has its required members, the manifest
agrees. What is wrong is named before training starts.
"""

import copy
import glob
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Container, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from data_pipeline.cache import fetch, is_remote
from data_pipeline.decode import IMAGE_EXTENSIONS, LABEL_EXTENSION
from data_pipeline.shard_index import IndexHead, ShardIndex, find_index, load_index
from data_pipeline.tar_scan import ShardError

MANIFEST = "manifest.json"
REQUIRED_FOR_CLASSIFICATION: tuple[tuple[str, ...], ...] = (IMAGE_EXTENSIONS, (LABEL_EXTENSION,))
"""What an image classification sample must have: one of the picture extensions, and a label."""

_MAX_OPEN = 64


class ShardSet:
    """The samples 0 … N-1 of a list of shards; make it with `open_shards`. Cheap to pickle; not for several threads."""

    def __init__(
        self,
        paths: Sequence[str],
        indexes: Sequence[str],
        heads: Sequence[IndexHead],
        manifests: Sequence[dict[str, Any]],
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
        return f"{self.names[shard]}/{self._opened(shard)[1].key(place)}"

    def read(self, sample: int, only: Container[str] | None = None) -> dict[str, bytes]:
        """Return a sample's members by extension, or of them `only` some.

        Raises ShardError if the shard has changed since it was opened.
        """
        shard, place = self._locate(sample)
        file, index = self._opened(shard)
        members = {}
        for extension, offset, size in index.members(place):
            if only is None or extension in only:
                members[extension] = _read_fully(file, offset, size, self.paths[shard])
        return members

    def label(self, sample: int) -> int:
        """Return a sample's class label from the index, without reading the shard."""
        shard, place = self._locate(sample)
        return int(self._opened(shard)[1].labels[place])

    def check_labels(self, num_classes: int) -> None:
        """Raise ValueError naming a sample whose label is not in 0 … num_classes-1."""
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

    def _opened(self, shard: int) -> tuple[int, ShardIndex]:
        """Return (file descriptor, index) of a shard, keeping the most recently used ones open."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        file = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(file).st_size != self._bytes[shard]:
            os.close(file)
            raise ShardError(f"Shard {self.paths[shard]} has changed since this run opened it; start the run again.")
        self._open[shard] = file, load_index(self._indexes[shard])
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[shard]

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
    required: Sequence[Sequence[str]] = REQUIRED_FOR_CLASSIFICATION,
) -> ShardSet:
    """Open shards for reading: scan (or find) their indexes and check that all is there.

    `spec` is a packed folder, a folder of tars, a tar, a brace or glob pattern, a URL of a scheme webdataset
    knows ("pipe:…" included; copied whole into `cache_dir`), or a list of these. `required`: every sample must
    have one member of each group. Raises ShardError naming shard, offset or sample, and the way out.
    """
    specs = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    paths: list[str] = []
    manifests: list[dict[str, Any]] = []
    expected: dict[str, dict[str, Any]] = {}
    for one in specs:
        found, manifest = _resolve(os.fspath(one), cache_dir)
        paths += found
        if manifest is not None:
            manifests.append(manifest)
            expected |= {path: entry for path, entry in zip(found, manifest["shards"], strict=True)}
    if not paths:
        raise ShardError("The list of shards is empty; name a packed folder, a pattern or URLs.")
    repeated = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if repeated:
        raise ShardError(f"Shard {repeated[0]} is listed more than once; its samples would count twice an epoch.")
    found = _find_indexes(paths, cache_dir)
    for path, (_, head) in zip(paths, found, strict=True):
        check_members(path, head, required)
        if path in expected:
            _check_manifest_entry(path, head, expected[path])
    all_packed = len(manifests) == len(specs)
    return ShardSet(paths, [index for index, _ in found], [head for _, head in found], manifests if all_packed else [])


def check_presence(spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
    """Raise ShardError if a local shard that `spec` names does not exist or is not as long as its manifest says.

    Opens no shard and fetches nothing.
    """
    for one in [spec] if isinstance(spec, str | os.PathLike) else list(spec):
        if is_remote(os.fspath(one)):
            continue
        paths, manifest = _resolve(os.fspath(one), None)
        for path, entry in zip(paths, manifest["shards"] if manifest else [], strict=manifest is not None):
            size = os.path.getsize(path)
            if size != entry["bytes"]:
                raise ShardError(f"{path} has {size} bytes, its manifest says {entry['bytes']}; copy or pack it again.")


def first_shard(spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str | None:
    """Return the path of the first shard that `spec` names, None if it is remote; raises ShardError for none."""
    first = os.fspath(spec) if isinstance(spec, str | os.PathLike) else os.fspath(spec[0])
    return None if is_remote(first) else _resolve(first, None)[0][0]


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Return the manifest of a packed folder, None if it has none. Raises ShardError if it cannot be read."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        entries = [(e["name"] + e["sha256"], e["samples"] + e["bytes"]) for e in manifest["shards"]]
        names = [str(name) for name in manifest["class_names"]]
        _ = manifest["counts"].items(), manifest["sources"]["name"] + manifest["sources"]["sha256"]
        version = manifest["format_version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{path} is damaged ({error!r}); pack the data again, or delete it to read the bare tars."
        ) from error
    if version != 1 or not entries or not names:
        raise ShardError(f"{path}: format_version {version}, {len(entries)} shards; this version reads 1 with some.")
    return manifest


def _resolve(spec: str, cache_dir: Path | None) -> tuple[list[str], dict[str, Any] | None]:
    """Return the local paths that one entry of the spec stands for, and the manifest if it is a packed folder."""
    if is_remote(spec):
        return [fetch(url, cache_dir, _open_url) for url in _expand_braces(spec)], None
    spec = spec.removeprefix("file://").removeprefix("file:")
    if os.path.isdir(spec):
        manifest = read_manifest(spec)
        if manifest is not None:
            paths = [os.path.join(spec, entry["name"]) for entry in manifest["shards"]]
            return _existing(paths, f"listed in {os.path.join(spec, MANIFEST)}"), manifest
        paths = sorted(glob.glob(os.path.join(glob.escape(spec), "*.tar")))
        if not paths:
            packed = sorted(p.parent.name for p in Path(spec).glob(f"*/{MANIFEST}"))
            hint = f" Name one of its packed folders: {', '.join(packed)}." if packed else ""
            raise ShardError(f"Folder {spec} holds no .tar shard.{hint}")
        return paths, None
    paths = []
    for pattern in [spec] if os.path.exists(spec) else _expand_braces(spec):
        if os.path.exists(pattern) or not glob.has_magic(pattern):
            paths.append(pattern)
        else:
            paths += sorted(glob.glob(pattern))
    if not paths:
        raise ShardError(f"No shard matches {spec}.")
    return _existing(paths, f"from {spec}"), None


def _existing(paths: list[str], origin: str) -> list[str]:
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ShardError(f"{len(missing)} of {len(paths)} shards ({origin}) do not exist, the first: {missing[0]}.")
    return paths


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    from webdataset.shardlists import expand_urls

    return list(expand_urls(pattern))


def _open_url(url: str) -> IO[bytes]:
    from webdataset.gopen import gopen, gopen_schemes

    scheme = url.split(":", 1)[0]
    if scheme not in gopen_schemes:
        known = ", ".join(sorted(set(gopen_schemes) - {"__default__"}))
        raise ValueError(f"no reader for {scheme}: (known: {known}); use a command, e.g. pipe:aws s3 cp {url} -")
    return cast(IO[bytes], gopen(url, "rb"))  # a Pipe reads and closes like a file


def _find_indexes(paths: list[str], cache_dir: Path | None) -> list[tuple[str, IndexHead]]:
    """Find or build all indexes; starts at a place of its own, so that ranks opening at once share the scanning."""
    first = os.getpid() * 7919 % len(paths)
    found = {}
    for place in [*range(first, len(paths)), *range(first)]:
        found[place] = find_index(paths[place], cache_dir)
    return [found[place] for place in range(len(paths))]


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
