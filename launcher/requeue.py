"""The end of the batch script: put the life's end on the ledger, and send the job back to the queue or let it end."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.cluster import ClusterConfig, place
from launcher.ending import Ending, classify
from launcher.lives import SOMEBODY_CANCELLED, record_end
from launcher.policy import Budgets, Decision, decide, excluded
from launcher.preemption import EXIT_STOPPED
from launcher.run_folder import RunFolder
from launcher.say import say
from launcher.slurm import expand_hostlist, read_slurm
from launcher.submission_checks import nodes_that_fit

_PATIENCE_S = 300.0  # for a controller that restarts or is overloaded
_UPDATE_PATIENCE_S = 20.0  # after a requeue Slurm kills this script within KillWait, 30 s by default
_ANSWER_S = 60.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 2.0, 30.0
_FINAL = re.compile(r"denied|disabled|not permitted|Invalid|not supported|does not exist", re.IGNORECASE)


def after_life(run: RunFolder, attempt: int, exit_code: int, budgets: Budgets) -> tuple[Ending, Decision]:
    """Close an attempt in the batch script: classify its end, decide, and append both to attempts.jsonl."""
    ending, step_now = classify(run, attempt, exit_code), run.checkpoint_step()
    decision = decide(ending, run.events(), attempt, step_now, budgets)
    record_end(run, attempt, ending, requeued=decision.requeue, reason=decision.reason, exit_code=exit_code)
    return ending, decision


def requeue(run: RunFolder, attempt: int, job_id: str, cluster: ClusterConfig) -> str | None:
    """Send the job back to the queue, without the nodes blamed too often; returns what went wrong, if anything.

    A running job's nodes cannot be changed, a requeued one's can, and the requeue ends this script: so the script
    ignores SIGTERM and has until Slurm's KillWait to say which nodes to leave out.
    """
    nodes = _affordable(excluded(run.events(), time.time(), budgets_of(cluster)), cluster)
    before = [event["hosts"] for event in run.events() if event["event"] == "exclude"]
    restarts = _fields(_ask(_show(job_id)).stdout).get("Restarts", "")

    def is_requeued() -> bool:  # the controller did it, and its answer was lost
        return _fields(_ask(_show(job_id)).stdout).get("Restarts", restarts) != restarts

    error = _scontrol("requeue", job_id, patience_s=_PATIENCE_S, is_done=is_requeued)
    if error is not None:
        return error
    if nodes or (before and before[-1]):  # a job keeps its list over requeues: nodes whose time is over come off it
        _exclude(run, attempt, job_id, nodes, cluster.exclude)
    return None


def budgets_of(cluster: ClusterConfig) -> Budgets:
    """Return what a cluster file says about trying again."""
    return Budgets(
        requeue=cluster.requeue,
        max_crashes=cluster.max_failures_without_progress,
        max_node_faults=cluster.max_node_faults,
        exclude_after=cluster.exclude_after,
        exclude_hours=cluster.exclude_hours,
    )


def _exclude(
    run: RunFolder, attempt: int, job_id: str, nodes: Mapping[str, tuple[float, str]], own_exclude: str | None
) -> None:
    listed = ",".join([*([own_exclude] if own_exclude else []), *sorted(nodes)])
    error = _scontrol("update", f"JobId={job_id}", f"ExcNodeList={listed}", patience_s=_UPDATE_PATIENCE_S)
    why = {host: text for host, (_, text) in nodes.items()}
    told = f"left out: {listed or 'no node any more'} {why or ''}".rstrip()
    say(told + (f"; Slurm refuses: {error}" if error else ""))
    until = max((until for until, _ in nodes.values()), default=None)
    try:
        run.append_event("exclude", attempt, hosts=sorted(nodes), until=until, why=why, error=error)
    except OSError as full:
        say(f"the exclusion is not recorded: {full}")


def _affordable(nodes: dict[str, tuple[float, str]], cluster: ClusterConfig) -> dict[str, tuple[float, str]]:
    """Drop the exclusions that end first until enough nodes that fit the job are left for it to start at all."""
    facts = read_slurm(accounting=False) if nodes else None
    if facts is None:
        return nodes
    placement, partition = place(cluster), os.environ.get("SLURM_JOB_PARTITION", "")
    own = expand_hostlist(cluster.exclude) if cluster.exclude and "/" not in cluster.exclude else ()
    fit = nodes_that_fit(facts, partition, cluster, placement, own or ())
    usable, kept = {node.name for node in fit if node.is_usable}, dict(nodes)
    while kept and len(usable - set(kept)) < placement.nodes:
        spared = min(kept, key=lambda host: kept[host][0])
        say(f"{spared} is not left out, though blamed ({kept[spared][1]}): too few nodes would remain")
        del kept[spared]
    return kept


def job_facts(job_id: str) -> dict[str, str]:
    """Return what Slurm says of a job; raises OSError if it does not answer for minutes."""
    shown = _ask_patiently(_show(job_id), _PATIENCE_S)
    if shown.returncode != 0:
        raise OSError(f"scontrol show job {job_id}: {shown.stderr.strip()}")
    return _fields(shown.stdout)


def _show(job_id: str) -> list[str]:
    return ["scontrol", "-o", "show", "job", job_id]


def _fields(shown: str) -> dict[str, str]:
    return {key: value for key, _, value in (word.partition("=") for word in shown.split())}


def is_orphan(facts: Mapping[str, str], restart_count: int) -> bool:
    """Tell whether Slurm has requeued this job already: its node was given up, or somebody else asked for it."""
    return facts.get("Restarts") != str(restart_count)


def is_cancelled(facts: Mapping[str, str]) -> bool:
    """Tell whether somebody cancels this job (`scancel`), so that it must not come back.

    Slurm ends the job while this script still runs, and not for its time limit. Measured with Slurm 22.05: a requeue,
    by a preemption too, has counted a restart by now, a time limit gives its name as the reason, a cancel gives none.
    """
    return facts.get("JobState") == "COMPLETING" and facts.get("Reason") == "None"


def record_cancel(run: RunFolder, attempt: int, exit_code: int) -> None:
    """Append the end of a life that was cancelled; after what `mvit cancel` wrote at once: only now it is over."""
    ends = [event for event in run.events() if event["event"] == "end" and event["attempt"] == attempt]
    if ends and ends[-1].get("kind") != "cancelled":
        return
    how = "cancelled by `mvit cancel`" if ends else "cancelled in Slurm (scancel)"
    saved = ", everything saved" if exit_code == EXIT_STOPPED else ""
    ending = replace(classify(run, attempt, exit_code), kind="cancelled", detail=f"{how}{saved}", blamed=())
    record_end(run, attempt, ending, requeued=False, reason=SOMEBODY_CANCELLED, exit_code=exit_code)


def _scontrol(*arguments: str, patience_s: float, is_done: Callable[[], bool] = lambda: False) -> str | None:
    """Let Slurm do something and return its complaint, None when it is done; `is_done`: though its answer was lost."""
    done = _ask_patiently(["scontrol", *arguments], patience_s, is_done)
    return None if done.returncode == 0 else f"scontrol {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}"


def _ask_patiently(
    command: list[str], patience_s: float, is_done: Callable[[], bool] = lambda: False
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's, again while its controller does not answer: a restart of it must not cost a run."""
    deadline, pause_s = time.monotonic() + patience_s, _FIRST_PAUSE_S
    while True:
        done = _ask(command)
        passing = done.returncode != 0 and not _FINAL.search(done.stderr + done.stdout)
        if not passing or time.monotonic() + pause_s > deadline:
            return done
        say(f"Slurm does not answer, trying again in {pause_s:.0f} s: {done.stderr.strip()}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        if is_done():
            return subprocess.CompletedProcess(command, 0, "", "")


def _ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def main(arguments: Sequence[str]) -> int:
    """Run at the end of the batch script: `RUN_DIR FIRST_ATTEMPT CLUSTER_JSON EXIT_CODE`."""
    run, first_attempt, exit_code = RunFolder(Path(arguments[0])), int(arguments[1]), int(arguments[3])
    cluster, job_id = ClusterConfig.model_validate_json(arguments[2]), os.environ["SLURM_JOB_ID"]
    restart_count = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    attempt = first_attempt + restart_count
    try:
        facts = job_facts(job_id)
    except OSError as error:
        reason = f"Slurm's controller did not answer ({error}): continue with `mvit resume {run.path}`"
        record_end(run, attempt, classify(run, attempt, exit_code), requeued=False, reason=reason, exit_code=exit_code)
        say(reason)
        return 0
    if is_orphan(facts, restart_count):
        say(f"Slurm has requeued the job already: life {restart_count} of it neither requeues nor records anything")
        return 0
    if is_cancelled(facts):
        record_cancel(run, attempt, exit_code)
        say("cancelled in Slurm: no requeue")
        return 0
    ending, decision = after_life(run, attempt, exit_code, budgets_of(cluster))
    verdict = "requeue" if decision.requeue else "no requeue"
    say(f"{ending.kind}: {ending.detail}; {verdict}: {decision.reason}")
    if decision.requeue and (error := requeue(run, attempt, job_id, cluster)) is not None:
        reason = f"the requeue was refused ({error}): continue with `mvit resume {run.path}`"
        record_end(run, attempt, ending, requeued=False, reason=reason, exit_code=exit_code)
        say(reason)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
