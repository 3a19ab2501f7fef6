"""Rebuild a golden case: outputs of the official implementations for weights that are a function of their names.

A case is a JSON file (hyper-parameters, the official state dict's names and shapes, gradient norms) and a safetensors
file (logits and more; of the maps of det_T_256x320 every second to eighth row and column, to keep it small). Weights
and inputs are drawn from seeds made of their names, so none are shipped.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mvit.model.backbone import MViT
from mvit.model.pyramid import StagePyramid
from mvit.variants import Variant, create_backbone, create_model
from mvit.weights import load_weights

HERE = Path(__file__).parent
DETECTION_CASES = sorted(path.stem for path in HERE.glob("det_*.json"))
ALL_CASES = sorted({path.stem for path in HERE.glob("*.json")} - {*DETECTION_CASES})
"""The classifiers."""
VIDEO_CASES = [case for case in ALL_CASES if case.startswith("video_")]

# Suggested by whoever recorded them: a differently ordered but equal attention moves logits by 9e-7, norms by 1e-6
LOGITS_TOLERANCE = 2e-5
MAPS_TOLERANCE = 5e-5
GRAD_NORM_TOLERANCE = 1e-4  # relative, to at least 1e-4 of the case's largest norm


@dataclass(frozen=True)
class Golden:
    """One recorded case."""

    name: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def input(self, tag: str = "") -> Tensor:
        """The recorded input, or the one of another resolution, `tag` = "2x3x32x64"."""
        shape = [int(n) for n in tag.split("x")] if tag else self.facts["input_shape"]
        return seeded_normal(f"input:{self.name}" + (f"@{tag}" if tag else ""), shape)

    def cotangent(self) -> Tensor:
        """The weights of the logits in the recorded loss."""
        return seeded_normal(f"cotangent:logits:{self.name}", self.tensors["logits"].shape)

    def map_cotangent(self, scale: str) -> Tensor:
        """The weights of a backbone's map in the recorded loss."""
        return seeded_normal(f"cotangent:{scale}:{self.name}", self.facts["outputs"][scale]["shape"])

    def map_step(self, scale: str) -> int:
        """Of a map every so many rows and columns are recorded."""
        return int(self.facts["outputs"][scale]["stored"].split("::")[1].split(",")[0])

    def official_weights(self) -> dict[str, Tensor]:
        """The official model's state dict."""
        return {name: _weight(name, shape) for name, shape in self.facts["state_dict"]}

    def model(self) -> MViT:
        """Our model for this case, with the case's weights, in evaluation mode."""
        model = _build(self.facts)
        load_weights(model, {"model_state": self.official_weights()})
        return model.eval()

    def backbone(self) -> StagePyramid:
        """Our backbone for this case, with the case's weights, in evaluation mode."""
        backbone = _build_backbone(self.facts)
        load_weights(backbone, {"model": self.official_weights()})
        return backbone.eval()

    def mismatched(self, grads: Mapping[str, Tensor]) -> list[str]:
        """Name the parameters whose gradient has another norm than recorded, or is another where recorded whole."""
        norms = self.facts["grad_norms"]
        floor = GRAD_NORM_TOLERANCE * max(norm for norm in norms.values() if norm)
        assert grads.keys() == norms.keys()
        wrong: list[str] = []
        for name, norm in norms.items():
            if name.endswith("norm_k.bias") and norm < floor:
                continue  # softmax ignores what is added to every key: zero, but for rounding, unless there is padding
            if abs(grads[name].double().norm().item() - norm) > GRAD_NORM_TOLERANCE * max(norm, floor):
                wrong.append(name)
        stored = [name for name in self.tensors if name.startswith("grad:")]
        assert stored
        for name in stored:
            theirs, ours = self.tensors[name], grads[name.removeprefix("grad:")]
            if name == "grad:pos_embed" and theirs.shape[1] == ours.shape[1] + 1:
                assert theirs[:, 0].eq(0).all()  # detectron2 keeps a class token's row and never uses it
                theirs = theirs[:, 1:]
            if (ours - theirs).norm().item() > GRAD_NORM_TOLERANCE * max(theirs.norm().item(), floor):
                wrong.append(name)
        return wrong


def load_golden(name: str) -> Golden:
    """Read a case from this folder."""
    facts = json.loads((HERE / f"{name}.json").read_text())
    return Golden(name, facts, load_file(HERE / f"{name}.safetensors"))


def seeded_normal(text: str, shape: Any) -> Tensor:
    """Standard normal float32 numbers from a seed that is the SHA-256 of a text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") & (2**63 - 1)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def _weight(name: str, shape: list[int]) -> Tensor:
    normal = seeded_normal(name, shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf.startswith("rel_pos_"):
        return 0.2 * normal
    if len(shape) == 1 and leaf == "weight":
        return 1 + 0.02 * normal
    return 0.02 * normal


def _build(facts: dict[str, Any]) -> MViT:
    """Translate the official configuration into ours."""
    options, data = facts["config"]["MVIT"], facts["config"]["DATA"]
    starts = [0, *(index for index, _ in options["DIM_MUL"]), options["DEPTH"]]
    d1, d2, d3, d4 = (end - start for start, end in itertools.pairwise(starts))
    variant = Variant(
        facts["case"], options["EMBED_DIM"], (d1, d2, d3, d4), options["NUM_HEADS"], mlp_ratio=options["MLP_RATIO"]
    )
    side = data["TRAIN_CROP_SIZE"]
    mean = options.get("USE_MEAN_POOLING", False)
    return create_model(
        variant,
        num_classes=facts["config"]["MODEL"]["NUM_CLASSES"],
        input_size=(data["NUM_FRAMES"], side, side) if "NUM_FRAMES" in data else (side, side),
        class_token=options["CLS_EMBED_ON"],
        expand="attention" if options["DIM_MUL_IN_ATT"] else "mlp",
        readout="mean_then_norm" if mean else None,
        relative_positions=options["REL_POS_SPATIAL"],
        absolute_positions=options["USE_ABS_POS"],
        residual_pooling=options["RESIDUAL_POOLING"],
        qkv_bias=options["QKV_BIAS"],
        kv_stride=options["POOL_KV_STRIDE_ADAPTIVE"][-1],
    )


def _build_backbone(facts: dict[str, Any]) -> StagePyramid:
    """Translate detectron2's arguments into ours."""
    options = facts["config"]
    d1, d2, d3, d4 = (end - start for start, end in itertools.pairwise([-1, *options["last_block_indexes"]]))
    side = options.get("img_size", 224)
    return create_backbone(
        Variant(facts["case"], options["embed_dim"], (d1, d2, d3, d4), options["num_heads"]),
        window_size=options.get("adaptive_window_size", 56),
        input_size=(side, side),
        relative_positions=options.get("use_rel_pos", True),
        absolute_positions=options.get("use_abs_pos", False),
    )
