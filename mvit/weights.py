"""Read weights into a model: published or our own, from a file or a state dict, never running code from the file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mvit.model.backbone import MViT
from mvit.model.convert import detector_part, fit_tensor, import_names, is_pyramid_norm
from mvit.model.inflation import INFLATIONS, Inflation, inflate_state, is_for_images, starts_anew
from mvit.model.pyramid import StagePyramid
from mvit.weight_files import read_checkpoint

_WRAPPERS = ("model_state", "state_dict", "model", "module")  # keys under which training code keeps the weights
_PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
_MAX_LISTED = 40
# What may start anew, by the start of its names: a detector's backbone ends with norms of its own and has no token.
_OF_CLASSIFIER = ("head.", "norm.", "cls_token")
_RENEWABLE = {"detectron2": _OF_CLASSIFIER, "detector": _OF_CLASSIFIER}


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a checkpoint and every parameter of the model."""

    naming: str
    """Whose parameter names the checkpoint has: "official" (also our own classifiers), "timm", "torchvision",
    "detectron2" (also our own backbones) or "detector" (one of ours)."""
    loaded: tuple[str, ...]
    """Our names of all parameters that were set, the resized ones included."""
    resized: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, old shape, new shape) of the position tables that were interpolated, or lost a class token's row."""
    missing: tuple[str, ...]
    """Parameters of the model that start anew. If a new head was allowed: the head; after a detector's backbone the
    final norm and the class token, too. After inflation: the temporal positions, and the class token unless the image
    weights had one. Of a backbone: the norms of its maps, unless the weights are a backbone's. Else none."""
    unexpected: tuple[str, ...]
    """Tensors of the checkpoint that were not used: its head, if a new one was allowed, whatever a detector has beside
    the backbone, and what a classifier has that a backbone has not: head, final norm, class token. Else none."""
    inflation: Inflation | None = None
    """How image weights were given a time axis, None if the weights were of the model's own kind."""
    inflated: tuple[str, ...] = ()
    """Our names of the convolutions that were."""

    def summary(self) -> str:
        """Return a few lines for a log."""
        lines = [f"loaded {len(self.loaded)} tensors ({self.naming} names)"]
        if self.resized:
            lines.append(
                f"{len(self.resized)} position tables fitted to another input size, or to a model without class token:"
            )
            lines += [f"  {name}: {list(old)} -> {list(new)}" for name, old, new in self.resized]
        if self.inflation:
            where = "in the centre frame, the others are zero" if self.inflation == "centre" else "in every frame"
            lines.append(f"{len(self.inflated)} convolutions inflated from images to clips: {where}")
        anew = [name for name in self.missing if not name.endswith(".rel_pos_t")]
        tables = len(self.missing) - len(anew)
        if tables:
            value = "are zero" if self.inflation == "centre" else "start anew"
            lines.append(f"{tables} tables of temporal positions {value}")
        if anew:
            lines.append(f"start anew: {', '.join(anew)}")
        if self.unexpected:
            parts = Counter(detector_part(name) or name.split(".")[0] for name in self.unexpected)
            lines.append(f"not used: {', '.join(f'{count} of {part}' for part, count in parts.items())}")
        return "\n".join(lines)


def load_weights(
    model: MViT | StagePyramid,
    source: str | Path | Mapping[str, object],
    *,
    allow_new_head: bool = False,
    inflation: Inflation = "centre",
) -> LoadReport:
    """Set the parameters of `model` from a file or a state dict in any published naming, which is detected.

    Position tables of another input size are interpolated and reported. `allow_new_head` starts a fresh classifier
    where the checkpoint has none or one for another number of classes. Of a detector, ours or detectron2's, the
    backbone is taken, its other parts are reported. A backbone takes the weights of a backbone, a detector or an image
    classifier, whose head, final norm and class token are left and reported; then the norms of the maps start anew.
    Image weights for a video model are inflated: see `Inflation`; the temporal positions start at zero ("centre") or as
    in a new model ("repeat"), the class token as in a new model if the images had none. The model is changed only if
    all fits.

    Raises ValueError naming the keys and shapes of whatever cannot be explained.
    """
    if inflation not in INFLATIONS:
        raise ValueError(f"inflation={inflation!r} must be one of {', '.join(map(repr, INFLATIONS))}")
    label = _label(source)
    state = read_state(source)
    naming, state = import_names(state)
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError("the model is on the meta device; give it memory first: model.to_empty(device='cpu')")
    inflating = len(model.input_size) == 3 and is_for_images(state)
    inflated: list[str] = []
    if inflating:
        state, inflated = inflate_state(state, wanted, inflation)

    fitted: dict[str, Tensor] = {}
    resized: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name in wanted.keys() & state.keys():
        shape = tuple(wanted[name].shape)
        fit = fit_tensor(name, state[name], shape, model.grid, model.class_tokens)
        if fit is None:
            wrong[name] = (tuple(state[name].shape), shape)
            continue
        fitted[name], interpolated = fit
        if interpolated:
            resized.append((name, tuple(state[name].shape), shape))
    missing = [name for name in wanted if name not in state]
    renewed = [name for name in missing if inflating and starts_anew(name)]
    unused = [name for name in state if name not in wanted and naming in _RENEWABLE and detector_part(name)]
    if isinstance(model, StagePyramid):
        if not any(map(is_pyramid_norm, state)):
            renewed = [name for name in missing if is_pyramid_norm(name)]
        unused += [name for name in state if name.startswith(_OF_CLASSIFIER)]
    unexpected = [name for name in state if name not in wanted and name not in unused]

    # Whole groups, weight and bias together
    unfit = [start for start in _RENEWABLE.get(naming, ("head.",)) if _has_unfit(start, wanted, fitted)]
    if unfit and allow_new_head:
        renewed = [name for name in wanted if name in renewed or name.startswith(tuple(unfit))]
        unused = [name for name in state if name.startswith(tuple(unfit))] + unused
    missing = [name for name in missing if name not in renewed]
    wrong = {name: shapes for name, shapes in wrong.items() if name not in renewed}
    if missing or unexpected or wrong:
        raise ValueError(_explain(label, naming, model, state, wanted, missing, unexpected, wrong))
    for start in dict.fromkeys([*unfit, *(n for n in renewed if starts_anew(n) or is_pyramid_norm(n))]):
        _renew(model, start, inflation)
    fitted = {name: tensor for name, tensor in fitted.items() if name not in renewed}
    model.load_state_dict(fitted, strict=False)  # strictness was enforced above, what starts anew excepted
    return LoadReport(
        naming,
        tuple(name for name in wanted if name in fitted),
        tuple(sorted(resized)),
        tuple(renewed),
        tuple(unused),
        inflation if inflating else None,
        tuple(inflated),
    )


