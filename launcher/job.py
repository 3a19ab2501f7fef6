"""TrainJob: what runs on every rank, from submitit's environment to an exit code; and the same in this process."""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launcher.claims import claim_life, owner_of
from launcher.ending import Ending
from launcher.evaluation_job import evaluates, run_evaluation
from launcher.faults import observer_from_environment
from launcher.life import RunLife
from launcher.lives import close_lost_attempts, record_end
from launcher.preemption import EXIT_FAILED, EXIT_FENCED, EXIT_STOPPED, StopRequest
from launcher.processes import free_port, identify, node_name
from launcher.run_folder import RunFolder, rank_file, write_json
from launcher.say import say
from launcher.snapshot import verify_snapshot
from launcher.stacks import register_dump
from mvit.life import Superseded

if TYPE_CHECKING:
    from mvit.config import RunConfig
    from mvit.trainer import TrainResult

_ADDRESS_FILE = "rendezvous.json"
_ADDRESS_WAIT_S = 120.0


@dataclass(frozen=True)
class RankPlace:
    """Which rank this process is."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }


@dataclass(frozen=True)
class TrainJob:
    """The callable that submitit pickles: run one rank of a training job.

    Everything else is read from the run folder, so that a requeued life needs nothing from the one before.
    """

    run_dir: Path
    first_attempt: int  # of this submission; Slurm's restart count is added
    cpus_per_rank: int | None

    def __call__(self) -> dict[str, object]:
        """Train, and end the process by the project's exit codes: 0, 85 stopped, 86 failed, 87 superseded.

        Returns step and metrics of a finished run (submitit pickles them; nothing here reads them back).
        """
        stop = StopRequest()
        stop.install()  # first: until now the signals were ignored
        register_dump()
        import submitit

        environment = submitit.JobEnvironment()
        is_slurm = environment.cluster == "slurm"
        restart_count = int(os.environ.get("SLURM_RESTART_COUNT") or 0) if is_slurm else 0
        run, attempt = RunFolder(self.run_dir), self.first_attempt + restart_count
        place = RankPlace(
            environment.global_rank,
            environment.num_tasks,
            environment.local_rank,
            environment.num_tasks // environment.num_nodes,
        )
        attempt_dir = run.attempt_dir(attempt)
        _redirect_output(rank_file(attempt_dir, place.rank, ".log"))
        if run.stop_file(attempt).exists():
            stop.request("mvit stop")
        try:
            identity = run.identity()
            os.chdir(identity["cwd"])  # relative paths of the recipe start where it was submitted
            verify_snapshot(run.code_dir, identity["code_sha256"])
            if is_slurm:
                port = 15000 + (int(environment.raw_job_id) * 7 + restart_count) % 10000  # orphans keep theirs
                address = (environment.hostnames[0], port)
            else:
                address = _agree_on_address(attempt_dir, place.rank)
            _export(place, address, self.cpus_per_rank)
            if place.rank == 0:
                claim_life(run.path, attempt)
                close_lost_attempts(run, before=attempt)
                _record_start(run, attempt, place, environment.cluster, environment.job_id, environment.hostnames)
            result = _train(run, attempt, stop, place.rank)
        except BaseException as error:  # leave a trace, then no atexit: NCCL or a data worker may hang there
            if owner_of(run.path) > attempt:  # whatever it is, it is of no interest any more
                say(f"superseded by life {owner_of(run.path)}: {error}")
                _leave_now(EXIT_FENCED)
            try:
                record_error(attempt_dir, place.rank, error)
            finally:
                _leave_now(EXIT_FAILED)
        if result.stopped:
            say(f"stopped at step {result.step} of {result.total_steps} on request ({stop.cause})")
            _leave_now(EXIT_STOPPED)  # all is saved and closed; taking the interpreter apart costs grace time
        return {"step": result.step, "metrics": dict(result.metrics)}


def train_inline(config: "RunConfig", run: RunFolder) -> int:
    """Train in this process (or as one rank of torchrun or srun) and return the exit code: 0, or 85 if stopped.

    The run folder must be claimed already. Signals and Ctrl-C become a save and exit code 85. An exception is recorded
    and raised again, unless a later life has taken the run over: then nothing more is written, and the code is 87.
    """
    import mvit

    stop = StopRequest()
    stop.install(keyboard=True)
    rank = export_srun_rank()
    attempt = run.last_attempt() + 1
    if rank == 0:
        place = RankPlace(0, int(os.environ.get("WORLD_SIZE", "1")), 0, 1)
        claim_life(run.path, attempt)
        close_lost_attempts(run, before=attempt)
        process = identify(os.getpid())
        assert process is not None
        job = {"process": process.to_dict()}
        _record_start(run, attempt, place, "inline", str(os.getpid()), [socket.gethostname()], job)
    try:
        observer = observer_from_environment(run.path, rank)
        result = mvit.train(
            config, run_dir=run.path, stop_requested=stop, observer=observer, life=RunLife(run, attempt)
        )
        _leave_group()
    except BaseException as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            _leave_group()  # nobody else can be waiting
        if isinstance(error, Superseded) or owner_of(run.path) > attempt:  # the folder and its ledger are the other's
            print(f"life {owner_of(run.path)} of {run.path} has taken over: {error}", file=sys.stderr, flush=True)
            return EXIT_FENCED
        if rank == 0:
            record_error(run.attempt_dir(attempt), rank, error, print_it=False)
            ending = Ending("error", f"{type(error).__name__}: {error}", rank, node_name())
            record_end(run, attempt, ending, requeued=False, reason="a run of `mvit train` is not restarted by itself")
        raise
    if rank == 0:
        if result.stopped:
            ending = Ending("user_stop", f"on request ({stop.cause}), everything saved", step=result.step)
        else:
            ending = Ending("finished", "the run is complete", step=result.step)
        record_end(run, attempt, ending, requeued=False, reason="")
    return EXIT_STOPPED if result.stopped else 0


def export_srun_rank() -> int:
    """Return this process's rank; under a plain `srun` of several tasks, export the variables torch reads first."""
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and tasks > 1 and "SLURM_STEP_ID" in os.environ:
        from submitit.slurm.slurm import SlurmJobEnvironment

        slurm = SlurmJobEnvironment()
        place = RankPlace(slurm.global_rank, slurm.num_tasks, slurm.local_rank, slurm.num_tasks // slurm.num_nodes)
        step = int(os.environ["SLURM_STEP_ID"]) + int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        port = 15000 + (int(slurm.raw_job_id) * 7 + step) % 10000
        _export(place, (slurm.hostnames[0], port), None)
    return int(os.environ.get("RANK", "0"))


def record_error(attempt_dir: Path, rank: int, error: BaseException, print_it: bool = True) -> None:
    """Write the exception that ends a rank where `mvit status` and `--follow` find it, and to stderr."""
    text = "".join(traceback.format_exception(error))
    write_json(
        rank_file(attempt_dir, rank, ".error.json"),
        {
            "rank": rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "node": node_name(),
            "time": time.time(),
            "type": type(error).__name__,
            "message": str(error),
            "traceback": text,
        },
    )
    if print_it:
        say(text)


def _train(run: RunFolder, attempt: int, stop: StopRequest, rank: int) -> "TrainResult":
    import mvit

    life = RunLife(run, attempt)
    life.beat(0, "start")
    if evaluates(run):
        result = run_evaluation(run, life, rank, stop)
    else:
        result = mvit.train(
            mvit.load_config(run.config_file),
            run_dir=run.path,
            stop_requested=stop,
            show_progress=rank == 0,
            observer=observer_from_environment(run.path, rank),
            life=life,
        )
    life.beat(result.step, "end")
    _leave_group()
    return result


def _leave_group() -> None:
    """Leave the process group in good order; after an error that would wait for ranks that do not come."""
    from mvit import distributed

    distributed.shutdown()


def _redirect_output(log: Path) -> None:
    """Send this process's output, that of C libraries included, to the rank's own log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"output continues in {log}")
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _agree_on_address(attempt_dir: Path, rank: int) -> tuple[str, int]:
    """Let rank 0 pick a free port of this machine and tell the others through a file of the attempt."""
    path = attempt_dir / _ADDRESS_FILE
    if rank == 0:
        port = free_port()
        write_json(path, {"port": port})
        return "127.0.0.1", port
    deadline = time.monotonic() + _ADDRESS_WAIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 did not write {path} within {_ADDRESS_WAIT_S:.0f} s")
        time.sleep(0.05)
    return "127.0.0.1", int(json.loads(path.read_text())["port"])


def _export(place: RankPlace, address: tuple[str, int], cpus_per_rank: int | None) -> None:
    os.environ.update(place.environment, MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
    cpus = cpus_per_rank or max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
    os.environ.setdefault("OMP_NUM_THREADS", str(cpus))
    wait_without_spinning()


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait; to be called before torch is imported.

    Spinning on a core that something else needs made a run on a shared machine five times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _record_start(
    run: RunFolder,
    attempt: int,
    place: RankPlace,
    executor: str,
    job_id: str,
    hosts: Sequence[str],
    job: Mapping[str, object] | None = None,
) -> None:
    run.append_event(
        "start",
        attempt,
        executor=executor,
        job_id=job_id,
        world_size=place.world_size,
        hosts=list(hosts),
        gpus=_num_gpus() * place.world_size,
        checkpoint_step=run.checkpoint_step(),
        **(job or {}),
    )


def _num_gpus() -> int:
    """Return 1 if this rank drives a GPU; torch need not be loaded to know."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return int(visible != "" and any(Path("/dev").glob("nvidia[0-9]*")))


def _leave_now(code: int) -> NoReturn:
    with suppress(OSError):  # a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
