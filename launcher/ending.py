"""How a life ended: one of a few kinds, with the rank, node and step that were first, from what its ranks left."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.failure import Failure, first_failure
from launcher.preemption import EXIT_FENCED, EXIT_STOPPED
from launcher.run_folder import RunFolder, rank_file, read_records
from launcher.slurm import read_slurm

Kind = Literal[
    "finished", "user_stop", "signalled", "cancelled", "error", "killed", "hung", "node", "preempted", "lost", "fenced"
]
_CAUSES = {"finished": "finished", "user_stop": "stopped", "signalled": "stopped", "cancelled": "stopped"}
# What the drivers and libraries say when a device or link is broken, not the program.
_HARDWARE = re.compile(
    r"uncorrectable ECC|Xid|NVLink|hardware error|device.*(lost|fallen off)|ibv_|GPU is lost|Bus error|"
    r"CUDA error: (unspecified launch failure|uncorrectable)|Input/output error|Stale file handle",
    re.IGNORECASE,
)
_WAITING = ("torch/distributed/", "deepspeed/comm/")  # in whose files a rank waits for the others
_MARGIN_S = 1.0  # between the clocks of two nodes


@dataclass(frozen=True)
class Ending:
    """The end of one life."""

    kind: Kind
    detail: str
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    error: str | None = None
    """Type, message and place of an exception, without the numbers that differ between lives."""
    blamed: tuple[str, ...] = ()
    """Nodes that may be at fault."""

    @property
    def cause(self) -> str:
        return _CAUSES.get(self.kind, "failed")

    def facts(self) -> dict[str, object]:
        """Return what the end event of the ledger says about it."""
        given = {"rank": self.rank, "host": self.host, "step": self.step, "error": self.error}
        known = {key: value for key, value in given.items() if value is not None}
        return {"cause": self.cause, "kind": self.kind, "detail": self.detail, "blamed": list(self.blamed), **known}


def classify(run: RunFolder, attempt: int, exit_code: int | None) -> Ending:
    """Say how a life ended; `exit_code` is the highest of its ranks', None where Slurm left nobody to see it."""
    records = run.rank_records(attempt)
    if exit_code == 0:
        return Ending("finished", "the run is complete", step=_last_step(records))
    codes = [record.get("exit_code") for record in records]
    if exit_code == EXIT_STOPPED or EXIT_STOPPED in codes:  # one that left this way knows that all have saved
        asked = run.stop_file(attempt).exists()
        detail = "stopped by `mvit stop`" if asked else f"told to stop ({_signals_seen(records) or 'by signal'})"
        return Ending("user_stop" if asked else "signalled", f"{detail}, everything saved", step=_last_step(records))
    if exit_code == EXIT_FENCED:
        return Ending("fenced", "a later life had taken over", step=_last_step(records))
    if exit_code is None and (down := tuple(host for host in _hosts(run, attempt) if host in _nodes_down())):
        return _lost_nodes(down, records)
    if (hang := _hang(run, attempt, records)) is not None:
        return hang
    terminated = [signal["time"] for record in records for signal in record.get("signals", []) if _ends(signal)]
    failure = first_failure(run, attempt)
    if failure is not None and (exit_code is not None or _before(run, attempt, failure, min(terminated, default=None))):
        return _failed(run, attempt, failure, records)
    if exit_code is not None and not terminated:
        return Ending("lost", f"exit code {exit_code}; no rank left a record of why", step=_last_step(records))
    return _ended_by_slurm(run, attempt, records)


def _hang(run: RunFolder, attempt: int, records: Sequence[Mapping[str, Any]]) -> Ending | None:
    marks = read_records(run.attempt_dir(attempt), "hang.json")
    if not marks:
        return None
    silent = [record for record in records if record.get("last_beat") is not None]
    stacks = {record["rank"]: _stacks(run, attempt, record["rank"]) for record in silent}
    waiting = {rank for rank, text in stacks.items() if any(part in _main_thread(text) for part in _WAITING)}
    # Where some ranks wait for others, the others are the ones to look at; else the one that fell silent first.
    suspects = [record for record in silent if record["rank"] not in waiting] if waiting else silent
    first = min(suspects or silent, key=lambda record: (record["last_step"], record["last_beat"]), default=None)
    if first is None:
        mark = marks[0]
        return Ending("hung", f"rank {mark['rank']} did not start in {mark['age_s']:.0f} s", mark["rank"], mark["node"])
    detail = (
        f"rank {first['rank']} on {first['node']} stood still in step {first['last_step']} ({first['last_phase']}) for "
        f"{marks[0]['age_s']:.0f} s, {len(waiting)} of {len(records)} ranks waited for others; {first.get('state', '')}"
    )
    return Ending(
        "hung", detail.rstrip("; "), first["rank"], first["node"], first["last_step"], blamed=(first["node"],)
    )


