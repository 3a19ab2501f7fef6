"""Exporting needs the memory of one tensor, verifying it that of one model, whatever the size of the run."""

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvit.export_check
from mvit.checkpoint import checkpoint_path, read_manifest
from mvit.checkpoint_load import whole_weights
from mvit.config import parse_config
from mvit.export import export_weights
from mvit.tasks.image_classification import ImageClassification
from tests.mvit.export_memory import SUFFIXES
from tests.mvit.synthetic_checkpoint import untrained, weight_of, write_checkpoint

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.mark.parametrize("format", SUFFIXES)
def test_two_models_are_never_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any) -> None:
    config = untrained(tmp_path)
    alive: list[weakref.ref[nn.Module]] = []

    def watched(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def building(*arguments: Any) -> nn.Module:
            assert [ref() for ref in alive if ref() is not None] == []
            alive.append(weakref.ref(model := build(*arguments)))
            return model

        return building

    monkeypatch.setattr(ImageClassification, "build_model", watched(ImageClassification.build_model))
    monkeypatch.setattr("mvit.export_check.build_timm", watched(mvit.export_check.build_timm))
    export_weights(config.run_dir, tmp_path / f"w{SUFFIXES[format]}", format=format)
    assert len(alive) == 2


def measured(checkpoint: Path, folder: Path, verified: bool) -> dict[str, float]:
    """Export in every format in a process of its own; return by how many bytes its memory grew at most."""
    command = [
        sys.executable,
        "-m",
        "tests.mvit.export_memory",
        str(checkpoint),
        str(folder),
        "yes" if verified else "no",
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    for format, (grown, seconds) in found.items():
        print(f"{format}, {'verified' if verified else 'not verified'}: {grown / MIB:.1f} MiB, {seconds:.1f} s")
    return {format: grown for format, (grown, _) in found.items()}


def sizes_of(checkpoint: Path) -> list[int]:
    return [4 * torch.Size(shape).numel() for shape in read_manifest(checkpoint).shapes.values()]


def test_exporting_needs_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """A model of 52 MiB, whose largest tensor takes 14, with its moments, saved by three ranks."""
    config = untrained(tmp_path, embed_dim=120, num_heads=1, depths=(1, 1, 1, 1))
    sizes = sizes_of(checkpoint_path(config.run_dir, 1))
    assert max(sizes) > 14 * MIB
    assert sum(sizes) > 3.5 * max(sizes)
    grown = measured(checkpoint_path(config.run_dir, 1), tmp_path, verified=False)
    assert grown.keys() == SUFFIXES.keys()
    assert max(grown.values()) < 1.2 * max(sizes) + 8 * MIB


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_exporting_huge_needs_no_more_than_a_tensor_and_verifying_it_no_more_than_the_model(tmp_path: Path) -> None:
    """667 M parameters with both moments, 8 GB, saved by eight ranks; run with -s for the figures."""
    config = parse_config({"name": "huge", "output_dir": str(tmp_path), "model": {"variant": "mvitv2_huge"}})
    try:
        checkpoint = write_checkpoint(config, num_ranks=8, states=("fp32", "exp_avg", "exp_avg_sq"))
        sizes = sizes_of(checkpoint)
        print(f"weights {sum(sizes) / MIB:.0f} MiB, the largest tensor {max(sizes) / MIB:.1f} MiB")
        assert max(measured(checkpoint, tmp_path, verified=False).values()) < 1.2 * max(sizes) + 16 * MIB
        assert max(measured(checkpoint, tmp_path, verified=True).values()) < 1.1 * sum(sizes)
    finally:
        shutil.rmtree(tmp_path)


def test_made_up_checkpoints_hold_what_their_maker_says(tmp_path: Path) -> None:
    """The tests of memory rest on it: pieces of three ranks give whole parameters, each another."""
    config = untrained(tmp_path)
    found: dict[str, Tensor] = {}
    for name, tensor in whole_weights(checkpoint_path(config.run_dir, 1)):
        assert torch.equal(tensor, weight_of(name, list(tensor.shape)))
        found[name] = tensor
    assert not torch.equal(found["blocks.1.norm1.bias"], found["blocks.1.norm2.bias"])
