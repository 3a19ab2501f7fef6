"""Image weights become clip weights by the named rule, shown on still clips, and the report leaves nothing out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mvit.model.backbone import MViT
from mvit.model.convert import export_names
from mvit.model.inflation import INFLATIONS
from mvit.variants import Variant, create_model
from mvit.weights import load_weights

SMALL = Variant("small_test", 24, (1, 1, 2, 1), 1)


def image_model(**options: object) -> MViT:
    """An image model each of whose parameters counts; relative tables start almost at zero otherwise."""
    torch.manual_seed(1)
    model = create_model(SMALL, **({"num_classes": 5, "input_size": (64, 64)} | options))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2 if "rel_pos" in name else 0.1)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model.eval()


def clip_model(**options: object) -> MViT:
    torch.manual_seed(2)
    return create_model(SMALL, **({"num_classes": 5, "input_size": (8, 64, 64)} | options)).eval()


def still(picture: Tensor, frames: int) -> Tensor:
    return picture.unsqueeze(2).expand(-1, -1, frames, -1, -1)


def frames_seen(frames: int, stride: int) -> Tensor:
    """Count the real frames under a kernel of 3 with padding 1, at each place; the others are padding."""
    inside = torch.ones(1, 1, frames)
    return nn.functional.conv1d(inside, torch.ones(1, 1, 3), stride=stride, padding=1).flatten()


@pytest.mark.parametrize("frames", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
@torch.no_grad()
def test_by_centre_a_still_clip_is_classified_as_its_picture(frames: int, size: tuple[int, int]) -> None:
    """Exactly, however long the clip is, if nothing but time sets the two models apart.

    The centre frame of each patch and of each pooling window is a real one, never padding, and the only one that
    counts: so every frame has the tokens of the picture. Temporal positions are zero: so a query has the same logit
    for a key and for its copies in the other frames, softmax gives each 1/T of what the picture's key has, and the sum
    over the copies is the picture's. The mean over all tokens is then the mean over one frame's. The published models
    differ on purpose: a fresh class token and keys pooled by 8 instead of 4.
    """
    ours = image_model()
    model = clip_model(class_token=False, kv_stride=4)
    load_weights(model, ours.state_dict(), inflation="centre")
    picture = torch.randn(2, 3, *size)
    expected = ours(picture)
    assert expected.std() > 0.1
    assert torch.allclose(model(still(picture, frames)), expected, atol=2e-5)


@torch.no_grad()
def test_by_centre_patches_see_every_second_frame_and_no_other() -> None:
    ours, model = image_model(), clip_model()
    load_weights(model, ours.state_dict())
    clip = torch.randn(2, 3, 8, 64, 64)
    tokens, grid = model.patch_embed(clip)
    by_frame = tokens.unflatten(1, grid).flatten(2, 3)  # (B, T/2, tokens of a frame, C)
    for t in range(4):
        assert torch.allclose(by_frame[:, t], ours.patch_embed(clip[:, :, 2 * t])[0], atol=1e-5)


@pytest.mark.parametrize("frames", [2, 5, 8])
@torch.no_grad()
def test_by_repeat_patches_of_a_still_clip_are_the_pictures_times_the_frames_they_see(frames: int) -> None:
    """All but the bias: 2 frames in the first patch, whose third is padding, and 3 in the others."""
    ours, model = image_model(), clip_model()
    load_weights(model, ours.state_dict(), inflation="repeat")
    picture = torch.randn(2, 3, 64, 64)
    tokens, grid = model.patch_embed(still(picture, frames))
    seen = frames_seen(frames, stride=2)
    assert seen.tolist() == {2: [2], 5: [2, 3, 2], 8: [2, 3, 3, 3]}[frames]
    bias = ours.patch_embed.proj.bias
    once = ours.patch_embed(picture)[0] - bias
    expected = seen[None, :, None, None] * once[:, None] + bias
    assert torch.allclose(tokens.unflatten(1, grid).flatten(2, 3), expected, atol=1e-5)


@pytest.mark.parametrize("inflation", INFLATIONS)
@pytest.mark.parametrize("pool", ["pool_q", "pool_k", "pool_v"])
@torch.no_grad()
def test_pooling_a_still_map_multiplies_by_the_frames_seen_or_by_one(inflation: str, pool: str) -> None:
    """The LayerNorm after each pooling takes the factor out again: only the patches keep it."""
    ours, model = image_model(), clip_model(kv_stride=4)
    load_weights(model, ours.state_dict(), inflation=inflation)  # pyright: ignore[reportArgumentType]
    maps = torch.randn(1, 24, 16, 16)
    theirs = getattr(ours.blocks[0].attn, pool)(maps)
    found = getattr(model.blocks[0].attn, pool)(still(maps, 4))
    factor = torch.tensor([2.0, 3, 3, 2]) if inflation == "repeat" else torch.ones(4)
    assert torch.allclose(found, still(theirs, 4) * factor[:, None, None], atol=1e-5)


@pytest.mark.parametrize("inflation", INFLATIONS)
@pytest.mark.parametrize("class_token", [False, True])
def test_every_parameter_is_copied_inflated_or_reported_as_starting_anew(inflation: str, class_token: bool) -> None:
    ours = image_model(class_token=class_token)
    state, model = ours.state_dict(), clip_model(kv_stride=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in before:
        if name.endswith("rel_pos_t") or name == "cls_token":
            model.get_parameter(name).data.fill_(7.0)
    report = load_weights(model, state, inflation=inflation)  # pyright: ignore[reportArgumentType]

    after = model.state_dict()
    tables = {f"blocks.{i}.attn.rel_pos_t" for i in range(5)}
    assert set(report.missing) == tables | (set() if class_token else {"cls_token"})
    assert set(report.loaded) == set(after) - set(report.missing)
    assert report.inflation == inflation
    assert set(report.inflated) == {name for name, tensor in after.items() if tensor.ndim == 5}
    assert (report.unexpected, report.resized) == ((), ())
    for name in report.loaded:
        want = state[name]
        if name in report.inflated:
            assert after[name].shape[2] == 3
            outer = torch.zeros_like(want) if inflation == "centre" else want
            want = torch.stack((outer, want, outer), dim=2)
        assert torch.equal(after[name], want), name
    for name in report.missing:
        if inflation == "centre" and name in tables:
            assert not after[name].any(), name
        else:
            assert 0.01 < after[name].std() < 0.03, name
            assert not torch.equal(after[name], before[name]), name

    summary = report.summary()
    assert "16 convolutions inflated from images to clips" in summary
    assert ("in the centre frame, the others are zero" in summary) == (inflation == "centre")
    assert f"5 tables of temporal positions {'are zero' if inflation == 'centre' else 'start anew'}" in summary
    assert ("start anew: cls_token" in summary) == (not class_token)


def test_temporal_positions_that_start_at_zero_learn() -> None:
    model = clip_model(class_token=False)  # a class token, which has no position, is all that reads the last block
    load_weights(model, image_model().state_dict())
    model(torch.randn(1, 3, 8, 64, 64)).square().sum().backward()
    for block in model.blocks:
        table = block.attn.rel_pos_t
        assert not table.any()
        assert table.grad.abs().max() > 0


@pytest.mark.parametrize("source", ["official", "time axis of one", "timm", "our file", "official file"])
def test_image_weights_of_every_origin_are_inflated(source: str, tmp_path: Path) -> None:
    state = image_model().state_dict()
    content: object = {
        "official": {"model_state": state, "cfg": "TRAIN: …"},
        "time axis of one": {name: t.unsqueeze(2) if t.ndim == 4 else t for name, t in state.items()},
        "timm": export_names(state, "timm"),
        "our file": tmp_path / "weights.safetensors",
        "official file": tmp_path / "weights.pyth",
    }[source]
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"model_state": state, "epoch": 1}, tmp_path / "weights.pyth")
    want, model = clip_model(), clip_model()
    load_weights(want, state)
    report = load_weights(model, content)  # pyright: ignore[reportArgumentType]
    assert report.naming == ("timm" if source == "timm" else "official")
    assert len(report.inflated) == 16
    for name in report.loaded:
        assert torch.equal(model.state_dict()[name], want.state_dict()[name]), name


def test_only_the_published_table_is_resized_at_224_px() -> None:
    """Keys pooled by 8 instead of 4 leave every table its size but those of the first block of stage 3."""
    model = clip_model(input_size=(16, 224, 224))
    report = load_weights(model, image_model(input_size=(224, 224)).state_dict())
    assert report.resized == tuple((f"blocks.2.attn.rel_pos_{axis}", (55, 24), (27, 24)) for axis in "hw")
    assert "blocks.2.attn.rel_pos_h: [55, 24] -> [27, 24]" in report.summary()


def test_a_new_head_is_started_if_allowed_and_told_with_the_rest() -> None:
    state = image_model().state_dict()
    model = clip_model(num_classes=7)
    with pytest.raises(ValueError, match="num_classes=5, or allow_new_head=True") as error:
        load_weights(model, state)
    assert "rel_pos_t" not in str(error.value)  # these are no reason to refuse
    report = load_weights(model, state, allow_new_head=True)
    anew = [name for name in report.missing if not name.endswith("rel_pos_t")]
    assert anew == ["cls_token", "head.projection.weight", "head.projection.bias"]
    assert report.unexpected == ("head.projection.weight", "head.projection.bias")
    assert "start anew: cls_token, head.projection.weight, head.projection.bias" in report.summary()


def test_create_model_inflates_as_asked() -> None:
    state = image_model().state_dict()
    centre, repeat = (clip_model(weights=state, inflation=inflation) for inflation in INFLATIONS)
    assert not centre.patch_embed.proj.weight[:, :, 0].any()
    assert torch.equal(repeat.patch_embed.proj.weight[:, :, 0], state["patch_embed.proj.weight"])


def test_clip_weights_are_no_image_weights_and_need_no_inflation() -> None:
    state = clip_model().state_dict()
    model = clip_model()
    report = load_weights(model, state, inflation="repeat")
    assert (report.inflation, report.inflated, report.missing) == (None, (), ())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"absolute_positions": True}, {"absolute_positions": True}, r"absolute positions \(pos_embed\) cannot be inf"),
        ({"class_token": True}, {"class_token": False}, r"(?s)Unexpected:\n  cls_token.*class_token=True"),
        ({"expand": "mlp"}, {}, r'(?s)blocks.0.proj.weight.*expand="mlp"'),
        ({"input_size": (4, 64, 64)}, {"input_size": (64, 64)}, r"(?s)Image weights fit a model for clips.*no rule"),
        ({}, {"inflation": "average"}, r"inflation='average' must be one of 'centre', 'repeat'"),
    ],
)
def test_what_has_no_rule_is_refused_and_the_model_left_alone(
    theirs: dict[str, object], ours: dict[str, object], message: str
) -> None:
    inflation = ours.pop("inflation", "centre")
    model = clip_model(**ours)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, image_model(**theirs).state_dict(), inflation=inflation)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
