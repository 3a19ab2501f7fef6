"""Which shards a URL stands for, and what can be known of them before they are here."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_pipeline.cache import ShardCache
from data_pipeline.download import Remote, read_whole
from data_pipeline.manifest import MANIFEST, parse_manifest
from data_pipeline.shard_index import IndexHead
from data_pipeline.tar_scan import ShardError
from data_pipeline.transfer import RefusedError, has_folders, without_password

logger = logging.getLogger(__name__)

STREAMS = 4
"""Shards of a node that are on their way at a time."""


def remote_shards(spec: str, urls: Sequence[str]) -> tuple[list[Remote], dict[str, Any] | None]:
    """Return the shards that `urls` (`spec` without its braces) name, and the manifest if they name a packed folder.

    Shards named one by one get length and hash from the manifest beside them, if there is one. Raises ShardError.
    """
    if len(urls) == 1 and has_folders(spec) and not _tar_name(spec):
        folder = spec.rstrip("/")
        manifest = _manifest(folder)
        if manifest is None:
            raise ShardError(
                f"{without_password(folder)} holds no {MANIFEST}: name a packed folder, or the shards themselves: "
                f"{without_password(folder)}/name-{{000000..000146}}.tar"
            )
        return [_entry(f"{folder}/{entry['name']}", entry) for entry in manifest["shards"]], manifest
    listed: dict[str, dict[str, dict[str, Any]]] = {}
    shards = []
    for url in urls:
        name = _tar_name(url) or "shard.tar"
        folder = url.rpartition("/")[0]
        entry = None
        if has_folders(url) and "?" not in url:
            if folder not in listed:
                manifest = _manifest(folder)
                listed[folder] = {entry["name"]: entry for entry in manifest["shards"]} if manifest else {}
            entry = listed[folder].get(name)
        shards.append(_entry(url, entry) if entry else Remote(url, name))
    return shards, None


def remote_heads(shards: Sequence[Remote], cache: ShardCache, tell: Callable[[str], None]) -> list[IndexHead]:
    """Return what is known of each shard; those that neither a manifest nor an earlier copy describes are fetched.

    Raises ShardError.
    """
    heads = [cache.head(shard) for shard in shards]
    for place, shard in enumerate(shards):
        if heads[place] is None and shard.num_samples is not None and shard.num_bytes is not None:
            heads[place] = IndexHead(shard.num_bytes, 0, shard.num_samples, 0, 0, [], [], None, None, None)
    unknown = [place for place, head in enumerate(heads) if head is None]
    if unknown:
        tell(
            f"{len(unknown)} remote shards have no {MANIFEST} beside them: all are fetched once now to count their "
            "samples. `mvit data pack` writes one."
        )
        told = time.monotonic()
        with ThreadPoolExecutor(STREAMS) as pool:
            try:
                for done, (place, head) in enumerate(
                    zip(unknown, pool.map(lambda at: cache.fetch(shards[at]), unknown), strict=True), 1
                ):
                    heads[place] = head
                    if time.monotonic() - told > 10:
                        told = time.monotonic()
                        tell(f"{done} of {len(unknown)} shards fetched")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [head for head in heads if head is not None]


def _manifest(folder: str) -> dict[str, Any] | None:
    """Return the manifest of a remote folder, None if it has none or does not show it."""
    url = f"{folder}/{MANIFEST}"
    try:
        return parse_manifest(read_whole(url), without_password(url))
    except RefusedError as error:
        logger.info("%s: %s", without_password(url), error)
        return None


def _entry(url: str, entry: dict[str, Any]) -> Remote:
    return Remote(url, entry["name"], entry["bytes"], entry["sha256"], entry["samples"])


def _tar_name(url: str) -> str | None:
    """Return the shard's name in a URL or command: fingerprints contain it."""
    found = re.findall(r"[\w.-]+\.tar\b", url)
    return found[-1] if found else None
