"""A video's bytes → the times of its frames, without decoding, and any of its frames as upright RGB pixels.

All packets are read once into memory, where they are small, and decoding begins at the key frame before a wanted one:
no container's own seeking is relied upon. Frames are told apart by their presentation time, so B-frames, edit lists
and variable rates come right. What is damaged on the way to a wanted frame is an error, never a grey or missing frame.
"""

import io
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, Self

import av
import av.error
import av.stream
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from data_pipeline.decode import DecodeError
from data_pipeline.video_container import VIDEO_EXTENSIONS, what_is_missing

_DEMUXERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"  # not playlists, which name other files, nor still pictures
_SKIPS_UNREFERENCED = ("h264",)  # of others, HEVC's unreferenced frames may yet be used by a higher temporal layer
_UPRIGHT = (1, 0, 0, 1)
_MOST_PIXELS = 2 * 7680 * 4320  # of a frame; a few bytes can ask for gigabytes


class DecoderMissingError(ValueError):
    """A decoder that was asked for by name is not installed."""


@dataclass(frozen=True)
class VideoFacts:
    """What a video is, once its container is read."""

    num_frames: int
    duration_s: float
    """From the first frame to the end of the last one."""
    fps: float
    """Average."""
    width: int
    """Upright, as `height`; pixels are taken for square."""
    height: int
    rotation: int
    """Degrees clockwise by which stored frames were turned to stand upright: 0, 90, 180 or 270."""
    is_variable: bool
    """Whether an interval between frames differs from the usual one by more than a tenth (and the clock's tick)."""
    codec: str


def video_member(members: Mapping[str, bytes]) -> bytes:
    """Return the bytes of a sample's video. Raises DecodeError if it has none."""
    for extension in VIDEO_EXTENSIONS:
        if extension in members:
            return members[extension]
    raise DecodeError(f"no video among the members {sorted(members)}; known: {', '.join(VIDEO_EXTENSIONS)}")


