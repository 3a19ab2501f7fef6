"""Whether a video's bytes are all there, by the sizes its container states: FFmpeg reads a part without a word.

MP4 and MOV are a row of boxes, Matroska and WebM nested EBML elements, AVI a row of RIFF chunks; each begins with its
length. A file that was cut while it was copied or recorded ends before the last of them does.
"""

VIDEO_EXTENSIONS: tuple[str, ...] = ("mp4", "webm", "mkv", "avi", "mov")
"""Members taken for the video of a sample, by extension; what is inside is found out from the bytes."""

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"pnot", b"uuid", b"meta")


def what_is_missing(data: bytes) -> str | None:
    """Return what the container lacks of what it says it holds, None if nothing or if it does not say."""
    if data[4:8] in _BOXES:
        return _missing_of_boxes(data)
    if data[:4] == _EBML:
        return _missing_of_segment(data)
    if data[:4] == b"RIFF":
        return _missing_of_chunks(data)
    return None


def _missing_of_boxes(data: bytes) -> str | None:
    start, has_index = 0, False
    while start + 8 <= len(data):
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if size == 1:  # the size follows in 8 bytes
            size = int.from_bytes(data[start + 8 : start + 16], "big")
        elif size == 0:  # up to the end of the file
            size = len(data) - start
        if kind not in _BOXES and start > 0 and not (kind.isascii() and kind.decode().isalnum()):
            break  # something appended that is no box
        if kind in (b"moov", b"moof"):
            has_index = True
        if kind in (b"moov", b"mdat", b"moof") and start + size > len(data):
            return _cut(f"its {kind.decode()} box", start + size, len(data))
        start += max(size, 8)
    return None if has_index else "it is truncated: it has no moov box, which a recording gets at its end"


def _missing_of_segment(data: bytes) -> str | None:
    start = 4
    size, start = _vint(data, start)
    start += size
    if data[start : start + 4] != _SEGMENT:
        return None
    length_bytes = 9 - data[start + 4].bit_length() if start + 4 < len(data) else 0
    size, start = _vint(data, start + 4)
    unknown = size == (1 << 7 * length_bytes) - 1  # a live recording
    return None if unknown or start + size <= len(data) else _cut("its segment", start + size, len(data))


def _missing_of_chunks(data: bytes) -> str | None:
    start = 0
    while data[start : start + 4] == b"RIFF" and start + 8 <= len(data):  # an AVI above 1 GB is several of them
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        if start + 8 + size > len(data):
            return _cut("its RIFF chunk", start + 8 + size, len(data))
        start += 8 + size + size % 2
    return None


def _vint(data: bytes, start: int) -> tuple[int, int]:
    """Return the value of an EBML number of variable length at `start`, and where it ends."""
    first = data[start] if start < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[start : start + length], "big") & ((1 << 7 * length) - 1)
    return value, start + length


def _cut(what: str, end: int, length: int) -> str:
    return f"it is truncated: {what} ends at byte {end:,}, but there are {length:,} bytes"
