"""Drawn shapes with exact masks: discs, squares, triangles and rings that hide parts of one another, made on the spot.

Synthetic, and said to be so: it shows that detection and segmentation learn and are measured right, not how well they
do on photographs. Colours, sizes, angles and places say nothing of the class; only the outline does.
"""

import io
import math
import random
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image

from data_pipeline.annotations import (
    ANNOTATIONS_EXTENSION,
    AnnotatedPicture,
    Annotation,
    write_annotations,
)
from data_pipeline.masks import encode, mask_box
from data_pipeline.order import derive_seed
from data_pipeline.sources import SourceData, SourceSample

SHAPES = ("disc", "square", "triangle", "ring")
NUM_PICTURES = {"train": 400, "validation": 100}
SIDES = (96, 160)
"""Range of a picture's height and of its width."""
RULE = "train and validation are drawn from different random numbers"
_MOST_OBJECTS = 6
_RADII = (8.0, 28.0)
_LEAST_SHOWN = 0.6
"""Part of every object that must stay visible; what would hide more is not drawn."""


def read_shapes(seed: int = 0) -> SourceData:
    """Draw all pictures; a pure function of the seed."""
    splits = {split: list(_pictures(split, seed)) for split in NUM_PICTURES}
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(SHAPES)]
    return SourceData("drawn shapes", list(SHAPES), splits, RULE, facts={"categories": categories})


def _pictures(split: str, seed: int) -> Iterator[SourceSample]:
    first_id = 1 if split == "train" else 1 + NUM_PICTURES["train"]  # COCOeval takes an id of 0 for none
    for number in range(NUM_PICTURES[split]):
        image_id = first_id + number
        name = f"{split}/{number:05d}.png"
        pixels, picture = draw(name, image_id, derive_seed(seed, "shapes", split, number))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        members = {ANNOTATIONS_EXTENSION: write_annotations(picture)}
        yield SourceSample(name, None, "png", buffer.tell(), content=buffer.getvalue(), members=members)


def draw(name: str, image_id: int, seed: int) -> tuple[np.ndarray, AnnotatedPicture]:
    """Draw one picture (H, W, 3) uint8 and return it with its objects; boxes and masks are of what is visible."""
    draws, noise = random.Random(seed), np.random.default_rng(seed)
    height, width = draws.randint(*SIDES), draws.randint(*SIDES)
    pixels = _texture(height, width, draws, noise)
    shown: list[np.ndarray] = []
    whole: list[int] = []
    labels: list[int] = []
    for _ in range(draws.randint(0 if draws.random() < 0.1 else 1, _MOST_OBJECTS)):
        label = draws.randrange(len(SHAPES))
        mask = _shape(SHAPES[label], height, width, draws)
        left = [other & ~mask for other in shown]
        if any(other.sum() < _LEAST_SHOWN * area for other, area in zip(left, whole, strict=True)):
            continue
        shown = [*left, mask]
        whole.append(int(mask.sum()))
        labels.append(label)
        pixels[mask] = _texture(height, width, draws, noise)[mask]
    pixels = (pixels + noise.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)
    annotations = []
    for label, mask in zip(labels, shown, strict=True):
        box = mask_box(mask)
        assert box is not None
        bbox = box[0], box[1], box[2] - box[0], box[3] - box[1]
        identity = image_id * _MOST_OBJECTS + len(annotations)
        annotations.append(Annotation(identity, label, bbox, False, float(mask.sum()), encode(mask)))
    return pixels, AnnotatedPicture(image_id, name, height, width, tuple(annotations))


def _texture(height: int, width: int, draws: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Return a random colour with a random slope and coarse spots, (H, W, 3) float32."""
    colour = np.array([draws.uniform(30, 225) for _ in range(3)], np.float32)
    angle = draws.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    slope = (x * math.cos(angle) + y * math.sin(angle)) / max(height, width) * draws.uniform(0, 50)
    spots = cv2.resize(noise.normal(0, 10, (8, 8, 3)).astype(np.float32), (width, height))
    return colour + slope[..., None].astype(np.float32) + spots


def _shape(name: str, height: int, width: int, draws: random.Random) -> np.ndarray:
    """Return the mask (H, W) of a shape that lies wholly within the picture."""
    radius, angle = draws.uniform(*_RADII), draws.uniform(0, 2 * math.pi)
    centre = np.array([draws.uniform(radius, width - radius), draws.uniform(radius, height - radius)])
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1])
    if name == "disc":
        return distance < radius
    if name == "ring":
        return (distance < radius) & (distance > 0.5 * radius)
    corners = {"square": 4, "triangle": 3}[name]
    # A pixel is inside if it is on the inner side of every edge.
    inner = radius * math.cos(math.pi / corners)
    inside = np.ones((height, width), bool)
    for edge in range(corners):
        normal = angle + 2 * math.pi * edge / corners
        inside &= (x + 0.5 - centre[0]) * math.cos(normal) + (y + 0.5 - centre[1]) * math.sin(normal) < inner
    return inside
