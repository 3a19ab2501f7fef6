"""Boxes and masks drawn on pictures, for TensorBoard and `mvit predict`."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

# Twenty colours that can be told apart; a class keeps its colour
_COLOURS = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe",
    "#008080", "#e6beff", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#a9a9a9",
)  # fmt: skip
# On the CPU also where this is first imported while a model is built on another device
_RGB = torch.tensor([ImageColor.getrgb(colour)[:3] for colour in _COLOURS], device="cpu")
_Place = tuple[float, float, float, float]
_ALPHA = 0.4  # of a mask's colour
_PER_LINE = 500  # pixels of the picture's short side for each one of a line's width
_PER_LETTER = 40
_SMALLEST_LETTER = 10


def draw_objects(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor | None = None,
    scores: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the picture (3, H, W) uint8, on the CPU, with its objects drawn on it.

    boxes: (N, 4) XYXY in pixels. labels: (N,). masks: (N, h, w) bool from the upper left corner, h ≤ H, w ≤ W, or
    None. scores: (N,) or None. names: of the classes; None shows their numbers. Lines and letters grow with the
    picture.
    """
    drawn = image.cpu()
    if masks is not None:
        drawn = draw_masks(drawn, labels, masks)
    return draw_boxes(drawn, boxes, labels, scores, names)


def draw_masks(image: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
    """Return the picture (3, H, W) uint8, on the CPU, with the colours of the masks (N, h, w) over it, in turn."""
    drawn = image.cpu().clone(memory_format=torch.contiguous_format)
    height, width = masks.shape[1:]
    for mask, label in zip(masks, labels.tolist(), strict=True):
        part = drawn[:, :height, :width]
        inside = mask.cpu().bool()
        colour = _RGB[label % len(_RGB)][:, None]
        part[:, inside] = torch.lerp(part[:, inside].float(), colour.float(), _ALPHA).round().byte()
    return drawn


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the picture (3, H, W) uint8, on the CPU, with boxes (N, 4) and what they are; as in `draw_objects`.

    What would be written over an earlier object's name, or over the middle of another object, is left out: of a
    hundred small objects the picture would show the names alone.
    """
    picture = Image.fromarray(image.cpu().permute(1, 2, 0).numpy())
    side = min(picture.size)
    line, letter = max(1, round(side / _PER_LINE)), max(_SMALLEST_LETTER, round(side / _PER_LETTER))
    font = ImageFont.load_default(letter)
    pen = ImageDraw.Draw(picture)
    texts: list[str] = [str(label) if names is None else names[int(label)] for label in labels.tolist()]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist(), strict=True)]
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
        pen.rectangle(_edge_pixels(box), outline=_COLOURS[label % len(_COLOURS)], width=line)
    centres = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes.tolist()]
    taken: list[_Place] = []
    for index, (label, text) in enumerate(zip(labels.tolist(), texts, strict=True)):
        x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
        left, top = boxes[index, :2].tolist()
        # Above the box, or within where the picture ends; never beyond the right edge
        x = max(0, min(left, picture.width - x1 - 1))
        y = top - y1 - line if top >= y1 + line else top + line
        place = x + x0 - 1, y + y0 - 1, x + x1 + 1, y + y1 + 1
        others = centres[:index] + centres[index + 1 :]
        if any(_overlap(place, other) for other in taken) or any(_overlap(place, centre * 2) for centre in others):
            continue
        taken.append(place)
        pen.rectangle(place, fill=_COLOURS[label % len(_COLOURS)])
        pen.text((x, y), text, fill=_ink(label), font=font)
    return _as_tensor(picture)


def _as_tensor(picture: Image.Image) -> Tensor:
    """Return an RGB picture as (3, H, W) uint8."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def _overlap(one: _Place, other: _Place) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _edge_pixels(box: Sequence[float]) -> tuple[int, int, int, int]:
    """Return the first and last column and row of pixels that a box in continuous coordinates covers."""
    left, top, right, bottom = round(box[0]), round(box[1]), round(box[2]), round(box[3])
    return left, top, max(left, right - 1), max(top, bottom - 1)


def _ink(label: int) -> str:
    """Return black or white, whichever is read better on a class's colour."""
    red, green, blue = _RGB[label % len(_RGB)].tolist()
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
