"""The training loop, what it is set up from, and how it saves, resumes and stops."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.loader import TrainLoader
from data_pipeline.order import derive_seed
from mvit import distributed
from mvit.checkpoint import check_space
from mvit.checkpoint_save import Outcome
from mvit.config import BatchArithmetic, ConfigError, RunConfig
from mvit.distributed import RankInfo, StopAgreement, free_memory, logger, together
from mvit.engine import Engine
from mvit.evaluation import evaluation_loader, run_evaluation
from mvit.forecast import Forecast
from mvit.guard import FiniteGuard
from mvit.life import Life, Unattended
from mvit.life_log import LifeLog
from mvit.metrics import RunLog, peak_flops
from mvit.observer import Observer
from mvit.optim import parameter_groups
from mvit.phases import phase_at
from mvit.run_checkpoints import RunCheckpoints
from mvit.run_data import open_data
from mvit.run_identity import claim
from mvit.run_schedule import lr_at
from mvit.save_timing import SaveTiming
from mvit.starting_weights import starting_weights
from mvit.step_report import StepReport
from mvit.tasks import create_task
from mvit.tasks.base import Task
from mvit.watch import Watch


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    total_steps: int
    stopped: bool
    """True if it was asked to stop before the last step; everything is saved and `train` continues from there."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of the final evaluation."""


def _never() -> bool:
    return False


def train(
    config: RunConfig,
    *,
    run_dir: Path | None = None,
    stop_requested: Callable[[], bool] = _never,
    show_progress: bool = True,
    observer: Observer | None = None,
    life: Life | None = None,
) -> TrainResult:
    """Train as `config` says, continuing from the run folder's newest valid checkpoint if there is one.

    Runs as one process, or as each rank of a launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT. `stop_requested` is asked at every step; if it is true on any rank, all ranks save and return. `life`
    is told that this rank is alive, and asked whether the run is still this one's.
    Raises ConfigError, ShardError, CheckpointError or ValueError before the first step for what cannot be run,
    NonFiniteError when the loss or gradient norm stops being finite, SaveError when the last save fails, Superseded
    when a later life of the run has taken over.
    """
    ranks = distributed.start()
    distributed.configure_logging(ranks.rank)
    life = life or Unattended()
    life.beat(0, "start")
    life_log = LifeLog(life, active=ranks.is_main)
    while True:  # once for each phase
        with life_log.building():
            run = _Run(config, Path(run_dir or config.run_dir), ranks, show_progress, life, life_log)
        try:
            result = run.loop(stop_requested, observer)
        except BaseException:
            # The error may be this rank's alone: nothing that waits for the other ranks or the device may run now.
            run.close()
            raise
        run.close()
        run.engine.close()
        if result.stopped or result.step == result.total_steps:
            return result
        del run
        free_memory(ranks.device)


