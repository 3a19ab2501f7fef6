"""Exact distributed evaluation: every sample counts once on any number of ranks, and that is proved by counting."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import EvaluationLoader
from data_pipeline.shards import ShardSet, open_shards
from mvit import distributed
from mvit.certificate import Certificate, certify
from mvit.checkpoint import CheckpointError, newest_valid, newest_valid_on_all_ranks
from mvit.checkpoint_load import whole_state
from mvit.config import ConfigError, RunConfig
from mvit.distributed import RankInfo, StopAgreement, logger, on_main, sum_over_ranks, together
from mvit.given_labels import GivenLabels, read_labels
from mvit.life import Stopped
from mvit.phases import phase_configs
from mvit.progress import ProgressDisplay
from mvit.results_file import Reports, check_reports
from mvit.tasks import create_task
from mvit.tasks.base import Forward, Task
from mvit.weights import read_state

_CERTIFIED = ("counted", "duplicates", "missing")  # what an evaluation's figures have of the certificate


def open_validation(config: RunConfig) -> ShardSet:
    """Open the validation shards; raises ConfigError if the recipe names none."""
    if config.data.validation is None:
        raise ConfigError("data.validation = None: evaluation needs shards; set it to a packed folder or a pattern")
    spec, cache = config.data.validation, config.data.cache_dir
    shards = open_shards(spec, cache_dir=cache, cache_gib=config.data.cache_gib, required=config.required_members)
    check_classes(config, shards)
    evaluated = config.image.evaluated_classes  # None unless images are classified
    if evaluated is not None:
        try:
            shards.check_labels(evaluated)
        except ValueError as error:
            raise ConfigError(f"data.validation has other classes than image.evaluated_classes: {error}") from error
    return shards


def check_classes(config: RunConfig, shards: ShardSet) -> None:
    """Raise ValueError if the shards have other classes than the model."""
    if config.task != "detection":
        shards.check_labels(config.model.num_classes)
        return
    from data_pipeline.detection import categories

    found = len(categories(shards))
    if found not in (0, config.model.num_classes):  # 0: shards of another tool do not tell
        raise ConfigError(
            f"model.num_classes = {config.model.num_classes}, but the shards have {found} categories; "
            f"set model.num_classes={found}"
        )


def evaluation_loader(
    config: RunConfig, task: Task, shards: ShardSet, ranks: RankInfo, *, all_views: bool = False
) -> EvaluationLoader:
    """Return the loader of one pass over `shards`; `all_views`: the test, which may look at a sample several times."""
    # 15 views of 40 frames at 312 px are 175 MB a video, and each worker holds as many batches as it prepares ahead.
    data = config.data.model_copy(update={"prefetch": 1}) if all_views else config.data
    return EvaluationLoader(
        shards,
        task.transform(train=False, all_views=all_views),
        task.collate,
        data,
        batch_size=task.evaluation_samples(config.train.evaluation_batch_size, all_views=all_views),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


@torch.no_grad()
def run_evaluation(
    task: Task,
    forward: Forward,
    loader: EvaluationLoader,
    num_samples: int,
    ranks: RankInfo,
    dtype: torch.dtype,
    progress: ProgressDisplay | None = None,
    beat: Callable[[], None] = lambda: None,
    stop_requested: Callable[[], bool] | None = None,
    show: Callable[[Any, Any], None] | None = None,
    reports: Reports | None = None,
) -> tuple[dict[str, float], Certificate]:
    """Evaluate and return the metric's figures (collective); `beat` is called before every batch and every reduction.

    `show` gets the first batch's predictions, and the batch; `reports` says which files to write of all of them.
    `stop_requested` is asked before every batch; if it is true on any rank, all of them raise Stopped. Raises
    RuntimeError unless each of `num_samples` samples was seen exactly once over all ranks, or was undecodable
    and within `data.max_bad_samples`; those are returned as `undecodable`.
    """
    metric = task.metric(ranks.device, reports)
    seen = torch.zeros(num_samples, dtype=torch.int32)
    agreement = StopAgreement()
    beat()
    for index, batch in enumerate(loader, start=1):
        beat()
        if stop_requested is not None and agreement.ask(stop_requested()):
            agreement.finish()
            raise Stopped(f"the evaluation was asked to stop before batch {index} of {len(loader)}")
        ids = batch.sample_ids[batch.weights > 0]
        seen += torch.bincount(ids, minlength=num_samples).int()
        batch = batch.to(ranks.device)
        predictions = task.predict(forward, batch, dtype=dtype)
        metric.update(predictions, batch)
        if show is not None and index == 1:
            show(predictions, batch)
        if progress is not None:
            progress.update({"kind": "progress", "step": index, "total_steps": len(loader)})
    agreement.finish()
    bad = torch.tensor([loader.num_bad])
    beat()  # waiting for a slower rank counts from here
    sum_over_ranks(seen)
    sum_over_ranks(bad)
    certificate = certify(seen, int(bad), ranks.world_size)
    beat()
    figures = metric.compute() | {"undecodable": float(bad)}
    beat()  # what follows is no part of the reduction
    return figures, certificate


def evaluate(
    config: RunConfig,
    weights: str | Path | Mapping[str, Tensor],
    *,
    ema: bool = False,
    results: str | Path | None = None,
    per_class: str | Path | None = None,
    confusion: str | Path | None = None,
    labels: str | Path | None = None,
    show_progress: bool = True,
    beat: Callable[[], None] = lambda: None,
    stop_requested: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Evaluate weights on the validation shards and return top-1, top-5, loss, majority share and sample count.

    Of a detector: COCO's figures. `views` among the figures tells how often each sample was looked at: videos in all
    `num_clips` x `num_crops` views, pictures with objects in those of the multi-scale test, if `detection` asks for
    one, while an evaluation during training takes one view. `results` names a JSON file for what was predicted, every
    sample once: of a detector COCO's results format, of a classifier each sample's five most probable classes. Of a
    classifier, `per_class` names a .csv file for a table of the classes, `confusion` a .png for a picture of which are
    taken for which, and `labels` a JSON file of labels to judge by: see `mvit.given_labels.read_labels`. Among the
    figures, `counted`, `duplicates`, `missing` and `undecodable` certify that each sample counted exactly once.
    `weights` is a weights file in any published naming, a run folder (its newest valid checkpoint), one checkpoint
    folder, or a state dict; `ema` takes a checkpoint's moving average. Runs in this process, or on every rank under
    a launcher, which is told by `beat` before every batch that this one lives. Raises ConfigError, CheckpointError or
    ValueError for what does not fit, and Stopped on all ranks, between two batches, if `stop_requested` is true on any.
    """
    ranks = distributed.start()
    distributed.configure_logging(ranks.rank)
    if config.phases:
        config = phase_configs(config)[-1]
        logger.info("evaluated as in the recipe's last phase: %s px", "x".join(map(str, config.input_size)))
    task = create_task(config)
    shards = open_validation(config)
    model = task.build_model()

    def load() -> None:
        source = resolve_weights(weights, ema=ema, ranks=ranks)
        check_whole(config, source)
        logger.info("%s", task.load_weights(model, source))

    written = [None if file is None else Path(file) for file in (results, per_class, confusion)]
    reports = Reports(results=written[0], per_class=written[1], confusion=written[2])
    if reports.files():
        on_main(lambda: check_reports(reports), "trying to write the files asked for", ranks)
    if labels is not None:
        reports = replace(reports, labels=_given_labels(config, labels, shards, ranks))
    task.metric(torch.device("meta"), reports)  # refuses what the task has not, before the work
    together(load, "loading the weights")
    views, words = task.test_views()
    logger.info("%d samples, %s", len(shards), words)
    model.to(ranks.device).eval()
    precision = config.train.precision
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    autocast = torch.autocast(ranks.device.type, half) if precision != "fp32" else nullcontext()
    shown = ProgressDisplay() if show_progress and ranks.is_main else None
    with autocast, shown or nullcontext():
        loader = evaluation_loader(config, task, shards, ranks, all_views=True)
        try:
            figures, certificate = run_evaluation(
                task,
                model,
                loader,
                len(shards),
                ranks,
                torch.float32,
                shown,
                beat,
                stop_requested,
                reports=reports,
            )
        finally:
            loader.close()
    proof = {key: float(value) for key, value in certificate.as_dict().items() if key in _CERTIFIED}
    return figures | {"views": float(views)} | proof


