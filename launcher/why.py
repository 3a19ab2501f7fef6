"""Why a run is as it is: what ended a life, on which rank and node, what followed, why a queued job does not start."""

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.ending import classify
from launcher.evaluation_job import SUBJECT
from launcher.failure import KILL_HINT, failure_text, first_failure
from launcher.fired_faults import FiredFault, fired_faults
from launcher.judgement import Judgement, judge, last_end
from launcher.logs import number_ranges
from launcher.processes import node_name
from launcher.run_folder import RunFolder, RunFolderError, rank_file, read_record
from launcher.slurm import read_slurm
from launcher.slurm_queue import SlurmQueue
from launcher.status import RunState, excluded_nodes

_TIME = "%Y-%m-%d %H:%M:%S"
NEVER = "never started"  # instead of the kind of an end, of a job whose chain broke before its turn
_NO_RANK_S_FAULT = ("hung", "preempted", "fenced")  # what ranks then say is of their being ended


@dataclass(frozen=True)
class LifeLine:
    """One life in a line of the history."""

    attempt: int
    start: float | None  # seconds since the epoch; None: it never left the queue
    hosts: list[str]
    first_step: int | None  # first it completed
    last_step: int | None
    kind: str  # of its end; queued or running for a life that has none
    detail: str
    reason: str  # why it was requeued or not


@dataclass(frozen=True)
class Explanation:
    """What ended one life of a run, and what became of the run."""

    run_dir: str
    name: str
    evaluates: str  # the run that this job evaluates; empty for one that trains
    state: str
    detail: str
    attempt: int | None  # the life explained; None while no life has ended
    end: dict[str, Any]  # its end event; without a record of one, what its ranks' records tell
    first_failure: dict[str, Any]  # of a rank that failed: rank, host, headline, text
    ranks: list[dict[str, Any]]  # where the ranks were: phase, step (that of the phase, not the last done), ranks
    drills: list[dict[str, Any]]  # faults of MVIT_FAULTS that happened in it: fault, rank, where, time
    signals: dict[str, list[int]]  # signal received → ranks
    stacks: dict[str, str]  # of a hang, of the rank it began with: file, text
    num_stacks: int  # ranks whose stacks were dumped
    out_of_memory: str  # of a rank killed by SIGKILL: what the kernel's log says, or where to look
    excluded: list[dict[str, Any]]  # nodes that later lives avoid: host, until, why
    resume_first: list[str]  # of a job whose chain broke before its turn: the runs to resume before it
    history: list[LifeLine]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.state}"]
        if self.evaluates:
            lines.append(f"  evaluates {self.evaluates}")
        if self.detail and self.detail != self.end.get("detail"):
            lines.append(f"  {self.detail}")
        if self.attempt is None:
            lines.append("no life has ended yet")
        else:
            lines += ["", *self._end_lines(), *self._decision_lines()]
        return "\n".join([*lines, "", *_table(self.history)])

    def _end_lines(self) -> list[str]:
        kind = self.end.get("kind") or self.end["cause"]
        ended = self.end.get("ended", self.end.get("time"))  # the second is when that was written
        when = "" if ended is None else time.strftime(f" on {_TIME}", time.localtime(ended))
        lines = [
            f"attempt {self.attempt} never started" if kind == NEVER else f"attempt {self.attempt} ended{when}: {kind}"
        ]
        if detail := self.end.get("detail"):
            lines.append(f"  {detail}")
        failure = self.first_failure
        if failure and failure["headline"] not in str(detail):
            lines.append(f"  first to fail: {failure['headline']}")
        lines += [f"  {text}" for text in _drill_lines(self.drills) if text not in failure.get("text", "")]
        if self.signals:
            told = "; ".join(f"{name} reached rank(s) {number_ranges(ranks)}" for name, ranks in self.signals.items())
            lines.append(f"  {told}")
        if kind != "finished" and (len(self.ranks) > 1 or kind == "hung"):
            lines += [
                f"  {len(place['ranks'])} rank(s) {_place(place['phase'], place['step'])}: "
                f"{number_ranges(place['ranks'])}"
                for place in self.ranks
            ]
        if self.out_of_memory:
            lines.append(f"  {self.out_of_memory}")
        text = str(failure.get("text", ""))
        if self.out_of_memory:  # which says more of the same
            text = text.replace(KILL_HINT, "")
        if text.strip():
            lines += ["", text.rstrip()]
        if self.stacks:
            lines += ["", f"--- {self.stacks['file']}", self.stacks["text"].rstrip()]
            if self.num_stacks > 1:
                lines.append(f"stacks of all {self.num_stacks} ranks: mvit logs {self.run_dir} --stacks --all")
        return [*lines, ""]

    def _decision_lines(self) -> list[str]:
        if self.end.get("kind") == "finished":
            return ["what followed: nothing is left to do"]
        if self.end.get("kind") == NEVER:
            return []  # its detail names the way on
        did = "requeued" if self.end.get("requeued") else "not requeued"
        if did == "not requeued" and any(life.attempt > (self.attempt or 0) for life in self.history):
            did = ""  # by itself: somebody resumed it, or Slurm requeued a job that could not ask for it any more
        told = ": ".join(part for part in (did, str(self.end.get("reason") or "")) if part)
        lines = [f"what followed: {told or 'another life'}"]
        if blamed := self.end.get("blamed"):
            lines.append(f"blamed: {', '.join(blamed)}")
        for node in self.excluded:
            until = time.strftime(_TIME, time.localtime(node["until"]))
            lines.append(f"left out until {until}: {node['host']}" + (f" ({node['why']})" if node["why"] else ""))
        if self.state in ("stopped", "failed"):
            lines.append(f"continue with: mvit resume {self.run_dir}")
        return lines


