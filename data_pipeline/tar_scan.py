"""Scan a tar's headers: where every member lies, and whether the archive is whole.

Neither tarfile nor webdataset notices a tar that was cut between two members or inside a header, or whose headers are
garbage from some point on: both take it for the end. Here each header's checksum must hold and the two zero blocks that
end an archive must be there.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_SKIPPED = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders: no member of a sample
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class ShardError(ValueError):
    """A shard that is truncated, corrupted, incomplete or unreadable; the message names shard, offset and way out."""


class Member(NamedTuple):
    """One regular file in a tar: its name, where its bytes begin, how many they are, and where its header begins."""

    name: str
    offset: int
    size: int
    header: int


def scan_tar(path: str) -> Iterator[Member]:
    """Yield the regular files of the tar at `path` in order (ustar, GNU long names, PAX).

    Raises ShardError, naming the byte offset, for anything but a whole, uncompressed archive.
    """
    total = os.path.getsize(path)
    with open(path, "rb", buffering=4096) as file:
        offset, name, size = 0, None, None
        while True:
            header = file.read(BLOCK)
            if len(header) < BLOCK:
                raise _error(
                    path,
                    min(offset, total),  # a cut within the padding of the last member
                    total,
                    "it ends without the two zero blocks that end a tar, so it is truncated",
                )
            if not any(header):
                _check_end(file, path, offset, total)
                return
            kind, header_size = _check_header(header, path, offset, total)
            stored = header_size if kind in (*_REGULAR, b"L", b"K", b"x", b"g") else 0
            if kind in _REGULAR and size is not None:
                stored = size
            if offset + BLOCK + stored > total:
                raise _error(path, offset, total, f"a member of {stored} bytes begins here and runs past the end")
            if kind in (b"L", b"x", b"g", b"K"):
                data = file.read(stored)
                if kind == b"L":
                    name = _text(data.rstrip(b"\0"))
                elif kind == b"x":
                    name, size = _pax(data, name, size, path, offset, total)
            elif kind in _REGULAR:
                yield Member(name or _name(header), offset + BLOCK, stored, offset)
                name = size = None
            elif kind in _SKIPPED:
                name = size = None
            else:
                raise _error(path, offset, total, f"it has a member of type {kind!r} (sparse?), which cannot be read")
            offset += BLOCK + -(-stored // BLOCK) * BLOCK
            file.seek(offset)


def _check_header(header: bytes, path: str, offset: int, total: int) -> tuple[bytes, int]:
    """Return (type, size) of a header whose checksum holds."""
    try:
        expected = _number(header[148:156])
        size = _number(header[124:136])
    except ValueError:
        expected, size = -1, -1
    if expected != sum(header) - sum(header[148:156]) + 8 * 32 or size < 0:
        if offset == 0:
            kind = next((name for magic, name in _COMPRESSED.items() if header.startswith(magic)), None)
            if kind:
                raise _error(
                    path,
                    0,
                    total,
                    f"it is compressed ({kind}); reading at random needs plain tar: decompress it",
                )
            raise _error(path, 0, total, "it is not a tar file")
        raise _error(path, offset, total, "the tar header here is garbage (its checksum fails)")
    return header[156:157], size


def _check_end(file: BinaryIO, path: str, offset: int, total: int) -> None:
    """Require the second zero block and nothing but zeros after it."""
    second = file.read(BLOCK)
    if len(second) < BLOCK:
        raise _error(path, offset, total, "it ends after one of the two zero blocks that end a tar, so it is truncated")
    at = offset + BLOCK
    while second:
        if any(second):
            raise _error(
                path,
                at,
                total,
                "there is data after the end of the archive (overwritten, or tars concatenated?)",
            )
        at += len(second)
        second = file.read(1 << 16)


def _number(field: bytes) -> int:
    """Read an octal field, or GNU's base-256 one for sizes of 8 GiB and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax(
    data: bytes, name: str | None, size: int | None, path: str, offset: int, total: int
) -> tuple[str | None, int | None]:
    """Read path and size from a PAX record "length key=value\\n" …; the other keys do not concern us."""
    at = 0
    while at < len(data) and data[at : at + 1] != b"\0":
        digits, _, _ = data[at : at + 20].partition(b" ")
        if not digits.isdigit() or not at + int(digits) <= len(data) or int(digits) <= len(digits):
            raise _error(path, offset, total, "the PAX header here is garbage")
        key, _, value = data[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" and value.isdigit():
            size = int(value)
        at += int(digits)
    return name, size


def _error(path: str, offset: int, total: int, what: str) -> ShardError:
    return ShardError(
        f"Shard {path}: at byte {offset} of {total}, {what}. "
        "Copy or pack this shard again, or leave it out of the list."
    )
