"""A project tree whose training is a stand-in, and a command line that runs from it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from launcher.status import run_state

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0  # upper bound of what takes one or two seconds on a quiet machine


@dataclass(frozen=True)
class Project:
    """A copy of the launcher beside the stand-in for mvit, with a recipe and a cluster file of two CPU ranks."""

    root: Path

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    @property
    def run_dir(self) -> Path:
        return self.root / "runs" / "trial"

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.tree), "PYTHONSAFEPATH": "1"}

    def mvit(self, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli", *arguments],
            cwd=self.root,
            env=environment or self.environment(),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start one command and leave it running."""
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", *arguments],
            cwd=self.root,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def submit(self, *overrides: str, follow: bool = False) -> subprocess.CompletedProcess[str]:
        options = ["--follow"] if follow else []
        return self.mvit("submit", "recipe.yaml", "--cluster", "cluster.yaml", *options, *overrides)

    def status(self) -> dict:
        """Return what `mvit status --json` prints, without starting a process for it."""
        return run_state(self.run_dir).to_dict()

    def facts(self, rank: int) -> list[dict]:
        """Return what each life of a rank reported about itself."""
        path = self.run_dir / f"facts_{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "attempts.jsonl").read_text().splitlines()]

    def wait_for_training(self, num_ranks: int = 2, life: int = 1) -> list[int]:
        """Wait until all ranks of a life train and one step is done; return their pids."""
        wait_until(lambda: all(len(self.facts(rank)) >= life for rank in range(num_ranks)))
        wait_until((self.run_dir / "metrics.jsonl").exists)
        return [self.facts(rank)[life - 1]["pid"] for rank in range(num_ranks)]

    def processes(self) -> list[psutil.Process]:
        """Return every process that belongs to this project's jobs: all carry its tree in their environment."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return str(self.root) in process.environ().get("PYTHONPATH", "") and process.status() != "zombie"
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False


def wait_until(condition: Callable[[], object], timeout: float = WAIT_S) -> float:
    """Wait for a condition and return the seconds it took; fail the test when it does not come."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout, f"not within {timeout} s"
        time.sleep(0.05)
    return time.monotonic() - start


def create_project(root: Path) -> Project:
    """Lay out the tree, a recipe and a cluster file of two CPU ranks."""
    tree = root / "tree"
    shutil.copytree(ROOT / "launcher", tree / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(__file__).parent / "stand_in" / "mvit", tree / "mvit")
    for name in ("progress", "life", "ledger", "ledger_events"):
        shutil.copy(ROOT / "mvit" / f"{name}.py", tree / "mvit" / f"{name}.py")
    shutil.copytree(ROOT / "data_pipeline", tree / "data_pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "shards").mkdir()
    (root / "shards" / "shard-000000.tar").touch()  # a submission looks whether it exists, the stand-in reads nothing
    (root / "recipe.yaml").write_text(yaml.safe_dump({"name": "trial", "output_dir": str(root / "runs")}))
    (root / "cluster.yaml").write_text("executor: local\nranks_per_node: 2\n")
    return Project(root)
