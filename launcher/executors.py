"""What submitit is told: the ranks' command lines, sbatch parameters and the batch script around them."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from submitit import LocalExecutor, SlurmExecutor

from launcher.cluster import ClusterConfig, Placement
from launcher.run_folder import RunFolder

_NO_LIMIT_MIN = 60 * 24 * 365  # submitit's local executor wants a number; its own default is two minutes
_NEVER_GIVE_UP = 1_000_000_000  # submitit takes preemptions for time-outs and counts them; requeue.py decides
# A local job's controller has handlers for none of these, and a terminal or a careless kill sends them.
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGUSR2)


class _UncheckedSlurmExecutor(SlurmExecutor):
    """Slurm's executor where Slurm need not be installed: it only renders."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def slurm_executor(
    run: RunFolder,
    attempt: int,
    name: str,
    cluster: ClusterConfig,
    placement: Placement,
    *,
    dependency: str | None = None,
    render_only: bool = False,
) -> SlurmExecutor:
    """Build submitit's Slurm executor for one submission of a run; `dependency` is in sbatch's notation.

    Raises RuntimeError if Slurm is not installed here, unless the executor shall only render.
    """
    kind = _UncheckedSlurmExecutor if render_only else SlurmExecutor
    # Until the guard has blocked it, USR2 would kill the task: an ignored signal survives exec, a handler does not.
    # `sh` since `env --ignore-signal` is missing before coreutils 8.31.
    guarded = shlex.join([*_guard(run, attempt, cluster), sys.executable])
    python = f"""sh -c 'trap "" USR2; exec "$@"' rank {guarded}"""
    executor = kind(run.submitit_dir(attempt), max_num_timeout=_NEVER_GIVE_UP, python=python)
    requeue = {"requeue": True} if cluster.requeue else {"no-requeue": True}
    given = {
        "cpus_per_task": cluster.cpus_per_rank,
        "gpus_per_node": placement.gpus_per_node or None,
        "mem": cluster.mem,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "comment": cluster.comment,
    }
    executor.update_parameters(
        job_name=name,
        nodes=placement.nodes,
        ntasks_per_node=placement.ranks_per_node,
        time=cluster.timeout_min,
        signal_delay_s=cluster.signal_delay_s,
        srun_args=["--kill-on-bad-exit=1"],  # else the other ranks wait for ever in a collective
        setup=[*cluster.setup, *_exports(run, cluster)],
        teardown=_teardown(run, attempt, cluster),
        wckey=None,  # submitit's default would be "submitit"
        additional_parameters=requeue | cluster.sbatch | _waiting(cluster, dependency),
        **{key: value for key, value in given.items() if value is not None},
    )
    return executor


def _waiting(cluster: ClusterConfig, dependency: str | None) -> dict[str, str]:
    """Return the sbatch parameters of a job that waits for another, beside what the cluster file lets it wait for."""
    if dependency is None:
        return {}
    own = cluster.sbatch.get("dependency")
    # Without the second, it would stay in the queue for ever when the other one fails.
    return {"dependency": f"{own},{dependency}" if own else dependency, "kill-on-invalid-dep": "yes"}


def render_batch_script(
    run: RunFolder, name: str, cluster: ClusterConfig, placement: Placement, dependency: str | None = None
) -> str:
    """Return the batch script that a submission would hand to sbatch; creates nothing, needs no Slurm."""
    attempt = run.last_attempt() + 1
    executor = slurm_executor(run, attempt, name, cluster, placement, dependency=dependency, render_only=True)
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def local_executor(run: RunFolder, attempt: int, cluster: ClusterConfig, placement: Placement) -> LocalExecutor:
    """Build submitit's local executor for one submission of a run."""
    python = shlex.join([*local_command(run, attempt, cluster, placement), sys.executable])
    executor = LocalExecutor(run.submitit_dir(attempt), max_num_timeout=_NEVER_GIVE_UP, python=python)
    executor.update_parameters(
        nodes=1,
        tasks_per_node=placement.ranks_per_node,
        gpus_per_node=placement.gpus_per_node,
        timeout_min=cluster.timeout_min or _NO_LIMIT_MIN,
        signal_delay_s=cluster.signal_delay_s,
    )
    return executor


def local_command(run: RunFolder, attempt: int, cluster: ClusterConfig, placement: Placement) -> list[str]:
    """Return what stands before a local rank's own command: its variables and its guard."""
    variables = {**cluster.env, "PYTHONPATH": _python_path(run, os.environ.get("PYTHONPATH")), "PYTHONSAFEPATH": "1"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if placement.gpus_per_node == 0:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # CPU ranks must not meet on a GPU that happens to be there
    elif visible:  # submitit would number the devices from 0
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: placement.gpus_per_node])
    settings = [f"{key}={value}" for key, value in variables.items()]
    return ["env", *settings, *_guard(run, attempt, cluster)]


def _guard(run: RunFolder, attempt: int, cluster: ClusterConfig) -> list[str]:
    limits = [str(cluster.hang_timeout_s or 0), str(cluster.start_timeout_s)]
    return [sys.executable, "-m", "launcher.guard", str(run.path), str(attempt), *limits]


@contextmanager
def detached(log: Path) -> Iterator[None]:
    """Let what is started inside survive this terminal: its signals are ignored, its output goes to a log.

    Without it, Ctrl-C here would end a local job's controller, and a pipe reading our output would stay open as long
    as the job runs.
    """
    assert threading.current_thread() is threading.main_thread(), "signals are the main thread's"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in _IGNORED}
    saved = [os.dup(descriptor) for descriptor in (0, 1, 2)]
    try:
        with log.open("ab") as output, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        yield
    finally:
        for descriptor, copy in enumerate(saved):
            os.dup2(copy, descriptor)
            os.close(copy)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _exports(run: RunFolder, cluster: ClusterConfig) -> list[str]:
    """Return the lines that make every rank import the run's snapshot, and nothing from the working directory."""
    code = shlex.quote(str(run.code_dir))
    return [
        "trap : TERM  # of a preemption: the ranks get it, too, and save; this script waits for them",
        *(f"export {key}={shlex.quote(value)}" for key, value in cluster.env.items()),
        f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        "export PYTHONSAFEPATH=1",
        # Since Slurm 22.05 srun does not take this over from sbatch: each rank would get one core.
        *([f"export SRUN_CPUS_PER_TASK={cluster.cpus_per_rank}"] if cluster.cpus_per_rank else []),
        # CPU ranks must not meet on a GPU that happens to be there.
        *(["export CUDA_VISIBLE_DEVICES="] if cluster.gpus_per_node == 0 else []),
    ]


def _teardown(run: RunFolder, attempt: int, cluster: ClusterConfig) -> list[str]:
    """Return the end of the batch script. The job is requeued from here, never from a rank.

    A rank that calls `scontrol requeue` gets all ranks killed while they save.
    """
    policy = [str(run.path), str(attempt), cluster.model_dump_json(exclude_defaults=True)]
    return [
        "rc=$?  # of srun: the highest exit code of a rank, 128 + n for signal n",
        "trap '' TERM  # the requeue ends this script, which then has a word to add",
        f'{shlex.join([sys.executable, "-m", "launcher.requeue", *policy])} "$rc"',
        'exit "$rc"',
    ]


def _python_path(run: RunFolder, inherited: str | None) -> str:
    return os.pathsep.join([str(run.code_dir), *([inherited] if inherited else [])])
