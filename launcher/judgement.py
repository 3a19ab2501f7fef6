"""What a run is doing now: judged by its own records and, where they are silent, by its processes or Slurm."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.failure import first_failure
from launcher.lives import is_alive_record, record_cancelled, unrecorded_cancel
from launcher.processes import identity_from, is_alive, is_local
from launcher.run_folder import RunFolder
from launcher.slurm_queue import CANCELLED, SlurmJob, SlurmQueue, end_in_words, final_state

State = Literal["pending", "running", "stopped", "failed", "finished"]
AT_REST = ("stopped", "failed", "finished")

_WAY_ON = ". Go on with: "


@dataclass(frozen=True)
class Judgement:
    """What a run is doing, without its figures."""

    state: State
    detail: str  # why, in one line; empty when the state says it all
    attempt: int
    executor: str  # local | slurm | inline (`mvit train`) | none
    job_id: str | None
    slurm: SlurmJob | None = None  # what squeue says, where it was asked
    resume_first: tuple[str, ...] | None = None  # of a job whose chain broke before its turn: the runs to resume before
    unrecorded_end: dict[str, Any] | None = None  # of a job that was cancelled in Slurm: the event that nobody wrote

    @property
    def at_rest(self) -> bool:
        return self.state in AT_REST


def judge(run: RunFolder, queue: SlurmQueue | None = None) -> Judgement:
    """Find out the state of a run.

    For a Slurm job this asks squeue, without a `queue` at every call: do not call it in a tight loop. Raises
    RunFolderError when this is no run.
    """
    events = run.events()
    attempt = max((event["attempt"] for event in events), default=0)
    latest = [event for event in events if event["attempt"] == attempt]
    facts = {key: value for event in latest for key, value in event.items()}
    executor, job_id = str(facts.get("executor", "none")), facts.get("job_id")
    end, kinds = last_end(latest), {event["event"] for event in latest}
    slurm: SlurmJob | None = None
    resume_first: tuple[str, ...] | None = None
    state: State
    if not latest:
        state, detail = "failed", "its submission was not completed: no attempt is recorded"
    elif end is not None and not end.get("requeued"):
        state, detail = end["cause"], end.get("detail") or ""
        if end.get("kind") == "cancelled" and executor == "slurm" and "start" in kinds and "saved" not in detail:
            detail = f"{detail}; {_newest_checkpoint(run)}"  # its ranks may have saved since that was written
    else:
        if executor == "slurm":
            slurm = (queue or SlurmQueue()).job(str(job_id))
            state, detail = _state_in_slurm(run, attempt, latest, slurm)
            if slurm is not None and slurm.is_gone and (broken := _chain_broken(run, latest)) is not None:
                state, (detail, resume_first) = "failed", broken
        elif end is not None:
            state, detail = "pending", f"requeued: {end.get('detail')}"
        else:
            state, detail = _state_of_processes(run, attempt, latest, facts)
        if state in AT_REST and len(run.events()) > len(events):
            return judge(run, queue)  # it wrote its end between our looking at the records and at the processes
    unrecorded = None
    if slurm is not None and slurm.is_gone and state == "stopped":
        unrecorded = unrecorded_cancel(run, attempt, slurm.job_id)
    return Judgement(state, detail, attempt, executor, job_id, slurm, resume_first, unrecorded)


def record_unrecorded_end(run: RunFolder) -> None:
    """Append the end of a run's last attempt if it was cancelled in Slurm and nobody has."""
    now = judge(run)
    if now.unrecorded_end is not None:
        record_cancelled(run, now.attempt, str(now.job_id))


