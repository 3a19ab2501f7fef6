"""With the same weights our models and other libraries' give the same logits.

Not compared: timm's `*_cls` models. They add the pooled query to the class token as well, which the official image and
video code does not (logits then differ by about 2); we follow the official code, see the goldens with a class token.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvit.model.convert import export_names
from mvit.variants import create_model
from mvit.weights import load_weights

timm = pytest.importorskip("timm")
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def vary(model: nn.Module) -> nn.Module:
    """Make every parameter count, the relative tables most (they start almost at zero)."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2 if "rel_pos" in name else 0.02)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model.eval()


def check_timm(name: str) -> None:
    peer = vary(timm.create_model(name))
    model = create_model(name, weights=peer.state_dict()).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = peer(images)
        assert expected.std() > 0.1
        assert (model(images) - expected).abs().max() <= TOLERANCE
    # and back: what we export loads into timm as its own
    peer.load_state_dict(export_names(model.state_dict(), "timm"), strict=True)


@pytest.mark.parametrize("name", ["mvitv2_tiny", "mvitv2_small"])
def test_equal_to_timm(name: str) -> None:
    check_timm(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mvitv2_base", "mvitv2_large"])
def test_larger_models_are_equal_to_timm(name: str) -> None:
    check_timm(name)


def test_weights_of_timms_class_token_models_load() -> None:
    """Their weights are the official ones; only timm's forward differs."""
    peer = vary(timm.create_model("mvitv2_small_cls"))
    model = create_model("mvitv2_small", class_token=True)
    report = load_weights(model, peer.state_dict())
    assert report.naming == "timm"
    assert set(report.loaded) == set(model.state_dict())
    assert torch.equal(model.state_dict()["cls_token"], peer.state_dict()["cls_token"])


def torchvision_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_clips_are_equal_to_torchvision() -> None:
    video = pytest.importorskip("torchvision.models.video")
    peer = vary(video.mvit_v2_s())
    model = create_model("mvitv2_small", 400, (16, 224, 224)).eval()
    report = load_weights(model, torchvision_state(peer))
    assert report.naming == "torchvision"
    assert report.resized == ()
    clips = torch.randn(1, 3, 16, 224, 224)
    with torch.no_grad():
        expected = peer(clips)
        assert expected.std() > 0.1
        assert (model(clips) - expected).abs().max() <= TOLERANCE


def slowfasts_relative_positions(
    attn: Tensor,
    q: Tensor,
    q_thw: tuple[int, int, int],
    k_thw: tuple[int, int, int],
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    rel_pos_t: Tensor,
) -> Tensor:
    """Add the relative positions as SlowFast does: torchvision adds up distances in another order and so rounds 103
    of the 780 pairs of 78 queries and 10 keys, video at 312 px, to other rows."""
    per_axis: list[Tensor] = []
    for table, queries, keys in zip((rel_pos_t, rel_pos_h, rel_pos_w), q_thw, k_thw, strict=True):
        q_step, k_step = max(keys / queries, 1.0), max(queries / keys, 1.0)
        distance = torch.arange(queries)[:, None] * q_step - torch.arange(keys)[None, :] * k_step
        rows = 2 * max(queries, keys) - 1
        if len(table) != rows:
            table = nn.functional.interpolate(table.T[None], size=rows, mode="linear")[0].T
        per_axis.append(table[(distance + (keys - 1) * k_step).long()])
    maps = q[:, :, 1:].unflatten(2, q_thw)
    terms = [torch.einsum(f"bnthwc,{axis}kc->bnthwk", maps, rows) for axis, rows in zip("thw", per_axis, strict=True)]
    bias = terms[0][..., :, None, None] + terms[1][..., None, :, None] + terms[2][..., None, None, :]
    attn[:, :, 1:, 1:] += bias.flatten(5).flatten(2, 4)
    return attn


@pytest.mark.parametrize("size", [(4, 312, 312), (6, 104, 104)])
def test_clips_of_odd_grids_are_computed_as_published(size: tuple[int, int, int], monkeypatch: Any) -> None:
    """312 px gives grids 78, 39, 20, 10 but tables for 19 and 9 (floor), interpolated at run time to 20 and 10.

    An independent whole: torchvision's model, in which only the sum of distances is SlowFast's.
    """
    mvit = pytest.importorskip("torchvision.models.video.mvit")
    from mvit.benchmark_peers import torchvision_model
    from mvit.variants import Variant

    monkeypatch.setattr(mvit, "_add_rel_pos", slowfasts_relative_positions)
    variant = Variant("small_test", 24, (1, 2, 2, 2), 1)
    peer = vary(torchvision_model(variant, size))
    model = create_model(variant, 400, size).eval()
    report = load_weights(model, torchvision_state(peer))
    assert report.resized == ()
    if size[1] == 312:
        assert [len(block.attn.rel_pos_h) for block in model.blocks] == [155, 77, 77, 37, 37, 37, 17]
    clips = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = peer(clips)
        assert expected.std() > 0.1
        assert (model(clips) - expected).abs().max() <= TOLERANCE


def test_separable_absolute_positions_are_equal_to_torchvision() -> None:
    """Small clips, no relative positions: torchvision has the one or the other."""
    mvit = pytest.importorskip("torchvision.models.video.mvit")
    from mvit.variants import Variant

    config = mvit.MSBlockConfig
    blocks = [
        config(1, 24, 24, [3] * 3, [3] * 3, [1, 1, 1], [1, 8, 8]),
        config(2, 24, 48, [3] * 3, [3] * 3, [1, 2, 2], [1, 4, 4]),
        config(4, 48, 96, [3] * 3, [3] * 3, [1, 2, 2], [1, 2, 2]),
        config(8, 96, 192, [3] * 3, [3] * 3, [1, 2, 2], [1, 1, 1]),
    ]
    peer = vary(
        mvit.MViT(
            spatial_size=(64, 64),
            temporal_size=8,
            block_setting=blocks,
            residual_pool=True,
            residual_with_cls_embed=False,
            rel_pos_embed=False,
            proj_after_attn=True,
            num_classes=20,
        )
    )
    model = create_model(
        Variant("small_test", 24, (1, 1, 1, 1), 1),
        20,
        (8, 64, 64),
        relative_positions=False,
        absolute_positions="separable",
        weights=torchvision_state(peer),
    ).eval()
    clips = torch.randn(2, 3, 8, 64, 64)
    with torch.no_grad():
        assert (model(clips) - peer(clips)).abs().max() <= TOLERANCE
