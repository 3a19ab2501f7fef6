"""Encoded bytes → RGB pixels: a fast JPEG codec, PIL for everything else, one error for what neither can read.

EXIF orientation is ignored, as torchvision and timm do: pixels come as they are stored. Grey, palette, alpha, CMYK and
16-bit pictures become RGB by PIL's `convert("RGB")`, again as there.
"""

import io
import math
from collections.abc import Mapping

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")
"""Members taken for the picture of a sample, by extension; what is inside is found out from the bytes."""

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


def decode_rgb_fast(data: bytes, min_size: tuple[float, float] = (math.inf, math.inf)) -> np.ndarray:
    """Decode for training: fast inverse DCT, at 1/2, 1/4 or 1/8 if both sides stay at `min_size` (H, W) or above.

    Pixels differ from the exact ones by about one level. Returns (H, W, 3) uint8; raises DecodeError.
    """
    size = jpeg_size(data)
    if size is None:
        return decode_rgb(data)
    height, width = size
    try:
        return simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            fastdct=True,
            fastupsample=True,
            min_height=math.ceil(min(min_size[0], height)),
            min_width=math.ceil(min(min_size[1], width)),
            min_factor=2,  # 3/4 and the like save nothing
        )
    except ValueError:
        return decode_rgb(data)


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