def last_end(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the end that counts among one attempt's events.

    The last one: a job that went back to the queue has an end, and a second if it is cancelled there.
    """
    return next((event for event in reversed(events) if event["event"] == "end"), None)


def poll_interval_s(executor: str) -> float:
    """Return how often to ask for a run's state: Slurm's controller serves others too."""
    return 10.0 if executor == "slurm" else 0.3


def judge_now_and_when_again(run: RunFolder) -> tuple[Judgement, float]:
    """Judge a run that is being watched, and return when to do so again, on the clock of time.monotonic().

    The record of a run of weeks takes a while to read: at most a tenth of the time is spent on it.
    """
    began = time.monotonic()
    found, ended = judge(run), time.monotonic()
    return found, ended + max(poll_interval_s(found.executor), 10 * (ended - began))


def _state_in_slurm(
    run: RunFolder, attempt: int, latest: list[dict[str, Any]], slurm: SlurmJob | None
) -> tuple[State, str]:
    """Judge a Slurm job that has not recorded its last end."""
    end, started = last_end(latest), any(event["event"] == "start" for event in latest)
    if slurm is None:
        why = "squeue is not available here: by the run's own records"
        if end is not None:
            return "pending", f"{_requeued(end)}; {why}"
        return ("running" if started else "pending"), why
    if slurm.is_gone:
        return _left_the_queue(run, attempt, slurm.job_id, end)
    if end is None:
        # with a start and no end, Slurm requeued it by itself
        return ("pending" if slurm.waits else "running"), slurm.in_words(first_life=not started)
    told = slurm.in_words(first_life=False)
    if slurm.began_after(end.get("ended", end["time"])):
        return "running", f"{told}; the life after attempt {attempt} is starting"
    return "pending", f"{_requeued(end)}; {told if slurm.waits else 'it is on its way into the queue'}"


def _chain_broken(run: RunFolder, latest: list[dict[str, Any]]) -> tuple[str, tuple[str, ...]] | None:
    """Say that Slurm dropped a job because the run it waited for did not finish, and which runs to resume before it.

    None if that is not why it is gone.
    """
    after = next((event["after"] for event in latest if event.get("after")), None)
    if after is None or after["job_id"] is None or any(event["event"] == "start" for event in latest):
        return None
    before = judge(RunFolder(Path(after["run_dir"])))
    if before.job_id == after["job_id"] and before.state not in ("stopped", "failed"):
        return None
    first = [*(before.resume_first or ()), *([after["run_dir"]] if before.state in ("stopped", "failed") else [])]
    broke = first[0] if before.resume_first else after["run_dir"]  # the one that really broke the chain
    cause = judge(RunFolder(Path(broke))) if before.resume_first else before
    told = f"it never started: the run it waited for did not finish, {broke} is {cause.state}"
    told += f": {cause.detail.partition(_WAY_ON)[0]}" if cause.detail else ""
    return told + _WAY_ON + ", then ".join(f"mvit resume {path}" for path in (*first, run.path)), tuple(first)


def _requeued(end: dict[str, Any]) -> str:
    return f"requeued: {end.get('detail')}"


def _left_the_queue(run: RunFolder, attempt: int, job_id: str, end: dict[str, Any] | None) -> tuple[State, str]:
    """Judge a Slurm job that is no longer in the queue and left no final record."""
    word = final_state(job_id)
    if word in CANCELLED:
        return "stopped", f"{end_in_words(word)}; {_newest_checkpoint(run)}"
    failure = None if end is not None else first_failure(run, attempt)
    unrecorded = f"{end_in_words(word)}; it left no final record"
    return "failed", unrecorded if failure is None else f"{failure.headline} ({unrecorded})"


def _newest_checkpoint(run: RunFolder) -> str:
    step = run.checkpoint_step()
    return f"the newest checkpoint is of step {step}" if step else "not saved"


def _state_of_processes(
    run: RunFolder, attempt: int, latest: list[dict[str, Any]], facts: dict[str, Any]
) -> tuple[State, str]:
    """Judge a run of this machine that has not recorded its end."""
    running: State = "running" if any(event["event"] == "start" for event in latest) else "pending"
    process = identity_from(facts.get("process"))
    if process is not None and not is_local(process):
        return running, f"on {process.host} or before a reboot: by the run's own records"
    alive = process is not None and is_alive(process)
    if alive or any(is_alive_record(record) for record in run.rank_records(attempt)):
        return running, ""
    failure = first_failure(run, attempt)
    return "failed", "its processes are gone without a final record" if failure is None else failure.headline
