"""An export is the run's weights bit for bit, in every format, or it is not there."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import mvit
import mvit.export
from launcher.cli import main
from mvit.checkpoint import CheckpointError, checkpoint_path, list_steps, read_manifest
from mvit.checkpoint_load import whole_weights
from mvit.config import RunConfig, parse_config
from mvit.export import export_weights, load_model
from mvit.export_formats import write_safetensors
from mvit.tasks.image_classification import ImageClassification
from tests.mvit.export_memory import SUFFIXES
from tests.mvit.synthetic_checkpoint import untrained
from tests.mvit.test_training import tiny_config


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return the config of a run that was trained for four steps and saved after two and four."""
    config = tiny_config(digits, tmp_path_factory.mktemp("trained"), train={"save_every": 2, "evaluate_every": 0})
    calls = iter(range(100))
    mvit.train(config, stop_requested=lambda: next(calls) >= 2, show_progress=False)
    assert list_steps(config.run_dir) == [2, 4]
    return config


def timms_model(**sizes: Any) -> nn.Module:
    """Build timm's model of the tiny runs."""
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    sizes = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": 1} | sizes
    return MultiScaleVit(MultiScaleVitCfg(**sizes), img_size=(32, 32), num_classes=10).eval()


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- the formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("format", SUFFIXES)
def test_every_format_holds_the_run_s_weights(trained: RunConfig, tmp_path: Path, format: Any, ema: bool) -> None:
    out = tmp_path / "deep" / f"weights{SUFFIXES[format]}"
    assert export_weights(trained.run_dir, out, format=format, ema=ema) == out
    assert left_in(out.parent) == {out.name}
    checkpoint = checkpoint_path(trained.run_dir, 4)
    wanted = dict(whole_weights(checkpoint, ema=ema))
    other = dict(whole_weights(checkpoint, ema=not ema))
    assert not torch.equal(wanted["head.projection.weight"], other["head.projection.weight"])
    content: Any = load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)
    if format == "facebook":
        assert (content["epoch"], content["step"]) == (0, 4)
        assert parse_config(json.loads(content["config"])) == trained
        content = content["model_state"]
    images = torch.randn(2, 3, 32, 32)
    if format == "timm":
        consumer: Any = timms_model()
        consumer.load_state_dict(content, strict=True)
    else:
        assert content.keys() == wanted.keys()
        assert all(torch.equal(content[name], wanted[name]) for name in wanted)
        consumer = load_model(out) if format == "safetensors" else ImageClassification(trained).build_model()
        mvit.load_weights(consumer, out)
    own = ImageClassification(trained).build_model()
    own.load_state_dict(wanted, strict=True)
    with torch.no_grad():
        assert torch.allclose(consumer.eval()(images), own.eval()(images), rtol=0, atol=2e-6)


def test_the_suffix_names_the_format(trained: RunConfig, tmp_path: Path) -> None:
    wanted = set(read_manifest(checkpoint_path(trained.run_dir, 4)).shapes)
    for name in ("a.safetensors", "a.pth", "a.pt", "a.pyth"):
        out = export_weights(trained.run_dir, tmp_path / name, verify=False)
        content: Any = load_file(out) if name == "a.safetensors" else torch.load(out, weights_only=True)
        assert set(content["model_state"] if name == "a.pyth" else content) == wanted


