"""What a training step holds in memory and computes, from running the recipe's real model without memory or device.

The model runs forward and backward on torch's meta device, where tensors have shapes and no data. A dispatch mode sees
every operation: which storages come and go, how many multiply-adds it has, how many bytes it touches. Nothing is known
here about layers, so a change of the model changes the plan. Two things make it a matter of seconds for 80 blocks:

- Everything is affine in the batch size, operation by operation, so two runs give every batch size exactly.
- Inner blocks of a stage are alike, so at most three blocks of each stage run and the middle one's part is repeated.
"""

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mvit.config import RunConfig
from mvit.model.backbone import MViT
from mvit.planner_record import AsOnCuda, Recorder, Stretch
from mvit.tasks.classification import build_classifier, soft_cross_entropy

Target = Literal["cuda", "cpu"]
STAGES = ("stage1", "stage2", "stage3", "stage4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_BATCHES = (2, 4)
_MOST_BLOCKS = 3  # first, inner, last


@dataclass(frozen=True)
class Segment:
    """A stretch of the step: the forward or backward pass of one block, or what lies before, between and after them.

    Arrays of shape (events, 2) and (operations, 2): a constant and a factor of the batch size.
    """

    held: np.ndarray
    """Bytes held after each event, since the segment began; without finished gradients of parameters."""
    gradients: np.ndarray
    """Bytes of finished gradients after each event, since the segment began."""
    flops: np.ndarray
    """Of matrix operations, 2 per multiply-add."""
    traffic: np.ndarray
    """Bytes each operation reads and writes."""


@dataclass(frozen=True)
class Cost:
    """What the operations of a pass cost at one batch size, an array entry for each."""

    flops: np.ndarray
    traffic: np.ndarray
    times: np.ndarray
    """How often each runs."""


@dataclass(frozen=True)
class StepTrace:
    """A micro-batch's forward and backward pass, for any batch size and choice of recomputed stages."""

    plain: Mapping[str, Segment]
    recomputed: Mapping[str, Segment]
    order: tuple[tuple[str, str, int], ...]
    """Segments in the order of time: (name, its stage or "", how often it repeats)."""
    sample_bytes: int
    """Of one sample as the loader delivers it; held during the whole step."""
    evaluation: tuple[float, float]
    """The most bytes that an evaluation's forward pass holds: a constant and a factor of the batch size."""

    def peak_bytes(self, batch: int, recompute: Collection[str], *, keep_gradients: bool) -> int:
        """Return the most bytes held at once beside parameters and optimizer, at `batch` samples.

        `keep_gradients`: the parameters' stay, as without sharding; otherwise each is gone as soon as it is there.
        """
        scale = np.array([1.0, batch])
        held = peak = float(batch * self.sample_bytes)
        for _, segment, times in self._segments(recompute):
            if not len(segment.held):
                continue
            curve = segment.held @ scale + (segment.gradients @ scale if keep_gradients else 0)
            grown, most = float(curve[-1]), float(curve.max())
            peak = max(peak, held + most, held + grown * (times - 1) + most)
            held += grown * times
        return int(peak)

    def evaluation_bytes(self, batch: int) -> int:
        """Return the most bytes held at once beside the weights while `batch` samples are evaluated."""
        constant, each = self.evaluation
        return int(constant + batch * (each + self.sample_bytes))

    def cost(self, batch: int, recompute: Collection[str], *, backward: bool) -> Cost:
        """Return what the forward or the backward pass costs; recomputation is part of the backward pass."""
        scale = np.array([1.0, batch])
        half = [(s, times) for name, s, times in self._segments(recompute) if name.startswith("backward") == backward]
        return Cost(
            np.concatenate([segment.flops @ scale for segment, _ in half]),
            np.concatenate([segment.traffic @ scale for segment, _ in half]),
            np.concatenate([np.full(len(segment.flops), times) for segment, times in half]),
        )

    def _segments(self, recompute: Collection[str]) -> Iterator[tuple[str, Segment, int]]:
        for name, stage, times in self.order:
            yield name, (self.recomputed if stage in recompute or not self.plain else self.plain)[name], times


def trace_step(
    config: RunConfig, *, autocast: bool, target: Target = "cuda", own_checkpointing: bool = False
) -> StepTrace:
    """Run the step of a classification recipe without memory; `autocast`: as stage 0 computes in bf16.

    `target` "cuda" follows what the model does on a GPU (fused attention, autocast's rules there), "cpu" this machine.
    `own_checkpointing` knows the recipe's own choice of recomputed stages only, in half the time.
    """
    depths = config.model.resolved_variant().depths
    short = _with_depths(config, [min(depth, _MOST_BLOCKS) for depth in depths])
    own = len(config.train.checkpointed_stages)
    of_kind: dict[bool, dict[str, Segment]] = {False: {}, True: {}}
    for recompute in (False, True):
        if own_checkpointing and own == (0 if recompute else len(STAGES)):
            continue
        first, second = (record_step(short, batch, recompute, autocast=autocast, target=target) for batch in _BATCHES)
        assert list(first.stretches) == list(second.stretches)
        of_kind[recompute] = {n: _affine(first.stretches[n], second.stretches[n]) for n in first.stretches}
    low, high = (record_evaluation(short, batch, autocast=autocast, target=target) for batch in _BATCHES)
    each = (high - low) / (_BATCHES[1] - _BATCHES[0])
    return StepTrace(
        of_kind[False],
        of_kind[True],
        _order(depths),
        3 * torch.Size(config.input_size).numel(),
        (max(0.0, low - _BATCHES[0] * each), each),
    )


def record_step(config: RunConfig, batch: int, recompute: bool, *, autocast: bool, target: Target) -> Recorder:
    """Run one forward and backward pass of `batch` samples, all blocks recomputed or none, and return the record."""
    checkpointing: Any = "all" if recompute else "off"
    train = config.train.model_copy(update={"activation_checkpointing": checkpointing})
    with _built(config.model_copy(update={"train": train}), autocast=autocast, target=target) as built:
        model = built.model.train()
        recorder = Recorder(list(model.parameters()))
        _mark_blocks(model.blocks, recorder)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(recorder.finished_gradient)

        def losses() -> Tensor:
            targets = torch.empty(batch, config.model.num_classes, device=built.device)
            return soft_cross_entropy(built.logits(batch), targets)

        with recorder, _without_collector():  # which would free at any time what the next collection finds
            recorder.mark("forward start")
            loss = losses()
            built.as_on_cuda.end_of_forward()
            recorder.mark("backward start")
            loss.backward()
    return recorder


def record_evaluation(config: RunConfig, batch: int, *, autocast: bool, target: Target) -> int:
    """Run an evaluation's forward pass of `batch` samples and return the most bytes it held."""
    with _built(config, autocast=autocast, target=target) as built:
        recorder = Recorder(list(built.model.eval().parameters()))
        with recorder, torch.no_grad(), _without_collector():
            built.logits(batch).float()
    return recorder.peak_bytes


@dataclass(frozen=True)
class _Built:
    """A model without memory, and how to run it as on the target."""

    model: MViT
    device: str
    dtype: torch.dtype
    input_size: tuple[int, ...]
    around: Any
    as_on_cuda: AsOnCuda

    def logits(self, batch: int) -> Tensor:
        images = torch.empty(batch, 3, *self.input_size, dtype=self.dtype, device=self.device)
        with self.around:
            return self.model(images)


@contextmanager
def _built(config: RunConfig, *, autocast: bool, target: Target) -> Iterator[_Built]:
    """Build the recipe's model and let it behave as on `target` inside the `with` block."""
    dtype = torch.float32 if autocast else DTYPES[config.train.precision]
    with torch.device("meta"):
        model = build_classifier(_without_left_out_samples(config, target)).to(dtype)
    as_on_cuda = AsOnCuda(torch.bfloat16 if autocast else None)
    if target == "cuda":
        for block in model.blocks:
            block.forward = as_on_cuda.around(block.forward)  # also when it runs again in the backward pass
        yield _Built(model, "meta", dtype, config.input_size, as_on_cuda, as_on_cuda)
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        around = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
        yield _Built(model, "cpu", dtype, config.input_size, around, as_on_cuda)


@contextmanager
def _without_collector() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def parameter_sizes(config: RunConfig) -> list[int]:
    """Return the number of elements of every parameter of the recipe's model."""
    with torch.device("meta"):
        return [parameter.numel() for parameter in build_classifier(config).parameters()]


def _without_left_out_samples(config: RunConfig, target: Target) -> RunConfig:
    """Where drop path leaves samples out, how many is chance: plan for the step that drops none, which holds most."""
    model = config.model
    leaves_out = model.drop_path_mode == "skip" or (model.drop_path_mode == "auto" and target == "cpu")
    if not leaves_out or config.train.compile != "off":
        return config
    return config.model_copy(update={"model": model.model_copy(update={"drop_path": 0.0})})


def _with_depths(config: RunConfig, depths: Sequence[int]) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"depths": tuple(depths)})})