class Video:
    """One video, opened for decoding by one thread; close it, or use it in a `with` statement.

    `times`: (N,) float64, the presentation time of each frame in seconds, rising from 0. Raises DecodeError for bytes
    that are no video, for audio alone, no frame, or a truncated file; DecoderMissingError without the decoder.
    """

    def __init__(self, data: bytes, decoder: Literal["pyav", "torchcodec"] = "pyav") -> None:
        self._container: Any = None
        self._other = _torchcodec(decoder)
        self._data = data
        if (missing := what_is_missing(data)) is not None:
            raise DecodeError(f"cannot decode {len(data)} bytes as a video: {missing}")
        try:
            with _errors_named(f"cannot decode {len(data)} bytes as a video"):
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Read all packets and find out which of them are shown when."""
        self._container = av.open(io.BytesIO(self._data), mode="r", options={"format_whitelist": _DEMUXERS})
        self._stream = _video_stream(self._container)
        self._context = self._stream.codec_context
        if self._context is None:
            raise DecodeError("its video stream is of a codec that FFmpeg does not know")
        self._context.thread_count = 1
        # A damaged slice is an error: FFmpeg would paint over it with its neighbourhood, and say so in a log.
        self._context.options = {"err_detect": "explode", "max_pixels": str(_MOST_PIXELS)}
        self._reformatter = VideoReformatter()
        packets = list(self._container.demux(self._stream))
        self._packets = [packet for packet in packets if packet.size]
        if not self._packets:
            raise DecodeError("its video stream holds no frame")
        if any(packet.is_corrupt for packet in self._packets):
            raise DecodeError("it is truncated: a packet is shorter than the index says")
        if self._container.format.name == "avi" and len(packets) - 1 < self._stream.frames:  # the last one says "end"
            raise DecodeError(f"it is damaged: it lists {self._stream.frames} frames, {len(packets) - 1} are there")
        self._keys = [i for i, packet in enumerate(self._packets) if packet.is_keyframe] or [0]
        stamps = self._stamps()
        self._in_order = stamps is None
        if stamps is None:  # AVI and the like know no presentation times: count what the decoder gives
            self.times = self._decoded_times()
        else:
            if not stamps:
                raise DecodeError("its video stream holds no frame that is shown")
            ticks = np.sort(np.fromiter(stamps, np.int64, len(stamps)))
            self._index = {int(tick): index for index, tick in enumerate(ticks)}
            self._position = [stamps[int(tick)] for tick in ticks]
            self.times: np.ndarray = (ticks - ticks[0]) * float(self._stream.time_base or 1)
        if not len(self.times):
            raise DecodeError("its video stream holds no frame that can be decoded")

    def _stamps(self) -> dict[int, int] | None:
        """Return presentation time → place in decoding order of the frames shown; None if they are not told apart.

        Not shown: what an edit list cuts off, what comes before the first key frame, and VP8's hidden frames. AVI
        stores decoding times only, which are wrong for B-frames.
        """
        if self._container.format.name == "avi":
            return None
        stamps: dict[int, int] = {}
        is_vp8 = self._context.name.startswith(("vp8", "libvpx-vp8")) or self._context.name == "libvpx"
        begin = self._packets[self._keys[0]].pts
        for position, packet in enumerate(self._packets):
            if packet.pts is None or begin is None:
                return None
            hidden = is_vp8 and not memoryview(packet)[0] & 0x10
            if packet.is_discard or hidden or position < self._keys[0] or packet.pts < begin:
                continue
            if packet.pts in stamps:
                return None
            stamps[packet.pts] = position
        return stamps

    def _decoded_times(self) -> np.ndarray:
        """Decode everything and return the frames' times, as far as they have any."""
        pts = [frame.pts for frame in self._run(0, len(self._packets) - 1)]
        known = np.array([math.nan if tick is None else tick for tick in pts], dtype=np.float64)
        if len(known) and not np.isnan(known).any() and (np.diff(known) > 0).all():
            return (known - known[0]) * float(self._stream.time_base or 1)
        rate = self._stream.average_rate
        if not rate:
            raise DecodeError("its frames have no times, and it states no frame rate")
        return np.arange(len(known)) / float(rate)

    @cached_property
    def facts(self) -> VideoFacts:
        """What the video is; decodes the first frame. Raises DecodeError if that cannot be done."""
        [(_, frame)] = self._pictures({0})
        turn = _orientation(frame)
        height, width = (frame.width, frame.height) if turn[0] == 0 else (frame.height, frame.width)
        gaps = np.diff(self.times)
        usual = float(np.median(gaps)) if len(gaps) else 1 / float(self._stream.average_rate or 1)
        tick = float(self._stream.time_base or 0)
        last = self._packets[self._position[-1]].duration if not self._in_order else None
        duration = float(self.times[-1]) + (last * tick if last and len(gaps) < 2 else usual)
        return VideoFacts(
            num_frames=len(self.times),
            duration_s=duration,
            fps=len(gaps) / float(self.times[-1]) if len(gaps) else 1 / duration,
            width=width,
            height=height,
            rotation=round(math.degrees(math.atan2(turn[1], turn[0]))) % 360,
            is_variable=bool(len(gaps) and (np.abs(gaps - usual) > 0.1 * usual + 1.01 * tick).any()),
            codec=str(self._stream.codec.canonical_name),
        )

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decode the frames at `indices`, in any order, repeats allowed: (len, H, W, 3) uint8 RGB, upright.

        Raises IndexError beyond the last frame, DecodeError if one of them cannot be decoded whole.
        """
        wanted = [int(index) for index in indices]
        if any(not 0 <= index < len(self.times) for index in wanted):
            raise IndexError(f"frames {min(wanted)} to {max(wanted)} of a video of {len(self.times)}")
        if self._other is not None and not self.facts.rotation:
            frames = _frames_by_torchcodec(self._other, self._data, wanted, len(self.times))
            if frames is not None:
                return frames
        places: dict[int, list[int]] = {}
        for place, index in enumerate(wanted):
            places.setdefault(index, []).append(place)
        result = np.empty((0, 0, 0, 3), np.uint8)
        for number, (index, frame) in enumerate(self._pictures(set(wanted))):
            with _errors_named(f"frame {index} at {self.times[index]:.3f} s"):
                pixels = self._upright(frame)
            if number == 0:
                result = np.empty((len(wanted), *pixels.shape), np.uint8)
            if pixels.shape != result.shape[1:]:
                raise DecodeError(f"frame {index}: the picture size changes from {result.shape[1:3]}")
            result[places[index]] = pixels
        return result

    def every_frame(self, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """Yield all frames in order, upright, scaled to `size` (H, W) if given; only one is in memory at a time.

        Raises DecodeError at the first frame that cannot be decoded whole, or whose size is not the first one's.
        """
        for index, frame in self._checked():
            with _errors_named(f"frame {index} at {self.times[index]:.3f} s"):
                pixels = self._upright(frame, size)
            yield pixels

    def check(self) -> None:
        """Decode every frame and keep none. Raises DecodeError as `every_frame` does."""
        for index, frame in self._checked():
            if index == 0:
                with _errors_named("frame 0"):
                    self._upright(frame)

    def _checked(self) -> Iterator[tuple[int, VideoFrame]]:
        first: tuple[int, int] | None = None
        for index, frame in self._pictures(set(range(len(self.times)))):
            size = frame.width, frame.height
            first = first or size
            if size != first:
                raise DecodeError(f"frame {index}: the picture size changes from {first} to {size}")
            yield index, frame

    def _upright(self, frame: VideoFrame, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the pixels of a frame, turned and mirrored as its display matrix says: (H, W, 3) uint8."""
        a, b, c, d = _orientation(frame)
        height, width = (None, None) if size is None else size if a else size[::-1]
        pixels = self._reformatter.reformat(frame, format="rgb24", width=width, height=height).to_ndarray()
        if a:
            return pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
        return pixels.swapaxes(0, 1)[:: 1 if b > 0 else -1, :: 1 if c > 0 else -1]

    def _pictures(self, wanted: set[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Yield each of the wanted frames once, in any order. Raises DecodeError if one does not come out whole."""
        if self._in_order:
            last = max(wanted, default=-1)
            missing = set(wanted)
            for index, frame in enumerate(self._run(0, len(self._packets) - 1)):
                if index in missing:
                    missing.remove(index)
                    yield index, self._whole(index, frame)
                if index >= last:
                    break
            self._refuse(missing)
            return
        for start, stop, group in self._spans(wanted):
            missing = {self._position[index] for index in group}
            for begin in dict.fromkeys((start, 0)):
                try:
                    for frame in self._run(begin, stop, missing):
                        index = self._index.get(-1 if frame.pts is None else frame.pts)
                        if index is not None and self._position[index] in missing:
                            whole = self._whole(index, frame)
                            missing = missing - {self._position[index]}
                            yield index, whole
                except DecodeError:
                    # Behind the key frame of an open group, or in a stream refreshed bit by bit, a frame may need more
                    # than its container says; from the very start it has all.
                    if begin == 0:
                        raise
                if not missing:
                    break
            self._refuse(index for index in group if self._position[index] in missing)

    def _spans(self, wanted: Iterable[int]) -> list[tuple[int, int, list[int]]]:
        """Divide wanted frames into runs of packets: (first: a key frame, last, the frames wanted from it)."""
        spans: list[tuple[int, int, list[int]]] = []
        for index in sorted(wanted, key=lambda index: self._position[index]):
            position = self._position[index]
            pts = self._packets[position].pts
            key = bisect_right(self._keys, position) - 1
            while key > 0 and self._packets[self._keys[key]].pts > pts:  # it leads this key frame: of the group before
                key -= 1
            if spans and self._keys[key] <= spans[-1][1]:
                start, _, group = spans[-1]
                spans[-1] = start, position, [*group, index]
            else:
                spans.append((self._keys[key], position, [index]))
        return spans

    def _run(self, start: int, stop: int, wanted: set[int] | None = None) -> Iterator[VideoFrame]:
        """Decode packets `start` to `stop` inclusive; those not `wanted` that no other needs are left out."""
        context = self._context
        skips = wanted is not None and context.name in _SKIPS_UNREFERENCED
        if context.is_open:
            context.flush_buffers()
        for position in range(start, stop + 1):
            with _errors_named(f"damaged at packet {position} of {len(self._packets)}"):
                if skips:
                    context.skip_frame = "DEFAULT" if wanted and position in wanted else "NONREF"
                frames = context.decode(self._packets[position])
            yield from frames
        with _errors_named("damaged at its end"):
            frames = context.decode(None)  # nothing behind `stop` is needed for what comes out now
        yield from frames

    def _whole(self, index: int, frame: VideoFrame) -> VideoFrame:
        if frame.is_corrupt:
            raise DecodeError(f"frame {index} at {self.times[index]:.3f} s is damaged")
        return frame

    def _refuse(self, missing: Iterable[int]) -> None:
        for index in sorted(missing):
            raise DecodeError(f"frame {index} at {self.times[index]:.3f} s cannot be decoded")

    def close(self) -> None:
        """Free the decoder and the packets."""
        self._packets = []
        if self._container is not None:
            self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _errors_named:
    """Turn FFmpeg's errors into DecodeErrors that begin with `what`."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, av.error.EOFError):
            raise DecodeError(f"{self.what}: it ends before its first frame") from error
        if isinstance(error, av.error.FFmpegError):  # its MemoryError, too: it says so of absurd sizes in damaged files
            raise DecodeError(f"{self.what}: {error.strerror or error}") from error
        if isinstance(error, DecodeError | ValueError):
            raise DecodeError(f"{self.what}: {error}") from error


def _video_stream(container: Any) -> VideoStream:
    """Return the first stream of moving pictures: the cover of an audio file is a video stream, too."""
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        raise DecodeError(f"it has no video stream{', only ' if kinds else ''}{', '.join(kinds)}")
    return streams[0]


def _orientation(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Return the display matrix's turn as (a, b, c, d) of 0 and ±1: x' = a x + c y, y' = b x + d y."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) >= abs(b):
        return (1 if a >= 0 else -1), 0, 0, (1 if d >= 0 else -1)
    return 0, (1 if b >= 0 else -1), (1 if c >= 0 else -1), 0


def check_decoder(decoder: str) -> None:
    """Raise DecoderMissingError if a decoder cannot be used here."""
    _torchcodec(decoder)


def _torchcodec(decoder: str) -> Any:
    """Return torchcodec's decoder class if it is asked for, None for PyAV."""
    if decoder == "pyav":
        return None
    if decoder != "torchcodec":
        raise DecoderMissingError(f"decoder {decoder!r} is unknown: choose pyav or torchcodec.")
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError) as error:  # it loads FFmpeg's libraries when it is imported
        raise DecoderMissingError(
            f"decoder torchcodec cannot be used ({str(error).splitlines()[0]}): install torchcodec and FFmpeg, "
            "or set decoder to pyav, which carries its own."
        ) from error
    return VideoDecoder


def _frames_by_torchcodec(decoder: Any, data: bytes, wanted: list[int], num_frames: int) -> np.ndarray | None:
    """Return the frames, or None for what torchcodec cannot give: PyAV then does, or says what is wrong.

    Torchcodec 0.17 finds no last frame in streams with open groups.
    """
    try:
        video = decoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        return video.get_frames_at(wanted).data.numpy() if len(video) == num_frames else None
    except (RuntimeError, IndexError):
        return None
