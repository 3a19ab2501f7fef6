"""Raw data sets that can be packed into shards: what a source hands to the packer."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

_NO_MEMBERS: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True, slots=True)  # there may be 13 million
class SourceSample:
    """One sample to pack: a file as it is, a part of one, or bytes made by the source."""

    source: str
    """Where it comes from, relative to the source's root: kept so that a packed sample can be traced back."""
    label: int | None
    """Class number; None if the sample's classes stand in a member of its own."""
    extension: str
    """Without the dot, lower case; the member's name in the shard."""
    size: int
    """Bytes."""
    file: Path | None = None
    content: bytes | None = None
    offset: int | None = None
    """Where the `size` bytes begin in the file, if it holds more (a tar)."""
    members: Mapping[str, bytes] = field(default_factory=lambda: _NO_MEMBERS)
    """Further members, by extension."""

    def read(self) -> bytes:
        """Return the bytes to store, unchanged."""
        if self.content is not None:
            return self.content
        assert self.file is not None
        if self.offset is None:
            return self.file.read_bytes()
        with open(self.file, "rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


@dataclass(frozen=True)
class Rejected:
    """A file, or an object in one, that was not packed, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class SourceData:
    """A labelled data set: the same classes, in the same order, for every split."""

    origin: str
    class_names: list[str]
    splits: dict[str, list[SourceSample]]
    rule: str
    """How the samples were divided among the splits, in words."""
    rejected: dict[str, list[Rejected]] = field(default_factory=dict)
    """Files that are no pictures, by split."""
    dropped: dict[str, list[Rejected]] = field(default_factory=dict)
    """Objects left out of pictures that are packed, by split."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further entries for the manifest of every split."""