def explain(run_dir: str | Path, attempt: int | None = None, queue: SlurmQueue | None = None) -> Explanation:
    """Explain the last end of a run, or that of one attempt; for a job that waits, why it does.

    Raises RunFolderError when the folder is no run, or has no such attempt.
    """
    run, now = RunFolder(Path(run_dir)), time.time()
    name = str(run.identity().get("name"))
    judgement = judge(run, queue)
    events = [*run.events(), *([judgement.unrecorded_end] if judgement.unrecorded_end else [])]
    ends = {event["attempt"]: event for event in events if event["event"] == "end"}
    attempts = {event["attempt"] for event in events}
    if attempt is not None and attempt not in attempts:
        raise RunFolderError(
            f"{run.path} has no attempt {attempt}: there are {number_ranges(attempts) or 'none'}, counted from 1."
        )
    if attempt is None:
        over = sorted(ends) if not judgement.at_rest else sorted(attempts)
        attempt = over[-1] if over else None
    elif attempt == judgement.attempt and attempt not in ends and not judgement.at_rest:
        attempt = None  # it has not ended
    end = {} if attempt is None else _end_of(run, attempt, events, judgement)
    hung = end.get("kind") == "hung"
    records = [] if attempt is None else run.rank_records(attempt)
    failed = end.get("cause") == "failed" and end.get("kind") not in (*_NO_RANK_S_FAULT, NEVER)
    failure = _first_failure(run, attempt) if failed and attempt is not None else {}
    drills = fired_faults(run, records)
    drilled = any(drill.is_kill and drill.rank == failure.get("rank") for drill in drills)
    stacks = [] if attempt is None else sorted(run.attempt_dir(attempt).glob("rank_*.stacks.txt"))
    history = _history(events, judgement, now)
    if SUBJECT in run.identity():  # it makes no steps of its own: what it is told of is its subject's
        history = [replace(line, first_step=None, last_step=None) for line in history]
    return Explanation(
        run_dir=str(run.path),
        name=name,
        evaluates=str(run.identity().get(SUBJECT, "")),
        state=judgement.state,
        detail=judgement.detail,
        attempt=attempt,
        end=end,
        first_failure=failure,
        ranks=_places(records),
        drills=[asdict(drill) for drill in drills],
        signals=_signals(records),
        stacks=_stacks_of_first(run, attempt, end) if hung and attempt is not None else {},
        num_stacks=len(stacks),
        out_of_memory="" if drilled else _out_of_memory(records, failure, judgement),
        excluded=excluded_nodes(events, now),
        resume_first=list(judgement.resume_first or ()),
        history=history,
    )


def failure_details(run: RunFolder, state: RunState) -> str:
    """Return what belongs under the headline of a failed run: the traceback or log of the rank that failed first.

    A sentence that stands in the headline already is not repeated.
    """
    more = f"more: mvit why {run.path}"
    if state.resume_first is not None:
        return more
    if state.last_end.get("kind", "error") not in ("error", "killed"):
        return more
    first, _, rest = failure_text(run, state.attempt).partition("\n")
    text = rest if first in state.detail else f"{first}\n{rest}"
    return f"{text.rstrip()}\n{more}".lstrip()


def _end_of(run: RunFolder, attempt: int, events: Sequence[dict[str, Any]], judgement: Judgement) -> dict[str, Any]:
    """Return how an attempt ended: as recorded, else as its ranks' records tell."""
    end = last_end([event for event in events if event["attempt"] == attempt])
    if end is not None:
        return end
    if attempt == judgement.attempt and judgement.resume_first is not None:
        return {"cause": judgement.state, "kind": NEVER, "detail": judgement.detail, "reason": ""}
    facts = classify(run, attempt, None).facts()
    if attempt != judgement.attempt:
        return facts
    return facts | {"cause": judgement.state, "detail": judgement.detail, "reason": "nobody was left to decide"}


def _first_failure(run: RunFolder, attempt: int) -> dict[str, Any]:
    failure = first_failure(run, attempt)
    if failure is None and run.rank_records(attempt):
        return {}  # they ended without an error of their own: a lost node, for one
    if failure is None:
        text = failure_text(run, attempt)
        return {"rank": None, "host": None, "headline": text.partition("\n")[0], "text": text.partition("\n")[2]}
    record = next((record for record in run.rank_records(attempt) if record["rank"] == failure.rank), {})
    return {"rank": failure.rank, "host": record.get("node"), "headline": failure.headline, "text": failure.text}


