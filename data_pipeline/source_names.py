"""What the samples of shards were called in their source: the file names, from the lists that packing leaves."""

import json
from pathlib import Path

import numpy as np

from data_pipeline.manifest import SOURCES
from data_pipeline.shards import ShardError, ShardSet


def source_names(shards: ShardSet) -> list[str]:
    """Return each sample's file name in its source, without folders: "ILSVRC2012_val_00000293.JPEG".

    Of shards that another tool wrote, and of remote ones, it is the sample's key. Raises ShardError if a list of
    sources is damaged or does not have a sample.
    """
    lists: dict[Path, dict[tuple[str, str], str] | None] = {}
    ends = np.cumsum(shards.shard_sizes)
    found = []
    for sample in range(len(shards)):
        folder = Path(shards.paths[int(np.searchsorted(ends, sample, side="right"))]).parent
        shard, key = shards.key(sample).split("/", 1)
        if folder not in lists:
            lists[folder] = _read(folder / SOURCES)
        sources = lists[folder]
        if sources is not None and (shard, key) not in sources:
            raise ShardError(f"{folder / SOURCES} does not list {shard}/{key}; pack the data again.")
        name = key if sources is None else sources[shard, key]
        found.append(name.rsplit("/", 1)[-1])
    return found


def _read(path: Path) -> dict[tuple[str, str], str] | None:
    if not path.is_file():
        return None
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return {(str(shard), str(key)): str(source) for shard, key, source in rows}
    except (ValueError, TypeError) as error:
        raise ShardError(f"{path} is damaged ({error}); pack the data again.") from error
