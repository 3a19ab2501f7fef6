"""scikit-learn's 1,797 handwritten digits (8 x 8, grey): a real data set that an installed package carries."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data_pipeline.sources import SourceData, SourceSample

RULE = "of each class, every fifth sample in the data set's order (its 5th, 10th, …) is held out for validation"


def samples(split: str) -> Iterator[SourceSample]:
    """Yield the digits of "train" or "validation" as 8 x 8 grey PNGs.

    Values 0 … 16 are scaled to 0 … 255. The held-out fifth is fixed: see RULE. Source: UCI Optical Recognition of
    Handwritten Digits, the test part, as scikit-learn ships it.
    """
    from sklearn.datasets import load_digits

    assert split in ("train", "validation"), split
    pixels, labels = load_digits(return_X_y=True)
    seen = [0] * 10
    for number, (row, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        seen[label] += 1
        if (seen[label] % 5 == 0) != (split == "validation"):
            continue
        grey = np.rint(row.reshape(8, 8) * (255 / 16)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, "PNG")
        content = buffer.getvalue()
        yield SourceSample(f"load_digits/{number}", label, "png", len(content), content=content)


def read_digits() -> SourceData:
    """Return both splits of the digits."""
    splits = {split: list(samples(split)) for split in ("train", "validation")}
    return SourceData("sklearn.datasets.load_digits", [str(digit) for digit in range(10)], splits, RULE)
