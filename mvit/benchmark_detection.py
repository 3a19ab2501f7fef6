"""Measure detection: the four attention types of a backbone side by side, and COCO's metric beside pycocotools."""

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.masks import compressed
from mvit.benchmark import PASSES, PRECISIONS, peak_mib, timed
from mvit.detection.coco_metric import FIGURES, coco_figures
from mvit.model.window import AttentionScope
from mvit.variants import create_backbone

PARTS = ("attention", "metric")
OURS, PEER = "mvit", "pycocotools"
_BASELINE = "full"
_HEIGHT, _WIDTH, _NUM_CATEGORIES = 480, 640, 80
_OBJECTS, _FALSE = 7.3, 20.0  # a picture, on average: COCO's objects; detections that are on none
_SIDES = (8.0, 400.0)  # of objects, evenly by their logarithm: small, medium and large ones by COCO's measure
_CORNERS = 24  # of the polygons


@dataclass(frozen=True)
class AttentionRow:
    """A backbone with one type of attention in one kind of pass. Seconds are of the CPU or the device, as the model's.

    The ratios are to full attention: 0.2 is a fifth of its time or memory. None where it was not measured.
    """

    attention: str
    variant: str
    input_size: tuple[int, int]
    precision: str
    batch: int
    kind: str
    """"forward" or "train": forward and backward, no optimizer."""
    seconds_min: float
    seconds_median: float
    seconds_ratio: float | None
    peak_mib: float | None
    """Memory above what was held before the pass: resident on the CPU, allocated on CUDA."""
    peak_ratio: float | None


@dataclass(frozen=True)
class MetricRow:
    """One contender's evaluation of boxes and masks."""

    contender: str
    images: int
    objects: int
    detections: int
    cpu_seconds: float
    """Minimum over the rounds, all threads together."""
    wall_seconds: float
    speedup: float | None
    """CPU seconds of pycocotools divided by this one's: above 1 is faster."""
    largest_difference: float | None
    """Of the 24 figures, to those of pycocotools."""


