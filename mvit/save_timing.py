"""When a run saves and what its ledger says of it, at the points where the ranks meet anyway."""

import socket
import time
from collections.abc import Mapping

from mvit.checkpoint_save import Outcome
from mvit.config import RunConfig
from mvit.distributed import RankInfo, StopAgreement, broadcast_object, gather_objects, logger
from mvit.life import Life
from mvit.save_interval import FIRST_SAVE_S, Meter, SaveSchedule, Setting

_REST_S = 60.0  # between two looks at the ledger, which lies on a shared file system
_SHOWN = ("ettr", "mttf_h", "checkpoint_overhead", "lost_gpu_hours")


class SaveTiming:
    """The save schedule of one life, fed with rank 0's measurements; made collectively, after the restore."""

    def __init__(self, config: RunConfig, ranks: RankInfo, life: Life, *, first_step: int, num_bytes: int) -> None:
        self._life, self._ranks, self._looked = life, ranks, float("-inf")
        hosts = set(gather_objects(socket.gethostname()))
        setting = Setting(
            num_nodes=len(hosts),
            node_mttf_h=config.train.node_mttf_h,
            rank_bytes=num_bytes // ranks.world_size,
            asynchronous=config.train.async_save,
        )
        self._schedule = SaveSchedule(
            config.train.save_every, keep_every=config.train.keep_every, first_step=first_step, setting=setting
        )
        self._meter = Meter(life.goodput() if ranks.is_main else {})
        self._began, self._logged, self._agreement = time.monotonic(), False, StopAgreement()
        self._learn()

    def log_point(self, step_s: float) -> dict[str, float]:
        """Take in the seconds per step and return what belongs into the record (collective)."""
        self._meter.stepped(step_s)
        self._logged = True
        self._learn()
        record = {key: value for key, value in self._goodput().items() if key in _SHOWN}
        if self._schedule.derives and self._schedule.steps is not None:
            record["save_interval_steps"] = self._schedule.steps
        return record

    def due(self, step: int) -> bool:
        """Say whether the state after `step` is to be saved, the same on every rank (collective)."""
        early = self._logged
        if self._schedule.waits_for_first and not early:  # by the clock, on which the ranks have to agree
            early = self._agreement.ask(time.monotonic() - self._began > FIRST_SAVE_S)
        return self._schedule.due(step, early=early)

    def began(self, step: int) -> None:
        """Remember that a save of `step` began, for whatever reason."""
        self._agreement.finish()
        self._schedule.saved(step)

    def published(self, outcome: Outcome) -> None:
        """Remember what a save cost."""
        self._meter.saved(outcome.stalled_s, outcome.seconds)

    def _goodput(self) -> Mapping[str, float]:
        """Return the ledger's figures on rank 0, and nothing so soon after the last look."""
        if not self._ranks.is_main or time.monotonic() - self._looked < _REST_S:
            return {}
        self._looked = time.monotonic()
        return self._life.goodput()

    def _learn(self) -> None:
        if not self._schedule.derives:
            return
        measured = broadcast_object(self._meter.measured() if self._ranks.is_main else None)
        if self._schedule.learn(measured):
            logger.info("%s", self._schedule.explanation)
