"""Decoding: PIL's pixels exactly, the fast way close to them, and one error for what cannot be read."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import decode
from data_pipeline.decode import DecodeError, class_label, decode_crop_fast, decode_rgb, jpeg_size, picture
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
    assert decode_rgb(data).shape == decode_crop_fast(data, (0, 0, 60, 80)).shape == (60, 80, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    "options", [{"subsampling": s} for s in (0, 1, 2)] + [{"restart_marker_rows": 1}, {"mode": "L"}]
)
def test_a_fast_crop_is_that_of_the_whole_fast_picture_and_a_level_or_so_from_pils(
    options: dict[str, Any], progressive: bool
) -> None:
    data = encoded(8, 301, 405, quality=90, progressive=progressive, **options)
    whole = decode_crop_fast(data, (0, 0, 301, 405))
    assert np.abs(whole.astype(int) - by_pil(data).astype(int)).mean() < 2
    for top, left, height, width in (
        (0, 0, 1, 1),
        (0, 3, 17, 90),
        (100, 7, 101, 398),
        (3, 0, 250, 405),
        (300, 404, 1, 1),
    ):
        crop = decode_crop_fast(data, (top, left, height, width))
        assert np.array_equal(crop, whole[top : top + height, left : left + width])


def test_rows_below_the_crop_are_not_decoded() -> None:
    data = encoded(8, 800, 800, quality=95, subsampling=0)
    damaged = bytearray(data)
    for place in range(len(data) * 3 // 4, len(data) - 20, 7):
        damaged[place] = 0
    for box, factor in (((0, 0, 300, 800), 1), ((10, 5, 300, 700), 2)):
        least = box[2] / factor, box[3] / factor
        assert np.array_equal(decode_crop_fast(bytes(damaged), box, least), decode_crop_fast(data, box, least))
    pixels_decoded = decode._decode_top(data, (800, 800), 1, 300)
    assert pixels_decoded is not None
    assert len(pixels_decoded) < 310


def test_large_pictures_are_decoded_smaller_but_never_below_what_is_needed() -> None:
    data = encoded(9, 803, 1000, quality=90)
    whole = (0, 0, 803, 1000)
    assert decode_crop_fast(data, whole, (400, 400)).shape == (402, 500, 3)
    assert decode_crop_fast(data, whole, (402, 1)).shape == (803, 1000, 3)
    assert decode_crop_fast(data, whole, (90.5, 120)).shape == (101, 125, 3)
    assert decode_crop_fast(data, whole, (5000, 5000)).shape == (803, 1000, 3)
    small = np.asarray(Image.fromarray(pixels(9, 803, 1000)).resize((125, 101), Image.Resampling.BOX)).astype(int)
    assert np.abs(decode_crop_fast(data, whole, (100, 125)) - small).mean() < 3
    shrunk = decode_crop_fast(data, whole, (100, 125))
    for box in ((160, 240, 400, 320), (16, 8, 701, 333)):
        crop = decode_crop_fast(data, box, (box[2] / 8, box[3] / 8))
        top, left = round(box[0] * 101 / 803), round(box[1] / 8)
        assert crop.shape == (round(box[2] * 101 / 803), round(box[3] / 8), 3)
        assert np.array_equal(crop, shrunk[top : top + crop.shape[0], left : left + crop.shape[1]])


JPEG = encoded(10, 200, 200)


@pytest.mark.parametrize(
    "data", [b"", b"hello", JPEG[:2], JPEG[:300], JPEG[: len(JPEG) // 2], encoded(10, kind="PNG")[:500]]
)
def test_what_cannot_be_read_is_a_decode_error_both_ways(data: bytes) -> None:
    with pytest.raises(DecodeError, match=f"cannot decode {len(data)} bytes"):
        decode_rgb(data)
    with pytest.raises(DecodeError, match=f"cannot decode {len(data)} bytes"):
        decode_crop_fast(data, (0, 0, 150, 200)) if jpeg_size(data) else decode_rgb(data)


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
