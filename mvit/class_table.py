"""How a classifier does class by class: a table, and a picture of which classes it takes for which."""

import csv
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LARGEST_MAP = 1400  # pixels of the map's side, about
_NAMED = 60  # with more classes there is no room for names
_NUMBERED = 25
_LETTER = 13
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_FULL = np.array([8, 48, 107])  # the colour of a share of 1; 0 is white


def confusion_matrix(labels: Sequence[int], predicted: Sequence[int], num_classes: int) -> np.ndarray:
    """Return how often each class (row) was taken for each (column): (K, K) int64."""
    flat = np.asarray(labels, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_table(matrix: np.ndarray, within: Iterable[tuple[int, bool]], names: Sequence[str], k: int) -> str:
    """Return the table of a confusion matrix as CSV, a row for each class.

    `within`: of every sample its class, and whether that was among the `k` most probable. Columns: label, name,
    samples, top1 and topk (empty without samples), predicted (how many samples were taken for the class), precision
    (how many of these rightly), taken_for and taken_for_samples (the other class it is most often taken for).
    """
    counts, right, predicted = matrix.sum(axis=1), matrix.diagonal(), matrix.sum(axis=0)
    found = np.zeros(len(matrix), dtype=np.int64)
    for label, hit in within:
        found[label] += hit
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    columns = ("label", "name", "samples", "top1", f"top{k}", "predicted", "precision")
    out.writerow([*columns, "taken_for", "taken_for_samples"])
    for label, name in enumerate(names):
        others = matrix[label].copy()
        others[label] = 0
        worst = int(others.argmax())
        shares = (_share(right[label], counts[label]), _share(found[label], counts[label]))
        mistaken = (names[worst], int(others[worst])) if others[worst] else ("", 0)
        precision = _share(right[label], predicted[label])
        out.writerow([label, name, int(counts[label]), *shares, int(predicted[label]), precision, *mistaken])
    return text.getvalue()


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.4f}" if whole else ""


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    """Draw a confusion matrix (K, K) and return the PNG: rows are true classes, dark what they are taken for.

    Each row is divided by its sum. Up to 60 classes are named, up to 25 have the shares written in percent; of more
    than 1400 several share a pixel, which shows the darkest.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    classes = len(matrix)
    step = -(-classes // _LARGEST_MAP)
    padded = np.pad(shares, (0, -classes % step))
    binned = padded.reshape(len(padded) // step, step, -1, step).max(axis=(1, 3))
    cell = max(1, min(34, _LARGEST_MAP // len(binned)))
    colours = 255 + binned[..., None] * (_FULL - 255)
    cells = Image.fromarray(colours.round().astype(np.uint8))
    cells = cells.resize((len(binned) * cell, len(binned) * cell), Image.Resampling.NEAREST)
    font = ImageFont.load_default(_LETTER)
    shown = [name if len(name) <= 24 else f"{name[:22]}.." for name in names] if classes <= _NAMED else []
    margin = 2 * _LETTER + int(max((font.getlength(name) for name in shown), default=2 * _LETTER))
    image = Image.new("RGB", (cells.width + margin + _LETTER, cells.height + margin + _LETTER), "white")
    image.paste(cells, (margin, margin))
    pen = ImageDraw.Draw(image)
    pen.rectangle((margin - 1, margin - 1, margin + cells.width, margin + cells.height), outline="black")
    pen.text((margin, 2), f"taken for ({classes} classes)", fill="black", font=font)
    _write_upright(image, "true class", 2, margin + cells.height, font)
    for place, name in enumerate(shown):
        middle = margin + place * cell + cell // 2
        pen.text((margin - 4, middle), name, fill="black", font=font, anchor="rm")
        _write_upright(image, name, middle - _LETTER // 2, margin - 4, font)
    if classes <= _NUMBERED:
        for row, column in np.argwhere(shares >= 0.005):
            ink = "white" if shares[row, column] > 0.5 else "black"
            where = margin + column * cell + cell // 2, margin + row * cell + cell // 2
            pen.text(where, f"{100 * shares[row, column]:.0f}", fill=ink, font=font, anchor="mm")
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _write_upright(image: Image.Image, text: str, left: int, bottom: int, font: _Font) -> None:
    """Write text from `bottom` upwards."""
    size = int(font.getlength(text)) + 1, _LETTER + 4
    strip = Image.new("RGB", size, "white")
    ImageDraw.Draw(strip).text((0, 0), text, fill="black", font=font)
    turned = strip.rotate(90, expand=True)
    image.paste(turned, (left, bottom - turned.height))
