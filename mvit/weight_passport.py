"""The passport of a weights file: whose it is, what model it is of, what of it loads, and whether it answers alike."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mvit.config import RunConfig, parse_config
from mvit.export_timm import build_timm, check_timm_has, timm_names
from mvit.model.convert import detector_part, import_names
from mvit.tasks import create_task
from mvit.variants import create_backbone, create_model
from mvit.weight_facts import WeightFacts, weight_facts
from mvit.weight_files import read_checkpoint
from mvit.weights import LoadReport, load_weights, read_state

_OWNERS = {
    "official": "facebookresearch/mvit, SlowFast, or mvit",
    "timm": "timm",
    "torchvision": "torchvision",
    "detectron2": "detectron2, or a backbone of mvit",
    "detector": "a detector of mvit",
}
_TORCHVISION_SIZE = (16, 224, 224)


@dataclass(frozen=True)
class Passport:
    """What is known of a weights file."""

    path: Path
    naming: str
    facts: WeightFacts
    num_tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    beside: tuple[str, ...]
    """What the file holds beside the weights: "epoch", "optimizer_state"."""
    run: dict[str, str]
    """Of an export of ours: the run's name, the step, whether the weights are averaged."""
    parts: dict[str, int]
    """Of a detector: tensors of each part that the backbone has not."""
    target: str
    """What the weights were loaded into."""
    report: LoadReport | None
    """What became of every tensor there; None if it does not fit."""
    misfit: str
    """Why it does not fit, "" if it does."""
    reference: str
    """The implementation that was asked for its logits, or why none was; "" if none was wanted."""
    difference: float | None
    """Largest difference of a logit of a random input between ours and the reference's."""
    largest: float | None
    """The largest logit of the reference."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        facts, report = self.facts, self.report
        variant = {key: getattr(facts.variant, key) for key in ("name", "embed_dim", "depths", "num_heads")}
        shown = {key: getattr(facts, key) for key in facts.__dataclass_fields__ if key != "variant"}
        keys = ("naming", "num_tensors", "parameters", "dtypes", "beside", "run", "parts", "target", "misfit")
        found = None
        if report is not None:
            found = {key: getattr(report, key) for key in ("loaded", "resized", "missing", "unexpected", "inflated")}
        ours = {"path": str(self.path), "variant": variant, **shown, **{key: getattr(self, key) for key in keys}}
        compared = {"name": self.reference, "max_difference": self.difference, "largest_logit": self.largest}
        return ours | {"report": found, "reference": compared if self.reference else None}

    def __str__(self) -> str:
        facts, variant = self.facts, self.facts.variant
        size = "not told" if facts.input_size is None else " x ".join(map(str, facts.input_size))
        classes = "none" if facts.num_classes is None else f"{facts.num_classes} classes"
        told = ", ".join(f"{key} {value}" for key, value in self.run.items())
        positions = [kind for kind in ("relative", "absolute") if getattr(facts, f"{kind}_positions")]
        dims = f"embed {variant.embed_dim}, blocks {'-'.join(map(str, variant.depths))}, heads {variant.num_heads}"
        kind = "clips" if facts.clips else "images"
        lines = [
            f"file:       {self.path}{f' ({told})' if told else ''}",
            f"names:      {self.naming} ({_OWNERS[self.naming]})",
            f"model:      {variant.name} ({dims}), {kind}, channels grow in {facts.expand}",
            f"resolution: {size} px{' (frames x height x width)' if facts.clips else ''}",
            f"positions:  {' and '.join(positions) or 'none'}; class token: {'yes' if facts.class_token else 'no'}",
            f"head:       {classes}",
            f"tensors:    {self.num_tensors} of {self.parameters:,} numbers, {', '.join(self.dtypes)}",
        ]
        if self.beside:
            lines.append(f"beside:     {', '.join(self.beside)} (not read)")
        if self.parts:
            lines.append(f"parts:      {', '.join(f'{count} of {part}' for part, count in self.parts.items())}")
        told = self.misfit if self.report is None else self.report.summary()
        lines.append(f"into {self.target}:")
        lines += [f"  {line}" for line in told.splitlines()]
        if self.difference is not None:
            lines.append(f"max |Δlogit| to {self.reference}: {self.difference:.2e} (largest logit {self.largest:.3g})")
        elif self.reference:
            lines.append(f"no reference: {self.reference}")
        return "\n".join(lines)


def inspect_weights(path: str | Path, config: RunConfig | None = None, *, reference: bool = False) -> Passport:
    """Read a weights file in any published naming, load it into the model it is of, and report.

    `config`: load it into that recipe's model instead, as `model.weights` would. `reference`: compare the logits of a
    random input with timm's (images) or torchvision's (clips of the published small) for the same weights. Takes the
    memory of the file and of one model, two with `reference`. Raises ValueError for a file that cannot be read or is
    of something else.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; `mvit export` makes a weights file of a run, or name the file in it")
    content = read_checkpoint(path)
    raw = read_state(content)
    naming, state = import_names(raw)
    facts = weight_facts(state)
    parts = Counter(part for name in state if (part := detector_part(name)))
    wrapped = not all(isinstance(value, Tensor) for value in content.values())
    model, target, report, misfit = _own(state, facts, bool(parts)) if config is None else _theirs(path, config)
    found: tuple[str, float | None, float | None] = ("", None, None)
    if reference:
        found = _compare(naming, raw, state, facts, model if config is None else None, bool(parts))
    return Passport(
        path,
        naming,
        facts,
        len(raw),
        sum(tensor.numel() for tensor in raw.values()),
        tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in raw.values()})),
        tuple(sorted(key for key, value in content.items() if not _is_state(value))) if wrapped else (),
        _run_of(path),
        dict(parts),
        target,
        report,
        misfit,
        *found,
    )


