"""Which faults of a fire drill happened in a life: what MVIT_FAULTS did is nobody's mystery afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.faults import VARIABLE
from launcher.run_folder import RunFolder, read_record


@dataclass(frozen=True)
class FiredFault:
    """A fault that a rank let happen to itself, from the mark it left in RUN/faults."""

    fault: str  # kind@step:rank, without the number of times
    rank: int
    where: str  # "at step 12"
    time: float  # seconds since the epoch

    @property
    def is_kill(self) -> bool:
        """Whether it is why the rank was killed by SIGKILL."""
        return self.fault.partition("@")[0] in ("kill", "kill-in-save")

    def __str__(self) -> str:
        return f"fire drill: {self.fault} of {VARIABLE}, {self.where}"


def fired_faults(run: RunFolder, records: Sequence[Mapping[str, Any]]) -> list[FiredFault]:
    """Return the faults that happened to the ranks of one life, given their records, oldest first.

    A mark belongs to the life whose rank had its pid while it was written: the same pid may come again.
    """
    found = []
    for path in sorted((run.path / "faults").glob("*@*.*")):
        mark, fault = read_record(path), path.name.rpartition(".")[0]
        if mark is None:  # its writer's node was lost at that moment
            continue
        rank, when = int(fault.rpartition(":")[2]), mark["time"]
        for record in records:
            begun, ended = record.get("started", 0.0), record.get("ended", float("inf"))
            if (record["rank"], record["pid"]) == (rank, mark["pid"]) and begun <= when <= ended:
                found.append(FiredFault(fault, rank, mark["where"], when))
    return sorted(found, key=lambda one: one.time)
