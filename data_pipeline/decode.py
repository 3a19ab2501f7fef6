"""Encoded bytes → RGB pixels: a fast JPEG codec, PIL for everything else, one error for what neither can read.

EXIF orientation is ignored, as torchvision and timm do: pixels come as they are stored. Grey, palette, alpha, CMYK and
16-bit pictures become RGB by PIL's `convert("RGB")`, again as there.
"""

import io
import math
import re
from collections.abc import Mapping

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")
"""Members taken for the picture of a sample, by extension; what is inside is found out from the bytes."""

_EXTRANEOUS = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd\d")
"""What libjpeg says of data between the last row it was asked for and the end of the picture (or a restart marker)."""

LABEL_EXTENSION = "cls"
"""The member that holds a class label, as an ASCII integer."""

UNLABELLED = -1
"""The class label of an example that has none, since its class is to be predicted."""


class DecodeError(ValueError):
    """A sample whose bytes cannot be turned into what the task needs."""


def decode_pil(data: bytes) -> Image.Image:
    """Decode any picture to an RGB PIL image. Raises DecodeError naming the reason."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its own words name an address in memory
        raise DecodeError(f"cannot decode {len(data)} bytes as a picture: of no format that PIL knows") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, …
        raise DecodeError(f"cannot decode {len(data)} bytes as a picture: {error}") from error


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode any picture exactly, pixel for pixel as PIL does: (H, W, 3) uint8. Raises DecodeError."""
    if jpeg_size(data) is not None:
        try:
            # Strict: libjpeg's warnings include a premature end, after which it would return grey. PIL tells harmless
            # ones from truncation, so it decides about every picture that is refused here.
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass
    return np.asarray(decode_pil(data))


def decode_crop_fast(
    data: bytes, box: tuple[int, int, int, int], least: tuple[float, float] = (math.inf, math.inf)
) -> np.ndarray:
    """Decode a crop of a JPEG for training: fast inverse DCT, no row below it, at 1/2, 1/4 or 1/8 where that will do.

    `box` is (top, left, height, width) in the picture that `jpeg_size` describes; the crop becomes smaller as long as
    its sides stay at `least` (H, W) or above. Pixels differ from the exact ones by about one level. Returns (h, w, 3)
    uint8; raises DecodeError.
    """
    top, left, height, width = box
    factor = next((f for f in (8, 4, 2) if height >= f * least[0] and width >= f * least[1]), 1)
    size = jpeg_size(data)
    assert size is not None
    pixels = _decode_top(data, size, factor, top + height)
    y, x = (-(-size[0] // factor) / size[0], -(-size[1] // factor) / size[1]) if pixels is not None else (1.0, 1.0)
    if pixels is None:  # refused for what comes before the crop's end: PIL decides
        pixels = decode_rgb(data)
    top, left = round(top * y), round(left * x)
    return pixels[top : top + max(1, round(height * y)), left : left + max(1, round(width * x))]


def _decode_top(data: bytes, size: tuple[int, int], factor: int, bottom: int) -> np.ndarray | None:
    """Decode a JPEG's rows down to `bottom` or a little further, shrunk by `factor`; None if it is damaged there.

    The codec has no such option; but it stops where the header says the picture does. What then follows it calls
    extraneous, in words that tell it from all other damage, after it has written the pixels.
    """
    height, width = size
    rows = min(height, bottom + factor)
    place = _height_place(data) if rows < height else None
    if place is None:
        rows = height
    else:
        data = b"".join((data[:place], rows.to_bytes(2, "big"), data[place + 2 :]))
    pixels = np.empty((-(-rows // factor), -(-width // factor), 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            fastdct=True,
            fastupsample=True,
            min_height=pixels.shape[0],
            min_width=pixels.shape[1],
            min_factor=factor,
            buffer=pixels,
        )
    except ValueError as error:
        if place is None or not _EXTRANEOUS.fullmatch(str(error)):
            return None
    return pixels


def _height_place(data: bytes) -> int | None:
    """Return where the frame header of a baseline JPEG holds the height; None for another kind, such as progressive."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (0xC0, 0xC1):
            return place + 5
        if marker == 0xFF:  # padding
            place += 1
        elif marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF:  # tables, comments, applications' own
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        else:
            break
    return None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG the fast codec can read, None for anything else (CMYK, PNG, garbage)."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colorspace in ("CMYK", "YCCK") else (int(height), int(width))


def picture(members: Mapping[str, bytes]) -> bytes:
    """Return the bytes of a sample's picture. Raises DecodeError if it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return members[extension]
    raise DecodeError(f"no picture among the members {sorted(members)}; known: {', '.join(IMAGE_EXTENSIONS)}")


def class_label(members: Mapping[str, bytes]) -> int:
    """Return a sample's class label. Raises DecodeError if it is missing or no integer."""
    text = members.get(LABEL_EXTENSION)
    if text is None:
        raise DecodeError(f"no .{LABEL_EXTENSION} among the members {sorted(members)}")
    try:
        return int(text)
    except ValueError as error:
        raise DecodeError(f"the .{LABEL_EXTENSION} member holds {text[:20]!r}, no integer") from error
