"""Look a video over before it is packed or when it is checked: decode it whole, measure it, encode it anew if asked to.

`inspect` runs in a process of its own (data_pipeline.video_processes), since a decoder may crash or never end.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from data_pipeline.decode import DecodeError
from data_pipeline.video_decode import Video, VideoFacts

CLOCK = 90_000
"""Ticks a second of the times in a video that was encoded here: exact for all usual rates, finer than any frame."""

FACTS_EXTENSION = "json"
"""The member of a packed sample that holds its VideoFacts."""

DEFAULT_SPAN_S = 16 * 4 / 30
"""A clip of 16 frames, every 4th at 30 a second; of a shorter video the last frame is held."""

MOST_BYTES = 2_000_000_000
"""A larger file is refused: training reads a sample whole."""


@dataclass(frozen=True)
class Encoding:
    """How to encode videos anew, as H.264 in mp4 without sound, upright."""

    short_side: int | None = None
    """Pixels of the shorter side; smaller videos keep their size."""
    gop: int = 24
    """Frames from key frame to key frame at most: what has to be decoded before a wanted frame."""
    crf: int = 20
    """x264's constant rate factor; lower is better and larger."""

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 16:
            raise ValueError(
                f"short_side is {self.short_side}; videos of less than 16 pixels hold nothing: 256 or 320."
            )
        if self.gop < 1:
            raise ValueError(f"gop is {self.gop}; it counts frames from key frame to key frame, 1 or more: 24.")


@dataclass(frozen=True)
class Inspection:
    """A video to look over: a file, or `size` bytes of one from `offset` on."""

    path: str
    offset: int = 0
    size: int | None = None
    encoding: Encoding | None = None
    out: str | None = None
    """File to write the encoded video to."""


@dataclass(frozen=True)
class Finding:
    """What was found: facts of the video as it will be stored, or a problem."""

    problem: str | None = None
    facts: VideoFacts | None = None
    original: VideoFacts | None = None
    """Facts of the source; the same unless it was encoded anew."""
    digest: str = ""
    """Of the source's bytes."""


def inspect(task: Inspection) -> Finding:
    """Decode a video whole and return what was found; whatever is wrong with it is in the finding."""
    try:
        size = os.path.getsize(task.path) if task.size is None else task.size
        if size > MOST_BYTES:
            return Finding(f"it has {size:,} bytes, more than the {MOST_BYTES:,} that a sample may have: cut it")
        with open(task.path, "rb") as file:
            if task.offset:
                file.seek(task.offset)
            data = file.read(size)
        digest = digest_of(data)
        with Video(data) as video:
            original = video.facts
            if task.encoding is None or task.out is None:
                video.check()
                return Finding(None, original, original, digest)
            encode(video, task.encoding, task.out)
            times = video.times
        with open(task.out, "rb") as file, Video(file.read()) as video:
            video.check()
            if len(video.times) != len(times) or abs(video.times - times).max() > 2 / CLOCK:
                return Finding(f"encoding it gave {len(video.times)} frames of {len(times)}, or other times")
            return Finding(None, video.facts, original, digest)
    except DecodeError as error:
        return Finding(str(error))
    except OSError as error:
        return Finding(f"it cannot be read: {error}")
    except MemoryError:
        return Finding("decoding it takes more memory than there is")


def measures(facts: VideoFacts, original: VideoFacts, span_s: float) -> dict[str, float]:
    """Return what is summed over many videos: seconds, and whether one is short, of variable rate, rotated."""
    return {
        "seconds": facts.duration_s,
        "short": float(facts.duration_s < span_s),
        "variable_rate": float(original.is_variable),
        "rotated": float(original.rotation != 0),
    }


def describe(measured: Mapping[str, float], span_s: float) -> str:
    """Tell the sums of `measures` in words."""
    short, variable, rotated = (round(measured[name]) for name in ("short", "variable_rate", "rotated"))
    hours = measured["seconds"] / 3600
    return f"{hours:.2f} hours; {short} shorter than {span_s:.2f} s, {variable} of variable rate, {rotated} rotated"


def digest_of(data: bytes) -> str:
    """Return a short hash of a video's bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def encode(video: Video, encoding: Encoding, out: str) -> None:
    """Encode a video anew into the file `out`, frame for frame at the same times. Raises DecodeError."""
    height, width = encoded_size(video.facts, encoding.short_side)
    rate = Fraction(video.facts.fps).limit_denominator(1001)
    options = {"crf": str(encoding.crf), "preset": "fast", "g": str(encoding.gop), "x264-params": "threads=1"}
    with av.open(out, "w", format="mp4", options={"video_track_timescale": str(CLOCK)}) as container:
        stream = container.add_stream("libx264", rate=max(rate, Fraction(1)), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, CLOCK)
        stream.codec_context.thread_count = 1
        ticks = np.rint(video.times * CLOCK).astype(np.int64).tolist()
        for tick, pixels in zip(ticks, video.every_frame((height, width)), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, CLOCK)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def encoded_size(facts: VideoFacts, short_side: int | None) -> tuple[int, int]:
    """Return (H, W) with the given shorter side, never enlarged, both even as the pixel format wants them."""
    scale = min(1.0, (short_side or 1 << 30) / min(facts.height, facts.width))
    return max(2, round(facts.height * scale / 2) * 2), max(2, round(facts.width * scale / 2) * 2)
