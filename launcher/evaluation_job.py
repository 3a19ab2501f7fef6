"""The last job of a chain: evaluates a finished run once and writes evaluation.json into its folder.

It has a run folder of its own, RUN/evaluation, with attempts, logs and ledger like any run, and shares the run's code.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.identity import describe_run
from launcher.run_folder import RunFolder, append_json_line, claim, write_json
from mvit.life import Life, Stopped

if TYPE_CHECKING:
    from launcher.cluster import ClusterConfig
    from mvit.trainer import TrainResult

SUBJECT = "evaluates"  # key of run.json that makes a job evaluate instead of train


@dataclass(frozen=True)
class Evaluation:
    """Where the evaluation of a run lies."""

    subject: RunFolder

    @property
    def folder(self) -> RunFolder:
        """The job's own run folder."""
        return RunFolder(self.subject.path / "evaluation")

    @property
    def result_file(self) -> Path:
        return self.subject.path / "evaluation.json"


def create_evaluation(subject: RunFolder, name: str, command: Sequence[str], cluster: "ClusterConfig") -> RunFolder:
    """Make the folder of the job that will evaluate `subject`, a run that is created but need not be finished."""
    folder = Evaluation(subject).folder
    shutil.rmtree(folder.path, ignore_errors=True)  # of an earlier submission of a run that never saved anything
    settings = cluster.model_dump(mode="json", exclude_defaults=True)
    code_sha256 = str(subject.identity()["code_sha256"])
    claim(folder, describe_run(name, command, code_sha256, settings) | {SUBJECT: str(subject.path)})
    folder.code_dir.symlink_to(Path("..") / subject.code_dir.name)
    shutil.copy(subject.config_file, folder.config_file)
    return folder


def evaluates(folder: RunFolder) -> bool:
    """Say whether a run folder is that of an evaluation."""
    return SUBJECT in folder.identity()


def run_evaluation(folder: RunFolder, life: Life, rank: int, stop_requested: Callable[[], bool]) -> "TrainResult":
    """Evaluate what the run has come to, its averaged weights if it has them, and write that down (collective).

    If `stop_requested` is true on any rank, all of them leave between two batches, with nothing written.
    """
    import mvit
    from mvit import distributed
    from mvit.starting_weights import trained_weights

    evaluation = Evaluation(RunFolder(Path(folder.identity()[SUBJECT])))
    life.beat(0, "start")
    trained = trained_weights(evaluation.subject.path, distributed.start())
    try:
        figures = mvit.evaluate(
            mvit.load_config(folder.config_file),
            trained.checkpoint,
            ema=trained.averaged,
            show_progress=rank == 0,
            beat=lambda: life.beat(0, "evaluate"),
            stop_requested=stop_requested,
        )
    except Stopped as stopped:
        print(stopped, flush=True)
        return mvit.TrainResult(trained.step, trained.step, True)
    life.beat(0, "end")
    if rank == 0:
        life.check_owner()
        result = {
            "run_dir": str(evaluation.subject.path),
            "step": trained.step,
            "checkpoint": str(trained.checkpoint),
            "weights": "averaged" if trained.averaged else "last",
            "figures": figures,
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "time": time.time(),
        }
        write_json(evaluation.result_file, result)
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        which = f"step {trained.step} of {evaluation.subject.path}, {result['weights']} weights"
        print(f"evaluated {which}: {shown}", flush=True)
        append_json_line(
            folder.metrics_file, {"kind": "evaluate", "step": trained.step, "time": result["time"], **figures}
        )
    return mvit.TrainResult(trained.step, trained.step, False, figures)
