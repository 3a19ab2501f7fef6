"""The end of the batch script: put the life's end on the ledger, and send the job back to the queue or let it end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.ending import Ending, classify
from launcher.lives import record_end
from launcher.policy import Budgets, Decision, decide, excluded
from launcher.preemption import EXIT_STOPPED
from launcher.run_folder import RunFolder
from launcher.slurm import read_slurm


def after_life(run: RunFolder, attempt: int, exit_code: int, budgets: Budgets) -> tuple[Ending, Decision]:
    """Close an attempt in the batch script: classify its end, decide, and append both to attempts.jsonl."""
    ending, step_now = classify(run, attempt, exit_code), run.checkpoint_step()
    decision = decide(ending, run.events(), step_now, budgets)
    try:
        record_end(run, attempt, ending, requeued=decision.requeue, reason=decision.reason, exit_code=exit_code)
    except OSError as error:  # a full disk must not keep the job from its next life, which closes this one
        print(f"the end of life {attempt} is not recorded: {error}", file=sys.stderr, flush=True)
    return ending, decision


def requeue(run: RunFolder, attempt: int, job_id: str, budgets: Budgets, own_exclude: str) -> str | None:
    """Send the job back to the queue, without the nodes blamed too often; returns what went wrong, if anything.

    A running job's nodes cannot be changed, a requeued one's can, and the requeue ends this script: so the script
    ignores SIGTERM and has until Slurm's KillWait to say which nodes to leave out.
    """
    error = _scontrol("requeue", job_id)
    if error is not None:
        return error
    nodes = _affordable(excluded(run.events(), time.time(), budgets))
    if nodes:
        listed = ",".join([*([own_exclude] if own_exclude else []), *sorted(nodes)])
        error = _scontrol("update", f"JobId={job_id}", f"ExcNodeList={listed}")
        why = {host: text for host, (_, text) in nodes.items()}
        until = max(until for until, _ in nodes.values())
        run.append_event("exclude", attempt, hosts=sorted(nodes), until=until, why=why, error=error)
        print(f"left out: {listed} ({why})" + (f"; Slurm refuses: {error}" if error else ""), flush=True)
    return None


def _affordable(nodes: dict[str, tuple[float, str]]) -> dict[str, tuple[float, str]]:
    """Drop the exclusions that end first until enough nodes are left for the job to start at all."""
    facts = read_slurm()
    if not nodes or facts is None:
        return nodes
    usable = {node.name for node in facts.nodes_of(os.environ.get("SLURM_JOB_PARTITION", "")) if node.is_usable}
    needed, kept = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")), dict(nodes)
    while kept and len(usable - set(kept)) < needed:
        spared = min(kept, key=lambda host: kept[host][0])
        print(f"{spared} is not left out, though blamed ({kept[spared][1]}): too few nodes would remain", flush=True)
        del kept[spared]
    return kept


def is_orphan(job_id: str, restart_count: int) -> bool:
    """Tell whether Slurm has requeued this job already: its node was given up, or somebody else asked for it."""
    return _job_facts(job_id).get("Restarts") != str(restart_count)


def is_cancelled(job_id: str) -> bool:
    """Tell whether somebody cancels this job (`scancel`), so that it must not come back.

    Slurm ends the job while this script still runs, and not for its time limit. Measured with Slurm 22.05: a requeue,
    by a preemption too, has counted a restart by now, a time limit gives its name as the reason, a cancel gives none.
    """
    facts = _job_facts(job_id)
    return facts.get("JobState") == "COMPLETING" and facts.get("Reason") == "None"


def record_cancel(run: RunFolder, attempt: int, exit_code: int) -> None:
    """Append the end of a life that was cancelled, unless `mvit cancel` has done so."""
    if any(event["event"] == "end" and event["attempt"] == attempt for event in run.events()):
        return
    saved = ", everything saved" if exit_code == EXIT_STOPPED else ""
    ending = replace(
        classify(run, attempt, exit_code), kind="cancelled", detail=f"cancelled in Slurm (scancel){saved}", blamed=()
    )
    record_end(run, attempt, ending, requeued=False, reason="somebody cancelled the job", exit_code=exit_code)


def _job_facts(job_id: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True, check=True).stdout
    return {key: value for key, _, value in (word.partition("=") for word in shown.split())}


def _scontrol(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol {' '.join(arguments)}: {error}"
    return None if done.returncode == 0 else f"scontrol {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}"


def main(arguments: Sequence[str]) -> int:
    """Run at the end of the batch script: `RUN_DIR FIRST_ATTEMPT BUDGETS_JSON OWN_EXCLUDE EXIT_CODE`."""
    run, first_attempt, exit_code = RunFolder(Path(arguments[0])), int(arguments[1]), int(arguments[4])
    budgets, job_id = Budgets(**json.loads(arguments[2])), os.environ["SLURM_JOB_ID"]
    restart_count = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if is_orphan(job_id, restart_count):
        print(f"Slurm has requeued the job already: life {restart_count} of it neither requeues nor records anything")
        return 0
    attempt = first_attempt + restart_count
    if is_cancelled(job_id):
        record_cancel(run, attempt, exit_code)
        print("cancelled in Slurm: no requeue", flush=True)
        return 0
    ending, decision = after_life(run, attempt, exit_code, budgets)
    verdict = "requeue" if decision.requeue else "no requeue"
    print(f"{ending.kind}: {ending.detail}; {verdict}: {decision.reason}", flush=True)
    if decision.requeue and (error := requeue(run, attempt, job_id, budgets, arguments[3])) is not None:
        reason = f"the requeue was refused ({error}): continue with `mvit resume {run.path}`"
        record_end(run, attempt, ending, requeued=False, reason=reason, exit_code=exit_code)
        print(reason, file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
