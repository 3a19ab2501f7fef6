"""Copy remote shards whole into a node-local folder: one downloader per node, nothing half-written ever visible."""

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from data_pipeline.tar_scan import ShardError, scan_tar

logger = logging.getLogger(__name__)


def is_remote(spec: str) -> bool:
    """Tell whether `spec` has a scheme ("pipe:…", "https://…") rather than being a local path."""
    return re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", spec) is not None and not spec.startswith("file:")


def fetch(url: str, cache_dir: Path | None, open_url: Callable[[str], IO[bytes]]) -> str:
    """Return the local path of `url`, copied into `cache_dir` if it is not there yet.

    `open_url` returns a readable stream whose close raises if the transfer failed. Processes of one node wait for each
    other by a file lock. Raises ShardError naming the URL when the copy fails or what came is no whole tar.
    """
    if cache_dir is None:
        raise ShardError(
            f"Shard {url} is remote and needs a node-local copy: set data.cache_dir to a folder on a local disk."
        )
    place = _place(url, cache_dir)
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        return str(place)
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel if this process dies
        if not place.exists():
            partial = Path(f"{place}.partial")
            try:
                _copy(url, partial, open_url)
                os.replace(partial, place)
            finally:
                partial.unlink(missing_ok=True)
            logger.info("Copied %s to %s", url, place)
    return str(place)


def _copy(url: str, partial: Path, open_url: Callable[[str], IO[bytes]]) -> None:
    try:
        with open_url(url) as stream, open(partial, "wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
    except (OSError, ValueError, ImportError) as error:
        raise ShardError(f"Shard {url} cannot be fetched: {error}") from error
    try:
        for _ in scan_tar(str(partial)):
            pass
    except ShardError as error:
        raise ShardError(f"What came from {url} is no whole tar: {error}") from error


def _place(url: str, cache_dir: Path) -> Path:
    """Return a folder of its own for each URL or command, and in it the shard's own name: fingerprints contain it."""
    found = re.findall(r"[\w.-]+\.tar\b", url)
    name = found[-1] if found else "shard.tar"
    return cache_dir / hashlib.blake2b(url.encode(), digest_size=8).hexdigest() / name
