"""Pack pictures with objects into shards: COCO data sets, and the shapes of the demo.

A sample is 000123.jpg, the picture's bytes unchanged, and 000123.json, its objects (data_pipeline.annotations). The
manifest has the categories, the image ids and the number of objects of each picture.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from data_pipeline.pack import PackError, PackOptions, PackReport, Progress, check_output, check_split_names, pack
from data_pipeline.pack_kinds import ANNOTATED_PICTURES
from data_pipeline.sources import SourceData
from data_pipeline.sources.coco import read_coco
from data_pipeline.sources.shapes import read_shapes

_SHOWN = 10

CocoSet = tuple[str | os.PathLike[str], str | os.PathLike[str]]
"""A folder or a tar of pictures, and the JSON with their objects."""


def pack_coco(
    sets: Mapping[str, CocoSet],
    output: str | os.PathLike[str],
    *,
    drop_bad: bool = False,
    options: PackOptions | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack split → (pictures, JSON) into OUTPUT/<split>.

    Pictures and objects that break a rule are named and refused (PackError); with `drop_bad` they are left out, counted
    and listed. Raises PackError, CocoError for a JSON that is no COCO data set, ShardError for a tar that is not whole.
    """
    output, options = Path(output), options or PackOptions()
    check_output(output, options)
    check_split_names(sets)
    data = read_coco({name: (Path(images), Path(path)) for name, (images, path) in sets.items()})
    if not drop_bad:
        _refuse(data)
    return pack(data, output, replace(options, strict=not drop_bad), progress, ANNOTATED_PICTURES)


def pack_shapes(
    output: str | os.PathLike[str], *, options: PackOptions | None = None, progress: Progress | None = None
) -> PackReport:
    """Pack drawn shapes with exact masks into OUTPUT/train and OUTPUT/validation: data of a demo, no download.

    What is drawn follows from `options.seed`. Raises PackError.
    """
    output, options = Path(output), options or PackOptions(max_samples=256)
    check_output(output, options)
    return pack(read_shapes(options.seed), output, options, progress, ANNOTATED_PICTURES)


def _refuse(data: SourceData) -> None:
    """Raise PackError if anything breaks a rule."""
    bad = [one for found in (data.rejected, data.dropped) for ones in found.values() for one in ones]
    if not bad:
        return
    lines = [f"  {one.source}: {one.reason}" for one in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  … and {len(bad) - _SHOWN} more")
    num_files = sum(map(len, data.rejected.values()))
    raise PackError(
        f"{data.origin}: {num_files} picture(s) and {len(bad) - num_files} object(s) break a rule. Mend them, or leave "
        "them out, counted and listed, with --drop-bad (drop_bad=True):\n" + "\n".join(lines)
    )
