"""Raw data sets that can be packed into shards: what a source hands to the packer."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SourceSample:
    """One picture to pack: a file as it is, or bytes made by the source."""

    source: str
    """Where it comes from, relative to the source's root: kept so that a packed sample can be traced back."""
    label: int
    extension: str
    """Without the dot, lower case; the member's name in the shard."""
    size: int
    """Bytes."""
    file: Path | None = None
    content: bytes | None = None

    def read(self) -> bytes:
        """Return the bytes to store, unchanged."""
        if self.content is not None:
            return self.content
        assert self.file is not None
        return self.file.read_bytes()


@dataclass(frozen=True)
class Rejected:
    """A file that was not packed, and why."""

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
