"""A real training job on the toy cluster: two nodes of two ranks under DeepSpeed, and what its run folder tells."""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mvit.checkpoint import checkpoint_path, list_steps, read_manifest
from mvit.config import RunConfig
from tests.mvit.test_training import records, tiny_config
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
CLUSTER = {
    "executor": "slurm",
    "nodes": 2,
    "ranks_per_node": 2,
    "cpus_per_rank": 1,
    "mem": "400M",
    "timeout_min": 10,
    "signal_delay_s": 60,
    "hang_timeout_s": 20,
    "env": {"OMP_NUM_THREADS": "1"},
}


@dataclass
class TrainingJob:
    """One run on the cluster, from its submission to its end."""

    cluster: Cluster
    config: RunConfig
    settings: dict[str, Any] = field(default_factory=dict)
    faults: str = ""
    job_id: str = ""

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    def mvit(self, *arguments: str | Path, check: bool = True) -> str:
        """Run one command of ours in the cluster's environment."""
        command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
        return self.cluster.run(*command, check=check, timeout=120, env={"PYTHONPATH": str(ROOT)})

    def submit(self) -> "TrainingJob":
        folder = Path(self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        recipe, cluster = folder / f"{self.config.name}.yaml", folder / f"{self.config.name}.cluster.yaml"
        recipe.write_text(self.config.to_yaml())
        env = CLUSTER["env"] | ({"MVIT_FAULTS": self.faults} if self.faults else {})
        cluster.write_text(yaml.safe_dump({**CLUSTER, **self.settings, "env": env}))
        self.job_id = json.loads(self.mvit("submit", recipe, "--cluster", cluster, "--json"))["job_id"]
        return self

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        file = self.run_dir / "attempts.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if kind is None or line["event"] == kind]

    def life(self) -> int:
        """Return the number of the life that started last."""
        return max((event["attempt"] for event in self.events("start")), default=0)

    def step(self) -> int:
        """Return the step logged last."""
        file = self.run_dir / "metrics.jsonl"
        steps = [record["step"] for record in records(self.run_dir)] if file.exists() else []
        return max(steps, default=0)

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = 300) -> float:
        """Wait for a condition and return the time (since the epoch) at which it was seen."""
        end = time.monotonic() + timeout_s
        while not condition():
            state = self.cluster.job(self.job_id)
            told = {key: state.get(key) for key in ("JobState", "Reason", "Restarts", "NodeList", "ExitCode")}
            assert time.monotonic() < end, f"not within {timeout_s} s: {what}; {told}\n{self.report()}"
            time.sleep(0.1)
        return time.time()

    def wait_for_life(self, life: int, timeout_s: float = 300) -> dict[str, Any]:
        """Wait until a life has finished its first step and return the event that says so."""
        found: list[dict[str, Any]] = []

        def productive() -> bool:
            found[:] = [event for event in self.events("first_step") if event["attempt"] == life]
            return bool(found)

        self.wait(productive, f"the first step of life {life}", timeout_s)
        return found[0]

    def wait_for_step(self, step: int, timeout_s: float = 300) -> None:
        self.wait(lambda: self.step() >= step, f"step {step}", timeout_s)

    def wait_finished(self, timeout_s: float = 400) -> None:
        self.wait(lambda: self.ends() and self.ends()[-1]["kind"] == "finished", "the end of the run", timeout_s)
        self.cluster.wait_job(self.job_id, lambda job: job["JobState"] == "COMPLETED", 30)

    def ends(self) -> list[dict[str, Any]]:
        return self.events("end")

    def report(self) -> str:
        """Return what a person would look at when a test of this job fails."""
        parts = [json.dumps(event) for event in self.events()[-12:]]
        logs = sorted(self.run_dir.glob("logs/*/rank_0000.log"))[-1:] + sorted(self.run_dir.glob("submitit/*/*.err"))
        return "\n".join(parts + [f"--- {log}\n{log.read_text()[-1500:]}" for log in logs])

    def final_hashes(self) -> list[str]:
        """Return the SHA-256 of every shard of the last checkpoint: weights, moments, average, random states."""
        last = list_steps(self.run_dir)[-1]
        return [file["sha256"] for file in read_manifest(checkpoint_path(self.run_dir, last)).files]

    def losses(self) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in records(self.run_dir)]


def job_config(digits: Path, folder: Path, name: str, **sections: Any) -> RunConfig:
    """Return the run of all Slurm tests: ZeRO-2, a save every 10 steps, a record at each."""
    train = {"evaluate_every": 0, "save_every": 10, "log_every": 1, "micro_batch_size": 16} | sections.pop("train", {})
    return tiny_config(digits, folder, name, train=train, zero={"stage": 2}, **sections)


def tree_hash(folder: Path) -> str:
    """Return a hash over the names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()
