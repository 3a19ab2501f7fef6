"""A run starts from another run's weights: the averaged ones where there are such, and only where they fit."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mvit
import mvit.checkpoint
from mvit import distributed
from mvit.checkpoint import CheckpointError, checkpoint_path, newest_valid
from mvit.checkpoint_load import whole_weights
from mvit.config import ConfigError, RunConfig
from mvit.starting_weights import check_start, starting_weights, trained_weights
from tests.mvit.synthetic_checkpoint import untrained, write_checkpoint
from tests.mvit.test_training import tiny_config
from tests.ranks import run_distributed


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_run_starts_from_the_last_or_averaged_weights_of_another(
    train: Callable[..., Any], digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, ema_decay: float | None
) -> None:
    train(stop_after=2, optim={"ema_decay": ema_decay})
    first = tiny_config(digits, tmp_path).run_dir
    folder = newest_valid(first)
    assert folder is not None
    expected = dict(whole_weights(folder, ema=bool(ema_decay)))
    source, _ = starting_weights(first)
    assert isinstance(source, dict)
    assert all(torch.equal(source[name], expected[name]) for name in expected)

    still = {"optim": {"lr": 1e-12}, "schedule": {"warmup_lr": 0.0, "end_lr": 0.0}}
    second = tiny_config(digits, tmp_path, name="second", model={"weights": str(first)}, **still)
    with caplog.at_level(logging.INFO, "mvit"):
        mvit.train(second, stop_requested=lambda: True, show_progress=False)
    words = "the averaged weights (EMA) of" if ema_decay else "the last weights (it has no average) of"
    assert f"starting from {words} {folder}" in caplog.text
    last = newest_valid(second.run_dir)
    assert last is not None
    trained = dict(whole_weights(last))  # it hardly learns: what it started from
    assert all(torch.allclose(trained[name], expected[name], atol=1e-7) for name in expected)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        starting_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        starting_weights(checkpoint_path(tmp_path, 10))


def _config(**model: Any) -> RunConfig:
    return RunConfig.model_validate({"name": model.pop("name", "fine"), "model": model})


def test_other_classes_need_a_new_head() -> None:
    before = _config(name="pre", num_classes=21841)
    with pytest.raises(ConfigError, match=r"starts from pre, which has 21841 classes; set model\.new_head=true"):
        check_start(before, _config(num_classes=1000))
    check_start(before, _config(num_classes=1000, new_head=True))
    check_start(before, _config(num_classes=21841))


def test_another_network_is_refused_and_another_way_to_say_the_same_is_not() -> None:
    before = _config(name="pre")
    check_start(before, _config(expand="attention", class_token=False))  # the defaults of this variant
    for other in ({"variant": "mvitv2_small"}, {"class_token": True}, {"relative_positions": False}):
        with pytest.raises(ConfigError, match="its network cannot start from pre"):
            check_start(before, _config(**other))


def _clips(**model: Any) -> RunConfig:
    config = _config(**model)
    return RunConfig.model_validate({"name": config.name, "task": "video_classification", "model": config.model})


def test_clips_start_from_images_where_inflation_can_and_the_other_way_round_is_refused() -> None:
    images = _config(name="pre")
    check_start(images, _clips())  # with a class token of its own
    check_start(images, _clips(class_token=False, inflation="repeat"))
    check_start(_config(name="pre", class_token=True), _clips())
    with pytest.raises(ConfigError, match="classifies images, but it starts from pre, which classifies clips"):
        check_start(_clips(name="pre"), _config())
    with pytest.raises(ConfigError, match="cls_token for one"):
        check_start(_config(name="pre", class_token=True), _clips(class_token=False))
    large = _config(name="pre", variant="mvitv2_large")
    with pytest.raises(ConfigError, match="for images and for clips null means another expand in large"):
        check_start(large, _clips(variant="mvitv2_large"))
    check_start(large, _clips(variant="mvitv2_large", expand="mlp"))
    with pytest.raises(ConfigError, match=r"cannot start from pre: .*absolute positions .* cannot be inflated"):
        check_start(_config(name="pre", absolute_positions=True), _clips(absolute_positions=True))
    with pytest.raises(ConfigError, match="its network cannot start from pre"):
        check_start(images, _clips(variant="mvitv2_small"))


# --- on many ranks --------------------------------------------------------------------------------------------


def _find_on_ranks(run_dir: Path) -> tuple[list[str], str, str]:
    """Return the files that this rank hashed, what it found, and the error of a search without a result."""
    hashed: list[str] = []
    real = mvit.checkpoint.file_sha256

    def note(path: Path, **options: Any) -> str | None:
        hashed.append(f"{path.parent.name}/{path.name}")
        return real(path, **options)

    mvit.checkpoint.file_sha256 = note
    ranks = distributed.start()
    weights, told = starting_weights(run_dir, ranks)
    assert isinstance(weights, dict)
    try:
        starting_weights(run_dir.parent / "nowhere", ranks)
        error = "none"
    except (CheckpointError, RuntimeError) as caught:
        error = str(caught)
    return hashed, told, error


def test_all_ranks_together_read_a_checkpoint_once_and_agree(tmp_path: Path) -> None:
    config = untrained(tmp_path)
    damaged = write_checkpoint(config, step=2)
    (damaged / "rank_00001.safetensors").write_bytes(b"")
    found = run_distributed(_find_on_ranks, 2, config.run_dir)
    files = [f"rank_0000{number}.safetensors" for number in range(3)]
    assert sorted(file for hashed, _, _ in found for file in hashed) == [
        *(f"step_00000001/{file}" for file in files),
        f"step_00000002/{files[0]}",
        f"step_00000002/{files[2]}",
    ]
    assert {told for _, told, _ in found} == {
        f"the last weights (it has no average) of {config.run_dir}/checkpoints/step_00000001"
    }
    assert all("no such file or folder" in error for *_, error in found)


def _fail_on_ranks(run_dir: Path) -> str:
    try:
        trained_weights(run_dir, distributed.start())
    except (CheckpointError, RuntimeError) as error:
        return str(error)
    return "none"


def test_what_rank_0_cannot_use_is_an_error_on_every_rank(tmp_path: Path) -> None:
    config = untrained(tmp_path)
    (config.run_dir / "checkpoints" / "step_00000001" / "rank_00001.safetensors").unlink()
    assert all("none is usable" in told for told in run_distributed(_fail_on_ranks, 2, config.run_dir))
    with pytest.raises(CheckpointError, match="none is usable"):
        trained_weights(config.run_dir)  # without a process group
