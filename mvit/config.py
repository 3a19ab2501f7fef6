"""RunConfig: the tree of typed configs, loading with clear errors, cross-field checks, derived values."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from data_pipeline.augment_config import AugmentConfig
from data_pipeline.detection_views import DetectionAugmentConfig
from data_pipeline.image import ImageConfig
from data_pipeline.loader import DataConfig
from data_pipeline.settings import Settings
from data_pipeline.shards import REQUIRED_FOR_CLASSIFICATION
from data_pipeline.video import VIDEO_MEMBERS, VideoConfig
from mvit.detection.config import DetectorConfig
from mvit.model.attention import AttentionForm
from mvit.model.block import DropPathMode
from mvit.model.inflation import Inflation
from mvit.optim import OptimConfig
from mvit.phases import PhaseConfig, check_phases, phase_configs
from mvit.schedule import ScheduleConfig
from mvit.train_config import BatchArithmetic, ProfileConfig, TrainConfig, WatchConfig
from mvit.variants import VARIANTS, Variant
from mvit.zero import ZeroConfig

# section → the only task that reads it
_SECTION_READ_BY = {
    "image": "image_classification",
    "video": "video_classification",
    "detection": "detection",
    "detector": "detection",
}


class ConfigError(ValueError):
    """A config that cannot be run; the message names key, value, rule and the way out."""


class ModelConfig(Settings):
    """Which network is trained; its input size is the task's section's, `image` or `video`."""

    variant: str = "mvitv2_tiny"
    """A row of the paper's Table 1: mvitv2_tiny, _small, _base, _large or _huge."""
    num_classes: int = Field(default=1000, gt=0)
    class_token: bool | None = None
    """Read out a class token instead of the mean; null as published (images: mean)."""
    expand: Literal["attention", "mlp"] | None = None
    """Where channels grow; null as published (large in the MLP, the others in attention)."""
    drop_path: float | tuple[float, float, float, float] = 0.0
    """Stochastic depth, linear from 0 to this rate over the blocks, or one rate per stage."""
    drop_path_mode: DropPathMode = "auto"
    """mask: dropped samples are computed, then zeroed; skip: not computed; auto: skip on a CPU."""
    head_dropout: float = Field(default=0.0, ge=0, lt=1)
    absolute_positions: bool = False
    relative_positions: bool = True
    residual_pooling: bool = True
    weights: str | None = None
    """Start from these weights, a file in any published naming or a run's folder; tables are resized to the input."""
    new_head: bool = False
    """With `weights` of another number of classes: start a fresh classifier instead of refusing them."""
    inflation: Inflation = "centre"
    """With image `weights` for clips: "centre" puts 2-D filters into the centre frame (paper), "repeat" into every one
    (SlowFast)."""
    attention_form: AttentionForm = "auto"
    """How the attention is computed: auto (by device), reference, matmul or fused; the same function."""
    embed_dim: int | None = Field(default=None, gt=0)
    """Channels of the first stage instead of the variant's, for small experiments."""
    depths: tuple[int, int, int, int] | None = None
    """Blocks per stage instead of the variant's."""
    num_heads: int | None = Field(default=None, gt=0)
    """Attention heads of the first stage instead of the variant's."""

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, value: str) -> str:
        if value not in VARIANTS:
            raise ValueError(f"unknown variant{_did_you_mean(value, VARIANTS)}; variants: {', '.join(VARIANTS)}")
        return value

    def resolved_variant(self) -> Variant:
        """Return the table's row with this config's own sizes put in."""
        from dataclasses import replace

        changes = {key: getattr(self, key) for key in ("embed_dim", "depths", "num_heads")}
        return replace(VARIANTS[self.variant], **{key: value for key, value in changes.items() if value is not None})


