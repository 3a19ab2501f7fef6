"""What the planner foresees of a run, and how far off it was: said once, beside the first steps."""

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from mvit.config import RunConfig
from mvit.distributed import RankInfo, logger
from mvit.tasks.classification import build_classifier

GIB = 2**30
LEAST_PARAMETERS = 16_000_000
"""Of smaller models nothing is said: a process of Python and torch alone takes more memory than their training."""


class Forecast:
    """Foresees memory, and on a known GPU the step's time, on rank 0 of a run that begins; else it is silent.

    Build it before the engine: what is resident by then is not the training's.
    """

    def __init__(self, config: RunConfig, ranks: RankInfo, *, begins: bool) -> None:
        self._config, self._ranks = config, ranks
        self._records = 0
        self._foreseen_bytes = self._resident_bytes = 0
        self._foreseen_seconds: float | None = None
        self._gpu = ""
        if not begins or not ranks.is_main or config.task == "detection":
            return
        try:
            self._foresee()
        except Exception as error:  # a plan that fails must not stop what it is about
            logger.warning("no forecast of memory and time: %s: %s", type(error).__name__, error)

    def _foresee(self) -> None:
        config, ranks = self._config, self._ranks
        with torch.device("meta"):
            if sum(p.numel() for p in build_classifier(config).parameters()) < LEAST_PARAMETERS:
                return
        from mvit.planner import foresee, foresee_memory  # seconds of imports, of which small runs have no use
        from mvit.planner_time import gpu_of_device

        on_gpu = ranks.device.type == "cuda"
        known = gpu_of_device(torch.cuda.get_device_name(ranks.device)) if on_gpu else None
        if known is None:
            self._foreseen_bytes = foresee_memory(config, ranks.world_size, target="cuda" if on_gpu else "cpu").peak
        else:
            per_node = int(os.environ.get("LOCAL_WORLD_SIZE", min(ranks.world_size, torch.cuda.device_count())))
            found = foresee(config, ranks.world_size, known, gpus_per_node=per_node)
            self._foreseen_bytes, self._foreseen_seconds, self._gpu = found.memory.peak, found.step.total, known
        self._resident_bytes = psutil.Process().memory_info().rss

    def tell(self, rates: Mapping[str, float]) -> None:
        """Compare, at the second record of a run: the first one has what happens only once in it."""
        self._records += 1
        if self._records != 2 or not self._foreseen_bytes:
            return
        logger.info("forecast (mvit plan): %s", "; ".join(self.lines(rates)))

    def lines(self, rates: Mapping[str, float]) -> list[str]:
        """Return what is foreseen beside what is measured so far."""
        if self._ranks.device.type == "cuda":
            measured, what = torch.cuda.max_memory_allocated(self._ranks.device), "of tensors"
        else:
            measured, what = high_water_bytes() - self._resident_bytes, "resident, with the heap's gaps"
        told = [_beside("memory", measured / GIB, self._foreseen_bytes / GIB, "GiB", what)]
        if self._foreseen_seconds is not None:
            computing = rates["step_seconds"] * (1 - rates["data_wait"])
            what = f"without waiting for data, on {self._gpu}"
            told.append(_beside("step", computing, self._foreseen_seconds, "s", what))
        return told


def high_water_bytes() -> int:
    """Return the most memory that was resident in this process so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _beside(name: str, measured: float, foreseen: float, unit: str, what: str) -> str:
    return f"{name} {measured:.3g} {unit} ({what}), foreseen {foreseen:.3g}: {foreseen / measured - 1:+.0%}"
