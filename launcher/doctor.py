"""`mvit doctor` without a job: will this cluster let this run train, stop, save and come back?"""

import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cluster import ClusterConfig, ClusterError, Placement
from launcher.disk_speed import existing_parent, write_speed
from launcher.doctor_report import Finding, Report
from launcher.doctor_settings import StopTime, granularity_finding, lead_finding, slurm_findings
from launcher.run_folder import RunFolder, RunFolderError
from launcher.slurm import read_slurm
from launcher.submission_checks import examine_request
from launcher.submit import refuse_taken

if TYPE_CHECKING:
    from mvit.config import RunConfig

_TEST_BYTES, _TEST_LIMIT_S = 256 << 20, 20.0
_NAME = "doctor"  # of the job in a script that is only shown


@dataclass(frozen=True)
class Disk:
    """The file system of output_dir."""

    folder: Path
    free: int
    bytes_per_s: float


def examine(
    cluster: ClusterConfig, placement: Placement, config: "RunConfig | None", output_dir: Path, run: RunFolder | None
) -> Report:
    """Look at everything that needs no job; `run` lends its measured saves."""
    findings: list[Finding] = []
    disk = _look_at_disk(output_dir, findings)
    needed = None if config is None else _checkpoint_bytes(config)
    stop = _measured_stop(run, findings) if run is not None else _predicted_stop(needed, disk)
    if config is not None and disk is not None and needed is not None:
        findings.append(_space(config, disk, needed))
    if config is not None:
        findings.append(_run_folder(config, run))
        findings.append(_batch(config, placement))
    if cluster.executor == "slurm":
        findings += _slurm(cluster, placement, stop)
    else:
        findings += _machine(cluster, placement)
        if cluster.timeout_min is not None:
            findings.append(lead_finding(cluster, stop))
    return Report(tuple(findings), _script(cluster, placement, config, output_dir))


def _slurm(cluster: ClusterConfig, placement: Placement, stop: StopTime | None) -> Iterator[Finding]:
    yield lead_finding(cluster, stop)
    yield granularity_finding(cluster)
    facts = read_slurm()
    if facts is None:
        yield Finding(
            "Slurm",
            "FAIL",
            "no answer",
            "`scontrol show config` is missing here, or fails.",
            "Run it on a machine that can submit jobs, usually a login node.",
        )
        return
    partition = facts.partition(None if cluster.partition is None else cluster.partition.split(",")[0])
    try:
        verdict = examine_request(facts, cluster, placement)
    except ClusterError as error:
        yield Finding("request", "FAIL", str(error))
    else:
        yield from (Finding("request", "FAIL", problem) for problem in verdict.problems)
        yield from (Finding("request", "WARN", warning) for warning in verdict.warnings)
        if not verdict.problems:
            where = "" if partition is None else f" of partition {partition.name!r}"
            yield Finding("request", "PASS", f"{placement.nodes} node(s) × {placement.ranks_per_node} rank(s){where}")
    yield from slurm_findings(facts, cluster, partition, stop)


def _machine(cluster: ClusterConfig, placement: Placement) -> Iterator[Finding]:
    """Judge this machine for a local job; its GPUs are checked when the placement is made."""
    import psutil

    found = f"{placement.ranks_per_node} rank(s), {placement.gpus_per_node} GPU(s)"
    yield Finding("request", "PASS", found)
    cpus, asked = len(psutil.Process().cpu_affinity()), placement.ranks_per_node * (cluster.cpus_per_rank or 1)
    if asked > cpus:
        why = "Ranks and data workers compete for the cores."
        yield Finding("CPUs", "WARN", f"{asked} asked for, {cpus} are there", why, "Lower cpus_per_rank or the ranks.")
    else:
        yield Finding("CPUs", "PASS", f"{asked} asked for, {cpus} are there")
    memory = psutil.virtual_memory().available / 2**30
    yield Finding("memory", "PASS" if memory > 2 * placement.ranks_per_node else "WARN", f"{memory:.1f} GiB free")


