"""How samples of a kind are read and checked before they are packed; pictures, in threads."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True)
class SampleKind:
    """One kind of sample: what it is called, how it is checked, and what is told of a split."""

    noun: str
    check: Callable[[Iterator[SourceSample], int, Path], Iterator[tuple[SourceSample, Checked]]]
    """(samples, number of workers, a folder for temporary files) → each sample in order, with what came of it."""
    tell: Callable[[Mapping[str, float]], list[str]]
    """Sums of what was measured → lines for people."""
    keeps_size: bool = True
    """Whether what is stored is about as large as the source; what is encoded anew is told when it is written."""


def _check_pictures(
    samples: Iterator[SourceSample], workers: int, scratch: Path
) -> Iterator[tuple[SourceSample, Checked]]:
    """Yield each sample in order with what came of it; threads read and decode ahead."""
    del scratch
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[SourceSample, Future[Checked]]] = deque()
        for sample in samples:
            ahead.append((sample, pool.submit(_check_picture, sample)))
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


PICTURES = SampleKind("picture", _check_pictures, lambda measured: [])
