"""What a run saves and how an attempt continues from it: everything between the trainer and the checkpoint files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import TrainLoader
from mvit.checkpoint import (
    CheckpointError,
    Manifest,
    list_steps,
    newest_valid_on_all_ranks,
    predicted_bytes,
    read_manifest,
)
from mvit.checkpoint_load import check_loaded, load_buffers, load_into, load_rng
from mvit.checkpoint_resize import resized
from mvit.checkpoint_save import Contents, Outcome, SaveError, Saver
from mvit.config import RunConfig, parse_config
from mvit.distributed import RankInfo, broadcast_object, gather_objects, logger, together
from mvit.engine import Engine
from mvit.life import Life, Unattended
from mvit.optim import num_moments
from mvit.retention import Retention, clear_leftovers, scores_of


@dataclass(frozen=True)
class Restored:
    """Where an attempt begins."""

    step: int = 0
    logged_step: int = 0
    """Last step whose loss is on record."""
    loss_sum: float = 0.0
    """This rank's losses of the steps after it."""


class RunCheckpoints:
    """The checkpoints of one attempt; every method but `poll` and `close` is collective."""

    def __init__(self, config: RunConfig, run_dir: Path, ranks: RankInfo, life: Life | None = None) -> None:
        self._recipe, self._config, self._run_dir, self._ranks = config, config, run_dir, ranks
        life = life or Unattended()
        if ranks.is_main:
            life.check_owner()
            clear_leftovers(run_dir)
        self.last: Path | None = newest_valid_on_all_ranks(run_dir, ranks)
        """The newest valid checkpoint."""
        self.failed_saves = 0
        self.last_step = reached = int(self.last.name.removeprefix("step_")) if self.last else 0
        # Steps beyond it are damaged, and what they scored will be scored again.
        self._best: float | None = None
        together(lambda: self._read_best(reached), "reading the scores of older checkpoints", here=ranks.is_main)
        self._best = broadcast_object(self._best)
        retention = Retention(config.train.keep_last, config.train.keep_every, config.train.keep_best)
        self._saver = Saver(
            run_dir, ranks, retention, asynchronous=config.train.async_save, check_owner=life.check_owner
        )
        self._saver.damaged = {step for step in list_steps(run_dir) if step > reached}

    def _read_best(self, reached: int) -> None:
        scores, steps = scores_of(self._run_dir), list_steps(self._run_dir)
        self._best = max((scores[step] for step in steps if step <= reached and step in scores), default=None)

    def attach(self, config: RunConfig, engine: Engine, loader: TrainLoader, shapes: Mapping[str, list[int]]) -> None:
        """Say whose state is saved and restored, as `config`, the current phase's, has built it.

        `shapes` are those of all parameters, from before ZeRO split them.
        """
        self._config, self._engine, self._loader, self._shapes = config, engine, loader, shapes

    def predicted_bytes(self, shapes: Mapping[str, list[int]]) -> int:
        """Return the size of one checkpoint over all ranks."""
        elements = sum(torch.Size(shape).numel() for shape in shapes.values())
        optim = self._config.optim
        return predicted_bytes(elements, ema=optim.ema_decay is not None, num_moments=num_moments(optim))

    def restore(self) -> Restored:
        """Load the newest valid checkpoint, if there is one, and prove that its state is what was loaded.

        Raises CheckpointError on all ranks if the checkpoint does not fit the run or the loaded state differs.
        """
        path = self.last
        self._saver.reserve(self._engine.fragments())
        if path is None:
            return Restored()
        manifest, engine = read_manifest(path), self._engine
        self._loader.check_state(manifest.state["data"])
        saved_groups = {g["name"]: set(g["parameters"]) for g in manifest.groups}
        if saved_groups != {g.name: set(g.parameter_names) for g in engine.groups}:
            raise CheckpointError(f"{path}: parameter groups differ from this run's; resume with the run's own config")
        if self._is_of_another_phase(manifest):
            model: Any = engine.module
            manifest = resized(manifest, self._shapes, model.grid, model.class_tokens)
            logger.info(
                "%d position tables are resized to %s", len({name for name, _ in manifest.held}), model.input_size
            )
        with engine.writing() as fragments:
            together(lambda: load_into(manifest, fragments, self._shapes), f"loading {path}")
        together(lambda: load_buffers(manifest, engine.buffers()), f"loading the buffers of {path}")
        engine.restore_counters(manifest.step, manifest.state["counters"])
        check_loaded(manifest, engine.fragments(), engine.hyperparameters(), self._ranks, engine.replicas())
        together(lambda: self._check_counters(manifest.state["counters"], path), "comparing the counters")
        together(lambda: self._restore_rng(load_rng(manifest, self._ranks.rank)), "restoring the random states")
        logger.info("resumed from %s (saved on %d ranks); the loaded state is the saved one", path, manifest.world_size)
        window = manifest.state["log_window"]
        sums = window["loss_sums"]
        same_ranks = len(sums) == self._ranks.world_size
        return Restored(
            manifest.step,
            window["since_step"],
            sums[self._ranks.rank] if same_ranks else sum(sums) / len(sums),
        )

    def _is_of_another_phase(self, manifest: Manifest) -> bool:
        """Tell whether the run has phases and this one has another resolution than the one that saved."""
        saved = parse_config(manifest.state["config"], source=str(manifest.path)).input_size
        return bool(self._recipe.phases) and saved != self._config.input_size

    def _check_counters(self, saved: Mapping[str, object], path: Path) -> None:
        now = self._engine.counters()
        # A stage or precision without a loss scale has none to restore.
        wrong = [key for key in saved if saved[key] != now[key] and not (key == "loss_scaler" and not now[key])]
        if wrong:
            told = "; ".join(f"{key} is {now[key]}, {saved[key]} was saved" for key in wrong)
            raise CheckpointError(f"{path}: after loading, counters differ: {told}")

    def _restore_rng(self, rng: Mapping[str, torch.Tensor]) -> None:
        if "cpu" in rng:
            torch.set_rng_state(rng["cpu"])
        if "device" in rng and self._ranks.device.type == "cuda":
            torch.cuda.set_rng_state(rng["device"], self._ranks.device)

    def is_best(self, score: float | None) -> bool:
        """Say whether `score` is the best so far of a run that keeps its best checkpoints, and remember it."""
        if score is None or (self._best is not None and score <= self._best):
            return False
        self._best = score
        return self._config.train.keep_best > 0

    def save(
        self, step: int, *, logged_step: int, loss_sum: float, score: float | None, must_succeed: bool
    ) -> list[Outcome]:
        """Begin to save; with `must_succeed` wait for the publish and raise SaveError on all ranks if it failed.

        Returns the saves that ended meanwhile.
        """
        rng = {"cpu": torch.get_rng_state()}
        if self._ranks.device.type == "cuda":
            rng["device"] = torch.cuda.get_rng_state(self._ranks.device)
        engine = self._engine
        contents = Contents(
            engine.fragments(),
            self._shapes,
            engine.hyperparameters(),
            {
                "counters": engine.counters(),
                "data": self._loader.state_dict(step),
                "log_window": {"since_step": logged_step, "loss_sums": gather_objects(loss_sum)},  # one a rank
                "config": self._config.model_dump(mode="json"),
            },
            rng,
            engine.buffers(),
            score,
        )
        needed = self.predicted_bytes(self._shapes)
        self._saver.begin(step, contents, needed_bytes=needed, read_back=not must_succeed)
        if not must_succeed:
            return self.poll()
        ended = self._saver.finish()
        if error := next((one.error for one in ended if one.step == step), ""):
            raise SaveError(self._failure(step, error))
        return self._taken(ended)

    def poll(self) -> list[Outcome]:
        """Return the saves that ended since the last call, after reporting those that failed; never waits."""
        return self._taken(self._saver.poll())

    def _taken(self, outcomes: list[Outcome]) -> list[Outcome]:
        for outcome in outcomes:
            if outcome.damage:  # the saver has said so
                self.failed_saves += 1
            elif not outcome.error:
                self.last = outcome.path
            else:
                self.failed_saves += 1
                logger.error("%s; training goes on", self._failure(outcome.step, outcome.error))
        return outcomes

    def _failure(self, step: int, error: str) -> str:
        folder = self._run_dir / "checkpoints"
        return f"the checkpoint of step {step} was not saved ({error}); older checkpoints in {folder} are untouched"

    def close(self) -> None:
        """Give a save in flight a moment to end."""
        self._saver.close()
        self.poll()
