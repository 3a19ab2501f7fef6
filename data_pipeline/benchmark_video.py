"""Measure how many clips a CPU core gives, beside PyAV, torchcodec and decord on the same shards, and bare decoding.

The peers are used as their documentation shows: open the bytes, seek, decode, pick frames, torchvision's transforms.
All take clips of the same length from the same distribution and augment alike; RandAugment is a row of its own.
"""

import io
import random
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
import torch
from torchvision.transforms import v2

from data_pipeline.benchmark import Contender, through_loader
from data_pipeline.benchmark_peers import check_peers
from data_pipeline.decode import class_label
from data_pipeline.reads import Item
from data_pipeline.seeding import seeded
from data_pipeline.video import VideoConfig, VideoTransform, collate_videos
from data_pipeline.video_decode import video_member

_PLAIN = "no RandAugment"
VIDEO_PEERS = ("pyav", "torchcodec", "decord")


def clip_contenders(config: VideoConfig, against: Sequence[str] | None = None) -> list[Contender]:
    """Return ours, the peers (None: all that are installed) and bare decoding; RandAugment is a row of its own.

    Raises ValueError for a peer that is none or is not installed.
    """
    check_peers(against or (), VIDEO_PEERS)
    missing = [name for name in against or () if not _is_usable(name)]
    if missing:
        raise ValueError(f"--against {', '.join(missing)}: not installed, or without the libraries it needs")
    plain = config.model_copy(update={"rand_augment": None, "crop": "area"})
    found = []
    for name, read in zip(VIDEO_PEERS, (_by_pyav, _by_torchcodec, _by_decord), strict=True):
        if name in against if against is not None else _is_usable(name):
            found.append(Contender(name, through_loader(_Peer(plain, read), _stack), "peer", _PLAIN))
    ours = f"mvit ({config.decoder})"
    found.append(Contender(ours, through_loader(VideoTransform(plain, train=True), collate_videos), "ours", _PLAIN))
    if config.rand_augment is not None:
        augmented = through_loader(VideoTransform(config, train=True), collate_videos)
        found.append(Contender(ours, augmented, "ours", "RandAugment"))
    bare = through_loader(_BareDecoding(plain), _stack)
    return [*found, Contender("decoding to the clip's end alone", bare, "reference")]


def _is_usable(name: str) -> bool:
    try:
        __import__({"torchcodec": "torchcodec.decoders", "pyav": "av"}.get(name, name))
    except (ImportError, RuntimeError, OSError):
        return False
    return True


class _Peer:
    """Frames by a peer's reader, then torchvision's random crop, flip and normalising on tensors."""

    def __init__(self, config: VideoConfig, read: Any) -> None:
        self._config, self._read = config, read
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(config.image_size, config.crop_scale, config.crop_ratio, antialias=False),
                v2.RandomHorizontalFlip(config.hflip_prob),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config.mean, config.std),
            ]
        )

    def __call__(self, members: dict[str, bytes], seed: int) -> tuple[torch.Tensor, int]:
        frames = self._read(video_member(members), self._config, seed)  # (T, H, W, 3) uint8
        with seeded(seed, torch.device("cpu")):
            return self._transform(torch.as_tensor(frames).permute(0, 3, 1, 2)), class_label(members)

    def padding(self) -> tuple[torch.Tensor, int]:
        """Return the example that fills up an evaluation batch."""
        return torch.zeros(self._config.num_frames, 3, *self._config.image_size), 0


class _BareDecoding:
    """What a reader that decodes in order cannot undercut: from the key frame before the clip to the clip's last frame.

    No frame is converted to RGB.
    """

    def __init__(self, config: VideoConfig) -> None:
        self._config = config

    def __call__(self, members: dict[str, bytes], seed: int) -> tuple[torch.Tensor, int]:
        for _ in _decoded(video_member(members), self._config, seed):
            pass
        return torch.zeros(1), class_label(members)

    def padding(self) -> tuple[torch.Tensor, int]:
        """Return the example that fills up an evaluation batch."""
        return torch.zeros(1), 0


def _clip_times(duration_s: float, config: VideoConfig, seed: int) -> np.ndarray:
    """Return the seconds (T,) at which frames are wanted: a clip from anywhere in the video, as in our training."""
    span = config.num_frames * config.frame_stride / config.target_fps
    start = random.Random(seed).uniform(0, max(0.0, duration_s - span))
    return np.minimum(start + np.arange(config.num_frames) * config.frame_stride / config.target_fps, duration_s)


def _decoded(data: bytes, config: VideoConfig, seed: int) -> Iterator[av.VideoFrame]:
    """Yield the frame shown at each wanted time; those between are decoded on the way."""
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        stream.thread_type = "NONE"
        times = _clip_times((container.duration or 0) / av.time_base, config, seed).tolist()
        container.seek(int(times[0] / stream.time_base), stream=stream)
        shown: av.VideoFrame | None = None
        number = 0
        for frame in container.decode(stream):
            assert frame.time is not None
            while number < len(times) and times[number] < frame.time:
                yield shown or frame
                number += 1
            if number == len(times):
                return
            shown = frame
        assert shown is not None
        for _ in times[number:]:
            yield shown


def _by_pyav(data: bytes, config: VideoConfig, seed: int) -> np.ndarray:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in _decoded(data, config, seed)])


def _by_torchcodec(data: bytes, config: VideoConfig, seed: int) -> Any:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    duration = decoder.metadata.duration_seconds - 0.05  # a time at the very end is refused
    return decoder.get_frames_played_at(_clip_times(duration, config, seed).tolist()).data


def _by_decord(data: bytes, config: VideoConfig, seed: int) -> np.ndarray:
    from decord import VideoReader, cpu  # pyright: ignore[reportMissingImports]

    reader = VideoReader(io.BytesIO(data), ctx=cpu(0), num_threads=1)
    rate = reader.get_avg_fps()
    times = _clip_times((len(reader) - 1) / rate, config, seed)
    return reader.get_batch((times * rate).astype(int).tolist()).asnumpy()


def _stack(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([item.example[0] for item in items]), torch.tensor([item.example[1] for item in items])