def test_a_safetensors_file_follows_the_format_and_rebuilds_its_model(trained: RunConfig, tmp_path: Path) -> None:
    out = export_weights(trained.run_dir, tmp_path / "a.safetensors", ema=True)
    raw = out.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert (
        max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__") == len(raw) - 8 - length
    )
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["step"], metadata["ema"], metadata["format"]) == ("4", "true", "pt")
    assert parse_config(json.loads(metadata["config"])) == trained
    for name, tensor in load_model(out).state_dict().items():
        assert torch.equal(tensor, load_file(out)[name])
    timms = export_weights(trained.run_dir, tmp_path / "timm.safetensors", format="timm")
    assert load_model(timms)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_exporting_leaves_the_random_state_as_it_was(trained: RunConfig, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for format, suffix in SUFFIXES.items():
        export_weights(trained.run_dir, tmp_path / f"{format}{suffix}", format=format)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_newest_checkpoint_another_step_or_a_folder_is_exported(trained: RunConfig, tmp_path: Path) -> None:
    first, last = (dict(whole_weights(checkpoint_path(trained.run_dir, step))) for step in (2, 4))
    name = "head.projection.weight"
    assert not torch.equal(first[name], last[name])
    for number, (source, step, wanted) in enumerate(
        (
            (trained.run_dir, None, last),
            (trained.run_dir, 2, first),
            (checkpoint_path(trained.run_dir, 2), None, first),
            (str(checkpoint_path(trained.run_dir, 4)), 4, last),
        )
    ):
        out = export_weights(source, str(tmp_path / f"{number}.safetensors"), step=step)
        assert torch.equal(load_file(out)[name], wanted[name])


def test_the_command_line_exports_and_says_what_is_wrong(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "w.pth")
    assert main(["export", str(trained.run_dir), out, "--format", "timm", "--ema", "--step", "2"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    averaged = dict(whole_weights(checkpoint_path(trained.run_dir, 2), ema=True))
    assert torch.equal(torch.load(out, weights_only=True)["norm.bias"], averaged["norm.bias"])
    assert main(["export", str(trained.run_dir), out]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(trained.run_dir), out, "--overwrite", "--no-verify"]) == 0
    assert "head.projection.bias" in torch.load(out, weights_only=True)


# --- timm's models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "timms"),
    [
        ({"expand": "mlp"}, {"expand_attn": False}),
        ({"relative_positions": False, "absolute_positions": True}, {"rel_pos_type": "", "use_abs_pos": True}),
        ({"absolute_positions": True}, {"use_abs_pos": True}),
        ({"residual_pooling": False, "class_token": True}, {"residual_pooling": False, "use_cls_token": True}),
        ({"num_heads": 2}, {"num_heads": 2}),
    ],
)
def test_custom_sizes_and_ablations_that_timm_has_are_its_models(
    tmp_path: Path, model: dict[str, Any], timms: dict[str, Any]
) -> None:
    config = untrained(tmp_path, **model)
    out = export_weights(config.run_dir, tmp_path / "w.safetensors", format="timm")  # compares the logits
    loaded = timms_model(depths=(1, 2, 1, 1), **timms).load_state_dict(load_file(out), strict=True)
    assert loaded.missing_keys == loaded.unexpected_keys == []


def test_a_published_variant_loads_into_timms_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    built: list[str] = []
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: built.append(name) or real(name, **options))
    config = untrained(tmp_path, "tiny", (64, 64), variant="mvitv2_tiny", embed_dim=None, depths=None)
    out = export_weights(config.run_dir, tmp_path / "w.pth", format="timm")
    assert built == ["mvitv2_tiny"], "verified in another model"
    peer = real("mvitv2_tiny", num_classes=10, img_size=(64, 64))
    peer.load_state_dict(torch.load(out, weights_only=True), strict=True)


@pytest.mark.parametrize(
    ("model", "image_size", "message"),
    [
        ({"class_token": True}, (32, 32), r"adds the pooled query to the class token.*export as safetensors"),
        ({}, (32, 64), r"for squares of multiples of 32 pixels, image.image_size is \(32, 64\)"),
        ({}, (48, 48), "multiples of 32 pixels"),
        ({"relative_positions": False, "absolute_positions": True}, (30, 30), "multiples of 4 pixels"),
    ],
)
def test_models_that_timm_computes_otherwise_or_not_at_all_are_refused(
    tmp_path: Path, model: dict[str, Any], image_size: tuple[int, int], message: str
) -> None:
    config = untrained(tmp_path, image_size=image_size, **model)
    for suffix in (".safetensors", ".pth"):
        with pytest.raises(ValueError, match=message):
            export_weights(config.run_dir, tmp_path / "out" / f"w{suffix}", format="timm", verify=False)
    assert not (tmp_path / "out").exists()
    for format in ("safetensors", "facebook", "torch"):  # what the message says
        export_weights(config.run_dir, tmp_path / f"{format}{SUFFIXES[format]}", format=format)