def _mark_blocks(blocks: Any, recorder: Recorder) -> None:
    """Begin a stretch at every block, forward and backward; recomputation belongs to the backward pass it is for."""

    def mark_forward(i: int, inputs: tuple[Any, ...]) -> None:
        if torch._C._current_graph_task_id() == -1:
            if i == 0:
                inputs[0].register_hook(lambda _: recorder.mark("backward end"))
            recorder.mark(f"forward {i}")

    def mark_backward(i: int, output: tuple[Tensor, Any]) -> None:
        if torch._C._current_graph_task_id() == -1:
            output[0].register_hook(lambda _: recorder.mark(f"backward {i}"))
            if i == len(blocks) - 1:
                recorder.mark("forward end")

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, inputs, i=i: mark_forward(i, inputs))
        block.register_forward_hook(lambda _, inputs, output, i=i: mark_backward(i, output))


def _affine(first: Stretch, second: Stretch) -> Segment:
    """Put the records of two batch sizes together."""

    def split(one: list[int], two: list[int]) -> np.ndarray:
        assert len(one) == len(two), "the model does something else at another batch size"
        low, high = np.array(one, dtype=np.float64), np.array(two, dtype=np.float64)
        factor = (high - low) / (_BATCHES[1] - _BATCHES[0])
        return np.stack((low - _BATCHES[0] * factor, factor), axis=1)

    return Segment(
        np.cumsum(split(first.held, second.held), axis=0),
        np.cumsum(split(first.gradients, second.gradients), axis=0),
        split(first.flops, second.flops),
        split(first.traffic, second.traffic),
    )


def _order(depths: Sequence[int]) -> tuple[tuple[str, str, int], ...]:
    """List the segments of the whole model in the order of time; inner blocks repeat."""
    blocks = [
        (stage, depth - 2 if depth > _MOST_BLOCKS and i == 1 else 1)
        for stage, depth in zip(STAGES, depths, strict=True)
        for i in range(min(depth, _MOST_BLOCKS))
    ]
    there = [(f"forward {i}", stage, times) for i, (stage, times) in enumerate(blocks)]
    back = [(f"backward {i}", stage, times) for i, (stage, times) in reversed(list(enumerate(blocks)))]
    edges = [(name, "", 1) for name in ("forward start", "forward end", "backward start", "backward end")]
    return (edges[0], *there, edges[1], edges[2], *back, edges[3])
