"""Whether a video's bytes are all there, by the sizes its container states: FFmpeg reads a part without a word.

MP4 and MOV are a row of boxes, Matroska and WebM nested EBML elements, AVI a row of RIFF chunks; each begins with its
length. A file that was cut while it was copied or recorded ends before the last of them does.
"""

VIDEO_EXTENSIONS: tuple[str, ...] = ("mp4", "webm", "mkv", "avi", "mov")
"""Members taken for the video of a sample, by extension; what is inside is found out from the bytes."""

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_CLUSTER = b"\x1f\x43\xb6\x75"
_IN_A_SEGMENT = "114d9b74 1549a966 1654ae6b 1c53bb6b 1941a469 1043a770 1254c367 1b538667"  # info, tracks, cues, tags, …
_IN_A_CLUSTER = "e7 5854 a7 ab a3 a0 af"  # its time, silent tracks, position and size, blocks
_ANYWHERE = "ec bf 1a45dfa3 18538067 1f43b675"  # void, checksum; header, segment, cluster
_ELEMENTS = {bytes.fromhex(name) for name in f"{_IN_A_SEGMENT} {_IN_A_CLUSTER} {_ANYWHERE}".split(" ")}
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
    """Step from element to element; FFmpeg would search on behind a damaged one and leave out what was in it."""
    start, known = 0, False
    while start < len(data):
        name = data[start : start + 5 - max(data[start].bit_length() - 4, 1)]
        if name not in _ELEMENTS:
            what = f"what begins at byte {start:,} of its {len(data):,} is no element of Matroska"
            return f"it is damaged: {what}" if known else None
        size, start = _vint(data, start + len(name))
        if name in (_CLUSTER, _SEGMENT):  # what is in them comes next, whatever their size
            known = True
            if name == _SEGMENT and size is not None and start + size > len(data):
                return _cut("its segment", start + size, len(data))
        elif size is None:
            return f"it is damaged: the element before byte {start:,} has no size"
        else:
            start += size
    return None if start == len(data) else _cut("its last element", start, len(data))


def _missing_of_chunks(data: bytes) -> str | None:
    start = 0
    while data[start : start + 4] == b"RIFF" and start + 8 <= len(data):  # an AVI above 1 GB is several of them
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        if start + 8 + size > len(data):
            return _cut("its RIFF chunk", start + 8 + size, len(data))
        start += 8 + size + size % 2
    return None


def _vint(data: bytes, start: int) -> tuple[int | None, int]:
    """Return the EBML size at `start` (None: unknown, as in a live recording), and where its bytes end."""
    first = data[start] if start < len(data) else 0
    length = 9 - first.bit_length()
    mask = (1 << 7 * length) - 1
    value = int.from_bytes(data[start : start + length], "big") & mask
    return None if value == mask or not first else value, start + length


def _cut(what: str, end: int, length: int) -> str:
    return f"it is truncated: {what} ends at byte {end:,}, but there are {length:,} bytes"
