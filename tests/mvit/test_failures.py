"""Failures that are rare or strike one rank alone: they end the run or are survived as promised, on all ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mvit.trainer
from mvit.checkpoint import checkpoint_path, list_steps, newest_valid
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.guard import NonFiniteError
from mvit.retention import Retention, prune_after_save
from tests.mvit.test_training import tiny_config
from tests.ranks import run_distributed


def test_a_flipped_bit_in_a_manifest_and_an_unreadable_file_are_damage_too(
    train: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(stop_after=15)
    manifest = tmp_path / "run" / "checkpoints" / "step_00000016" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"skipped_steps": 0', '"skipped_steps": 8'))
    assert manifest.read_text() != whole
    assert newest_valid(tmp_path / "run") == checkpoint_path(tmp_path / "run", 10)
    assert "differs from the SHA-256 it carries" in caplog.text
    for broken in ("null", '{"format": "mvit-ranges-1"}', whole[:-1]):
        manifest.write_text(broken)
        assert newest_valid(tmp_path / "run") == checkpoint_path(tmp_path / "run", 10), broken
    manifest.write_text(whole)
    assert newest_valid(tmp_path / "run") == manifest.parent
    shard = manifest.with_name("rank_00000.safetensors")
    shard.unlink()
    shard.mkdir()  # reading it is an OSError, as from a bad sector
    assert newest_valid(tmp_path / "run") == checkpoint_path(tmp_path / "run", 10)
    assert "rank_00000.safetensors: cannot be read" in caplog.text


def test_an_old_checkpoint_that_cannot_be_removed_does_not_undo_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    with monkeypatch.context() as patch:

        def refuse(path: Path, target: Path) -> None:
            raise PermissionError(13, "Permission denied")

        patch.setattr(Path, "rename", refuse)
        prune_after_save(tmp_path, 20, Retention(keep_last=1))
    assert "step_00000010 cannot be removed" in caplog.text
    assert list_steps(tmp_path) == [10, 20]


class _SpoilGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("inf")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_gradient_that_is_not_finite_stops_the_run_although_the_loss_is_finite(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    from mvit.tasks.image_classification import ImageClassification

    real, calls = ImageClassification.losses, 0

    def losses(self: Any, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        found = real(self, *args, **options)
        return {key: _SpoilGradient.apply(value) if calls == 4 * 12 + 1 else value for key, value in found.items()}

    monkeypatch.setattr(ImageClassification, "losses", losses)
    with pytest.raises(NonFiniteError, match=r"step 13: the gradient norm is not finite; .*step_00000010"):
        train(train={"log_every": 5}, zero={"stage": stage})
    assert list_steps(tmp_path / "run") == [10], "broken weights were saved"


def _claim_fails(config: dict[str, Any]) -> tuple[int, str]:
    """Let claiming the run folder fail; returns how often this rank tried, and the error it ended with."""
    tried = 0

    def claim(run_dir: Path, config: RunConfig) -> None:
        nonlocal tried
        tried += 1
        raise ConfigError("taken")

    mvit.trainer.claim = claim
    try:
        mvit.train(parse_config(config), show_progress=False)
    except (ConfigError, RuntimeError) as error:
        return tried, f"{type(error).__name__}: {error}"
    return tried, ""


def test_one_rank_claims_the_folder_and_its_error_ends_all(digits: Path, tmp_path: Path) -> None:
    """Ranks that all claimed would take each other's half-made folder for a stranger's."""
    found = run_distributed(_claim_fails, 2, tiny_config(digits, tmp_path).model_dump(mode="json"))
    assert found[0] == (1, "ConfigError: taken")
    assert found[1] == (
        0,
        "RuntimeError: claiming the run folder failed on 1 of 2 ranks; rank 0: ConfigError: taken",
    )