def _failed(run: RunFolder, attempt: int, failure: Failure, records: Sequence[Mapping[str, Any]]) -> Ending:
    record = next((record for record in records if record["rank"] == failure.rank), {})
    host, step = record.get("node"), record.get("last_step")
    error = next((error for error in run.rank_errors(attempt) if error["rank"] == failure.rank), None)
    if error is not None and not failure.is_signal:
        hardware = _HARDWARE.search(error["message"])
        kind: Kind = "node" if hardware else "error"
        blamed = (str(host),) if hardware and host else ()
        return Ending(kind, failure.headline, failure.rank, host, step, _signature(error), blamed)
    if failure.is_signal:
        return Ending("killed", failure.headline, failure.rank, host, step, blamed=(str(host),) if host else ())
    return Ending("error", failure.headline, failure.rank, host, step, failure.headline)


def _ended_by_slurm(run: RunFolder, attempt: int, records: Sequence[Mapping[str, Any]]) -> Ending:
    """Tell a lost node from a preemption: on a node that lives, the guards were told by SIGTERM before the end."""
    hosts = _hosts(run, attempt)
    if not hosts:
        return Ending("lost", "it ended without a record", step=_last_step(records))
    told = {record.get("node") for record in records if any(map(_ends, record.get("signals", [])))}
    step = _last_step(records) or _progress(run, attempt)
    if not told:
        return Ending("lost", "ended without a record, and Slurm says that its nodes are up", step=step)
    if silent := tuple(host for host in hosts if host not in told):
        return _lost_nodes(silent, records)
    return Ending("preempted", "ended by Slurm (preempted or requeued) before a save was complete", step=step)


def _lost_nodes(hosts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Ending:
    names = ", ".join(hosts)
    return Ending("node", f"node {names} was lost: Slurm ended the life", step=_last_step(records), blamed=tuple(hosts))


def _hosts(run: RunFolder, attempt: int) -> list[str]:
    """Return the nodes of a life that Slurm started, none of another or of one that did not come so far."""
    starts = [event for event in run.events() if event["event"] == "start" and event["attempt"] == attempt]
    return list(starts[-1].get("hosts", [])) if starts and starts[-1]["executor"] == "slurm" else []


def _nodes_down() -> set[str]:
    facts = read_slurm()
    return set() if facts is None else {node.name for node in facts.nodes if not node.is_usable}


def _ends(signal: Mapping[str, Any]) -> bool:
    return signal["name"] == "SIGTERM"


def _signals_seen(records: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({signal["name"] for record in records for signal in record.get("signals", [])}))


def _before(run: RunFolder, attempt: int, failure: Failure, terminated: float | None) -> bool:
    """Say whether a failure came before Slurm began to end the life; after it, failures are consequences."""
    return terminated is not None and failure.time is not None and failure.time < terminated - _MARGIN_S


def _last_step(records: Sequence[Mapping[str, Any]]) -> int | None:
    return max((record["last_step"] for record in records if record.get("last_step")), default=None)


def _progress(run: RunFolder, attempt: int) -> int | None:
    steps = [int(event["step"]) for event in run.events() if event["attempt"] == attempt and event.get("step")]
    return max(steps, default=None)


def _signature(error: Mapping[str, Any]) -> str:
    """Name an error so that the same one in another life has the same name: no numbers, no addresses."""
    places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', error["traceback"])
    place = ":".join([Path(places[-1][0]).name, *places[-1][1:]]) if places else ""
    message = re.sub(r"0x[0-9a-f]+|\d+", "#", error["message"])[:300]
    return f"{error['type']} at {place}: {message}"


def _stacks(run: RunFolder, attempt: int, rank: int) -> str:
    file = rank_file(run.attempt_dir(attempt), rank, ".stacks.txt")
    return file.read_text() if file.exists() else ""


def _main_thread(stacks: str) -> str:
    """Return the part of faulthandler's dump that is the main thread's: the last one."""
    return stacks.rpartition("hread 0x")[2]
