"""Does memory stay flat? Read many samples and look at this process and its workers in between."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from data_pipeline.benchmark import Contender, Reading
from data_pipeline.shards import ShardSet

_MIB = 2**20


@dataclass(frozen=True)
class SoakPoint:
    """Memory after so many samples: RSS, and PSS, in which each process has its part of what it shares."""

    samples: int
    seconds: float
    main_rss_mib: float
    main_pss_mib: float
    workers_rss_mib: float
    """Of the workers and the server that forks them, together."""
    workers_pss_mib: float

    @property
    def rss_mib(self) -> float:
        """Of all processes; what they share counts in each. PSS also moves with other programs that share libraries."""
        return self.main_rss_mib + self.workers_rss_mib


def soak(
    shards: ShardSet,
    contender: Contender,
    num_samples: int,
    *,
    workers: int = 2,
    batch_size: int = 50,
    num_points: int = 21,
    tell: Callable[[SoakPoint], None] = lambda point: None,
) -> list[SoakPoint]:
    """Read `num_samples` samples as training does and look at memory `num_points` times, at equal distances."""
    num_batches = -(-num_samples // batch_size)
    looks = {round(at) for at in np.linspace(min(1 + 2 * workers, num_batches), num_batches, num_points)}
    points, start = [], time.monotonic()
    with contender.opens(Reading(shards, workers, batch_size, 0)) as stream:
        for number in range(1, num_batches + 1):
            next(stream)
            if number in looks:
                points.append(_look(number * batch_size, time.monotonic() - start))
                tell(points[-1])
    return points


def slope(points: Sequence[SoakPoint], warm_up: float = 0.25) -> float:
    """Return the growth of all processes' RSS in MiB per 100,000 samples: a line through what follows the warm-up."""
    late = [point for point in points if point.samples >= warm_up * points[-1].samples]
    if len(late) < 2:
        raise ValueError(f"a slope needs two points after the warm-up; there are {len(late)}")
    samples, rss = [point.samples for point in late], [point.rss_mib for point in late]
    return float(np.polynomial.Polynomial.fit(samples, rss, 1).convert().coef[1]) * 1e5


def _look(samples: int, seconds: float) -> SoakPoint:
    main = psutil.Process()
    memory = [process.memory_full_info() for process in (main, *main.children(recursive=True))]
    return SoakPoint(
        samples,
        seconds,
        memory[0].rss / _MIB,
        memory[0].pss / _MIB,
        sum(one.rss for one in memory[1:]) / _MIB,
        sum(one.pss for one in memory[1:]) / _MIB,
    )
