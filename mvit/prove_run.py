"""One attempt of a run as `mvit prove-resume` has it done: traced, stopped early, or killed in the middle of a step."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from mvit.checkpoint import checkpoint_path
from mvit.config import RunConfig, parse_config
from mvit.trace import Tracer
from mvit.trainer import train

MIN_STEPS = 4  # a save, a step that the kill loses, and two after the resume
_PUBLISH_PATIENCE_S = 1800.0
_POLL_S = 0.05


def save_step(kill_at: int) -> int:
    """Return the step whose checkpoint a run that is killed in step `kill_at` continues from."""
    return (kill_at + 1) // 2


def proof_config(config: RunConfig, save_every: int) -> RunConfig:
    """Return `config` with nothing changed but what does not reach the training: when it saves, logs and evaluates."""
    tree = config.model_dump(mode="json")
    tree["train"] |= {"save_every": save_every, "keep_every": 0, "keep_best": 0, "log_every": 1, "evaluate_every": 0}
    return parse_config(tree)


def killed_mark(trace_dir: Path) -> Path:
    """Return the file that the rank leaves which kills itself: other kills are no part of the proof."""
    return trace_dir / "killed"


class _KilledTracer(Tracer):
    """Kills the last rank with SIGKILL half-way through the chunks of a step, once the checkpoint before is published.

    Without waiting for the publish a tiny model would be killed before it had anything to resume from.
    """

    def __init__(self, trace_dir: Path, run_dir: Path, kill_at: int, chunk: int) -> None:
        super().__init__(trace_dir)
        self._trace_dir = trace_dir
        self._checkpoint = checkpoint_path(run_dir, save_step(kill_at))
        self._kill_at, self._chunk = kill_at, chunk

    def read(self, step: int, accumulation: int, batch: Any) -> None:
        if step == self._kill_at and accumulation == self._chunk and _is_last_rank():
            deadline = time.monotonic() + _PUBLISH_PATIENCE_S
            while not self._checkpoint.is_dir():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self._checkpoint} was not published within {_PUBLISH_PATIENCE_S:g} s")
                time.sleep(_POLL_S)  # the thread that saves goes on
            killed_mark(self._trace_dir).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().read(step, accumulation, batch)


def _is_last_rank() -> bool:
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def train_traced(config: RunConfig, run_dir: Path, trace_dir: Path, *, steps: int, kill_at: int | None = None) -> None:
    """Train this rank up to step `steps` of the full run's schedule and record the attempt in `trace_dir`.

    With `kill_at` the last rank dies by SIGKILL in the middle of that step. Raises what `train` raises.
    """
    tracer = Tracer(trace_dir)
    if kill_at is not None:
        accumulation = config.batch_arithmetic(int(os.environ["WORLD_SIZE"])).accumulation_steps
        tracer = _KilledTracer(trace_dir, run_dir, kill_at, accumulation // 2)
    # The ranks agree to stop one step after the request.
    train(
        config, run_dir=run_dir, stop_requested=lambda: tracer.step >= steps - 1, show_progress=False, observer=tracer
    )
