"""Signs of life of a rank: a few bytes of memory that the rank writes and its guard reads; no file system between."""

import mmap
import os
import struct
import time
from dataclasses import dataclass
from typing import get_args

from mvit.life import Phase

HEARTBEAT_FD = "MVIT_HEARTBEAT_FD"
_PHASES: tuple[Phase, ...] = get_args(Phase)
_LAYOUT = struct.Struct("=qqd")  # step, phase, seconds since the epoch
_SIZE = 4096


@dataclass(frozen=True)
class Beat:
    """What a rank said last: it began `phase` of `step` at `time` (seconds since the epoch)."""

    step: int
    phase: Phase
    time: float


class Heartbeat:
    """The shared memory of one rank and its guard."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, _SIZE)

    @staticmethod
    def create() -> int:
        """Return the descriptor of new shared memory; the child is told its number in MVIT_HEARTBEAT_FD."""
        descriptor = os.memfd_create("mvit-heartbeat", 0)  # 0: it stays open over exec
        os.truncate(descriptor, _SIZE)
        return descriptor

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this rank begins `phase` of `step`."""
        _LAYOUT.pack_into(self._memory, 0, step, _PHASES.index(phase), time.time())

    def read(self) -> Beat | None:
        """Return the last beat, None before the first."""
        step, phase, when = _LAYOUT.unpack_from(self._memory, 0)
        return None if when == 0 else Beat(step, _PHASES[phase], when)


def own_heartbeat() -> Heartbeat | None:
    """Return the heartbeat that this rank's guard reads, None for a process without a guard."""
    descriptor = os.environ.get(HEARTBEAT_FD)
    return None if descriptor is None else Heartbeat(int(descriptor))
