"""What Slurm says of jobs: whether they are queued, why they wait, in plain words, and how those that left ended."""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

_ASK_AGAIN_S = 10.0  # Slurm's controller serves others too
_TIMEOUT_S = 20.0  # of one question: a controller that is down makes every command wait
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
_REASONS = {
    "None": "Slurm has not looked at it yet",
    "Priority": "other jobs stand before it in the queue",
    "Resources": "it is next, and waits for free nodes, GPUs or memory",
    "BeginTime": "its begin time has not come: after a requeue Slurm waits until the credential of the last life has "
    "expired (cred_expire, two minutes by default)",
    "Cleaning": "its last life is still being cleaned up on the nodes",
    "Prolog": "the prolog of its last life still runs",
    "Dependency": "it waits for the end of a job that it depends on",
    "DependencyNeverSatisfied": "the job it depends on did not end as required, so it will never start: `mvit cancel`",
    "PartitionConfig": "it asks for more than its partition has (nodes, for one), so it will never start as it is: "
    "`mvit cancel`, then `mvit resume` with fewer --nodes",
    "PartitionNodeLimit": "it asks for more (or fewer) nodes than its partition allows, so it will never start as it "
    "is: `mvit cancel`, then `mvit resume` with other --nodes",
    "PartitionTimeLimit": "its time limit is above its partition's, so it will never start as it is: `mvit cancel`, "
    "then `mvit resume` with a smaller timeout_min=",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition starts no jobs at present",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "Nodes": "nodes that it needs are down, drained or reserved",
    "NodeDown": "a node that it needs is down",
    "BadConstraints": "no node can fulfil its constraints, so it will never start as it is: `mvit cancel`",
    "BeginTimeLimit": "its deadline cannot be met any more",
    "JobHeldUser": "it is held: `scontrol release {id}` lets it go",
    "JobHeldAdmin": "an administrator holds it",
    "JobLaunchFailure": "Slurm failed to start it on its nodes: `scontrol show job {id}`, `scontrol release {id}`",
    "launch": "Slurm failed to start it on its nodes and holds it: `scontrol release {id}` lets it try again",
    "Licenses": "it waits for a licence",
    "Reservation": "it waits for its reservation to begin",
    "ReservationDeleted": "its reservation no longer exists, so it will never start: `mvit cancel`",
    "InvalidAccount": "its account is not valid any more: `mvit cancel`, then `mvit resume` with another account=",
    "InvalidQOS": "its QOS is not valid any more: `mvit cancel`, then `mvit resume` with another qos=",
    "AccountNotAllowed": "its account may not use this partition: `mvit cancel`, then `mvit resume` with another one",
    "QOSNotAllowed": "its QOS may not use this partition: `mvit cancel`, then `mvit resume` with another one",
}
_REASONS_OF_A_FIRST_LIFE = {  # where the words above are about the life before
    "BeginTime": "the begin time that it was submitted with (sbatch's `begin`) has not come",
    "Prolog": "the prolog runs on its nodes",
}
NEVER_SATISFIED = "DependencyNeverSatisfied"
CANCELLED = ("CANCELLED", NEVER_SATISFIED)
"""Final states of a job that ended for nothing it did itself."""
_ENDS = {  # Slurm's final state → in words
    NEVER_SATISFIED: "the job it depends on did not end as required, so Slurm cancelled it",
    "CANCELLED": "it was cancelled in Slurm (scancel), not by `mvit cancel`",
    "TIMEOUT": "Slurm ended it at its time limit before it had saved: a larger signal_delay_s= gives it more time",
    "NODE_FAIL": "a node was lost and Slurm did not requeue it",
    "OUT_OF_MEMORY": "the kernel ended it for want of memory: a larger mem=, or fewer data.num_workers",
    "PREEMPTED": "it was preempted and Slurm did not requeue it",
    "BOOT_FAIL": "a node failed to boot",
    "DEADLINE": "its deadline was reached",
    "FAILED": "its batch script failed",
    "COMPLETED": "its batch script has ended",
}


@dataclass(frozen=True)
class SlurmJob:
    """One job as squeue shows it; state "" when it is not in the queue."""

    job_id: str
    state: str
    reason: str = ""
    start: str = ""  # of its current life, in local time; expected, for one that waits; "" when not known
    nodes: str = ""

    @property
    def is_gone(self) -> bool:
        return not self.state

    @property
    def waits(self) -> bool:
        """Whether it is queued: no process of it runs."""
        return self.state in _WAITING

    def began_after(self, moment: float) -> bool:
        """Tell whether the life that runs now began after `moment` (seconds since the epoch)."""
        try:
            return not self.waits and datetime.fromisoformat(self.start).timestamp() >= moment - 1.0
        except ValueError:
            return False

    def in_words(self, *, first_life: bool) -> str:
        """Say its state and why it waits, as a job that never ran or one that was requeued."""
        if not self.waits:
            return f"Slurm says {self.state}"
        when = f"; expected to start at {self.start.replace('T', ' ')}" if self.start else ""
        why = reason_in_words(self.reason, self.job_id, first_life=first_life)
        return f"Slurm says {self.state} ({self.reason}): {why}{when}"


