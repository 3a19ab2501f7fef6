"""Proof that an evaluation counted every sample exactly once, on any number of ranks: the ids themselves, added up."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass(frozen=True)
class Certificate:
    """How often the ids 0 … ids-1 of the evaluated samples were counted, over all ranks."""

    ids: int
    counted: int
    """Counted exactly once."""
    duplicates: int
    """Counted more than once."""
    missing: int
    """Never counted, and not for being undecodable."""
    undecodable: int
    """Could not be read, within what `data.max_bad_samples` allows."""
    world_size: int

    def __str__(self) -> str:
        return (
            f"certificate: {self.counted} of {self.ids} ids counted exactly once over {self.world_size} rank(s), "
            f"duplicates {self.duplicates}, missing {self.missing}, undecodable {self.undecodable}"
        )

    def as_dict(self) -> dict[str, int]:
        """Return plain data for JSON."""
        return asdict(self)


def certify(seen: Tensor, undecodable: int, world_size: int) -> Certificate:
    """Return the certificate for `seen`, how often each id was counted over all ranks: (N,) integers.

    Raises RuntimeError if an id was counted twice, or was not counted and is not among the undecodable.
    """
    never, repeated = int((seen == 0).sum()), int((seen > 1).sum())
    if repeated or never != undecodable:
        raise RuntimeError(
            f"evaluation of {len(seen)} samples missed {never}, of which {undecodable} are undecodable, "
            f"and repeated {repeated}"
        )
    return Certificate(len(seen), int((seen == 1).sum()), repeated, never - undecodable, undecodable, world_size)


def certificate_of(figures: Mapping[str, float], world_size: int) -> Certificate:
    """Return the certificate that the figures of `mvit.evaluate` hold."""
    counted, duplicates, missing, undecodable = (
        int(figures[key]) for key in ("counted", "duplicates", "missing", "undecodable")
    )
    ids = counted + duplicates + missing + undecodable
    return Certificate(ids, counted, duplicates, missing, undecodable, world_size)