class RunConfig(Settings):
    """One training run; the saved form is itself a valid recipe."""

    name: str = Field(min_length=1)
    """Names the run folder."""
    task: Literal["image_classification", "video_classification", "detection"] = "image_classification"
    seed: int = Field(default=0, ge=0)
    output_dir: str = "runs"
    """The run folder is created in here."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    image: ImageConfig = ImageConfig()
    """Read by image_classification only."""
    video: VideoConfig = VideoConfig()
    """Read by video_classification only."""
    detection: DetectionAugmentConfig = DetectionAugmentConfig()
    """Read by detection only: how pictures and their objects are augmented and resized."""
    detector: DetectorConfig = DetectorConfig()
    """Read by detection only: what stands on the backbone that `model` describes."""
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    watch: WatchConfig = WatchConfig()
    profile: ProfileConfig = ProfileConfig()
    phases: tuple[PhaseConfig, ...] = ()
    """Later phases at other resolutions; what stands above is the first one's."""

    @field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, value: str) -> str:
        if value in (".", "..") or "/" in value or "\\" in value:
            raise ValueError("is used as a folder name and must not contain slashes; put the path into output_dir")
        return value

    @model_validator(mode="after")
    def _only_the_task_s_inputs_are_set(self) -> "RunConfig":
        for section, task in _SECTION_READ_BY.items():
            given, default = getattr(self, section), type(getattr(self, section))()
            changed = [key for key in type(given).model_fields if getattr(given, key) != getattr(default, key)]
            if task != self.task and changed:
                raise ValueError(
                    f"{section}.{changed[0]} = {getattr(given, changed[0])!r} would have no effect: task is "
                    f"{self.task}, which does not read {section}.*; set task={task}, or take out "
                    f"{', '.join(f'{section}.{key}' for key in changed)}"
                )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        check_phases(self.phases, self.task, self.schedule.epochs)
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size = {self.train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size = {self.train.micro_batch_size}; change one of them"
            )
        if self.train.micro_batch_size < self.least_micro_batch:
            section = "image" if self.task == "image_classification" else "video"
            what = "2 pictures" if self.repeats == 1 else f"{self.least_micro_batch} clips, of two videos"
            raise ValueError(
                f"train.micro_batch_size = {self.train.micro_batch_size}: with mixup or cutmix on, a micro-batch is "
                f"mixed with itself and needs at least {what}; raise it, or set {section}.mix_prob=0"
            )
        if self.train.keep_best and (self.data.validation is None or not self.train.evaluate_every):
            raise ValueError(
                f"train.keep_best = {self.train.keep_best} needs evaluations to tell the best, but data.validation is "
                f"{self.data.validation} and train.evaluate_every is {self.train.evaluate_every}; set both, or "
                "train.keep_best=0"
            )
        if self.task == "detection" and self.detection.masks != self.detector.masks:
            raise ValueError(
                f"detector.masks = {self.detector.masks}, but detection.masks = {self.detection.masks}: the data and "
                "the detector must both have masks, or neither; set the two alike"
            )
        if self.watch.activations_every and self.train.compile != "off":
            raise ValueError(
                f"watch.activations_every = {self.watch.activations_every} looks into modules, which a compiled model "
                f"does not run: train.compile is {self.train.compile}; set one of the two to 0 or off"
            )
        if self.train.precision == "fp16" and self.zero.stage == 0:
            raise ValueError("train.precision = fp16 needs zero.stage 1, 2 or 3, zero.stage is 0; or use bf16")
        return self

    @model_serializer(mode="wrap")
    def _without_the_other_task_s_section(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not read: other defaults of a later version must not stop a run from continuing."""
        return {key: value for key, value in handler(self).items() if _SECTION_READ_BY.get(key, self.task) == self.task}

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def inputs(self) -> AugmentConfig:
        """The section that a classification reads: `image` or `video`."""
        return self.video if self.task == "video_classification" else self.image

    @property
    def input_size(self) -> tuple[int, ...]:
        """What the model is built for: (H, W) of images or (T, H, W) of clips; of a detector's pre-training."""
        return self.video.clip_size if self.task == "video_classification" else self.image.image_size

    @property
    def required_members(self) -> tuple[tuple[str, ...], ...]:
        """What every sample of a shard must have for the task, one of each group."""
        if self.task == "detection":
            from data_pipeline.annotations import DETECTION_MEMBERS

            return DETECTION_MEMBERS
        return VIDEO_MEMBERS if self.task == "video_classification" else REQUIRED_FOR_CLASSIFICATION

    @property
    def repeats(self) -> int:
        """How often each training sample comes in an epoch, one right after the other."""
        return self.video.repeats if self.task == "video_classification" else 1

    @property
    def least_micro_batch(self) -> int:
        """The fewest samples that mixing can mix."""
        return self.repeats + 1 if self.task != "detection" and self.inputs.mixes else 1

    def epoch_size(self, num_samples: int) -> int:
        """Return how many samples an epoch over a training set of `num_samples` computes: each as often as repeated."""
        return num_samples * self.repeats

    def batch_arithmetic(self, world_size: int) -> BatchArithmetic:
        """Derive the accumulation, of the first phase; ConfigError with the arithmetic if the batch does not divide."""
        for number, later in enumerate(phase_configs(self)[1:]):
            try:
                later.batch_arithmetic(world_size)
            except ConfigError as error:
                raise ConfigError(f"in phases.{number}: {error}") from None
        total, micro = self.train.global_batch_size, self.train.micro_batch_size
        if total % (micro * world_size):
            sizes = range(self.least_micro_batch, total // world_size + 1)
            fits = sorted((size for size in sizes if total % (size * world_size) == 0), reverse=True)
            ways = f"train.micro_batch_size one of {fits}" if fits else f"another number of ranks than {world_size}"
            below, above = total // (micro * world_size) * micro * world_size, -(-total // (micro * world_size))
            nearest = " or ".join(str(n) for n in (below, above * micro * world_size) if n)
            raise ConfigError(
                f"train.global_batch_size = {total} is not micro_batch_size x ranks x a whole number: "
                f"{micro} x {world_size} = {micro * world_size}, {total} / {micro * world_size} = "
                f"{total / (micro * world_size):.3f}; choose {ways}, or train.global_batch_size={nearest}"
            )
        return BatchArithmetic(micro, total // (micro * world_size), world_size, total)

    def total_steps(self, num_samples: int) -> int:
        """Return the number of updates in the whole run over a training set of `num_samples`."""
        steps = int(self.schedule.epochs * self.epoch_size(num_samples) / self.train.global_batch_size)
        if steps < 1:
            repeated = f" x {self.repeats} repeats" if self.repeats > 1 else ""
            raise ConfigError(
                f"schedule.epochs = {self.schedule.epochs:g} over {num_samples} samples{repeated} is less than "
                f"one step of train.global_batch_size = {self.train.global_batch_size}; train longer or "
                "with a smaller batch"
            )
        return steps

    def warmup_steps(self, num_samples: int) -> int:
        """Return the number of updates before the peak learning rate."""
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        return int(self.schedule.warmup_epochs * self.epoch_size(num_samples) / self.train.global_batch_size)

    def scaled_lr(self, lr: float) -> float:
        """Scale a rate stated for `optim.lr_batch_size` samples to the global batch (linear rule)."""
        return lr * self.train.global_batch_size / self.optim.lr_batch_size

    def to_yaml(self) -> str:
        """Return the resolved config as YAML."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a recipe, its `base:` chain first, then `section.key=value` overrides.

    Raises ConfigError naming every wrong key and value at once.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.merge(_read(Path(path)), OmegaConf.from_dotlist([_checked(o) for o in overrides]))
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    assert isinstance(values, dict)
    return parse_config({str(key): value for key, value in values.items()}, source=str(path))


def parse_config(values: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Check a tree of plain values; raises ConfigError naming every wrong key and value at once."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail, values) for detail in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(["cannot be used:", *lines])) from None


def _read(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to itself; remove the loop")
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such recipe{_did_you_mean(path.name, names)}")
    try:
        tree: Any = OmegaConf.load(path)
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, this is a list or empty")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return OmegaConf.merge(_read(path.parent / str(base), (*seen, path.resolve())), tree)


def _checked(override: str) -> str:
    if "=" not in override:
        raise ConfigError(f"override {override!r} has no `=`; write section.key=value, such as optim.lr=1e-4")
    return override


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """List the keys of the section that `location` lies in."""
    section: type[Settings] = RunConfig
    for part in location:
        field = section.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, Settings)):
            break
        section = inner
    return list(section.model_fields)


def _explain(detail: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    location = [part for part in detail["loc"] if not (isinstance(part, str) and "[" in part)]
    key = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        where = ".".join(str(part) for part in location[:-1]) or "the recipe"
        hint = _did_you_mean(str(location[-1]), known)
        return f"{key} = {detail['input']!r}: unknown key{hint} (keys of {where}: {', '.join(known)})"
    message = detail["msg"].removeprefix("Value error, ")
    if not location or isinstance(detail["input"], Mapping):
        return f"{key}: {message}" if key else message
    return f"{key} = {detail['input']!r}: {message[:1].lower() + message[1:]}"
