"""The manifest of a packed folder: its shards with size, samples and hash, its classes, its sources."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.tar_scan import ShardError

MANIFEST = "manifest.json"
SOURCES = "sources.jsonl"
"""Beside the shards of a packed folder: [shard, key, source] of each sample, one a line."""


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Return the manifest of a packed folder, None if it has none. Raises ShardError if it cannot be read."""
    path = Path(folder) / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(str(path), error) from error


def parse_manifest(content: bytes, path: str) -> dict[str, Any]:
    """Return the manifest that `path` holds. Raises ShardError if it is damaged or of another version."""
    try:
        manifest = json.loads(content)
        entries = [(e["name"] + e["sha256"], e["samples"] + e["bytes"]) for e in manifest["shards"]]
        names = [str(name) for name in manifest["class_names"]]
        _ = manifest["counts"].items(), manifest["sources"]["name"] + manifest["sources"]["sha256"]
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    if version != 1 or not entries or not names:
        raise ShardError(f"{path}: format_version {version}, {len(entries)} shards; this version reads 1 with some.")
    return manifest


def _damaged(path: str, error: Exception) -> ShardError:
    return ShardError(f"{path} is damaged ({error!r}); pack the data again, or delete it to read the bare tars.")