def _look_at_disk(output_dir: Path, findings: list[Finding]) -> Disk | None:
    folder = existing_parent(output_dir)
    try:
        disk = Disk(folder, shutil.disk_usage(folder).free, write_speed(folder, _TEST_BYTES, _TEST_LIMIT_S))
    except OSError as error:
        out = "Set output_dir to a folder that you may write and that the nodes see."
        findings.append(Finding("output_dir", "FAIL", f"{folder}: {error.strerror}", "Nothing can be written.", out))
        return None
    found = f"{folder}: {disk.bytes_per_s / 1e6:.0f} MB/s written and synced, {disk.free / 2**30:.1f} GiB free"
    findings.append(Finding("output_dir", "PASS", found))
    return disk


def _space(config: "RunConfig", disk: Disk, needed: int) -> Finding:
    """Compare the free space with what the run keeps: a new checkpoint is whole before an old one goes."""
    kept = config.train.keep_last + config.train.keep_best
    total = needed * (kept + 1)
    found = f"{disk.free / 2**30:.2f} GiB free"
    why = (
        f"A checkpoint takes {needed / 2**30:.2f} GiB, and train.keep_last={config.train.keep_last} + "
        f"keep_best={config.train.keep_best} + 1 in the making take {total / 2**30:.2f} GiB."
    )
    if disk.free < total:
        return Finding("space", "FAIL", found, why, "Free some, lower keep_last, or set output_dir elsewhere.")
    if config.train.keep_every:
        why += f" Those of keep_every={config.train.keep_every} come on top and are never removed."
    return Finding("space", "PASS", found, why)


def _run_folder(config: "RunConfig", measured: RunFolder | None) -> Finding:
    """Say whether a submission would find its folder free."""
    folder = RunFolder(config.run_dir.absolute())
    if measured is not None and measured.path == folder.path:
        return Finding("run folder", "PASS", f"{folder.path} is that of --run", f"Go on: mvit resume {folder.path}")
    try:
        refuse_taken(folder)
    except RunFolderError as error:
        return Finding("run folder", "FAIL", f"{folder.path} is taken", f"`mvit submit` will refuse it: {error}")
    if folder.run_file.exists():
        return Finding("run folder", "PASS", f"{folder.path} holds a run that never saved", "It will be replaced.")
    return Finding("run folder", "PASS", f"{folder.path} is free")


def _batch(config: "RunConfig", placement: Placement) -> Finding:
    try:
        return Finding("batch", "PASS", str(config.batch_arithmetic(placement.world_size)))
    except ValueError as error:
        return Finding("batch", "FAIL", str(error))


def _checkpoint_bytes(config: "RunConfig") -> int:
    """Predict a checkpoint's size; the model is built without its weights."""
    import torch

    from mvit.checkpoint import predicted_bytes
    from mvit.tasks import create_task

    with torch.device("meta"):
        model = create_task(config).build_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    return predicted_bytes(count, ema=config.optim.ema_decay is not None)


def _predicted_stop(needed: int | None, disk: Disk | None) -> StopTime | None:
    if needed is None or disk is None:
        return None
    return StopTime(needed / disk.bytes_per_s, 0.0, "predicted size / speed measured now; the step comes on top")


def _measured_stop(run: RunFolder, findings: list[Finding]) -> StopTime | None:
    """Take the slowest save and the usual step of a run's metrics.jsonl."""
    run.identity()  # says so if this is no run
    saves: list[float] = []
    steps: list[float] = []
    lines = run.metrics_file.read_text().splitlines() if run.metrics_file.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the run may be writing it now
            continue
        if record.get("kind") == "save":
            saves.append(record["seconds"])
        elif record.get("step_seconds"):
            steps.append(record["step_seconds"])
    if not saves:
        out = "Leave --run out for a prediction, or let it save once."
        findings.append(Finding("measured saves", "WARN", f"{run.path} has none on record", "", out))
        return None
    source = f"the slowest of {len(saves)} save(s) of {run.path}"
    return StopTime(max(saves), statistics.median(steps) if steps else 0.0, source)


def _script(cluster: ClusterConfig, placement: Placement, config: "RunConfig | None", output_dir: Path) -> str:
    """Return what a submission would run, from the same code as a submission."""
    import shlex

    from launcher.executors import local_command, render_batch_script

    name = _NAME if config is None else config.name
    run = RunFolder((output_dir / name).absolute())
    if cluster.executor == "slurm":
        return render_batch_script(run, name, cluster, placement)
    return shlex.join(local_command(run, 1, cluster, placement))
