"""Decoding: PIL's pixels exactly, the fast way close to them, and one error for what cannot be read."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import DecodeError, class_label, decode_rgb, decode_rgb_fast, jpeg_size, picture
from tests.data_pipeline.pictures import encoded, pixels


def by_pil(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    "data",
    [
        *(encoded(1, subsampling=s, quality=q, progressive=p) for s in (0, 1, 2) for q, p in ((95, True), (40, False))),
        encoded(2, mode="L"),
        encoded(2, mode="CMYK"),
        *(encoded(3, kind="PNG", mode=mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
        encoded(4, kind="WEBP"),
        encoded(5, kind="BMP"),
        encoded(6) + b"trailing bytes",
    ],
)
def test_exact_decoding_gives_pils_pixels_in_every_format(data: bytes) -> None:
    assert np.array_equal(decode_rgb(data), by_pil(data))


def test_exif_orientation_is_ignored_as_by_torchvision() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    data = encoded(7, 60, 80, exif=exif)
    assert decode_rgb(data).shape == decode_rgb_fast(data).shape == (60, 80, 3)


def test_fast_decoding_differs_by_a_level_or_so() -> None:
    data = encoded(8, 300, 400, quality=90)
    difference = np.abs(decode_rgb_fast(data).astype(int) - by_pil(data).astype(int))
    assert difference.mean() < 2


def test_large_pictures_are_decoded_smaller_but_never_below_what_is_needed() -> None:
    data = encoded(9, 800, 1000, quality=90)
    assert decode_rgb_fast(data, (400, 400)).shape == (400, 500, 3)
    assert decode_rgb_fast(data, (401, 1)).shape == (800, 1000, 3)
    assert decode_rgb_fast(data, (90.5, 120)).shape == (100, 125, 3)
    assert decode_rgb_fast(data, (5000, 5000)).shape == (800, 1000, 3)
    small = np.asarray(Image.fromarray(pixels(9, 800, 1000)).resize((125, 100), Image.Resampling.BOX)).astype(int)
    assert np.abs(decode_rgb_fast(data, (100, 125)) - small).mean() < 3


JPEG = encoded(10, 200, 200)


@pytest.mark.parametrize(
    "data", [b"", b"hello", JPEG[:2], JPEG[:300], JPEG[: len(JPEG) // 2], encoded(10, kind="PNG")[:500]]
)
def test_what_cannot_be_read_is_a_decode_error_both_ways(data: bytes) -> None:
    with pytest.raises(DecodeError, match=f"cannot decode {len(data)} bytes"):
        decode_rgb(data)
    with pytest.raises(DecodeError, match=f"cannot decode {len(data)} bytes"):
        decode_rgb_fast(data)


def test_only_jpegs_that_become_rgb_take_the_fast_way() -> None:
    assert jpeg_size(encoded(1, 60, 80)) == (60, 80)
    assert jpeg_size(encoded(1, 60, 80, mode="CMYK")) is None
    assert jpeg_size(encoded(1, kind="PNG")) is None


def test_a_sample_without_picture_or_with_a_bad_label_is_a_decode_error() -> None:
    assert picture({"cls": b"1", "png": b"p"}) == b"p"
    assert class_label({"cls": b" 12\n"}) == 12
    with pytest.raises(DecodeError, match="no picture among"):
        picture({"cls": b"1", "txt": b"p"})
    with pytest.raises(DecodeError, match=r"no \.cls among"):
        class_label({"jpg": b""})
    with pytest.raises(DecodeError, match=r"holds b'cat', no integer"):
        class_label({"cls": b"cat"})
