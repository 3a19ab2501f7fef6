"""How samples of a kind are read and checked before they are packed; pictures, bare or with objects, in threads."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_pipeline.annotations import describe_objects, object_measures, picture_problems, read_annotations
from data_pipeline.decode import DecodeError, decode_rgb
from data_pipeline.sources import SourceSample


@dataclass(frozen=True)
class Checked:
    """What is to be stored of a sample, or why it is left out."""

    members: dict[str, bytes]
    """Extension → bytes, without the label."""
    problem: str | None = None
    measured: dict[str, float] = field(default_factory=dict)
    """Figures that are summed over a split."""
    labels: Sequence[int] = ()
    """Of a sample without a label of its own: the classes of its objects, one by one."""
    listed: Mapping[str, int] = field(default_factory=dict)
    """Facts that the manifest keeps of each sample: one list of each name, in the order of the samples."""


@dataclass(frozen=True)
class SampleKind:
    """One kind of sample: what it is called, how it is checked, and what is told of a split."""

    noun: str
    check: Callable[[Iterator[SourceSample], int, Path], Iterator[tuple[SourceSample, Checked]]]
    """(samples, number of workers, a folder for temporary files) → each sample in order, with what came of it."""
    tell: Callable[[Mapping[str, float], Mapping[str, int]], list[str]]
    """(sums of what was measured, class → how many) → lines for people."""
    keeps_size: bool = True
    """Whether what is stored is about as large as the source; what is encoded anew is told when it is written."""
    remedy: str = ""
    """What to do about a sample that `strict` refuses."""


def _in_threads(
    check: Callable[[SourceSample], Checked], samples: Iterator[SourceSample], workers: int, scratch: Path
) -> Iterator[tuple[SourceSample, Checked]]:
    """Yield each sample in order with what came of it; threads read and decode ahead."""
    del scratch
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[SourceSample, Future[Checked]]] = deque()
        for sample in samples:
            ahead.append((sample, pool.submit(check, sample)))
            if len(ahead) > 4 * workers:
                first, result = ahead.popleft()
                yield first, result.result()
        while ahead:
            first, result = ahead.popleft()
            yield first, result.result()


def _check_picture(sample: SourceSample) -> Checked:
    content = sample.read()
    try:
        decode_rgb(content)
    except DecodeError as error:
        return Checked({}, str(error))
    return Checked({sample.extension: content})


def _check_annotated(sample: SourceSample) -> Checked:
    try:
        content = sample.read()
        annotated = read_annotations(sample.members)
        height, width = decode_rgb(content).shape[:2]
    except (DecodeError, OSError) as error:
        return Checked({}, str(error))
    if (height, width) != (annotated.height, annotated.width):
        problem = f"the picture is {width}x{height}, the annotations say {annotated.width}x{annotated.height}"
        return Checked({}, f"{problem} (width x height); its {len(annotated.annotations)} objects go with it")
    problems = picture_problems(annotated, None)
    if problems:
        return Checked({}, "; ".join(problems))
    num_objects = sum(not a.is_crowd for a in annotated.annotations)
    return Checked(
        {sample.extension: content, **sample.members},
        None,
        object_measures(annotated),
        [a.label for a in annotated.annotations],
        {"image_ids": annotated.image_id, "num_objects": num_objects},
    )


PICTURES = SampleKind("picture", partial(_in_threads, _check_picture), lambda measured, counts: [])
ANNOTATED_PICTURES = SampleKind(
    "picture",
    partial(_in_threads, _check_annotated),
    describe_objects,
    remedy=". Mend it, or leave such pictures out, counted and listed, with --drop-bad (drop_bad=True)",
)
