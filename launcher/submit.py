"""Submitting a run: its folder with resolved config and code snapshot, then one attempt through submitit."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from launcher import faults
from launcher.cluster import ClusterConfig, ClusterError, Placement, parse_cluster, place
from launcher.dependency import Upstream, wait_for
from launcher.identity import describe_run
from launcher.job import TrainJob
from launcher.judgement import record_unrecorded_end
from launcher.processes import identify
from launcher.run_folder import RunFolder, RunFolderError, claim, refuse_foreign, write_json
from launcher.snapshot import take_snapshot
from launcher.status import run_state
from launcher.submission_checks import check_submission

if TYPE_CHECKING:
    from mvit.config import RunConfig

_SHOWN_WAYS = 6  # of those that would work


@dataclass(frozen=True)
class Submission:
    """A job on its way."""

    run_dir: str
    attempt: int
    executor: str
    job_id: str
    world_size: int
    after: str | None = None
    """The Slurm job that has to be finished first."""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        waits = "" if self.after is None else f", when job {self.after} is finished"
        return (
            f"{self.executor} job {self.job_id}: attempt {self.attempt}, {self.world_size} rank(s){waits}\n"
            f"run folder: {self.run_dir}"
        )


def check_data_is_there(config: "RunConfig") -> None:
    """Raise ValueError before the job is queued if the recipe's shards are missing or do not exist on this machine."""
    from data_pipeline.shards import ShardError, check_presence, read_manifest

    for key, spec in (("train", config.data.train), ("validation", config.data.validation)):
        if spec is None:
            if key == "train":
                raise ClusterError("data.train is not set: training needs shards, data.train=FOLDER for one")
            continue
        try:
            check_presence(spec)
            manifests = [read_manifest(one) for one in ([spec] if isinstance(spec, str) else spec)]
        except ShardError as error:
            raise ClusterError(
                f"data.{key} = {spec}: {error} If only the nodes can see them, submit with --no-data-check."
            ) from error
        classes = max((len(manifest["class_names"]) for manifest in manifests if manifest), default=0)  # 0: bare tars
        if classes and classes > config.model.num_classes:
            raise ClusterError(
                f"model.num_classes = {config.model.num_classes}, but data.{key} = {spec} has {classes} classes; "
                f"set model.num_classes={classes}"
            )


def create_run(config: "RunConfig", command: Sequence[str], cluster: ClusterConfig | None = None) -> RunFolder:
    """Claim the run folder and put the resolved config and the code snapshot into it.

    A run of the same name that ended before its first checkpoint is replaced; the logs of its attempts stay. Raises
    RunFolderError when the folder belongs to something else; then nothing was changed.
    """
    run = RunFolder(config.run_dir.absolute())
    _refuse_alive(run)
    if again := _never_saved(run):
        shutil.rmtree(run.code_dir, ignore_errors=True)
    else:
        claim(run, {"name": config.name, "id": "being created", "created": time.strftime("%Y-%m-%d %H:%M:%S %z")})
    try:
        run.config_file.write_text(config.to_yaml())
        code_sha256 = take_snapshot(run.code_dir)
        settings = None if cluster is None else cluster.model_dump(mode="json", exclude_defaults=True)
        write_json(run.run_file, describe_run(config.name, command, code_sha256, settings))
    except BaseException:
        if not again:
            shutil.rmtree(run.path)  # ours alone: it was absent or empty a moment ago
        raise
    return run


def _never_saved(run: RunFolder) -> bool:
    """Say whether the folder holds a run at rest that has nothing to lose but its logs."""
    if not run.run_file.exists() or run.checkpoint_step():
        return False
    return run_state(run.path).state in ("failed", "stopped")


def check_new(config: "RunConfig", cluster: ClusterConfig, after: Upstream | None = None) -> Placement:
    """Check all that can be known of a new run before it is created, and return where its ranks will be.

    Raises ConfigError, ClusterError or RunFolderError.
    """
    refuse_taken(RunFolder(config.run_dir.absolute()))
    placement = place(cluster)
    _check_request(config, cluster, placement, after)
    return placement


