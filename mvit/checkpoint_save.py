"""Writing checkpoints beside training: copy to host memory, then every rank its file, one atomic publish, a read-back.

Training waits for the copy only. The rest runs in one thread a rank; the threads agree over a process group of their
own, so an error on one rank is known to all and nothing is polled on a shared file system.
"""

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from mvit.checkpoint import (
    CheckpointError,
    check_space,
    checkpoint_path,
    checkpoints_dir,
    file_sha256,
    record_verification,
)
from mvit.checkpoint_files import Contents, at_point, build_manifest, publish, write_shard
from mvit.distributed import RankInfo, background_group, broadcast_object, gather_objects, logger
from mvit.fingerprint import own_sums
from mvit.fragments import Fragment
from mvit.host_copy import HostCopy
from mvit.retention import Retention, prune_after_save


class SaveError(RuntimeError):
    """A save that did not succeed on every rank; nothing was published."""


@dataclass(frozen=True)
class Outcome:
    """How one save ended; the same on every rank but for `stalled_s`."""

    step: int
    path: Path
    error: str
    """Empty if the checkpoint is published."""
    num_bytes: int
    seconds: float
    """From the beginning to the publish."""
    stalled_s: float
    """How long training waited for it: for an earlier save in flight, the copy, and at a stop for the publish."""
    damage: tuple[str, ...]
    """What reading it back from disk found wrong."""