def reason_in_words(reason: str, job_id: str, *, first_life: bool) -> str:
    """Say why a job waits. The reason is squeue's, which some versions print with words or nodes behind it."""
    name = re.split(r"[\s,_:(]", reason.strip("()"))[0] or "None"
    if first_life and name in _REASONS_OF_A_FIRST_LIFE:
        return _REASONS_OF_A_FIRST_LIFE[name]
    if name in _REASONS:
        text = _REASONS[name].format(id=job_id)
        nodes = re.search(r"UnavailableNodes:(\S+)", reason)
        return text if nodes is None else f"{text} ({nodes.group(1)})"
    if name.startswith(("QOS", "Assoc", "MaxQOS")):
        whose = "QOS" if "QOS" in name else "account"
        return f"a limit of its {whose} is reached; it waits until other jobs of it end"
    return f"see `scontrol show job {job_id}`"


class SlurmQueue:
    """Asks squeue about all jobs of interest at once, and not again before ten seconds have passed."""

    def __init__(self, ask_again_s: float = _ASK_AGAIN_S) -> None:
        self._ask_again_s = ask_again_s
        self._ids: set[str] = set()
        self._asked: set[str] = set()
        self._asked_at = float("-inf")
        self._answer: dict[str, SlurmJob] | None = None

    def expect(self, job_ids: Iterable[str]) -> None:
        """Name jobs that will be looked up, so that the next question is about all of them."""
        self._ids |= set(job_ids)

    def job(self, job_id: str) -> SlurmJob | None:
        """Return a job as last seen, None if squeue cannot be asked."""
        self._ids.add(job_id)
        if job_id not in self._asked or time.monotonic() - self._asked_at >= self._ask_again_s:
            self._answer, self._asked_at = ask_squeue(sorted(self._ids)), time.monotonic()
            self._asked = set(self._ids)
        return None if self._answer is None else self._answer[job_id]


def ask_squeue(job_ids: Sequence[str]) -> dict[str, SlurmJob] | None:
    """Return each job as squeue shows it, None if squeue cannot be asked."""
    result = _run(["squeue", "-h", "-a", "-j", ",".join(job_ids), "-o", "%i|%T|%r|%S|%N"])
    if result is None or (result.returncode != 0 and "Invalid job id" not in result.stderr):
        return None
    jobs = {job_id: SlurmJob(job_id, "") for job_id in job_ids}
    for line in result.stdout.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 5 and fields[0] in jobs:
            start = "" if fields[3] in ("N/A", "") else fields[3]
            jobs[fields[0]] = SlurmJob(fields[0], fields[1], fields[2], start, fields[4])
    return jobs


def final_state(job_id: str) -> str | None:
    """Return Slurm's word for how a job ended, None if neither the controller nor the accounting remembers it.

    Of a job that Slurm cancelled for a dependency's sake, the reason: it was nobody's scancel.
    """
    shown = _run(["scontrol", "-o", "show", "job", job_id])
    if shown is not None and (state := re.search(r"\bJobState=(\w+)", shown.stdout)):
        return NEVER_SATISFIED if f"Reason={NEVER_SATISFIED}" in shown.stdout else state.group(1)
    listed = _run(["sacct", "-n", "-X", "-P", "-j", job_id, "-o", "State"])
    if listed is None or not listed.stdout.strip():
        return None
    return listed.stdout.split()[0]  # "CANCELLED by 1000"


def final_time(job_id: str) -> float | None:
    """Return when a job ended (seconds since the epoch), None if nobody remembers it."""
    shown = _run(["scontrol", "-o", "show", "job", job_id])
    found = None if shown is None else re.search(r"\bEndTime=(\S+)", shown.stdout)
    listed = None if found is not None else _run(["sacct", "-n", "-X", "-P", "-j", job_id, "-o", "End"])
    text = found.group(1) if found is not None else "" if listed is None else listed.stdout.strip()
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # "Unknown"
        return None


def end_in_words(state: str | None) -> str:
    """Say what Slurm's final state means."""
    if state is None:
        return "Slurm no longer knows the job"
    return f"Slurm says {state}: {_ENDS.get(state, 'see `sacct`')}"


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str] | None":
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