def bench_attention(
    variant: str = "mvitv2_tiny",
    input_size: Sequence[int] = (1024, 1024),
    attentions: Sequence[AttentionScope] = ("full", "hwin", "window", "swin"),
    *,
    precision: str = "fp32",
    batch: int = 1,
    rounds: int = 1,
    device: str | None = None,
    num_threads: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[AttentionRow]:
    """Measure time and peak memory of forward passes and training steps of a backbone for each type of attention.

    All have the same parameters. A first pass of each measures its memory; then they take turns for `rounds` rounds.
    Raises ValueError for what is unknown.
    """
    for name, known in (*((each, get_args(AttentionScope)) for each in attentions), (precision, tuple(PRECISIONS))):
        if name not in known:
            raise ValueError(f"cannot bench {name!r}; choose from {list(known)}")
    if rounds < 1 or batch < 1 or len(input_size) != 2 or min(input_size) < 32:
        raise ValueError(
            f"rounds = {rounds}, batch = {batch}, input size {tuple(input_size)}: the first two are 1 or more, the "
            "size is height and width of 32 pixels or more"
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    height, width = input_size
    backbones = {name: create_backbone(variant, attention=name).to(where) for name in attentions}
    shared = next(iter(backbones.values())).state_dict(keep_vars=True)
    for backbone in backbones.values():
        backbone.load_state_dict(shared, assign=True)
    pictures = torch.randn(batch, 3, height, width, device=where)
    measured: dict[tuple[str, str], tuple[list[float], float | None]] = {}
    for kind in PASSES:
        steps = {
            name: _step(backbone.train(kind == "train"), pictures, precision, kind)
            for name, backbone in backbones.items()
        }
        for name, step in steps.items():
            measured[name, kind] = ([], peak_mib(backbones[name], step, where))
            tell(f"{kind}, {name}: memory measured")
        for number in range(1, rounds + 1):
            for name, step in steps.items():
                measured[name, kind][0].append(timed(step, where)[0])
                tell(f"{kind}, {name}: round {number} of {rounds}")
        for backbone in backbones.values():
            backbone.zero_grad(set_to_none=True)
    rows: list[AttentionRow] = []
    for (name, kind), (seconds, peak) in measured.items():
        base_seconds, base_peak = measured.get((_BASELINE, kind), ([], None))
        rows.append(
            AttentionRow(
                name, variant, (height, width), precision, batch, kind,
                min(seconds), statistics.median(seconds), min(seconds) / min(base_seconds) if base_seconds else None,
                peak, peak / base_peak if peak is not None and base_peak else None,
            )
        )  # fmt: skip
    return rows


def bench_metric(
    num_images: int = 5000, *, rounds: int = 1, seed: int = 0, tell: Callable[[str], None] = lambda text: None
) -> list[MetricRow]:
    """Time the evaluation of boxes and masks of synthetic pictures beside pycocotools, and compare all 24 figures.

    Both begin with the truth and the detections as lists, and take turns. Raises ValueError without pycocotools.
    """
    if num_images < 1 or rounds < 1:
        raise ValueError(f"images = {num_images}, rounds = {rounds}: both are 1 or more")
    _check_peer()
    truth, results = synthetic_set(num_images, seed)
    tell(f"{num_images} pictures drawn")
    contenders = {OURS: coco_figures, PEER: _figures_of_pycocotools}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    figures: dict[str, Mapping[str, float]] = {}
    for number in range(1, rounds + 1):
        for name, evaluate in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            figures[name] = evaluate(truth, results)
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
            tell(f"metric, {name}: round {number} of {rounds}")
    theirs = min(cpu for cpu, _ in times[PEER])
    difference = max(abs(figures[OURS][name] - figures[PEER][name]) for name in figures[PEER])
    return [
        MetricRow(
            name, num_images, len(truth["annotations"]), len(results),
            min(cpu for cpu, _ in times[name]), min(wall for _, wall in times[name]),
            theirs / min(cpu for cpu, _ in times[name]), difference if name == OURS else None,
        )
        for name in contenders
    ]  # fmt: skip


def synthetic_set(num_images: int, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a COCO data set of ellipses, a hundredth of them crowds, and noisy detections; a pure function.

    Nine objects in ten are found, in a box that is a little off, some twice and some with a wrong class; beside them
    there are detections on nothing. True masks are polygons as in COCO, those of crowds and detections RLE.
    """
    random = np.random.default_rng(seed)
    images = [{"id": number, "height": _HEIGHT, "width": _WIDTH} for number in range(1, num_images + 1)]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []

    def detect(image: int, label: int, box: np.ndarray, best: float) -> None:
        score = round(float(best * random.beta(2, 2)), 4)
        code = _rle(_ellipse(box))
        row = {"image_id": image, "category_id": label, "bbox": box.tolist(), "score": score}
        results.append(row | {"segmentation": code})

    for image in images:
        for _ in range(random.poisson(_OBJECTS)):
            box, label = _box(random), int(random.integers(1, _NUM_CATEGORIES + 1))
            polygon, crowd = _ellipse(box), bool(random.random() < 0.01)
            mask = {"segmentation": _rle(polygon) if crowd else [polygon], "area": float(np.pi / 4 * box[2] * box[3])}
            facts = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": label}
            annotations.append(facts | {"bbox": box.tolist(), "iscrowd": int(crowd)} | mask)
            for _ in range(int(random.choice(3, p=(0.1, 0.8, 0.1)))):
                near = _within(box + random.normal(0, 0.06, 4) * box[[2, 3, 2, 3]])
                found = label if random.random() < 0.9 else int(random.integers(1, _NUM_CATEGORIES + 1))
                detect(image["id"], found, near, 1.0)
        for _ in range(random.poisson(_FALSE)):
            detect(image["id"], int(random.integers(1, _NUM_CATEGORIES + 1)), _box(random), 0.5)
    categories = [{"id": label, "name": str(label)} for label in range(1, _NUM_CATEGORIES + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def show_rows(attention: Sequence[AttentionRow], metric: Sequence[MetricRow]) -> None:
    """Print what was measured as tables."""
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own: rich would fold every column
        console = Console(width=120)
    if attention:
        first = attention[0]
        size = "x".join(map(str, first.input_size))
        table = Table(title=f"backbone {first.variant}, {size}, batch {first.batch}, {first.precision}")
        for header in ("pass", "attention"):
            table.add_column(header)
        for header in ("seconds min", "median", "of full", "peak MiB", "of full"):
            table.add_column(header, justify="right")
        for row in attention:
            ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio in (row.seconds_ratio, row.peak_ratio)]
            peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
            numbers = f"{row.seconds_min:.3g}", f"{row.seconds_median:.3g}"
            table.add_row(row.kind, row.attention, *numbers, ratios[0], peak, ratios[1])
        console.print(table)
    if metric:
        first = metric[0]
        table = Table(title=f"{first.images} pictures, {first.objects} objects, {first.detections} detections")
        table.add_column("metric")
        for header in ("CPU seconds", "seconds", "speed-up", "largest difference"):
            table.add_column(header, justify="right")
        for row in metric:
            difference = "" if row.largest_difference is None else f"{row.largest_difference:.1e}"
            ratio = "" if row.speedup is None else f"{row.speedup:.2f}"
            table.add_row(row.contender, f"{row.cpu_seconds:.1f}", f"{row.wall_seconds:.1f}", ratio, difference)
        console.print(table)


def as_dict(attention: Sequence[AttentionRow], metric: Sequence[MetricRow]) -> dict[str, list[dict[str, Any]]]:
    """Return what was measured, for JSON."""
    return {"attention": [asdict(row) for row in attention], "metric": [asdict(row) for row in metric]}


# --- the parts ----------------------------------------------------------------------------------------------------


def _step(backbone: torch.nn.Module, pictures: torch.Tensor, precision: str, kind: str) -> Callable[[], None]:
    dtype = PRECISIONS[precision]

    def step() -> None:
        backbone.train(kind == "train")
        backbone.zero_grad(set_to_none=True)
        with (
            torch.set_grad_enabled(kind == "train"),
            torch.autocast(pictures.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            maps = backbone(pictures)
            loss = torch.stack([each.float().square().mean() for each in maps.values()]).sum()
        if kind == "train":
            loss.backward()

    return step


def _box(random: np.random.Generator) -> np.ndarray:
    """Draw a box within the picture: left, top, width, height."""
    least, most = np.log(_SIDES)
    sides = np.exp(random.uniform(least, most, 2))
    corner = random.uniform(0, 1, 2) * np.maximum((_WIDTH, _HEIGHT) - sides, 1)
    return _within(np.concatenate((corner, sides)))


def _within(box: np.ndarray) -> np.ndarray:
    """Cut a box at the picture's edges; at least four pixels of it stay."""
    left, top = min(max(box[0], 0), _WIDTH - 4), min(max(box[1], 0), _HEIGHT - 4)
    width, height = min(max(box[2], 4), _WIDTH - left), min(max(box[3], 4), _HEIGHT - top)
    return np.array([left, top, width, height]).round(2)


def _ellipse(box: np.ndarray) -> list[float]:
    """Return the ellipse in a box as a polygon: x, y, x, y, …"""
    angle = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    x = box[0] + box[2] / 2 * (1 + np.cos(angle))
    y = box[1] + box[3] / 2 * (1 + np.sin(angle))
    return np.stack((x, y), axis=1).round(2).reshape(-1).tolist()


def _rle(polygon: list[float]) -> dict[str, Any]:
    code = compressed([polygon], _HEIGHT, _WIDTH)
    return {"size": [_HEIGHT, _WIDTH], "counts": code["counts"].decode()}


def _check_peer() -> None:
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"pycocotools, which the metric is measured against, cannot be imported ({error}); install it, or measure "
            "the attention alone: --only attention"
        ) from error


def _figures_of_pycocotools(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the 24 figures by pycocotools, areas as in `coco_figures`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    figures: dict[str, float] = {}
    kinds: tuple[tuple[str, Literal["bbox", "segm"], str], ...] = (
        ("box", "bbox", "segmentation"),
        ("mask", "segm", "bbox"),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of every part
        for kind, iou_type, hidden in kinds:
            known: Any = COCO()  # its types know files alone
            known.dataset = {"info": {}} | {key: [dict(row) for row in rows] for key, rows in truth.items()}
            known.createIndex()
            rows = [{key: value for key, value in row.items() if key != hidden} for row in results]
            evaluation = COCOeval(known, known.loadRes(rows), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures |= {f"{kind}_{name}": float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    return figures
