"""What TensorBoard shows of a run: names of the curves, the page that groups them, what runs are compared by."""

from collections.abc import Mapping
from typing import Any

from mvit.config import RunConfig
from mvit.step_time import PARTS

PARAMETER_STAGES: tuple[str, ...] = ("stem", "stage1", "stage2", "stage3", "stage4", "head")
"""Where a parameter stands: patch embedding and positions; the blocks of a stage; norm, head, pyramid, detector."""

TAGS: dict[str, str] = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "grad_norm_max": "train/grad_norm_max",
    "clip_rate": "train/clip_rate",
    "skipped_steps": "train/skipped_steps",
    "samples_per_s": "speed/samples_per_second",
    "data_wait": "speed/data_wait_share",
    "mfu": "speed/mfu",
    **{f"{part}_seconds": f"time/{part}_seconds" for part in PARTS},
    "slowest_rank": "time/slowest_rank",
    "slowest_excess": "time/slowest_rank_excess",
    "log_share": "time/log_share",
    "memory_gib": "memory/peak_gib",
    "bad_samples": "data/bad_samples",
    "fetched_gib": "data/fetched_gib",
    "fetch_retries": "data/fetch_retries",
    "fetch_wait_s": "data/fetch_wait_s",
    "failed_saves": "checkpoint/failed_saves",
    "save_interval_steps": "checkpoint/interval_steps",
    "ettr": "goodput/ettr",
    "mttf_h": "goodput/mttf_h",
    "checkpoint_overhead": "goodput/checkpoint_overhead",
    "lost_gpu_hours": "goodput/lost_gpu_hours",
    **{f"weight_norm_{stage}": f"weight_norm/{stage}" for stage in PARAMETER_STAGES},
    **{f"lr_{stage}": f"learning_rate/{stage}" for stage in PARAMETER_STAGES},
}
"""Key of a training record → its curve."""


def tag_of(key: str) -> str | None:
    """Return the curve of a record's key, None if it has none; the parts of a loss have names of their own."""
    return f"train/{key}" if key.startswith("loss_") else TAGS.get(key)


def _lines(*tags: str) -> list[Any]:
    """Return one chart; the tags are regular expressions."""
    return ["Multiline", [f"^{tag}$" for tag in tags]]


def layout(config: RunConfig, *, world_size: int, mfu: bool) -> dict[str, dict[str, list[Any]]]:
    """Return the page "custom scalars": section → chart → curves, without charts that would stay empty.

    `mfu` says whether the device's peak rate is known.
    """
    parts: dict[str, list[Any]] = {}
    evaluated = {"top-1 and top-5": _lines("validation(_ema)?/top[15]")}
    if config.task == "detection":
        parts = {"parts of the loss": _lines("train/loss_.*")}
        evaluated = {"box AP and mask AP": _lines("validation(_ema)?/(box|mask)_ap")}
    page = {
        "1. Does it learn?": {
            "loss": _lines("train/loss", "validation(_ema)?/loss"),
            **parts,
            **(evaluated if config.data.validation is not None else {}),
            "learning rate": _lines("train/learning_rate", "learning_rate/.*"),
        },
        "2. How fast is it?": {
            "samples per second": _lines("speed/samples_per_second"),
            "share of the time spent waiting for data": _lines("speed/data_wait_share"),
            **({"model FLOPs utilisation": _lines("speed/mfu")} if mfu else {}),
        },
        "3. Where does the time of a step go?": {
            "seconds": _lines(*(f"time/{part}_seconds" for part in PARTS)),
            "slowest rank": _lines("time/slowest_rank"),
            "how much slower than the median": _lines("time/slowest_rank_excess"),
        },
        "4. Is it healthy?": {
            "gradient norm before clipping": _lines("train/grad_norm", "train/grad_norm_max"),
            "share of updates that were clipped": _lines("train/clip_rate"),
            "norm of the weights": _lines("weight_norm/.*"),
            "samples that could not be read": _lines("data/bad_samples"),
            "memory in GiB": _lines("memory/peak_gib"),
            **({"updates skipped": _lines("train/skipped_steps")} if config.train.precision == "fp16" else {}),
        },
        "5. What do interruptions and saves cost?": {
            "share of productive time (ETTR)": _lines("goodput/ettr"),
            "GPU-hours lost": _lines("goodput/lost_gpu_hours"),
            "seconds of a save, and waited for": _lines("checkpoint/save_seconds", "checkpoint/stall_seconds"),
        },
    }
    if world_size == 1:
        del page["3. Where does the time of a step go?"]["slowest rank"]
        del page["3. Where does the time of a step go?"]["how much slower than the median"]
    if not config.optim.clip_grad_norm:
        del page["4. Is it healthy?"]["share of updates that were clipped"]
    if config.watch.activations_every:
        page["6. What is inside?"] = {
            "size of the blocks' outputs (RMS)": _lines("activation_rms/.*"),
            "entropy of the attention, 1 = uniform": _lines("attention_entropy/.*"),
            "largest logit of the attention": _lines("attention_logit_max/.*"),
        }
    return page


def compared_settings(config: RunConfig, world_size: int) -> dict[str, bool | float | str]:
    """Return what the runs of a folder are compared by in TensorBoard's page "hparams"."""
    model, optim, train = config.model, config.optim, config.train
    return {
        "task": config.task,
        "variant": model.variant,
        "input_size": "x".join(map(str, config.input_size)),
        "precision": train.precision,
        "global_batch_size": float(train.global_batch_size),
        "algorithm": optim.algorithm,
        "lr": config.scaled_lr(optim.lr),
        "weight_decay": optim.weight_decay,
        "layer_decay": optim.layer_decay,
        "clip_grad_norm": optim.clip_grad_norm,
        "ema": optim.ema_decay is not None,
        "drop_path": str(model.drop_path),
        "epochs": float(config.schedule.epochs),
        "weights": model.weights or "none",
        "zero_stage": float(config.zero.stage),
        "world_size": float(world_size),
        "seed": float(config.seed),
    }


COMPARED_FIGURES: Mapping[str, str] = {
    "image_classification": "validation/top1",
    "video_classification": "validation/top1",
    "detection": "validation/box_ap",
}
"""The curve whose last value stands beside them, by task."""