def _given_labels(config: RunConfig, path: str | Path, shards: ShardSet, ranks: RankInfo) -> GivenLabels:
    """Read a file of labels on every rank (collective)."""
    if config.task == "detection":
        raise ConfigError(f"labels {path}: they are for classifiers; a detector is judged by the objects of its shards")
    found: list[GivenLabels] = []
    classes = config.image.evaluated_classes or config.model.num_classes
    together(lambda: found.append(read_labels(path, shards, classes)), f"reading the labels {path}")
    logger.info("labels of %s %s", path, "instead of the shards'" if found[0].replace else "besides the shards'")
    return found[0]


def check_whole(config: RunConfig, source: str | Path | Mapping[str, Tensor]) -> None:
    """Raise ConfigError for weights of a backbone alone where a detector is needed: its heads would be random."""
    if config.task == "detection" and not any(name.startswith("pyramid.") for name in read_state(source)):
        label = "the given state dict" if isinstance(source, Mapping) else source
        raise ConfigError(
            f"{label}: has the weights of a backbone, not of a whole detector, so it finds no objects; train one "
            "from it (model.weights), or name a run's"
        )


def resolve_weights(
    source: str | Path | Mapping[str, Tensor], *, ema: bool = False, ranks: RankInfo | None = None
) -> str | Path | Mapping[str, Any]:
    """Turn a run or checkpoint folder into a state dict; leave files and state dicts as they are.

    With `ranks`, all of them ask and what the source is, is found out once (collective).
    """
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if on_main(path.is_dir, f"looking at {path}", ranks):
        return dict(whole_state(newest_checkpoint(path, ranks), ema=ema))
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder; name a run folder, a checkpoint or a weights file")
    if ema:
        raise CheckpointError(f"{path}: a weights file holds no moving average; leave the option out")
    return path


def newest_checkpoint(folder: str | Path, ranks: RankInfo | None = None) -> Path:
    """Return a run folder's newest valid checkpoint, a checkpoint folder itself; raises CheckpointError without one.

    With `ranks`, all of them ask, verify a share each, and get the same answer (collective): a thousand ranks that
    read the whole checkpoint would keep the file system busy for hours.
    """
    path = Path(folder)
    if on_main((path / "manifest.json").is_file, f"looking at {path}", ranks):
        return path
    found = newest_valid(path) if ranks is None else newest_valid_on_all_ranks(path, ranks)
    if found is None:
        raise CheckpointError(f"{path}: holds no checkpoint; name a run folder, a checkpoint or a weights file")
    return found