class _Run:
    """Everything one attempt of a run needs; built in the order in which things can go wrong cheaply."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        ranks: RankInfo,
        show_progress: bool,
        life: Life,
        life_log: LifeLog,
    ) -> None:
        self.recipe, self.run_dir, self.ranks, self.life, self.life_log = config, run_dir, ranks, life, life_log
        self.step = 0  # the last finished one
        config.batch_arithmetic(ranks.world_size)  # of all phases, before anything is read
        if config.train.precision == "fp16" and ranks.device.type == "cpu":
            raise ConfigError("train.precision = fp16 does not run on CPUs; use train.precision=bf16 or fp32")
        self.shards, self.validation = open_data(config, ranks)
        self.total_steps = config.total_steps(len(self.shards))
        together(lambda: claim(run_dir, config), "claiming the run folder", here=ranks.is_main)
        self.checkpoints = RunCheckpoints(config, run_dir, ranks, life)
        self.phase = phase_at(config, self.checkpoints.last_step, len(self.shards))
        self.config = config = self.phase.config
        self.batch: BatchArithmetic = config.batch_arithmetic(ranks.world_size)
        self.task: Task = create_task(config)
        self.loader = TrainLoader(
            self.shards,
            self.task.transform(train=True),
            self.task.collate,
            config.data,
            seed=config.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            repeats=config.repeats,
        )
        self.forecast = Forecast(config, ranks, begins=self.checkpoints.last is None)
        self._build_engine()
        self.evaluation_loader = (
            None if self.validation is None else evaluation_loader(config, self.task, self.validation, ranks)
        )
        self.checkpoints.attach(config, self.engine, self.loader, self.shapes)
        life.beat(0, "start")
        began = time.perf_counter()
        restored = self.checkpoints.restore()
        self.life_log.restored(restored.step, time.perf_counter() - began)
        self.step = self.first_step = restored.step
        self.report = StepReport(
            config,
            ranks,
            self.engine,
            total_steps=self.total_steps,
            num_samples=len(self.shards),
            peak_flops=self.peak,
            flops_per_sample=self.flops_per_sample,
            logged_step=restored.logged_step,
            loss_sum=restored.loss_sum,
        )
        self.timer = self.report.timer
        num_bytes = self.checkpoints.predicted_bytes(self.shapes)
        self.saving = SaveTiming(config, ranks, life, first_step=self.first_step, num_bytes=num_bytes)
        self.guard = FiniteGuard(ranks, watch_grad_norm=config.train.precision != "fp16")
        self.log = RunLog(
            run_dir,
            first_step=self.first_step,
            total_steps=self.total_steps,
            active=ranks.is_main,
            show_progress=show_progress,
        )
        self.watch = Watch(config.profile, config.watch, run_dir, ranks, self.engine, self.log)

    def _build_engine(self) -> None:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "init"))
        model = self.task.build_model()
        if self.checkpoints.last is None and config.model.weights is not None:
            together(lambda: self._load_weights(model), f"loading {config.model.weights}")
        self.shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        needed = self.checkpoints.predicted_bytes(self.shapes)
        together(lambda: check_space(self.run_dir, needed), "looking for free space")
        self.peak = peak_flops(self.ranks.device, config.train.peak_tflops)
        self.flops_per_sample = 0.0 if self.peak is None else self.task.flops_per_sample()
        groups = parameter_groups(model, config.optim, depth=sum(config.model.resolved_variant().depths))
        self.engine = Engine(
            model,
            groups,
            config.optim,
            config.zero,
            precision=config.train.precision,
            micro_batch_size=self.batch.micro_batch_size,
            accumulation_steps=self.batch.accumulation_steps,
            ranks=self.ranks,
            compile_backend=None if config.train.compile == "off" else config.train.compile,
        )

    def _load_weights(self, model: nn.Module) -> None:
        options = self.config.model
        assert options.weights is not None
        source, told = starting_weights(options.weights, self.ranks)
        report = self.task.load_weights(model, source, new_head=options.new_head)
        logger.info("starting from %s: %s", told, report)

    def loop(self, stop_requested: Callable[[], bool], observer: Observer | None) -> TrainResult:
        every = self.config.train
        step, stop, agreement = self.first_step, False, StopAgreement()
        figures: dict[str, float] = {}
        if self.first_step >= self.total_steps:
            return TrainResult(self.first_step, self.total_steps, False, self._evaluate(self.first_step, log=False))
        self._log_start()
        if self._evaluation_due(self.first_step) and not self._main_says(self.log.has_evaluation, self.first_step):
            self._evaluate(self.first_step)  # a stop came in its place
        batches = self.loader.start(self.first_step)
        self.life_log.begin()
        if observer is not None:
            observer.started(self.first_step, self.engine)
        self.watch.begin(self.first_step, self.total_steps)
        self.timer.skip()
        for step in range(self.first_step + 1, self.phase.end + 1):
            lr = self._lr_at(step)
            with self.watch.step(step):
                losses = self._compute(step, batches, observer)
                grad_norm = self.engine.update(lr)
                self.timer.mark("optimizer")
            self.step = step
            self.guard.watch(step, self.report.loss_sum, grad_norm)
            if observer is not None:
                observer.updated(step, losses, grad_norm, lr, self.engine)
            self.report.updated(grad_norm)
            self.life_log.stepped(step)
            self._log_saves(self.checkpoints.poll())
            last, turn = step == self.total_steps, step == self.phase.end
            stop = agreement.ask(stop_requested()) and not last
            if step % every.log_every == 0 or last or stop:
                self._log(step, grad_norm)
            score = None
            if last or (self._evaluation_due(step) and not stop):
                figures = self._evaluate(step)
                score = self._score(figures)
            if self.checkpoints.is_best(score) or turn or stop or self.saving.due(step):
                self._save(step, score, must_succeed=turn or stop)
            if stop:
                break
        agreement.finish()
        return TrainResult(step, self.total_steps, stop, figures)

    def _compute(self, step: int, batches: Iterator[Any], observer: Observer | None) -> list[Tensor]:
        """Run forward and backward over this rank's chunks of a step and return their losses."""
        self.engine.train()
        found = []
        for accumulation in range(self.batch.accumulation_steps):
            self.life.beat(step, "data")
            self.timer.mark("other")
            asked = time.perf_counter()
            batch = next(batches)
            self.life_log.waited(time.perf_counter() - asked)
            self.timer.mark("data")
            self.life.beat(step, "compute")
            self.guard.read_batch(step, batch.keys)
            if observer is not None:
                observer.read(step, accumulation, batch)
            seed, batch = self._chunk_seed(step, accumulation), batch.to(self.ranks.device)
            shown = self.config.train.log_images
            if step == 1 and accumulation == 0 and shown:
                self.log.images(self.task.preview(batch, seed=seed, limit=shown), step)
            self.timer.mark("transfer")
            torch.manual_seed(seed)  # drop path and dropout: the same whenever this chunk is computed
            with self.watch.forward(step, accumulation):
                losses = self.task.losses(self.engine, batch, seed=seed, dtype=self.engine.dtype)
            loss = torch.stack(list(losses.values())).sum()
            self.timer.mark("forward")
            self.engine.backward(loss)
            self.timer.mark("backward")
            found.append(loss.detach())
            self.report.computed(found[-1], losses, self.batch.accumulation_steps)
        return found

    def _score(self, figures: Mapping[str, float]) -> float | None:
        """Return the figure of merit that the best checkpoints are chosen by: the average's where there is one."""
        merit = self.task.figure_of_merit
        return figures.get(f"ema_{merit}", figures.get(merit))

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.train.evaluate_every
        return bool(every and step and step % every == 0)

    def _main_says(self, question: Callable[[int], bool], step: int) -> bool:
        """Ask rank zero, who alone keeps the log (collective)."""
        return distributed.broadcast_object(question(step) if self.ranks.is_main else None)

    def _chunk_seed(self, step: int, accumulation: int) -> int:
        chunk = accumulation * self.ranks.world_size + self.ranks.rank
        return derive_seed(self.config.seed, "step", step, chunk)

    def _lr_at(self, step: int) -> float:
        return lr_at(self.config, step, total_steps=self.total_steps, num_samples=len(self.shards))

    def _log_start(self) -> None:
        parameters = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        start = f"continuing after step {self.first_step}" if self.first_step else "starting"
        logger.info("%s: %s of %d steps, %d samples", self.config.name, start, self.total_steps, len(self.shards))
        logger.info("%.2f M parameters, ZeRO-%d, %s", parameters / 1e6, self.config.zero.stage, self.batch)
        if self.recipe.phases:
            number, size = self.phase.number + 1, "x".join(map(str, self.config.input_size))
            logger.info("phase %d of %d, to step %d: %s px", number, len(self.recipe.phases) + 1, self.phase.end, size)
        save_every = self.config.train.save_every
        if save_every is not None and save_every > self.total_steps:
            logger.warning(
                "train.save_every = %d is more than the run's %d steps: it saves at its end or when stopped only",
                save_every,
                self.total_steps,
            )
        if self.first_step == 0:
            self.log.config(self.recipe, world_size=self.ranks.world_size, mfu=self.peak is not None)

    def _log(self, step: int, grad_norm: Tensor) -> None:
        """Report the steps since the last record (collective); the only place that waits for the device."""
        self.life.beat(step, "log")
        if self.ranks.is_main:
            self.life.check_owner()
        self.guard.check(self.run_dir, self.checkpoints.last)
        record = self.report.record(step, grad_norm, self.loader.num_bad)
        record |= {**self.loader.remote_figures(), **self.saving.log_point(record["step_seconds"])}
        if self.checkpoints.failed_saves:
            record["failed_saves"] = self.checkpoints.failed_saves
        self.log.train(step, record)
        self.forecast.tell(record)
        self.life_log.progress(step)
        self.report.written()

    def _evaluate(self, step: int, *, log: bool = True) -> dict[str, float]:
        """Evaluate the weights, and their moving average if there is one (collective)."""
        if self.evaluation_loader is None or self.validation is None:
            return {}
        figures: dict[str, float] = {}
        self.engine.eval()
        for prefix in ("validation", "validation_ema") if self.engine.has_ema else ("validation",):
            self.life.beat(step, "evaluate")  # before the weights change places with their average
            averaged = self.engine.ema_weights() if prefix == "validation_ema" else nullcontext()
            with self.life_log.evaluating(), averaged:
                found, _ = run_evaluation(
                    self.task,
                    self.engine,
                    self.evaluation_loader,
                    len(self.validation),
                    self.ranks,
                    self.engine.dtype,
                    beat=lambda: self.life.beat(step, "evaluate"),
                    show=self._shower(step) if log and prefix == "validation" else None,
                )
            if log:
                self.log.validation(step, found, prefix)
            figures |= found if prefix == "validation" else {f"ema_{key}": value for key, value in found.items()}
        self.timer.skip()
        return figures

    def _shower(self, step: int) -> Callable[[Any, Any], None] | None:
        """Return what shows the first batch's predictions in TensorBoard, on rank zero alone."""
        limit = self.config.train.log_images

        def show(predictions: Any, batch: Any) -> None:
            if (pictures := self.task.show(predictions, batch, limit=limit)) is not None:
                self.log.images(pictures, step, "validation/predictions")

        return show if limit and self.ranks.is_main else None

    def _save(self, step: int, score: float | None, *, must_succeed: bool) -> None:
        """Begin a save (collective). One that fails is reported and the run goes on; the last one raises."""
        self.life.beat(step, "save")
        self.saving.began(step)
        with self.life_log.saving():
            self.guard.check(self.run_dir, self.checkpoints.last)
            ended = self.checkpoints.save(
                step,
                logged_step=self.report.logged_step,
                loss_sum=float(self.report.loss_sum),
                score=score,
                must_succeed=must_succeed,
            )
        self._log_saves(ended)
        self.life_log.progress(step, now=must_succeed)
        self.timer.skip()

    def _log_saves(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if not outcome.error and not outcome.damage:
                self.log.saved(outcome.step, outcome.seconds, outcome.stalled_s, outcome.num_bytes)
                self.life_log.saved(outcome)
                self.saving.published(outcome)

    def close(self) -> None:
        """Stop the workers and flush the log; waits for no other rank longer than a moment."""
        self.life.beat(self.step, "end")
        self.loader.close()
        self.checkpoints.close()
        if self.evaluation_loader is not None:
            self.evaluation_loader.close()
        self.log.close()
