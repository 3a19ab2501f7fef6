"""How a life ended: one of a few kinds, with the rank, node and step that were first, from what its ranks left."""

import re
from collections import Counter
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
_PLACE = re.compile(r'File "([^"]+)", line (\d+)')
_WAITING = ("torch/distributed/", "deepspeed/comm/")  # in whose files a rank waits for the others
_NO_COMMAND = (126, 127)  # the shell's exit codes for a program that cannot be run, or is not there
_MARGIN_S = 1.0  # between the clocks of two nodes


@dataclass(frozen=True)
class Ending:
    """The end of one life."""

    kind: Kind
    detail: str
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    """The last step that was finished, None before the first or where a life did not come to training."""
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
    asked = run.stop_file(attempt).exists()
    stopped = [record["ended"] for record in records if record.get("exit_code") == EXIT_STOPPED]
    failure = first_failure(run, attempt)
    # One that left this way knows that all have saved; what ends the others afterwards harms nothing.
    if (exit_code == EXIT_STOPPED or stopped) and (
        asked or not _is_before(failure, min(stopped, default=None), _MARGIN_S)
    ):
        detail = "stopped by `mvit stop`" if asked else f"told to stop ({_signals_seen(records) or 'by signal'})"
        return Ending("user_stop" if asked else "signalled", f"{detail}, everything saved", step=_last_step(records))
    if exit_code == EXIT_FENCED:
        return Ending("fenced", "a later life had taken over", step=_last_step(records))
    if exit_code is None and (gone := _nodes_gone(_hosts(run, attempt), _told(records))):
        return _lost_nodes(gone, records)
    if (hang := _hang(run, attempt, records)) is not None:
        return hang
    terminated = [signal["time"] for record in records for signal in record.get("signals", []) if _ends(signal)]
    ended_by_slurm = min(terminated, default=None)
    if failure is not None and (exit_code is not None or _is_before(failure, ended_by_slurm, _MARGIN_S)):
        return _failed(run, attempt, failure, records)
    if exit_code in _NO_COMMAND and not records:
        return Ending(
            "error", f"exit code {exit_code}: the ranks' command could not be run, see `mvit logs --submitit`"
        )
    if exit_code is not None and not terminated:
        return Ending("lost", f"exit code {exit_code}; no rank left a record of why", step=_last_step(records))
    return _ended_by_slurm(run, attempt, records, exit_code)


