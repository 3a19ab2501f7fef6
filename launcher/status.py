"""One run at one moment: its state, how far it is, where its time went, and how its last life ended."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.evaluation_job import SUBJECT, Evaluation
from launcher.judgement import AT_REST, Judgement, State, judge, last_end, poll_interval_s
from launcher.run_folder import RunFolder, parse_json_line, read_record
from launcher.slurm_queue import SlurmQueue

if TYPE_CHECKING:
    from mvit.ledger import Account

_OF_THE_LEDGER = ("ettr", "mttf_h", "checkpoint_overhead", "lost_gpu_hours")  # older than the account that is shown
_NOT_SHOWN = ("kind", "time", "step", "total_steps", "eta_s", *_OF_THE_LEDGER)
_BLOCK = 1 << 18  # bytes read at once from the end of metrics.jsonl
_MOST_BLOCKS = 32  # a run that never evaluates is not read to its beginning


@dataclass(frozen=True)
class RunState:
    """One run at one moment."""

    run_dir: str
    name: str
    state: State
    detail: str  # why, in one line; empty when the state says it all
    attempt: int
    executor: str  # local | slurm | inline (`mvit train`) | none
    job_id: str | None
    hosts: list[str]  # of the last life that started
    activity: str  # what it does while nothing is logged: queued, starting; empty once it trains
    step: int
    total_steps: int | None
    checkpoint_step: int
    samples_per_s: float | None  # the last logged, as the next two
    loss: float | None
    eta_s: float | None  # seconds from now to the end, of a run that trains
    metrics: dict[str, Any]  # the last `train` record
    evaluation: dict[str, Any]  # the last `evaluate` record of the training
    evaluation_ema: dict[str, Any]  # the last of the averaged weights
    evaluation_job: dict[str, Any]  # what the last job of its chain found: step, checkpoint, weights, figures, time
    evaluates: str  # the run that this job evaluates; empty for one that trains
    stop_requested: bool  # by `mvit stop`, and it has not ended yet
    resume_first: list[str] | None  # of a job whose chain broke before its turn: the runs to resume before it
    excluded: list[dict[str, Any]]  # nodes that later lives avoid: host, until (seconds since the epoch), why
    last_end: dict[str, Any]  # of the last life that ended: attempt, time, kind, cause, detail, reason, rank, host
    ledger: dict[str, Any]  # where the time went: `Account` of mvit/ledger.py
    where_time_went: str  # the same for people

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @property
    def at_rest(self) -> bool:
        return self.state in AT_REST

    @property
    def headline(self) -> str:
        if self.resume_first is not None:  # what it says of another run has brackets of its own
            return f"{self.name}: {self.state}: {self.detail}"
        return f"{self.name}: {self.state}" + (f" ({self.detail})" if self.detail else "")

    def __str__(self) -> str:
        return f"{self.headline}\n{self.body}"

    @property
    def body(self) -> str:
        """All but the headline."""
        job = "" if self.job_id is None else f", job {self.job_id}"
        hosts = f" on {', '.join(self.hosts)}" if self.hosts else ""
        lines = [f"attempt {self.attempt}, {self.executor}{job}{hosts}; {self.run_dir}"]
        if self.activity:
            lines.append(self.activity)
        if self.stop_requested:
            lines.append(
                "asked to stop (`mvit stop`): it saves after a step, its first one if it is starting, and ends"
            )
        total, saved = "", "no checkpoint yet"
        if self.total_steps:
            total = f" of {self.total_steps} ({self.step / self.total_steps:.0%})"
        if self.checkpoint_step:
            saved = f"last checkpoint at step {self.checkpoint_step}"
        if self.evaluates:
            lines.append(f"evaluates {f'step {self.step} of ' if self.step else ''}{self.evaluates}")
        else:
            lines.append(f"step {self.step}{total}, {saved}" + (f", {eta_text(self.eta_s)}" if self.eta_s else ""))
        evaluated = f"evaluation in training at step {self.evaluation.get('step')}"
        if self.evaluates:
            evaluated = "figures"
        averaged = f"evaluation in training at step {self.evaluation_ema.get('step')}, averaged weights"
        own_job = (
            f"evaluation by a job of its own at step {self.evaluation_job.get('step')}, "
            f"{self.evaluation_job.get('weights')} weights"
        )
        records = {
            "last metrics": self.metrics,
            evaluated: self.evaluation,
            averaged: self.evaluation_ema,
            own_job: self.evaluation_job.get("figures", {}),
        }
        for title, record in records.items():
            told = [f"{key} {_short(record[key])}" for key in record if key not in _NOT_SHOWN and not _is_detail(key)]
            if told:
                lines.append(f"{title}: {'  '.join(told)}")
        lines += [told for told in (step_parts(self.metrics), self.where_time_went) if told]
        if self.last_end and not (self.at_rest and self.last_end["attempt"] == self.attempt):
            kind, detail = self.last_end.get("kind") or self.last_end["cause"], self.last_end.get("detail")
            lines.append(f"attempt {self.last_end['attempt']} ended: {kind}" + (f": {detail}" if detail else ""))
        for node in self.excluded:
            until = time.strftime("%Y-%m-%d %H:%M", time.localtime(node["until"]))
            lines.append(f"excluded until {until}: {node['host']}" + (f" ({node['why']})" if node["why"] else ""))
        return "\n".join(lines)


def run_state(run_dir: str | Path, queue: SlurmQueue | None = None) -> RunState:
    """Return a run's state with its latest figures; for a Slurm job this asks squeue, unless `queue` knows.

    Raises RunFolderError when the folder is not a run.
    """
    from mvit.ledger import account

    run, now = RunFolder(Path(run_dir)), time.time()
    identity = run.identity()
    judgement = judge(run, queue)
    events = run.events()
    if judgement.unrecorded_end is not None:
        events.append(judgement.unrecorded_end)  # as `mvit resume` will write it
    records = newest_records(run.metrics_file)
    train, evaluation = records.get("train", {}), records.get("evaluate", {})
    latest = [event for event in events if event["attempt"] == judgement.attempt]
    start = next((event for event in latest if event["event"] == "start"), None)
    if not judgement.at_rest and (judgement.state == "pending" or last_end(latest) is not None):
        start = None  # of the life before: the one that is to come has no nodes yet
    subject = str(identity.get(SUBJECT, ""))
    step = int(train.get("step", 0))
    if subject:  # while it has not begun, nobody knows yet which checkpoint that will be
        finished = RunFolder(Path(subject)).checkpoint_step() if judgement.state == "running" else 0
        step = int(evaluation.get("step", finished))
    where = account(events, _end_of(events, judgement, now))
    activity = _activity(run, judgement, events, train, now)
    return RunState(
        run_dir=str(run.path),
        name=str(identity.get("name")),
        state=judgement.state,
        detail=judgement.detail,
        attempt=judgement.attempt,
        executor=judgement.executor,
        job_id=judgement.job_id,
        hosts=[] if start is None else list(start.get("hosts") or []),
        activity=activity,
        step=step,
        total_steps=train.get("total_steps"),
        checkpoint_step=run.checkpoint_step(),
        samples_per_s=train.get("samples_per_s"),
        loss=train.get("loss"),
        eta_s=None if activity or judgement.state != "running" else _eta_s(train, now),
        metrics=train,
        evaluation=evaluation,
        evaluation_ema=records.get("evaluate_ema", {}),
        evaluation_job=read_record(Evaluation(run).result_file) or {},
        evaluates=subject,
        stop_requested=not judgement.at_rest and run.stop_file(judgement.attempt).exists(),
        resume_first=None if judgement.resume_first is None else list(judgement.resume_first),
        excluded=excluded_nodes(events, now),
        last_end=last_end(events) or {},
        ledger=json.loads(json.dumps(where.to_dict())) if where.lives else {},  # lists, as a reader of --json has them
        where_time_went="" if subject else _where_time_went(where),
    )


def wait_for_end(run_dir: str | Path, timeout_s: float) -> RunState:
    """Wait until a run is stopped, failed or finished, at most `timeout_s`; return its state then."""
    run, deadline = RunFolder(Path(run_dir)), time.monotonic() + timeout_s
    while not (now := judge(run)).at_rest and time.monotonic() < deadline:
        time.sleep(poll_interval_s(now.executor))
    return run_state(run_dir)


def newest_records(path: Path) -> dict[str, dict[str, Any]]:
    """Return the newest record of each kind in metrics.jsonl, read from its end.

    The search ends where both a training record and an evaluation are found: what an evaluation wrote besides stands
    close to it.
    """
    found: dict[str, dict[str, Any]] = {}
    rest = b""
    try:
        with path.open("rb") as file:
            position = file.seek(0, 2)
            for _ in range(_MOST_BLOCKS):
                begin = max(0, position - _BLOCK)
                file.seek(begin)
                first, *lines = (file.read(position - begin) + rest).split(b"\n")
                position, rest = begin, first
                for line in reversed([first, *lines] if begin == 0 else lines):
                    record = parse_json_line(line)
                    if record is not None and "kind" in record:
                        found.setdefault(record["kind"], record)
                if begin == 0 or {"train", "evaluate"} <= found.keys():
                    break
    except FileNotFoundError:
        pass  # nothing was logged yet
    return found


def excluded_nodes(events: Sequence[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """Return the nodes that lives which start now avoid, with the last word on each."""
    nodes: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "exclude":
            why = event.get("why") or {}
            for host in event.get("hosts", ()):
                nodes[host] = {"host": host, "until": event.get("until", 0.0), "why": why.get(host, "")}
    return [node for node in nodes.values() if node["until"] > now]


def step_parts(train: dict[str, Any]) -> str:
    """Say what the steps of the last record spent their time on, largest first, and which rank was slowest."""
    names = [key for key in train if key.endswith("_seconds") and key != "step_seconds"]
    parts = {key.removesuffix("_seconds"): train[key] for key in names}
    total = sum(parts.values())
    if not total:
        return ""
    shares = sorted(((value / total, part) for part, value in parts.items()), reverse=True)
    told = ", ".join(f"{part} {share:.0%}" for share, part in shares if share >= 0.005)
    text = f"time of a step: {_short(total)} s: {told}"
    if "slowest_rank" in train:
        text += f"; slowest rank {train['slowest_rank']:.0f}, {train['slowest_excess']:.0%} above the median"
    return text


def _is_detail(key: str) -> bool:
    """Tell what stands in a line of its own, or in TensorBoard."""
    return key.endswith("_seconds") or key.startswith(("slowest_", "weight_norm_", "lr_", "loss_"))


def eta_text(eta_s: float) -> str:
    """Return how long it takes and when that is."""
    from mvit.progress import format_duration

    day = "%H:%M" if eta_s < 12 * 3600 else "%Y-%m-%d %H:%M"
    return f"ETA {format_duration(eta_s)} ({time.strftime(day, time.localtime(time.time() + eta_s))})"


def _eta_s(train: dict[str, Any], now: float) -> float | None:
    if train.get("eta_s") is None:
        return None
    return max(0.0, train["eta_s"] - max(0.0, now - train.get("time", now)))


def _activity(
    run: RunFolder, judgement: Judgement, events: list[dict[str, Any]], train: dict[str, Any], now: float
) -> str:
    """Say what a run does that has not logged anything in its current life."""
    if judgement.at_rest or not events:
        return ""
    latest = [event for event in events if event["attempt"] == judgement.attempt]
    by_kind = {event["event"]: event for event in latest}
    since = by_kind.get("start")
    if judgement.state == "pending" or since is None or "end" in by_kind:
        waits = "queued" if judgement.state == "pending" else "starting"
        return f"{waits} for {_seconds(now - latest[-1]['time'])}"
    if max(train.get("time", 0.0), by_kind.get("progress", since)["time"]) > since["time"]:
        return ""
    if SUBJECT in run.identity():
        where = _slowest(run, judgement.attempt)
        return f"at work for {_seconds(now - since['time'])}: its figures come at the end{where}"
    return f"starting for {_seconds(now - since['time'])}: {start_up(latest)}{_slowest(run, judgement.attempt)}"


def start_up(latest: Sequence[dict[str, Any]]) -> str:
    """Say how far the start of a life is by its events; empty if it has not begun, or has ended."""
    by_kind = {event["event"]: event for event in latest}
    if "start" not in by_kind or "end" in by_kind:
        return ""
    if "first_step" in by_kind:
        return "training, nothing logged yet" if "progress" not in by_kind else "training"
    if "restored" in by_kind:
        return "its first step"
    step = by_kind["start"].get("checkpoint_step")
    return "imports, process group, model, data" + (f", checkpoint of step {step}" if step else "")


def _slowest(run: RunFolder, attempt: int) -> str:
    """Name the phase that the ranks' own records are in, where the guards keep it up to date."""
    phases = {record["last_phase"] for record in run.rank_records(attempt) if record.get("last_phase")}
    return f" (ranks are in: {', '.join(sorted(phases))})" if phases else ""


def _end_of(events: list[dict[str, Any]], judgement: Judgement, now: float) -> float:
    """Return until when to account: a run that ended without a record did nothing after its last sign of life."""
    return max((event["time"] for event in events), default=now) if judgement.at_rest else now


def _where_time_went(where: "Account") -> str:
    """Say it if anything is known: runs of before such events were kept have lives and ends alone."""
    if where.run_s > where.other_s:
        return str(where)
    return f"lives: {', '.join(f'{count} {kind}' for kind, count in where.ends.items())}" if where.ends else ""


def _seconds(seconds: float) -> str:
    from mvit.progress import format_duration

    return f"{max(0.0, seconds):.0f} s" if seconds < 120 else format_duration(seconds)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