def _check_request(
    config: "RunConfig",
    cluster: ClusterConfig,
    placement: Placement,
    after: Upstream | None,
    is_resume: bool = False,
) -> None:
    """Raise ValueError with everything that is wrong at once: too many nodes rarely divide the batch, either."""
    checks: tuple[Callable[[], object], ...] = (
        lambda: check_submission(cluster, placement, None if after is None else after.dependency),
        lambda: (
            _check_batch_of_resumed(config, placement) if is_resume else config.batch_arithmetic(placement.world_size)
        ),
        # a fault of a rank that does not exist would never happen
        lambda: faults.parse(cluster.env.get(faults.VARIABLE, ""), placement.world_size),
    )
    problems: list[ValueError] = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ClusterError("\n".join(map(str, problems)))


def _check_batch_of_resumed(config: "RunConfig", placement: Placement) -> None:
    """Raise ClusterError if the batch does not divide, naming only ways that a run may take: its batch stays."""
    try:
        config.batch_arithmetic(placement.world_size)
        return
    except ValueError:
        total, micro, ranks = config.train.global_batch_size, config.train.micro_batch_size, placement.world_size
    per_node = placement.ranks_per_node
    nodes = [n for n in range(1, total // (micro * per_node) + 1) if total % (micro * n * per_node) == 0]
    nearest = sorted(sorted(nodes, key=lambda n: abs(n - placement.nodes))[:_SHOWN_WAYS])
    least = config.least_micro_batch
    sizes = [size for size in range(total // ranks, least - 1, -1) if total % (size * ranks) == 0][:_SHOWN_WAYS]
    ways = [f"nodes={'|'.join(map(str, nearest))}"] if nearest else []
    ways += [f"train.micro_batch_size={'|'.join(map(str, sizes))}"] if sizes else []
    if not ways:
        counts = [n for n in range(1, total // micro + 1) if total % (micro * n) == 0]
        ways = [f"a number of ranks (nodes x ranks_per_node) of {'|'.join(map(str, counts[-_SHOWN_WAYS:]))}"]
    raise ClusterError(
        f"nodes={placement.nodes}: train.global_batch_size = {total}, which a run keeps, is not micro_batch_size x "
        f"ranks x a whole number: {micro} x {ranks} = {micro * ranks}. Resume it with {' or '.join(ways)}."
    )


def submit_resume(run: RunFolder, config: "RunConfig", cluster: ClusterConfig) -> Submission:
    """Submit the next attempt of a run; it continues from the newest valid checkpoint with the run's own code.

    A run of a chain that has nothing yet waits for the run before it again. Raises RunFolderError while the run is
    pending or running, when it is finished, or when the run before it has to be resumed first.
    """
    refuse_active(run)
    before = None if run.checkpoint_step() else Upstream.of(run.events())
    after = None if before is None else wait_for(before.run_dir, cluster.executor)
    placement = place(cluster)
    _check_request(config, cluster, placement, after, is_resume=True)
    run.config_file.write_text(config.to_yaml())
    return submit_attempt(run, cluster, placement, after)


def dry_run(config: "RunConfig", cluster: ClusterConfig, dependency: str | None = None) -> str:
    """Return what a submission would do: batch arithmetic, run folder, batch script. Creates nothing.

    Raises what a submission would raise before it creates anything, other than what only the cluster can tell: that is
    `mvit doctor`'s, and a dry run works where there is no Slurm.
    """
    placement = place(cluster)
    arithmetic = config.batch_arithmetic(placement.world_size)
    run = RunFolder(config.run_dir.absolute())
    refuse_taken(run)
    return describe_job(run, config.name, cluster, placement, str(arithmetic).splitlines(), dependency)


def describe_job(
    run: RunFolder,
    name: str,
    cluster: ClusterConfig,
    placement: Placement,
    notes: Sequence[str],
    dependency: str | None = None,
) -> str:
    """Return what would be submitted for a run: folder, ranks, notes and batch script."""
    from launcher.executors import local_command, render_batch_script

    lines = [
        f"# run folder: {run.path}",
        f"# ranks: {placement.nodes} node(s) x {placement.ranks_per_node} = {placement.world_size}, "
        f"{placement.gpus_per_node} GPU(s) per node",
        *(f"# {line}" for line in notes),
        "# nothing was created or submitted",
        "",
    ]
    if cluster.executor == "slurm":
        return "\n".join([*lines, render_batch_script(run, name, cluster, placement, dependency)])
    command = " ".join(local_command(run, 1, cluster, placement))
    return "\n".join([*lines, f"# no batch script with executor: local; each rank runs under\n{command}"])


def refuse_taken(run: RunFolder) -> None:
    """Raise RunFolderError if the folder holds something that a new run must not replace."""
    _refuse_alive(run)
    if not _never_saved(run):
        refuse_foreign(run)


def _refuse_alive(run: RunFolder) -> None:
    """Raise RunFolderError if a run lives in the folder: to resume it, as one at rest, would be refused as well."""
    if run.run_file.exists() and (state := run_state(run.path)).state in ("pending", "running"):
        raise RunFolderError(
            f"{run.path} belongs to the run {state.name!r}, which is {state.state} (attempt {state.attempt}, "
            f"{state.executor} job {state.job_id}). Watch it: mvit status {run.path} --follow; end it: mvit stop "
            f"{run.path}. To start another: give it another name (name=…) or output_dir."
        )


def saved_cluster(run: RunFolder, overrides: Sequence[str] = ()) -> ClusterConfig | None:
    """Return the cluster a run was submitted to, changed by `key=value`; None for a run of `mvit train`.

    Raises ClusterError for overrides of a run that has no cluster.
    """
    settings = run.identity().get("cluster")
    if settings is None:
        if overrides:
            raise ClusterError(
                f"{run.path} was trained in a process of its own and has no cluster to change with "
                f"{' '.join(overrides)}. Submit it to one: mvit resume {run.path} --cluster FILE"
            )
        return None
    return parse_cluster(settings, str(run.run_file), overrides)


def resumed_config(run: RunFolder, overrides: Sequence[str]) -> "RunConfig":
    """Read a run's own config, changed by `key=value` where that does not change what is computed.

    Raises RunFolderError naming the keys that may not change within a run.
    """
    import mvit
    from mvit.run_identity import differences

    run.identity()  # says so if this is no run
    saved = mvit.load_config(run.config_file)
    config = mvit.load_config(run.config_file, list(overrides))
    if changed := differences(saved, config):
        raise RunFolderError(
            f"{run.path} cannot continue with other settings: {'; '.join(changed)}. Submit them as a new run with "
            "another name=…"
        )
    return config


def enter_run(run: RunFolder) -> None:
    """Prepare this process to continue a run: the run must be at rest, and its relative paths must lead on."""
    refuse_active(run)
    os.chdir(run.identity()["cwd"])


def refuse_active(run: RunFolder) -> None:
    """Raise RunFolderError if the run is pending, running or finished: no second job may enter its folder."""
    state = run_state(run.path)
    if state.state in ("pending", "running"):
        raise RunFolderError(
            f"{run.path} is {state.state} (attempt {state.attempt}, job {state.job_id}). Watch it with "
            f"`mvit status {run.path} --follow`, or end it first: `mvit stop {run.path}`."
        )
    if state.state == "finished":
        raise RunFolderError(
            f"{run.path} is finished, at step {state.step}: there is nothing to resume. To train on, start a run with "
            "another name=… from its weights."
        )


def submit_attempt(
    run: RunFolder, cluster: ClusterConfig, placement: Placement, after: Upstream | None = None
) -> Submission:
    """Submit the next attempt of a run that is created and at rest; everything was checked before.

    Raises ClusterError with Slurm's words when it is refused.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from launcher.executors import detached, local_executor, slurm_executor

    if "%" in str(run.path):
        raise RunFolderError(f"{run.path}: submitit gives '%' a meaning of its own, choose a path without it.")
    record_unrecorded_end(run)
    attempt = run.last_attempt() + 1
    run.attempt_dir(attempt).mkdir(parents=True, exist_ok=True)
    run.submitit_dir(attempt).mkdir(parents=True, exist_ok=True)
    job, process = TrainJob(run.path, attempt, cluster.cpus_per_rank), None
    try:
        if cluster.executor == "slurm":
            name = str(run.identity()["name"])
            dependency = None if after is None else after.dependency
            executor = slurm_executor(run, attempt, name, cluster, placement, dependency=dependency)
            job_id = executor.submit(job).job_id
        else:
            executor = local_executor(run, attempt, cluster, placement)
            with detached(run.submitit_dir(attempt) / "controller.log"):
                job_id = executor.submit(job).job_id  # the pid of its controller
            controller = identify(int(job_id))
            process = None if controller is None else controller.to_dict()
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        raise ClusterError(f"the submission was refused: {error}") from error
    run.append_event(
        "submit",
        attempt,
        executor=cluster.executor,
        job_id=job_id,
        world_size=placement.world_size,
        process=process,
        **({} if after is None else {"after": after.to_dict()}),
    )
    waits_for = None if after is None else after.job_id
    return Submission(str(run.path), attempt, cluster.executor, job_id, placement.world_size, waits_for)
