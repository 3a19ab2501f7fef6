"""Which shards a local name stands for: a packed folder, a folder of tars, a tar, a brace or glob pattern."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.manifest import MANIFEST, read_manifest
from data_pipeline.tar_scan import ShardError
from data_pipeline.transfer import is_remote


def check_presence(spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
    """Raise ShardError if a local shard that `spec` names does not exist or is not as long as its manifest says.

    Opens no shard and fetches nothing.
    """
    for one in [spec] if isinstance(spec, str | os.PathLike) else list(spec):
        if is_remote(os.fspath(one)):
            continue
        paths, manifest = local_shards(os.fspath(one))
        for path, entry in zip(paths, manifest["shards"] if manifest else [], strict=manifest is not None):
            size = os.path.getsize(path)
            if size != entry["bytes"]:
                raise ShardError(f"{path} has {size} bytes, its manifest says {entry['bytes']}; copy or pack it again.")


def first_shard(spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str | None:
    """Return the path of the first shard that `spec` names, None if it is remote; raises ShardError for none."""
    first = os.fspath(spec) if isinstance(spec, str | os.PathLike) else os.fspath(spec[0])
    return None if is_remote(first) else local_shards(first)[0][0]


def local_shards(spec: str) -> tuple[list[str], dict[str, Any] | None]:
    """Return the paths that a local name stands for, and the manifest if it is a packed folder. Raises ShardError."""
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
    for pattern in [spec] if os.path.exists(spec) else expand_braces(spec):
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


def expand_braces(pattern: str) -> list[str]:
    """Return what "a-{000..146}.tar" stands for, in its order."""
    if "{" not in pattern:
        return [pattern]
    from webdataset.shardlists import expand_urls

    return list(expand_urls(pattern))