def _has_unfit(start: str, wanted: Mapping[str, Tensor], fitted: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(start) and name not in fitted for name in wanted)


def _renew(model: MViT | StagePyramid, start: str, inflation: Inflation) -> None:
    """Initialise the parameters whose names begin so, as a new model's are; inflated temporal tables as published."""
    if isinstance(model, StagePyramid):
        assert is_pyramid_norm(start), start
        getattr(model, start.split(".")[0]).reset_parameters()
    elif start == "head.":
        model.head.projection.reset_parameters()
    elif start == "norm.":
        model.norm.reset_parameters()
    elif start.endswith(".rel_pos_t") and inflation == "centre":
        nn.init.zeros_(model.get_parameter(start))
    elif start != "cls_token" or model.cls_token is not None:
        nn.init.trunc_normal_(model.get_parameter(start), std=0.02)


def _label(source: str | Path | Mapping[str, object]) -> str:
    return "the given state dict" if isinstance(source, Mapping) else str(source)


def read_state(source: str | Path | Mapping[str, object]) -> dict[str, Tensor]:
    """Take the tensors out of a checkpoint's wrapping and their names out of a wrapper's prefix.

    Raises ValueError for a file or a mapping that holds other things.
    """
    content = source if isinstance(source, Mapping) else read_checkpoint(source)
    label = _label(source)
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, Mapping):
            content = inner
            break
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{label}: entry {name!r} is a {type(value).__name__}, not a tensor; expected a state dict, or one "
                f"under the key {' or '.join(repr(key) for key in _WRAPPERS)}"
            )
        state[str(name)] = value
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _explain(
    label: str,
    naming: str,
    model: MViT | StagePyramid,
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    """Say which tensors do not fit, and which option would make them fit where that can be told."""
    lines = [f"{label} ({naming} names) does not fit {model.variant or 'the model'}, which was left unchanged."]
    if wrong:
        rows = [f"{name}: {list(have)}, the model has {list(want)}" for name, (have, want) in sorted(wrong.items())]
        lines += ["Wrong shapes:", *_listed(rows)]
    if missing:
        lines += ["Missing:", *_listed([f"{name} {list(wanted[name].shape)}" for name in missing])]
    if unexpected:
        lines += ["Unexpected:", *_listed([f"{name} {list(state[name].shape)}" for name in unexpected])]
    return "\n".join(lines + _hints(model, state, missing, unexpected, wrong))


def _listed(rows: list[str]) -> list[str]:
    more = [f"… and {len(rows) - _MAX_LISTED} more"] if len(rows) > _MAX_LISTED else []
    return [f"  {row}" for row in rows[:_MAX_LISTED] + more]


def _hints(
    model: MViT | StagePyramid,
    state: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> list[str]:
    """Name the option of `create_model` that explains a misfit."""
    hints: list[str] = []
    have, want = wrong.get("head.projection.weight", ((0, 0), (0, 0)))
    if have[-1] == want[-1] and have != want:
        hints.append(
            f"The head is for {have[0]} classes, the model for {want[0]}: give num_classes={have[0]}, or "
            "allow_new_head=True to start a new head."
        )
    elif "head.projection.weight" in missing:
        hints.append("The weights have no head: give allow_new_head=True to start a new one.")
    if "norm.weight" in missing and any(detector_part(name) for name in state):
        hints.append("A detector's backbone has no final norm and no class token: the option starts them anew, too.")
    elif "cls_token" in unexpected + missing:
        hints.append(f"Build the model with class_token={'cls_token' in unexpected}.")
    if any(name.startswith("pos_embed") for name in unexpected + missing):
        hints.append("The absolute positions differ: see absolute_positions.")
    if any(".rel_pos_" in name for name in unexpected + missing):
        hints.append("The relative positions differ: see relative_positions, and input_size for images or clips.")
    if any(name.endswith(".qkv.bias") for name in unexpected + missing):
        hints.append(f"Build the model with qkv_bias={any(n.endswith('.qkv.bias') for n in unexpected)}.")
    grown = [name for name in (*unexpected, *missing) if name.count(".") == 3 and ".proj." in name]
    if grown and "patch_embed.proj.weight" not in wrong:
        other = "mlp" if model.expand == "attention" else "attention"
        hints.append(f'The channels may grow elsewhere: try expand="{other}".')
    patch = wrong.get("patch_embed.proj.weight")
    if patch and len(patch[0]) != len(patch[1]):
        kinds = {4: "images, input_size=(H, W)", 5: "clips, input_size=(T, H, W)"}
        hints.append(f"The weights are for {kinds.get(len(patch[0]), '?')}; the model is for {kinds[len(patch[1])]}.")
        hints.append("Image weights fit a model for clips, by inflation; the other way round there is no rule.")
    return hints