def _hang(run: RunFolder, attempt: int, records: Sequence[Mapping[str, Any]]) -> Ending | None:
    marks = read_records(run.attempt_dir(attempt), "hang.json")
    if not marks:
        return None
    silent = [record for record in records if record.get("last_beat") is not None]
    if not silent:
        mark = marks[0]
        return Ending("hung", f"rank {mark['rank']} did not start in {mark['age_s']:.0f} s", mark["rank"], mark["node"])
    waiting = _waiting(silent, {record["rank"]: _stacks(run, attempt, record["rank"]) for record in silent})
    suspects = [record for record in silent if record["rank"] not in waiting]
    first = min(suspects or silent, key=lambda record: (record["last_step"], record["last_beat"]))
    # A few that do something else than all the others are to blame; of many, or none, nobody can say.
    stands_apart = len(silent) > 1 and 0 < len(suspects) <= max(1, len(silent) // 4)
    blamed = (first["node"],) if stands_apart else ()
    detail = (
        f"rank {first['rank']} on {first['node']} stood still in step {first['last_step']} ({first['last_phase']}) for "
        f"{marks[0]['age_s']:.0f} s, {len(waiting)} of {len(records)} ranks waited for others; {first.get('state', '')}"
    )
    return Ending("hung", detail.rstrip("; "), first["rank"], first["node"], finished_step(first), blamed=blamed)


def _waiting(silent: Sequence[Mapping[str, Any]], stacks: Mapping[int, str]) -> set[int]:
    """Return the ranks that wait for others.

    Their stacks say so where Python waits for a collective. Where the device does, nothing tells a kernel that waits
    from one that hangs, but the many that stand at the same place wait for the few that stand elsewhere or are behind.
    """
    waiting = {rank for rank, text in stacks.items() if any(part in _main_thread(text) for part in _WAITING)}
    if waiting:
        return waiting
    places = {r["rank"]: (r["last_step"], tuple(_PLACE.findall(_main_thread(stacks[r["rank"]])))) for r in silent}
    common, count = Counter(places.values()).most_common(1)[0]
    return (
        {rank for rank, place in places.items() if place == common} if len(silent) / 2 < count < len(silent) else set()
    )


def _failed(run: RunFolder, attempt: int, failure: Failure, records: Sequence[Mapping[str, Any]]) -> Ending:
    record = next((record for record in records if record["rank"] == failure.rank), {})
    host, step = record.get("node"), finished_step(record)
    error = next((error for error in run.rank_errors(attempt) if error["rank"] == failure.rank), None)
    if error is not None and not failure.is_signal:
        hardware = _HARDWARE.search(error["message"])
        kind: Kind = "node" if hardware else "error"
        blamed = (str(host),) if hardware and host else ()
        return Ending(kind, failure.headline, failure.rank, host, step, _signature(error), blamed)
    if failure.is_signal:
        return Ending("killed", failure.headline, failure.rank, host, step, blamed=(str(host),) if host else ())
    return Ending("error", failure.headline, failure.rank, host, step, failure.headline)


def _ended_by_slurm(
    run: RunFolder, attempt: int, records: Sequence[Mapping[str, Any]], exit_code: int | None
) -> Ending:
    """Tell a lost node from a preemption: on a node that lives, the guards were told by SIGTERM before the end."""
    hosts = _hosts(run, attempt)
    if not hosts:
        return Ending("lost", "it ended without a record", step=_last_step(records))
    told = _told(records)
    step = _last_step(records) or _progress(run, attempt)
    if not told:
        return Ending("lost", "ended without a record, and Slurm says that its nodes are up", step=step)
    silent = tuple(host for host in hosts if host not in told)
    if exit_code is not None:  # the batch script lives: a node may only have failed to write that it was told
        silent = _nodes_gone(hosts, told)
    if silent:
        return _lost_nodes(silent, records)
    return Ending("preempted", "ended by Slurm (preempted or requeued) before a save was complete", step=step)


def _lost_nodes(hosts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Ending:
    names = ", ".join(hosts)
    return Ending("node", f"node {names} was lost: Slurm ended the life", step=_last_step(records), blamed=tuple(hosts))


def _hosts(run: RunFolder, attempt: int) -> list[str]:
    """Return the nodes of a life that Slurm started, none of another or of one that did not come so far."""
    starts = [event for event in run.events() if event["event"] == "start" and event["attempt"] == attempt]
    return list(starts[-1].get("hosts", [])) if starts and starts[-1]["executor"] == "slurm" else []


def _told(records: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the nodes whose ranks Slurm told to end: these live."""
    return {str(record.get("node")) for record in records if any(map(_ends, record.get("signals", [])))}


def _nodes_gone(hosts: Sequence[str], told: set[str]) -> tuple[str, ...]:
    """Return those of a life's nodes that Slurm has lost."""
    facts = read_slurm() if set(hosts) - told else None
    gone = set() if facts is None else {node.name for node in facts.nodes if node.is_gone}
    return tuple(host for host in hosts if host in gone and host not in told)


def _ends(signal: Mapping[str, Any]) -> bool:
    return signal["name"] == "SIGTERM"


def _signals_seen(records: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({signal["name"] for record in records for signal in record.get("signals", [])}))


def _is_before(failure: Failure | None, when: float | None, margin_s: float) -> bool:
    """Say whether a rank failed before the life began to end for another reason; later failures follow from that."""
    return failure is not None and failure.time is not None and when is not None and failure.time < when - margin_s


def _last_step(records: Sequence[Mapping[str, Any]]) -> int | None:
    return max((step for record in records if (step := finished_step(record)) is not None), default=None)


def finished_step(record: Mapping[str, Any]) -> int | None:
    """Return the last step that a rank finished, by its record; None before the first step of its life."""
    step, phase = record.get("last_step"), record.get("last_phase")
    if not step:
        return None
    return step - 1 if phase in ("data", "compute") else step


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
