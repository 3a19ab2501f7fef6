"""Our model computes what the official implementations computed, for the same weights and inputs."""

import pytest
import torch
import torch.nn.functional as F
from golden_replay import (
    ALL_CASES,
    LOGITS_TOLERANCE,
    VIDEO_CASES,
    Golden,
    load_golden,
)
from torch import Tensor

from mvit.model import block
from mvit.model.attention import ATTENTION_FORMS
from mvit.model.convert import import_names
from mvit.model.positions import resize_table

SMALL_CASES = [case for case in ALL_CASES if "small" in case]
MAX_POOL = F.max_pool2d


@pytest.fixture(params=ALL_CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


def test_weights_and_inputs_are_rebuilt_from_their_names(golden: Golden) -> None:
    weights = golden.official_weights()
    for name, first in golden.facts["weight_check_first8"].items():
        assert torch.allclose(weights[name].flatten()[:8], torch.tensor(first)[:8], atol=1e-6), name


def test_parameter_count_is_the_official_one(golden: Golden) -> None:
    assert sum(p.numel() for p in golden.model().parameters()) == golden.facts["param_count"]


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("case", SMALL_CASES)
def test_logits_and_gradient_norms_are_the_official_ones(case: str, form: str) -> None:
    check_case(load_golden(case), form)


def test_tiny_at_224_is_the_official_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """To 2e-5 and 1e-4, up to one choice that float32 leaves open.

    Among the 450,000 windows of the skip's max-pools, one of stage 3 has two candidates that differ by 9e-8, so that
    rounding decides which of the two receives the gradient (float64 takes one, the recorded float32 run the other).
    Either is right: the norms must match for one of them.
    """
    golden = load_golden("image_T_224")
    logits, parameters = run_case(golden, "auto")
    check_logits(golden, logits)
    if golden.mismatched(parameters):
        monkeypatch.setattr(block.F, "max_pool2d", pool_with_closest_tie_swapped)
        logits, parameters = run_case(golden, "auto")
        check_logits(golden, logits)
    assert golden.mismatched(parameters) == []


def pool_with_closest_tie_swapped(maps: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Max-pool, after raising the runner-up of the closest window above the winner if they differ by less than 2e-7."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps.detach(), (padding,) * 4, value=-torch.inf)
    windows = padded.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride).flatten(-2)  # (B, C, H', W', 9)
    best = windows.topk(2, dim=-1)
    gaps = best.values[..., 0] - best.values[..., 1]
    b, c, y, x = (int(i) for i in torch.unravel_index(gaps.argmin(), gaps.shape))
    nudge = torch.zeros_like(maps)
    if gaps[b, c, y, x] < 2e-7:
        dy, dx = divmod(int(best.indices[b, c, y, x, 1]), kernel_size)
        row, column = y * stride - padding + dy, x * stride - padding + dx
        assert 0 <= row < height
        assert 0 <= column < width
        nudge[b, c, row, column] = 5e-7
    return MAX_POOL(maps + nudge, kernel_size, stride, padding)


def check_case(golden: Golden, form: str) -> None:
    logits, parameters = run_case(golden, form)
    check_logits(golden, logits)
    assert golden.mismatched(parameters) == []


def run_case(golden: Golden, form: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return our logits, and our gradients of the recorded loss by parameter."""
    model = golden.model()
    model.set_attention_form(form)
    logits = model(golden.input())
    (logits * golden.cotangent()).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def check_logits(golden: Golden, logits: Tensor) -> None:
    assert (logits - golden.tensors["logits"]).abs().max() <= LOGITS_TOLERANCE


def test_tokens_after_each_stage_are_the_official_ones(golden: Golden) -> None:
    model = golden.model()
    means: list[Tensor] = []
    for blocks in model.stages.values():
        model.blocks[blocks.stop - 1].register_forward_hook(lambda _m, _args, out: means.append(out[0].mean(dim=1)))
    with torch.no_grad():
        model(golden.input())
    # The file's stages end where the query stride does, ours by the table of depths: the same places
    for number, mean in enumerate(means, start=1):
        assert torch.allclose(mean, golden.tensors[f"stage{number}_token_mean"], atol=2e-5)


@pytest.mark.parametrize(
    ("case", "tag"),
    [
        (case, key.split("@")[1])
        for case in VIDEO_CASES
        for key in load_golden(case).tensors
        if key.startswith("logits@")
    ],
)
@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_clips_of_other_lengths_and_sizes_are_the_official_ones(case: str, tag: str, form: str) -> None:
    golden = load_golden(case)
    model = golden.model()
    model.set_attention_form(form)
    with torch.no_grad():
        logits = model(golden.input(tag))
    assert (logits - golden.tensors[f"logits@{tag}"]).abs().max() <= LOGITS_TOLERANCE


def test_images_of_other_sizes_use_interpolated_tables() -> None:
    """The same as a model of that size whose tables were interpolated beforehand, and not the off-centre read."""
    golden = load_golden("image_small_nocls")
    tag = "2x3x32x32"
    model = golden.model()
    images = golden.input(tag)
    with torch.no_grad():
        logits = model(images)
        assert (logits - golden.tensors[f"logits@{tag}"]).abs().max() > 1e-3  # the off-centre read is not imitated
        for block in model.blocks:
            for axis in "hw":
                table = getattr(block.attn, f"rel_pos_{axis}")
                resized = resize_table(table, table.shape[0] // 2)  # 31, 15, 7 rows → 15, 7, 3
                setattr(block.attn, f"rel_pos_{axis}", torch.nn.Parameter(resized))
        assert torch.allclose(model(images), logits, atol=1e-6)


@pytest.mark.parametrize("case", VIDEO_CASES)
def test_official_names_need_no_renaming(case: str) -> None:
    weights = load_golden(case).official_weights()
    naming, renamed = import_names(weights)
    assert naming == "official"
    assert list(renamed) == list(weights)
