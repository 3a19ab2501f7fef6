"""The launcher on the kinds of Slurm that sites have: process tracking, accounting, requeue rights, and users."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.heartbeat import HEARTBEAT_FD
from tests.launcher.project import Project, create_project
from tests.slurm import cgroups
from tests.slurm.accounting import missing_for_database
from tests.slurm.cluster import Cluster, Settings

SLURM = {"executor": "slurm", "nodes": 2, "ranks_per_node": 1, "timeout_min": 10, "signal_delay_s": 60}
QUICK = Settings(nodes=2, kill_wait_s=2)
USER = "nobody"
LONG = ("steps=2000", "step_s=0.05", "save_every=5")
# Rank 0 needs a second between Python's farewell to its signal handlers and its exit, as it does with torch loaded.
# Rank 1 has left by then, with a code that makes srun end the step.
SLOW_TO_LEAVE = """

class _Slow:
    def __del__(self, sleep=time.sleep, rank=int(os.environ.get("SLURM_PROCID", "0"))):
        sleep(1 - rank)


_slow = _Slow()
"""


@dataclass
class Job:
    """A run of the stand-in project on a cluster, and how long what happened to it took."""

    cluster: Cluster
    project: Project
    user: str | None = None
    python: tuple[str, str] = (sys.executable, "")  # the interpreter, and what goes behind the tree in PYTHONPATH
    seconds: dict[str, float] = field(default_factory=dict)

    def mvit(self, *arguments: str, check: bool = True) -> str:
        return self.cluster.run(
            *(self.python[0], "-m", "launcher.cli", *arguments),
            check=check,
            env={"PYTHONPATH": f"{self.project.tree}:{self.python[1]}".rstrip(":"), "PYTHONSAFEPATH": "1"},
            user=self.user,
            cwd=self.project.root,
        )

    def submit(self, *overrides: str) -> None:
        self.mvit("submit", "recipe.yaml", "--cluster", "cluster.yaml", *overrides)

    @property
    def run_dir(self) -> str:
        return str(self.project.run_dir)

    @property
    def job_id(self) -> str:
        return str(self.last("submit")["job_id"])

    def last(self, kind: str) -> dict[str, Any]:
        """Return the newest event of a kind, {} when there is none yet."""
        return next((event for event in reversed(self.project.events()) if event["event"] == kind), {})

    def wait(self, what: str, condition: Callable[[], object], timeout_s: float = 60) -> None:
        """Wait for something and note how long it took."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < timeout_s, f"not within {timeout_s} s: {what}\n{self.report()}"
            time.sleep(0.05)
        self.seconds[what] = round(time.monotonic() - start, 1)

    def wait_for_life(self, number: int, what: str = "start") -> None:
        """Wait until both ranks of a life train and it has saved something of its own."""

        def is_productive() -> bool:
            lives = [self.project.facts(rank) for rank in (0, 1)]
            return all(len(life) >= number for life in lives) and self.saved() > lives[0][number - 1]["first_step"]

        self.wait(what, is_productive)

    def saved(self) -> int:
        """Return the step of the newest checkpoint."""
        return max((int(path.name[5:]) for path in self.project.run_dir.glob("checkpoints/step_*")), default=0)

    def rank_processes(self) -> list[int]:
        """Return this machine's pids of the processes that train, by rank; not of their guards."""
        ranks = self.cluster.rank_pids(self.job_id).values()
        return [next(pid for pid in pids if HEARTBEAT_FD in self.cluster.environment_of(pid)) for pids in ranks]

    def state(self) -> dict[str, Any]:
        """Return what `mvit status --json` says of the run."""
        return json.loads(self.mvit("status", self.run_dir, "--json"))

    def processes(self) -> list[int]:
        """Return this machine's pids of everything that runs for a job on the nodes."""
        everything = [pid for name in self.cluster.names for pid in self.cluster.pids_on(name)]
        return [pid for pid in everything if "SLURM_JOB_ID" in self.cluster.environment_of(pid)]

    def report(self) -> str:
        """Return what a person would look at when this goes wrong."""
        job = self.cluster.job(self.job_id)
        told = {key: job.get(key) for key in ("JobState", "Reason", "Restarts", "NodeList", "ExitCode")}
        logs = sorted(path for path in self.project.run_dir.glob("*/*/*") if path.suffix in (".log", ".out", ".err"))
        left = {pid: (Path("/proc") / str(pid) / "cmdline").read_text().split("\0") for pid in self.processes()}
        return "\n".join(
            [
                str(told),
                f"processes on the nodes: {left}",
                *map(str, self.project.events()),
                *(f"--- {log}\n{log.read_text()[-1500:]}" for log in logs),
            ]
        )


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """Return a folder that any user can reach: pytest's own is for root's eyes only."""
    folder = Path(tempfile.mkdtemp(prefix="mvit-public-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def python_of(user: str) -> tuple[str, str]:
    """Return an interpreter that a user may run, and the folder of our packages if it does not know them itself.

    A virtual environment may be built on an interpreter in root's home; its packages suit the system's of that version.
    """
    account = pwd.getpwnam(user)
    system = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for python, packages in ((sys.executable, ""), (system, str(Path(pytest.__file__).parents[1]))):
        try:
            subprocess.run(
                [python, "-c", "import submitit, omegaconf"],
                env={"PYTHONPATH": packages},
                cwd="/",
                user=account.pw_uid,
                group=account.pw_gid,
                extra_groups=[],
                check=True,
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return python, packages
    pytest.skip(f"{user} may run neither {sys.executable} nor {system} with our packages")


@contextmanager
def job_on(settings: Settings, folder: Path, user: str | None = None) -> Iterator[Job]:
    """Start a cluster of this kind and lay out a project for it."""
    project = create_project(folder / "project")
    (project.root / "cluster.yaml").write_text(yaml.safe_dump(SLURM))
    if user is not None:
        for path in [project.root, *project.root.rglob("*")]:
            shutil.chown(path, user)
    with Cluster(settings) as cluster:
        job = Job(cluster, project, user)
        yield job
        print(f"{settings}: seconds {job.seconds}, events:")
        print("\n".join(map(str, project.events())))


@pytest.mark.parametrize("tracking", ["linuxproc", "pgid", "cgroup"])
def test_a_job_survives_and_stops_under_every_kind_of_process_tracking(
    slurm_available: None, tracking: Any, tmp_path: Path
) -> None:
    if tracking == "cgroup" and (reason := cgroups.refused()):
        pytest.skip(f"no cgroups for the nodes here: {reason}")
    with job_on(replace(QUICK, proctrack=tracking), tmp_path) as job:
        job.submit(*LONG, "num_workers=1")
        job.wait_for_life(1)
        os.kill(job.rank_processes()[1], signal.SIGKILL)
        job.wait_for_life(2, "killed rank")
        assert job.last("end")["kind"] == "killed"
        job.cluster.run("scontrol", "requeue", job.job_id)
        job.wait_for_life(3, "scontrol requeue")
        job.mvit("stop", job.run_dir)
        job.wait("stop", lambda: job.state()["state"] == "stopped")
        state = job.state()
        assert state["checkpoint_step"] == state["step"], job.report()
        job.wait("no process left", lambda: not job.processes())
        job.mvit("resume", job.run_dir, "step_s=0")
        job.wait("resume", lambda: job.state()["state"] == "finished")
        assert job.project.facts(0)[-1]["first_step"] == state["step"]


@pytest.mark.parametrize("accounting", ["none", "dbd"])
def test_a_job_needs_no_accounting_and_feels_at_home_with_one(
    slurm_available: None, accounting: Any, tmp_path: Path
) -> None:
    if accounting == "dbd" and (reason := missing_for_database()):
        pytest.skip(reason)
    with job_on(replace(QUICK, accounting=accounting), tmp_path) as job:
        job.submit(*LONG, *(["cluster.account=test"] if accounting == "dbd" else []))
        job.wait_for_life(1)
        os.kill(job.rank_processes()[0], signal.SIGKILL)
        job.wait_for_life(2, "killed rank")
        job.mvit("stop", job.run_dir)
        job.wait("stop", lambda: job.state()["state"] == "stopped")
        job.mvit("resume", job.run_dir, "cluster.sbatch.hold=true")
        job.cluster.run("scancel", job.job_id)
        job.wait("cancelled in the queue", lambda: job.state()["state"] == "stopped")
        assert "CANCELLED" in job.state()["detail"]
        job.cluster.forget_jobs()
        later = job.state()
        if accounting == "dbd":  # remembers for the controller, each life of a job by itself
            assert (later["state"], "CANCELLED" in later["detail"]) == ("stopped", True)
            lives = job.cluster.run("sacct", "-n", "-X", "-D", "-P", "-o", "JobID,State,Account").splitlines()
            assert lives[0] == "1|REQUEUED|test"
        else:
            assert (later["state"], "no longer knows the job" in later["detail"]) == ("failed", True)
        job.mvit("resume", job.run_dir, "step_s=0", "cluster.sbatch={}")
        job.wait("resume", lambda: job.state()["state"] == "finished")


def test_a_rank_that_is_slow_to_leave_does_not_turn_a_stop_into_a_crash(slurm_available: None, tmp_path: Path) -> None:
    with job_on(Settings(nodes=2), tmp_path) as job:
        with (job.project.tree / "mvit" / "__init__.py").open("a") as module:
            module.write(SLOW_TO_LEAVE)
        job.submit(*LONG)
        job.wait_for_life(1)
        job.mvit("stop", job.run_dir)
        job.wait("stop", lambda: job.last("end"))
        assert job.last("end")["kind"] == "user_stop", job.last("end")


@pytest.mark.parametrize("by", ["scancel", "mvit cancel"])
def test_a_job_cancelled_while_it_trains_stays_cancelled(slurm_available: None, by: str, tmp_path: Path) -> None:
    with job_on(QUICK, tmp_path) as job:
        job.submit(*LONG)
        job.wait_for_life(1)
        if by == "scancel":
            job.cluster.run("scancel", job.job_id)
        else:
            job.mvit("cancel", job.run_dir)
        job.wait("cancelled", lambda: not job.processes())
        assert job.state()["state"] == "stopped"
        time.sleep(2)
        assert job.cluster.job(job.job_id)["JobState"] == "CANCELLED"


def test_a_controller_that_is_away_when_a_life_ends_costs_no_run(slurm_available: None, tmp_path: Path) -> None:
    with job_on(QUICK, tmp_path) as job:
        job.submit(*LONG)
        job.wait_for_life(1)
        second = job.rank_processes()[1]
        job.cluster.kill_controller()
        os.kill(second, signal.SIGKILL)
        time.sleep(6)
        job.cluster.start_controller()
        job.wait_for_life(2, "killed rank")
        assert (job.last("end")["kind"], job.last("end")["requeued"]) == ("killed", True)
        job.mvit("cancel", job.run_dir)
        job.wait("cancelled", lambda: not job.processes())


def test_without_the_right_to_requeue_the_run_ends_and_says_how_to_go_on(slurm_available: None, tmp_path: Path) -> None:
    with job_on(replace(QUICK, job_requeue=False), tmp_path) as job:
        job.submit(*LONG)
        job.wait_for_life(1)
        assert job.cluster.job(job.job_id)["Requeue"] == "1"  # the job asks for it where the site's default is no
        job.cluster.run("scontrol", "update", f"jobid={job.job_id}", "requeue=0")  # a site that insists
        os.kill(job.rank_processes()[1], signal.SIGKILL)
        job.wait("killed rank", lambda: job.state()["state"] == "failed")
        assert "mvit resume" in job.last("end")["reason"]
        assert "the requeue was refused" in job.mvit("why", job.run_dir)
        job.mvit("resume", job.run_dir, "step_s=0")
        job.wait("resume", lambda: job.state()["state"] == "finished")


def test_a_user_who_is_not_root_trains_is_requeued_and_stops(slurm_available: None, public_folder: Path) -> None:
    with job_on(QUICK, public_folder, user=USER) as job:
        job.python = python_of(USER)
        job.submit(*LONG)
        job.wait_for_life(1)
        assert {os.stat(f"/proc/{pid}").st_uid for pid in job.rank_processes()} == {pwd.getpwnam(USER).pw_uid}
        os.kill(job.rank_processes()[1], signal.SIGKILL)
        job.wait_for_life(2, "killed rank")
        job.mvit("stop", job.run_dir)
        job.wait("stop", lambda: job.state()["state"] == "stopped")