class Saver:
    """Saves one checkpoint after the other; every method but `poll` and `close` is collective.

    With `asynchronous` False every save is finished when `begin` returns, and needs no host memory. `check_owner`
    raises if a later life of the run has taken over; rank 0 asks it before it publishes or removes anything.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: RankInfo,
        retention: Retention | None = None,
        *,
        asynchronous: bool = True,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir, self._ranks, self._check_owner = run_dir, ranks, check_owner
        self._retention = retention or Retention()
        self._asynchronous = asynchronous
        self._group = background_group()
        self._host = HostCopy(ranks.device)
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._done: SimpleQueue[Outcome] = SimpleQueue()
        self._group_broke = False
        self.damaged: set[int] = set()
        """Steps on disk known to be damaged: they count for nothing when older ones are removed."""

    def reserve(self, fragments: Sequence[Fragment]) -> None:
        """Get the host memory for saving `fragments` in the background (not collective)."""
        if self._asynchronous:
            self._host.reserve(self._own(fragments))

    def _own(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        own = [f.part(self._ranks.rank, self._ranks.world_size) for f in fragments]
        return [f for f in own if f.count]

    def begin(self, step: int, contents: Contents, *, needed_bytes: int = 0, read_back: bool = True) -> None:
        """Copy `contents` and let the writing begin; waits for an earlier save first, so none overtakes another.

        Later changes of the training state do not reach the checkpoint. `needed_bytes` is checked against the free
        space of the file system before anything is written; `read_back` compares the files with what was meant to be
        written after the publish. Nothing is raised: the outcome tells.
        """
        began = time.perf_counter()
        self._join(hurry=not read_back)
        if any(gather_objects(self._group_broke)):  # a rank's thread failed where the others waited for it
            self._group, self._group_broke = background_group(), False
        token, error = broadcast_object(self._prepare(needed_bytes) if self._ranks.is_main else None)
        copies: list[Fragment] = []
        if not error:
            try:
                own = self._own(contents.fragments)
                copies = self._host.take(own) if self._asynchronous else own
            except Exception as caught:  # no host memory, for one: the other ranks learn it in the thread
                error = f"copying the state to host memory: {type(caught).__name__}: {caught}"
        small = {f"rng.{key}": value.clone() for key, value in contents.rng.items()}
        if self._ranks.is_main:
            small |= {f"buffer.{key}": value.detach().cpu().clone() for key, value in contents.buffers.items()}
        stalled = time.perf_counter() - began
        job = _Job(step, checkpoint_path(self.run_dir, step), token, error, contents, copies, small, began, stalled)
        self._hurry.clear()
        if self._asynchronous:
            self._thread = threading.Thread(target=self._run, args=(job, read_back), daemon=True, name="mvit-save")
            self._thread.start()
        else:
            self._run(job, read_back)
            outcome = self._done.get()
            self._done.put(replace(outcome, stalled_s=time.perf_counter() - began))

    def poll(self) -> list[Outcome]:
        """Return the saves that ended since the last call; never waits."""
        return [self._done.get() for _ in range(self._done.qsize())]

    def finish(self) -> list[Outcome]:
        """Wait until the save in flight is published (a read-back is cut short) and return what `poll` would."""
        began = time.perf_counter()
        self._join(hurry=True)
        waited, outcomes = time.perf_counter() - began, self.poll()
        return [*outcomes[:-1], *(replace(one, stalled_s=one.stalled_s + waited) for one in outcomes[-1:])]

    def close(self, patience_s: float = 30.0) -> None:
        """Wait a moment for a save in flight, as the run may be ending because of an error on this rank alone."""
        self._join(hurry=True, timeout_s=patience_s)
        if self._thread is not None:
            logger.warning("the save in flight did not end within %g s and is given up", patience_s)
        else:
            self._host.release()

    def _join(self, *, hurry: bool, timeout_s: float | None = None) -> None:
        if self._thread is not None:
            if hurry:
                self._hurry.set()
            self._thread.join(timeout_s)
            if not self._thread.is_alive():
                self._thread = None

    def _prepare(self, needed_bytes: int) -> tuple[str, str]:
        try:
            checkpoints_dir(self.run_dir).mkdir(parents=True, exist_ok=True)
            check_space(self.run_dir, needed_bytes)
        except (OSError, CheckpointError) as caught:
            return "", f"{type(caught).__name__}: {caught}"
        return uuid.uuid4().hex[:8], ""

    # --- in the thread --------------------------------------------------------------------------------------------

    # Whatever goes wrong on one rank, it must come to the next agreement: the others wait there.

    def _run(self, job: "_Job", read_back: bool) -> None:
        try:
            shard, outcome = self._save(job)
        except Exception as caught:  # a rank died, or was slower than the group's patience
            self._group_broke = True
            text = f"{type(caught).__name__}: {caught}"
            self._done.put(job.outcome(f"the ranks could not agree on it ({text})"))
            return
        if not outcome.error:
            try:
                outcome = replace(outcome, damage=self._look_after(job, shard, read_back))
            except Exception as caught:  # it is published all the same
                self._group_broke = True
                logger.warning("after the checkpoint of step %d was saved: %s", job.step, caught)
        self._done.put(outcome)

    def _save(self, job: "_Job") -> tuple[dict[str, Any], Outcome]:
        """Write and publish; returns this rank's manifest entry and what became of it."""
        part = job.target.with_name(f".{job.target.name}.{job.token}.tmp")
        shard, sums, error = {}, {}, job.error
        if not error:
            try:
                shard, sums = self._write_own(job, part)
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
        results = gather_objects((shard, sums, error), self._group)
        failures = [f"rank {rank}: {text}" for rank, (*_, text) in enumerate(results) if text]
        if not failures and self._ranks.is_main:
            try:
                shards, all_sums, _ = zip(*results, strict=True)
                manifest = build_manifest(job.step, job.contents, shards, all_sums)
                publish(part, job.target, manifest, self._check_owner)
            except Exception as caught:
                failures = [f"rank 0: {type(caught).__name__}: {caught}"]
        failures = broadcast_object(failures, self._group)
        if failures:
            if self._ranks.is_main and job.token:
                shutil.rmtree(part, ignore_errors=True)
            return shard, job.outcome("; ".join(dict.fromkeys(failures)))
        num_bytes = sum(one["bytes"] for one, *_ in results)
        return shard, job.outcome("", num_bytes=num_bytes, seconds=time.perf_counter() - job.began)

    def _look_after(self, job: "_Job", shard: Mapping[str, Any], read_back: bool) -> tuple[str, ...]:
        """Read a published checkpoint back and remove older ones; returns what is wrong with it."""
        self.damaged.discard(job.step)
        damage, whole = self._read_back(job, shard) if read_back else ((), False)
        if damage:
            self.damaged.add(job.step)
        if self._ranks.is_main:
            if damage:
                logger.error("the checkpoint of step %d is damaged on disk: %s", job.step, "; ".join(damage))
            else:  # one that nobody has read back does not replace the last one that was
                retention, known = self._retention, self.damaged
                self._check_owner()
                prune_after_save(self.run_dir, job.step, retention, read_back=whole, damaged=known)
        return damage

    def _write_own(self, job: "_Job", part: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """Write this rank's file; returns its manifest entry and its shares of the fingerprints."""
        self._host.wait()
        part.mkdir(parents=True, exist_ok=True)
        at_point("folder made")
        trained, names = [f for f in job.copies if not f.frozen], list(job.contents.shapes)
        with ThreadPoolExecutor(1) as pool:
            sums = pool.submit(own_sums, trained, names)
            shard = write_shard(part / f"rank_{self._ranks.rank:05d}.safetensors", job.copies, job.small)
            return shard, {state: values.tolist() for state, values in sums.result().items()}

    def _read_back(self, job: "_Job", entry: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
        """Read this rank's file from the medium and compare.

        All ranks return what any of them found wrong, and whether all of it was read and is whole.
        """
        file, problem = job.target / entry["file"], ""
        try:
            digest = file_sha256(file, from_disk=True, give_up=self._hurry.is_set)
            if digest not in (None, entry["sha256"]):
                problem = f"{file}: differs from what was written"
        except OSError as caught:
            digest, problem = "", f"{file}: cannot be read back: {caught.strerror}"
        found = gather_objects((problem, digest is not None), self._group)
        at_point("read back")
        whole = all(read and not text for text, read in found)
        if self._ranks.is_main and whole:
            record_verification(self.run_dir, job.step)
        return tuple(text for text, _ in found if text), whole


@dataclass(frozen=True)
class _Job:
    """One save on its way through the thread."""

    step: int
    target: Path
    token: str
    """Tells this save's folder from what an earlier attempt, or another life of the job, left behind."""
    error: str
    contents: Contents
    copies: Sequence[Fragment]
    small: Mapping[str, Tensor]
    began: float
    stalled_s: float

    def outcome(self, error: str, *, num_bytes: int = 0, seconds: float = 0.0, damage: tuple[str, ...] = ()) -> Outcome:
        return Outcome(self.step, self.target, error, num_bytes, seconds, self.stalled_s, damage)
