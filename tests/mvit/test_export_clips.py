"""A model of clips is exported as one of images is, in every format that has such models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mvit
from launcher.cli import main
from mvit.checkpoint import checkpoint_path
from mvit.checkpoint_load import whole_weights
from mvit.config import RunConfig, parse_config
from mvit.export import export_weights, load_model
from mvit.variants import Variant
from tests.mvit.export_memory import SUFFIXES
from tests.mvit.synthetic_checkpoint import write_checkpoint


@pytest.fixture
def clips(tmp_path: Path) -> RunConfig:
    """Return the config of a run of clips, not square ones, that consists of one checkpoint of made-up weights."""
    config = parse_config(
        {
            "name": "run",
            "output_dir": str(tmp_path),
            "task": "video_classification",
            "model": {"num_classes": 10, "embed_dim": 16, "depths": (1, 2, 1, 1)},
            "video": {"num_frames": 6, "image_size": (32, 48)},
        }
    )
    write_checkpoint(config)
    return config


@pytest.mark.parametrize("format", ["safetensors", "facebook", "torch"])
def test_exported_clip_models_have_the_official_names_and_the_run_s_logits(
    clips: RunConfig, tmp_path: Path, format: Any
) -> None:
    out = export_weights(clips.run_dir, tmp_path / f"w{SUFFIXES[format]}", format=format)  # compares logits, too
    wanted = dict(whole_weights(checkpoint_path(clips.run_dir, 1)))
    content: Any = load_file(out) if format == "safetensors" else torch.load(out, weights_only=True)
    if format == "facebook":
        assert parse_config(json.loads(content["config"])) == clips
        content = content["model_state"]
    assert content.keys() == wanted.keys()
    assert content["patch_embed.proj.weight"].shape == (16, 3, 3, 7, 7)
    assert content["blocks.0.attn.pool_q.weight"].shape == (16, 1, 3, 3, 3)
    assert content["blocks.0.attn.rel_pos_t"].shape == (5, 16)
    assert all(torch.equal(content[name], wanted[name]) for name in wanted)

    own = mvit.create_model(Variant("own", 16, (1, 2, 1, 1), 1), 10, (6, 32, 48), weights=wanted).eval()
    model = own if format != "safetensors" else load_model(out)
    report = mvit.load_weights(model, out)  # pyright: ignore[reportArgumentType]
    assert (report.naming, report.inflation, report.missing, report.resized) == ("official", None, (), ())
    clip = torch.randn(1, 3, 6, 32, 48)
    with torch.no_grad():
        assert torch.equal(model(clip), own(clip))


def test_timm_has_no_model_of_clips_and_the_way_out_works(
    clips: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w.pth"
    assert main(["export", str(clips.run_dir), str(out), "--format", "timm"]) == 1
    message = "timm has no video MViTv2; export as safetensors, torch or facebook (the official names)"
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert main(["export", str(clips.run_dir), str(out), "--format", "torch"]) == 0