def _places(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Group ranks by where they were when they ended, the fewest first: the odd one out is of interest."""
    places: dict[tuple[str, int], list[int]] = {}
    for record in records:
        if record.get("last_phase") is not None:
            places.setdefault((record["last_phase"], record.get("last_step") or 0), []).append(record["rank"])
    found = [{"phase": phase, "step": step, "ranks": ranks} for (phase, step), ranks in places.items()]
    return sorted(found, key=lambda place: len(place["ranks"]))


def _place(phase: str, step: int) -> str:
    """Say where a rank was: the step of a batch or of the step itself is under way, that of other phases is done."""
    if step == 0:  # in a job that only evaluates it stays 0
        return "before the first step" if phase == "start" else f"in phase {phase}"
    if phase in ("data", "compute"):
        return f"in step {step} ({phase})"
    return f"leaving after step {step}" if phase == "end" else f"after step {step} ({phase})"


def _drill_lines(drills: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each fault, one for all ranks that it was asked for on."""
    same: dict[tuple[str, str], list[FiredFault]] = {}
    for drill in drills:
        fired = FiredFault(**drill)
        same.setdefault((fired.fault.partition(":")[0], fired.where), []).append(fired)
    return [
        str(some[0])
        if len(some) == 1
        else f"{replace(some[0], fault=fault)}, on ranks {number_ranges(one.rank for one in some)}"
        for (fault, _), some in same.items()
    ]


def _signals(records: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    received: dict[str, list[int]] = {}
    for record in records:
        for name in sorted({str(signal["name"]) for signal in record.get("signals", [])}):
            received.setdefault(name, []).append(record["rank"])
    return received


def _stacks_of_first(run: RunFolder, attempt: int, end: Mapping[str, Any]) -> dict[str, str]:
    rank = end.get("rank")
    if rank is None:
        rank = (read_record(run.attempt_dir(attempt) / "hang.json") or {}).get("rank")
    file = None if rank is None else rank_file(run.attempt_dir(attempt), int(rank), ".stacks.txt")
    if file is None or not file.exists():
        return {}
    return {"file": str(file), "text": file.read_text(errors="replace")}


def _out_of_memory(records: Sequence[Mapping[str, Any]], failure: Mapping[str, Any], judgement: Judgement) -> str:
    """Look into the kernel's log for the rank that failed first, if it was killed by SIGKILL and that node is this."""
    record = next((record for record in records if failure and record["rank"] == failure["rank"]), None)
    if record is None or record.get("signal") != "SIGKILL" or record.get("ended_because"):
        return ""
    node = str(record.get("node"))
    log = _kernel_log() if node == node_name() else None
    found = re.findall(rf"^.*[Kk]illed process {record['pid']}\b.*$", log or "", re.MULTILINE)
    if found:
        return f"the kernel ended it for want of memory: {found[-1].strip()}"
    if log is not None:
        return "the kernel's log here does not say that it was for want of memory: somebody's kill -9, or a container's"
    facts = read_slurm(accounting=False) if judgement.executor == "slurm" else None
    recorded = facts is not None and facts.has_accounting
    job = f", or `sacct -j {judgement.job_id} -o State,MaxRSS`" if recorded else ""
    return f"if it was for want of memory, `dmesg -T | grep -i 'killed process'` on {node} says so{job}"


def _kernel_log() -> str | None:
    try:
        result = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def _history(events: Sequence[dict[str, Any]], judgement: Judgement, now: float) -> list[LifeLine]:
    from mvit.ledger import account

    lines = []
    for life in account(events, now).lives:
        own = [event for event in events if event["attempt"] == life.attempt]
        end = last_end(own) or {}
        lines.append(
            LifeLine(
                attempt=life.attempt,
                start=next((event["time"] for event in own if event["event"] == "start"), None),
                hosts=list(life.hosts),
                first_step=life.first_step,
                last_step=life.last_step,
                kind=life.kind or _unended(life.attempt, judgement),
                detail=str(end.get("detail") or ""),
                reason="" if life.kind == "finished" else str(end.get("reason") or ""),
            )
        )
    return lines


def _unended(attempt: int, judgement: Judgement) -> str:
    """Return what the history says of an attempt without an end on record."""
    if attempt != judgement.attempt:
        return "lost"
    return judgement.state if judgement.resume_first is None else NEVER


def _table(history: Sequence[LifeLine]) -> list[str]:
    rows = [("attempt", "start", "nodes", "steps", "end", "reason")]
    for life in history:
        start = "never" if life.start is None else time.strftime(_TIME, time.localtime(life.start))
        steps = "none" if life.first_step is None else f"{life.first_step}-{life.last_step}"
        hosts = ",".join(life.hosts) if len(life.hosts) < 4 else f"{life.hosts[0]} and {len(life.hosts) - 1} more"
        rows.append((str(life.attempt), start, hosts or "-", steps, life.kind, life.reason or life.detail))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join([*map(str.ljust, row, widths), row[5]]).rstrip() for row in rows]
