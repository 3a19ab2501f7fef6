"""In bf16 and fp16, boxes, matching, suppression and losses stay in fp32, and large activations do no harm."""

from collections import defaultdict
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mvit.detection.boxes import refine
from mvit.detection.cascade import _share_gradient
from mvit.detection.config import DetectorKind
from mvit.detection.detector import create_detector
from mvit.detection.norm import RegionBatchNorm
from tests.mvit.detection.tiny import SMALL, TinyBackbone, shapes

KINDS = get_args(DetectorKind)
HALVES = (torch.bfloat16, torch.float16)
LOOSE = SMALL.model_copy(update={"score_threshold": 0.0})
SIDE = 96
# What decodes, matches, draws, suppresses and loses; none of it occurs in the convolutions of the heads.
IN_TRAINING = (
    "torchvision::nms",
    "torchvision::roi_align",
    "aten::exp",
    "aten::log",
    "aten::log2",
    "aten::topk",
    "aten::max.dim",
    "aten::sigmoid",
    "aten::clamp",
    "aten::_log_softmax",
    "aten::nll_loss_forward",
    "aten::binary_cross_entropy_with_logits",
    "aten::abs",
)
IN_TEST = ("torchvision::nms", "torchvision::roi_align", "aten::exp", "aten::topk", "aten::_softmax", "aten::sigmoid")


class FloatInputs(TorchDispatchMode):
    """Notes of every operation the types of the floating-point tensors that it really got."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.dtype for each in args if isinstance(each, Tensor) and each.is_floating_point()}
        self.types[func.name()] |= given
        return func(*args, **(kwargs or {}))

    def of(self, operation: str) -> set[torch.dtype]:
        """Return the types that all forms of an operation got."""
        named = (types for name, types in self.types.items() if f"{name}.".startswith(f"{operation}."))
        return set().union(*named)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("where", ["autocast", "parameters"])
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_matching_suppression_and_losses_are_computed_in_fp32(kind: Any, where: str, half: Any) -> None:
    torch.manual_seed(0)
    detector = create_detector(TinyBackbone(), kind, 3, LOOSE)
    images, sizes, targets = shapes(2, SIDE, seed=0)
    if where == "parameters":  # as DeepSpeed has it
        detector, images = detector.to(half), images.to(half)
    with torch.autocast("cpu", half, enabled=where == "autocast"):
        with FloatInputs() as training:
            losses = detector.train()(images, sizes, targets)
        with torch.no_grad(), FloatInputs() as test:
            found = detector.eval()(images, sizes)
    assert half in training.of("aten::convolution"), "the heads did not compute in half precision"
    for seen, operations in ((training, IN_TRAINING), (test, IN_TEST)):
        assert {name: seen.of(name) for name in operations} == {name: {torch.float32} for name in operations}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(len(each) and each.boxes.dtype == each.scores.dtype == torch.float32 for each in found)


@pytest.mark.parametrize(("half", "size"), [*((half, size) for half in HALVES for size in (1, 1e4)), (HALVES[0], 1e5)])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_stay_finite_and_near_those_of_fp32_with_large_activations(kind: Any, half: Any, size: float) -> None:
    torch.manual_seed(0)
    detector = create_detector(TinyBackbone(), kind, 3, SMALL).train()
    images, sizes, targets = shapes(2, SIDE, seed=0)
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        detector.zero_grad()
        with torch.autocast("cpu", half, enabled=enabled):
            losses = detector(images * size, sizes, targets)
        sum(losses.values(), torch.zeros(())).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
        found.append({name: loss.item() for name, loss in losses.items()})
    # Where a logit differs a little, another proposal may be drawn
    assert found[1] == pytest.approx(found[0], rel=0.1, abs=0.1)


@pytest.mark.parametrize("half", HALVES)
def test_boxes_are_decoded_as_precisely_as_fp32_deltas_would_be(half: Any) -> None:
    """A box in half precision would be off by up to 4 pixels (bf16) at the right edge of a large picture."""
    boxes = [torch.tensor([[1201.3, 700.7, 1317.9, 791.1], [3.3, 5.9, 1100.1, 799.7]])]
    deltas = torch.tensor([[0.3, -0.2, 0.1, 0.05], [0.01, 0.02, -0.4, 0.3]]).to(half)
    weights = (10.0, 10.0, 5.0, 5.0)
    with torch.autocast("cpu", half):
        (found,) = refine(deltas, boxes, [(800, 1333)], weights)
    (wanted,) = refine(deltas.double().float(), boxes, [(800, 1333)], weights)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    (huge,) = refine(torch.full((2, 4), 6e4).to(half), boxes, [(800, 1333)], weights)
    assert ((huge >= 0) & (huge <= 1333)).all()


@pytest.mark.parametrize("half", [torch.float32, *HALVES])
def test_the_stages_of_a_cascade_share_the_gradient_and_change_no_value(half: Any) -> None:
    regions = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(half).requires_grad_()
    shared = _share_gradient(regions)
    assert torch.equal(shared, regions)
    shared.sum().backward()
    assert regions.grad is not None
    assert torch.equal(regions.grad, torch.full_like(regions, 1 / 3))


@pytest.mark.parametrize("half", HALVES)
def test_batch_norm_over_regions_takes_values_whose_squares_no_half_holds(half: Any) -> None:
    norms = [RegionBatchNorm(4).train() for _ in range(2)]
    regions = (torch.randn(8, 4, 7, 7, generator=torch.Generator().manual_seed(0)) * 1e4).to(half)
    wanted = norms[0](regions.float())
    with torch.autocast("cpu", half):
        found = norms[1].to(half)(regions)
    assert found.dtype == half
    assert torch.allclose(found.float(), wanted, atol=0.02)
    for name in ("running_mean", "running_var"):
        mine, exact = (norm.get_buffer(name) for norm in norms[::-1])
        assert mine.dtype == torch.float32
        assert torch.equal(mine, exact)
