"""What a trained model says about pictures and videos that lie as files: classes, or objects drawn on the pictures."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.decode import IMAGE_EXTENSIONS, DecodeError, decode_rgb
from data_pipeline.reads import Item
from data_pipeline.video_container import VIDEO_EXTENSIONS
from mvit.checkpoint import newest_valid, read_manifest
from mvit.class_names import ClassNames, class_names
from mvit.config import RunConfig, parse_config
from mvit.detection.coco_metric import encode_masks
from mvit.detection.detections import Detections
from mvit.detection.draw import draw_boxes, draw_masks
from mvit.evaluation import check_whole, resolve_weights
from mvit.export import exported_config
from mvit.export_check import build_to_fill
from mvit.prediction_files import asked_files, copies_in, make_out, refuse_existing
from mvit.prediction_results import Classified, Detected, FoundObject, Guess, Result, Unreadable, write_results
from mvit.run_identity import read_config
from mvit.tasks import create_task
from mvit.tasks.base import Task, TaskTransform

RESULTS_FILE = "predictions.json"
_PASTED_PIXELS = 1 << 27  # of masks pasted into the picture at once: 128 MiB

Tell = Callable[[int, int, Result], None]


@dataclass(frozen=True)
class Predictor:
    """A model in evaluation mode on its device, and what is needed to ask it."""

    config: RunConfig
    task: Task
    model: nn.Module
    names: ClassNames
    device: torch.device

    @property
    def detects(self) -> bool:
        return self.config.task == "detection"


def predict(
    paths: str | Path | Sequence[str | Path],
    weights: str | Path,
    *,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
    score: float = 0.5,
    topk: int = 5,
    names: str | Path | None = None,
    ema: bool = False,
    device: str | None = None,
) -> list[Result]:
    """Return what a model says about each picture or video, in order: `Classified`, `Detected` or `Unreadable`.

    `load_predictor` says what `weights`, `config`, `overrides`, `names`, `ema` and `device` are, `predict_files` the
    rest; ask those two for several calls with one model.
    """
    predictor = load_predictor(weights, config, overrides, names=names, ema=ema, device=device)
    return predict_files(predictor, paths, out=out, overwrite=overwrite, score=score, topk=topk)


def load_predictor(
    weights: str | Path,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    *,
    names: str | Path | None = None,
    ema: bool = False,
    device: str | None = None,
) -> Predictor:
    """Build the model of some weights.

    Args:
        weights: a .safetensors file of `mvit export` or a run or checkpoint folder, which carry their recipe; with
            `config` any file in a published naming.
        config: the recipe, instead of the one that the weights carry.
        overrides: `section.key=value` settings that replace the recipe's, such as "video.num_clips=10".
        names: file of class names; without it those of the training data, if that is here, else numbers.
        ema: the averaged weights of a run.
        device: "cpu", "cuda", "cuda:1"; None: a GPU where there is one.

    Raises ConfigError, CheckpointError or ValueError for what does not fit together.
    """
    where = _checked_device(device)
    if config is None:
        config = _carried_config(Path(weights))
    if overrides:
        config = _with(config, overrides)
    task = create_task(config)
    source = resolve_weights(weights, ema=ema)
    check_whole(config, source)
    named = class_names(config, names)
    model = build_to_fill(task)
    task.load_weights(model, source)
    return Predictor(config, task, model.to(where).eval(), named, where)


def predict_files(
    predictor: Predictor,
    paths: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    score: float = 0.5,
    topk: int = 5,
    tell: Tell | None = None,
) -> list[Result]:
    """Ask about files, and all pictures or videos in folders, one after the other; what cannot be read is left out.

    Args:
        out: a folder; a detector's pictures are copied into it as .png with their objects drawn on them, and
            predictions.json gets the results (of a detector: COCO's results format).
        overwrite: files of these names that are there already may be replaced, but no original.
        score: objects below are neither returned nor drawn.
        topk: classes returned for each file.
        tell: called with (done, total, result) after each file.

    Raises ValueError if nothing is asked for, if `out` cannot be written, or if a file would be replaced that may not;
    OSError if predictions.json cannot be written in the end.
    """
    if topk < 1 or not 0 <= score <= 1:
        raise ValueError(f"topk = {topk}, score = {score}: topk is 1 or more, score a probability from 0 to 1")
    out = None if out is None else Path(out)
    asked = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    is_video = predictor.config.task == "video_classification"
    what, extensions = ("video", VIDEO_EXTENSIONS) if is_video else ("picture", IMAGE_EXTENSIONS)
    files = list(asked_files(asked, what, extensions, out))
    if not files:
        raise ValueError("no file is named; give pictures, videos, or folders of them")
    copies: list[Path | None] = [None] * len(files)
    if out is not None:
        if predictor.detects:
            copies = list(copies_in(files, out))
        make_out(out)
        refuse_existing([*(copy for copy in copies if copy is not None), out / RESULTS_FILE], overwrite)
    transform = predictor.task.transform(train=False, all_views=True)
    results: list[Result] = []
    for number, (file, copy) in enumerate(zip(files, copies, strict=True), start=1):
        result = file.problem or _predict_one(predictor, transform, file.path, number, copy, score, topk)
        results.append(result)
        if tell is not None:
            tell(number, len(files), result)
    if out is not None:
        write_results(out / RESULTS_FILE, results)
    return results


# --- one file ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _predict_one(
    predictor: Predictor, transform: TaskTransform, path: Path, number: int, copy: Path | None, score: float, topk: int
) -> Result:
    try:
        data = path.read_bytes()
        item = Item(transform.unlabelled(data), sample_id=0, key=str(path), weight=1.0)
    except DecodeError as error:
        return Unreadable(path, str(error))
    except OSError as error:
        return Unreadable(path, error.strerror or str(error))
    batch = predictor.task.collate([item]).to(predictor.device)
    with _autocast(predictor):
        answer = predictor.task.predict(predictor.model, batch, dtype=torch.float32)
    if not predictor.detects:
        return Classified(path, _guesses(answer[0], predictor.names, topk))
    height, width = batch.original_sizes[0].tolist()
    found: Detections = answer[0].to("cpu").resized((height, width))
    found = found[slice(0, int((found.scores >= score).sum()))]
    picture = None if copy is None else torch.from_numpy(decode_rgb(data).copy()).permute(2, 0, 1)
    codes, picture = _masks(found, picture)
    unwritten = None
    if copy is not None and picture is not None:
        drawn = draw_boxes(picture, found.boxes, found.labels, found.scores, predictor.names.names)
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(copy)
        except OSError as error:
            unwritten, copy = f"{copy} could not be written: {error.strerror or error}", None
    return Detected(path, number, (height, width), _objects(found, codes, predictor.names), copy, unwritten)


def _guesses(logits: Tensor, names: ClassNames, topk: int) -> tuple[Guess, ...]:
    """Return the best of one file's logits (K,); those of a video are the logarithm of its mean probabilities."""
    best = logits.float().softmax(dim=0).topk(min(topk, len(logits)))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(Guess(label, names.names[label], probability) for label, probability in rows)


def _objects(found: Detections, codes: Sequence[Any], names: ClassNames) -> tuple[FoundObject, ...]:
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), codes, strict=True)
    return tuple(
        FoundObject(label, names.names[label], names.category_ids[label], score, (x0, y0, x1, y1), code)
        for label, score, (x0, y0, x1, y1), code in rows
    )


