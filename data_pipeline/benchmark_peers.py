"""Who takes part in the benchmark of pictures: ours, webdataset and torchvision as their users write them, bare codecs.

Peers decode with PIL, crop, flip and augment as ours do, with timm's RandAugment of the same policy, and give float32.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision import transforms

from data_pipeline.benchmark import Contender, Reading, through_loader
from data_pipeline.decode import IMAGE_EXTENSIONS, class_label, decode_rgb, jpeg_size, picture
from data_pipeline.detection import DetectionTransform, collate_detections
from data_pipeline.detection_views import DetectionAugmentConfig
from data_pipeline.image import RESAMPLING, ImageConfig, ImageTransform, collate_images
from data_pipeline.reads import Item

IMAGE_PEERS = ("webdataset", "torchvision")
DECODING = "decoding alone"
READING = "reading alone"


def image_contenders(config: ImageConfig, against: Sequence[str] = IMAGE_PEERS) -> list[Contender]:
    """Return ours and the peers, with the config's RandAugment and without, and bare reading and decoding.

    Raises ValueError for a peer that is none.
    """
    check_peers(against, IMAGE_PEERS)
    found = []
    policies = [None] if config.rand_augment is None else [None, config.rand_augment]
    for policy in policies:
        one = config.model_copy(update={"rand_augment": policy})
        augmentation = "no RandAugment" if policy is None else "RandAugment"
        if "webdataset" in against:
            found.append(Contender("webdataset", _WebDataset(one), "peer", augmentation))
        if "torchvision" in against:
            peer = through_loader(_Torchvision(one), _stack)
            found.append(Contender("torchvision", peer, "peer", augmentation))
        ours = through_loader(ImageTransform(one, train=True), collate_images)
        found.append(Contender(f"mvit ({config.decoder})", ours, "ours", augmentation))
    return [*found, *_references(labelled=True)]


def detection_contenders(config: DetectionAugmentConfig, against: Sequence[str] = ()) -> list[Contender]:
    """Return ours, and bare reading and decoding; there is no peer whose boxes and masks would be the same."""
    check_peers(against, ())
    ours = through_loader(DetectionTransform(config, train=True), partial(collate_detections, config=config))
    return [Contender("mvit", ours), *_references(labelled=False)]


def _references(labelled: bool) -> list[Contender]:
    return [
        Contender(DECODING, through_loader(_BareDecoding(labelled), _labels), "reference"),
        Contender(READING, through_loader(_Undecoded(labelled), _labels), "other"),
    ]


def check_peers(against: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError if a name is that of no peer."""
    wrong = [name for name in against if name not in known]
    if wrong:
        raise ValueError(
            f"--against {', '.join(wrong)}: recipes of this task are compared with {', '.join(known) or 'no peer'}; "
            "--against none leaves the peers out"
        )


def _usual(config: ImageConfig) -> transforms.Compose:
    """Return the transform of torchvision's and timm's training scripts: PIL picture → normalised float32 (3, H, W)."""
    mode = transforms.InterpolationMode(config.interpolation)
    augment = []
    if config.rand_augment is not None:
        from data_pipeline.augment import timm_rand_augment

        resample = RESAMPLING[config.interpolation]
        augment = [timm_rand_augment(config.rand_augment, config.image_size, config.mean, resample)]
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(config.image_size, config.crop_scale, config.crop_ratio, mode),
            transforms.RandomHorizontalFlip(config.hflip_prob),
            *augment,
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )


class _WebDataset:
    """webdataset's own pipeline and loader, as its documentation shows them."""

    def __init__(self, config: ImageConfig) -> None:
        self._transform = _usual(config)

    @contextmanager
    def __call__(self, reading: Reading) -> Iterator[Iterator[Any]]:
        from webdataset.compat import WebDataset, WebLoader

        paths = [str(path) for path in reading.shards.paths]
        if any(reading.shards.remote) or reading.workers > len(paths):
            raise ValueError(
                f"webdataset is measured on local shards, at least one a worker; here are {len(paths)} for "
                f"{reading.workers} workers. Leave it out (--against torchvision), or pack smaller shards."
            )
        source: Any = WebDataset(paths, shardshuffle=len(paths), seed=reading.seed, empty_check=False)
        samples = (
            source.repeat()
            .shuffle(1000)
            .decode("pil")
            .to_tuple(";".join(IMAGE_EXTENSIONS), "cls")
            .map_tuple(self._transform, int)
            .batched(reading.batch_size)
        )
        batches: Any = iter(WebLoader(samples, batch_size=None, num_workers=reading.workers))
        try:
            yield batches
        finally:
            batches.close()  # ends the workers


class _Torchvision:
    """torchvision's transforms behind our index, which is at least as fast as its folders of files."""

    def __init__(self, config: ImageConfig) -> None:
        self._image_size, self._transform = config.image_size, _usual(config)

    def __call__(self, members: dict[str, bytes], seed: int) -> tuple[torch.Tensor, int]:
        del seed  # its draws come from the global generators
        pixels: Any = self._transform(Image.open(io.BytesIO(picture(members))).convert("RGB"))
        return pixels, class_label(members)

    def padding(self) -> tuple[torch.Tensor, int]:
        """Return the example that fills up an evaluation batch."""
        return torch.zeros(3, *self._image_size), 0


class _BareDecoding:
    """Decode the whole picture with the codec's own settings and throw it away."""

    def __init__(self, labelled: bool) -> None:
        self._labelled = labelled

    def __call__(self, members: dict[str, bytes], seed: int) -> int:
        del seed
        data = picture(members)
        if jpeg_size(data) is None:
            decode_rgb(data)
        else:
            simplejpeg.decode_jpeg(data, colorspace="RGB")
        return class_label(members) if self._labelled else 0

    def padding(self) -> int:
        """Return a label."""
        return 0


class _Undecoded:
    """Read the members and do nothing: the speed of the shards alone."""

    def __init__(self, labelled: bool) -> None:
        self._labelled = labelled

    def __call__(self, members: dict[str, bytes], seed: int) -> int:
        del seed
        return class_label(members) if self._labelled else 0

    def padding(self) -> int:
        """Return a label."""
        return 0


def _stack(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([item.example[0] for item in items]), torch.tensor([item.example[1] for item in items])


def _labels(items: Sequence[Item]) -> np.ndarray:
    return np.array([item.example for item in items])