def _is_state(value: object) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())
    )


def _run_of(path: Path) -> dict[str, str]:
    """Return what an export of ours says of its run."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return {}
    if "config" not in metadata:
        return {}
    name = str(json.loads(metadata["config"]).get("name"))
    return {"run": name, "step": metadata.get("step", "?"), "averaged": metadata.get("ema", "?")}


def _own(
    state: Mapping[str, Tensor], facts: WeightFacts, backbone: bool
) -> tuple[nn.Module | None, str, LoadReport | None, str]:
    """Load weights into the model that they tell of."""
    try:
        if backbone:
            built = create_backbone(
                facts.variant,
                expand=facts.expand,
                relative_positions=facts.relative_positions,
                absolute_positions=facts.absolute_positions,
            )
            return built, f"a backbone of {facts.variant.name}", load_weights(built, state), ""
        size = facts.input_size or (224, 224)
        model = create_model(
            facts.variant,
            num_classes=facts.num_classes or 1,
            input_size=size,
            class_token=facts.class_token,
            expand=facts.expand,
            relative_positions=facts.relative_positions,
            absolute_positions=("separable" if facts.clips else True) if facts.absolute_positions else False,
            qkv_bias=facts.qkv_bias,
        )
        report = load_weights(model, state, allow_new_head=facts.num_classes is None)
        return model.eval(), f"{facts.variant.name} at {' x '.join(map(str, size))}", report, ""
    except ValueError as error:
        return None, facts.variant.name, None, str(error)


def _theirs(path: Path, config: RunConfig) -> tuple[None, str, LoadReport | None, str]:
    """Load a file into a recipe's model as its `model.weights` would."""
    from mvit.detection.detector import Detector
    from mvit.model.backbone import MViT
    from mvit.model.pyramid import StagePyramid

    model: Any = create_task(config).build_model()
    model = model.pyramid.backbone if isinstance(model, Detector) else model
    assert isinstance(model, MViT | StagePyramid)
    new_head = config.model.new_head and config.task != "detection"
    try:
        report = load_weights(model, path, allow_new_head=new_head, inflation=config.model.inflation)
    except ValueError as error:
        return None, config.name, None, str(error)
    return None, config.name, report, ""


def _compare(
    naming: str,
    raw: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    facts: WeightFacts,
    model: nn.Module | None,
    backbone: bool,
) -> tuple[str, float | None, float | None]:
    """Return the reference's name, the largest difference and the largest logit; or why there is none."""
    if model is None or backbone or facts.num_classes is None:
        return "only a classifier loaded into its own model is compared", None, None
    if facts.clips:
        if naming != "torchvision" or not facts.published or facts.input_size != _TORCHVISION_SIZE:
            return "of clips, torchvision has the published small under its own names alone", None, None
        from torchvision.models.video import mvit_v2_s

        name, theirs = "torchvision's mvit_v2_s", mvit_v2_s(num_classes=facts.num_classes)
        theirs.load_state_dict(dict(raw), strict=True)
    else:
        config = _recipe(facts)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        try:
            check_timm_has(shapes, config)
        except ValueError as error:
            return str(error).split(";")[0].removeprefix("format 'timm': "), None, None
        name, theirs = "timm's MultiScaleVit", build_timm(config)
        renamed = timm_names(shapes)
        weights = dict(raw) if naming == "timm" else {renamed[key]: value for key, value in model.state_dict().items()}
        theirs.load_state_dict(weights, strict=True)
    size = facts.input_size or (224, 224)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs.eval()(images), model(images)
    return name, float((found - expected).abs().max()), float(expected.abs().max())


def _recipe(facts: WeightFacts) -> RunConfig:
    """Return a recipe with the model that weights of images tell of."""
    model = {
        "variant": facts.variant.name if facts.published else "mvitv2_tiny",
        "embed_dim": facts.variant.embed_dim,
        "depths": facts.variant.depths,
        "num_heads": facts.variant.num_heads,
        "num_classes": facts.num_classes,
        "class_token": facts.class_token,
        "expand": facts.expand,
        "relative_positions": facts.relative_positions,
        "absolute_positions": facts.absolute_positions,
    }
    size = facts.input_size or (224, 224)
    return parse_config({"name": "weights", "model": model, "image": {"image_size": size}})