def _masks(found: Detections, picture: Tensor | None) -> tuple[list[Any], Tensor | None]:
    """Return the masks' codes, and the picture with the masks over it; few at once, each is as large as the picture."""
    if found.masks is None:
        return [None] * len(found), picture
    codes: list[Any] = []
    step = max(1, _PASTED_PIXELS // (found.size[0] * found.size[1]))
    for start in range(0, len(found), step):
        part = found[slice(start, start + step)]
        masks = part.pasted()
        codes += encode_masks(masks)
        if picture is not None:
            picture = draw_masks(picture, part.labels, masks)
    return codes, picture


def _autocast(predictor: Predictor) -> Any:
    """Compute on a GPU in the precision of the training; a CPU gains nothing from less than fp32."""
    precision = predictor.config.train.precision
    if predictor.device.type == "cpu" or precision == "fp32":
        return nullcontext()
    return torch.autocast(predictor.device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


# --- which model ----------------------------------------------------------------------------------------------------


def _carried_config(weights: Path) -> RunConfig:
    """Return the recipe that the weights carry; ValueError if they carry none."""
    if (weights / "manifest.json").is_file():
        return parse_config(read_manifest(weights).state["config"], source=str(weights))
    if not weights.is_dir():
        return exported_config(weights)
    config = read_config(weights)
    newest = newest_valid(weights) if config.phases else None
    return config if newest is None else parse_config(read_manifest(newest).state["config"], source=str(newest))


def _with(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return a recipe with some of its settings replaced."""
    from omegaconf import OmegaConf

    tree = OmegaConf.merge(OmegaConf.create(config.model_dump(mode="json")), OmegaConf.from_dotlist(list(overrides)))
    values = OmegaConf.to_container(tree)
    assert isinstance(values, dict)
    return parse_config({str(key): value for key, value in values.items()}, source="the recipe with its settings")


def _checked_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a word it does not know, or no such GPU
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}; choose cpu, cuda or cuda:N") from error
    return device