def test_clips_have_no_timm_model(tmp_path: Path) -> None:
    from mvit.export_timm import check_timm_has

    config = tiny_config("digits", tmp_path)
    with pytest.raises(ValueError, match="timm has no video MViTv2; export as safetensors"):
        check_timm_has({"patch_embed.proj.weight": [16, 3, 3, 7, 7]}, config)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("w.onnx", {}, r"suffix '.onnx' stands for no format; use one of .pt, .pth, .pyth, .safetensors"),
        ("w", {}, "suffix '' stands for no format"),
        ("w.pth", {"format": "safetensors"}, r"format 'safetensors' goes with .safetensors, not with '.pth'"),
        ("w.pth", {"format": "facebook"}, r"goes with .pyth"),
        ("w.pyth", {"format": "timm"}, r"goes with .safetensors or .pth or .pt"),
        ("w.safetensors", {"format": "torch"}, r"goes with .pth or .pt"),
        ("w.pth", {"format": "keras"}, "format 'keras' is not known; choose from safetensors, torch, facebook, timm"),
        ("w.pth", {"step": 3}, "holds no checkpoint of step 3; it has those of steps.* 2, 4"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    trained: RunConfig, tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_weights(trained.run_dir, tmp_path / "out" / name, **options)
    assert left_in(tmp_path) == set()


def test_runs_without_checkpoints_averages_or_whole_files_are_refused(trained: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "w.pth"
    with pytest.raises(CheckpointError, match="holds no checkpoint; name a run folder or a checkpoint"):
        export_weights(tmp_path, out)
    with pytest.raises(CheckpointError, match="no checkpoint of step 1; it has none"):
        export_weights(tmp_path, out, step=1)
    config = untrained(tmp_path / "runs")
    with pytest.raises(CheckpointError, match="no moving average"):
        export_weights(config.run_dir, out, ema=True)
    with pytest.raises(CheckpointError, match="is the checkpoint of step 2, not of step 4"):
        export_weights(checkpoint_path(trained.run_dir, 2), out, step=4)
    copied = tmp_path / "runs" / "copied"
    shutil.copytree(trained.run_dir, copied)
    shard = checkpoint_path(copied, 2) / "rank_00000.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1000] ^= 1
    shard.write_bytes(damaged)
    for source, step in ((copied, 2), (shard.parent, None)):
        with pytest.raises(CheckpointError, match=r"is damaged.*differs from its SHA-256"):
            export_weights(source, out, step=step)
    assert left_in(tmp_path) == {"runs"}


def test_an_existing_file_is_replaced_only_on_request(trained: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "w.pth"
    out.write_text("precious")
    with pytest.raises(ValueError, match=r"exists already; name another file, or replace it with overwrite"):
        export_weights(trained.run_dir, out)
    assert out.read_text() == "precious"
    export_weights(trained.run_dir, out, overwrite=True)
    assert "norm.bias" in torch.load(out, weights_only=True)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export_weights(trained.run_dir, tmp_path / "folder.pth", overwrite=True)


def test_a_file_that_appears_meanwhile_is_not_replaced(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "w.safetensors"
    monkeypatch.setattr(mvit.export, "check_logits", lambda *a, **k: out.write_text("somebody else's"))
    with pytest.raises(ValueError, match="exists already"):
        export_weights(trained.run_dir, out)
    assert out.read_text() == "somebody else's"
    assert left_in(tmp_path) == {"w.safetensors"}


# --- failures ---------------------------------------------------------------------------------------------------


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Let writes beyond a size fail with an OSError, as on a full disk; pytest's own output to a file, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", SUFFIXES)
@pytest.mark.parametrize("moment", ["header", "numbers", "last"])
def test_a_full_disk_leaves_nothing_behind_and_what_was_there_untouched(
    trained: RunConfig, tmp_path: Path, format: Any, moment: str
) -> None:
    out = tmp_path / f"w{SUFFIXES[format]}"
    size = export_weights(trained.run_dir, out, format=format, verify=False).stat().st_size
    before = out.read_bytes()
    # "last": of torch's formats, what the file is made of fits, and the file itself does not
    limit = {"header": 1000, "numbers": size // 2, "last": size - 1000}[moment]
    with (
        pytest.raises(OSError, match=rf"{out.name} cannot be written: .*; nothing was exported"),
        limit_file_size(limit),
    ):
        export_weights(trained.run_dir, out, format=format, overwrite=True)
    assert left_in(tmp_path) == {out.name}
    assert out.read_bytes() == before


def test_a_bit_that_flips_on_the_way_is_noticed(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(path: Path, *arguments: Any) -> None:
        write_safetensors(path, *arguments)
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(mvit.export, "write_safetensors", flip)
    for format, suffix in SUFFIXES.items():
        with pytest.raises(CheckpointError, match="differs after reading back; nothing was exported"):
            export_weights(trained.run_dir, tmp_path / f"w{suffix}", format=format)  # type: ignore[arg-type]
    assert left_in(tmp_path) == set()


def test_names_that_are_mixed_up_are_noticed_in_the_logits(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is there and loads strictly, two of them in each other's place."""
    from mvit.export_timm import timm_names

    def mixed_up(shapes: Any) -> dict[str, str]:
        names = timm_names(shapes)
        one, two = "blocks.1.attn.pool_q.weight", "blocks.1.attn.pool_v.weight"
        return names | {one: names[two], two: names[one]}

    monkeypatch.setattr(mvit.export, "timm_names", mixed_up)
    with pytest.raises(CheckpointError, match="gives other logits than the run's"):
        export_weights(trained.run_dir, tmp_path / "w.pth", format="timm")
    assert left_in(tmp_path) == set()


def test_weights_that_are_not_finite_are_exported_only_unverified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.mvit.synthetic_checkpoint.SCALE", float("inf"))
    config = untrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"logits are not finite.*--no-verify"):
        export_weights(config.run_dir, tmp_path / "w.pth")
    assert (
        not torch.load(export_weights(config.run_dir, tmp_path / "w.pth", verify=False))["norm.bias"].isfinite().all()
    )
