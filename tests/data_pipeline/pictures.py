"""Pictures and shards made for the tests: smooth random photographs, so that codecs behave as on real ones."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.writer import ShardWriter


def pixels(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Return a smooth random picture (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(
    seed: int, height: int = 60, width: int = 80, kind: str = "JPEG", mode: str = "RGB", **options: Any
) -> bytes:
    """Return such a picture encoded."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_shards(folder: Path, samples: list[dict[str, bytes]], per_shard: int) -> Path:
    """Write members by extension into bare tars with webdataset's own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(str(folder / "shard-%06d.tar"), maxcount=per_shard, verbose=0, encoder=False, mtime=0) as writer:
        for number, members in enumerate(samples):
            writer.write({"__key__": f"{number:06d}", **members})
    return folder


def photo_samples(number: int) -> list[dict[str, bytes]]:
    """Return `number` JPEG samples with labels 0, 1, 2, 0, …"""
    return [{"jpg": encoded(i, 48 + i % 5, 64 - i % 7), "cls": str(i % 3).encode()} for i in range(number)]
