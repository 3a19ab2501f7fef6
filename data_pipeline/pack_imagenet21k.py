"""Pack ImageNet-21K into shards, jointly with ImageNet-1K, for the published pre-training.

OUTPUT/train has both; the validation set is ImageNet-1K's own, packed with `pack_imagefolder`: its classes are numbered
as the first 1,000 here.
"""

import os
from pathlib import Path

from data_pipeline.pack import PackOptions, PackReport, Progress, check_output, pack
from data_pipeline.sources.imagenet21k import read_imagenet21k


def pack_imagenet21k(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    imagenet1k: str | os.PathLike[str] | None = None,
    classes: str | os.PathLike[str] | None = None,
    options: PackOptions | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack a folder of class tars or class folders into OUTPUT/train; the arguments are `read_imagenet21k`'s.

    `progress(done, total)` counts classes while they are listed, then samples. Takes about 600 bytes of memory a
    picture, 8 GB for the whole. Raises PackError, ValueError for a source or a class list that does not fit, ShardError
    for a tar that is not whole.
    """
    output, options = Path(output), options or PackOptions()
    check_output(output, options)
    data = read_imagenet21k(
        Path(source),
        None if imagenet1k is None else Path(imagenet1k),
        None if classes is None else Path(classes),
        workers=options.workers,
        progress=progress,
    )
    return pack(data, output, options, progress)
