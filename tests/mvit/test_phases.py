"""A run steps through resolutions: tables grow with what the optimizer knows of them, and a resume ends in the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mvit
from mvit.checkpoint import checkpoint_path, read_manifest
from mvit.checkpoint_load import whole_states
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.model.positions import resize_table
from mvit.phases import phase_at, phase_configs
from mvit.run_identity import read_config
from tests.mvit.test_training import records, tiny_config
from tests.ranks import run_distributed

# 1,442 digits, batches of 64: 24 steps in all; the second phase begins after step 9, the third after step 18
PHASES = [
    {"from_epoch": 0.4, "image_size": (48, 48), "micro_batch_size": 8, "activation_checkpointing": "all"},
    {"from_epoch": 0.8, "image_size": (64, 64)},
]


def _phased(digits: Path, folder: Path, name: str = "run", **sections: Any) -> RunConfig:
    train = {"evaluate_every": 0, "save_every": 5, "keep_last": 10}
    return tiny_config(digits, folder, name, train=train, phases=PHASES, **sections)


def _stopping_at(config: RunConfig, step: int) -> None:
    """Train until a save by request at the end of `step`, or of the next one if a phase ends before it."""
    begun = max((int(p.name[5:]) for p in (config.run_dir / "checkpoints").glob("step_*")), default=0)
    done = begun

    def stop() -> bool:  # asked after every step; the answer is known one step later
        nonlocal done
        done += 1
        return done >= step - 1

    result = mvit.train(config, stop_requested=stop, show_progress=False)
    assert result.stopped
    assert step <= result.step <= step + 1


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that went through all phases at once."""
    config = _phased(digits, tmp_path_factory.mktemp("whole"))
    result = mvit.train(config, show_progress=False)
    assert (result.step, result.stopped) == (24, False)
    return config


def _state(config: RunConfig, step: int, state: str = "fp32") -> dict[str, torch.Tensor]:
    return dict(whole_states(read_manifest(checkpoint_path(config.run_dir, step)), state))


def test_tables_and_moments_are_resized_at_the_turn_and_the_rest_goes_on(whole: RunConfig) -> None:
    sizes = {step: read_manifest(checkpoint_path(whole.run_dir, step)).state["config"] for step in (9, 10, 18, 24)}
    assert {step: tree["image"]["image_size"] for step, tree in sizes.items()} == {
        9: [32, 32],
        10: [48, 48],
        18: [48, 48],
        24: [64, 64],
    }
    name = "blocks.0.attn.rel_pos_h"
    rows = [_state(whole, step)[name].shape[0] for step in (9, 10, 24)]
    assert rows == [15, 23, 31], "8, 12 and 16 tokens a side: 2 x 8 - 1, …"
    assert [record["step"] for record in records(whole.run_dir)] == list(range(1, 25))
    assert read_config(whole.run_dir) == whole


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_the_next_phase_begins_with_is_what_was_saved_interpolated(
    digits: Path, tmp_path: Path, whole: RunConfig, stage: int
) -> None:
    """Of a learning rate of nothing, the first step of the phase leaves the weights as they were taken over."""
    rates = {"warmup_lr": 0.0, "end_lr": 0.0}
    still = _phased(digits, tmp_path, zero={"stage": stage}, optim={"lr": 1e-30}, schedule=rates)
    _stopping_at(still, 10)
    before, after = _state(still, 9), _state(still, 10)
    for name, saved in before.items():
        expected = resize_table(saved, after[name].shape[0]) if "rel_pos" in name else saved
        assert torch.allclose(after[name], expected, atol=1e-7), name
    beta = still.optim.betas[1]
    for name, saved in _state(still, 9, "exp_avg_sq").items():
        now = _state(still, 10, "exp_avg_sq")[name]
        kept = resize_table(saved, now.shape[0]) if "rel_pos" in name else saved
        assert (now >= beta * kept * (1 - 1e-5)).all(), f"{name}: a new gradient's square was added to what there was"


@pytest.mark.parametrize("at", [7, 9, 14, 18, 20])
def test_a_stop_in_any_phase_and_at_a_turn_changes_nothing(
    digits: Path, tmp_path: Path, whole: RunConfig, at: int
) -> None:
    config = _phased(digits, tmp_path)
    _stopping_at(config, at)
    mvit.train(config, show_progress=False)
    expected, found = _state(whole, 24), _state(config, 24)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[record["loss"] for record in records(c.run_dir)] for c in (whole, config)]
    assert losses[0] == losses[1]


def _train(tree: dict[str, Any]) -> None:
    mvit.train(parse_config(tree), show_progress=False)


def test_two_ranks_at_stage_3_go_through_the_phases_and_end_where_one_does(
    digits: Path, tmp_path: Path, whole: RunConfig
) -> None:
    config = _phased(digits, tmp_path, zero={"stage": 3})
    run_distributed(_train, 2, config.model_dump(mode="json"))
    expected, found = _state(whole, 24), _state(config, 24)
    assert {n: t.shape for n, t in expected.items()} == {n: t.shape for n, t in found.items()}
    figures = mvit.evaluate(config, config.run_dir, show_progress=False)
    assert figures["samples"] == 355


def test_what_uses_the_run_takes_the_phase_s_resolution(whole: RunConfig, tmp_path: Path) -> None:
    from mvit.export import export_weights, exported_config
    from mvit.prediction import _carried_config

    export_weights(whole.run_dir, tmp_path / "w.safetensors")
    assert exported_config(tmp_path / "w.safetensors").image.image_size == (64, 64)
    assert _carried_config(whole.run_dir).image.image_size == (64, 64)


def test_phases_divide_the_run_and_keep_the_batch(digits: Path, tmp_path: Path) -> None:
    config = _phased(digits, tmp_path)
    assert [phase_at(config, step, 1442)[::2] for step in (0, 8, 9, 17, 18, 24)] == [
        (0, 9),
        (0, 9),
        (1, 18),
        (1, 18),
        (2, 24),
        (2, 24),
    ]
    micro = [phase.train.micro_batch_size for phase in phase_configs(config)]
    assert micro == [16, 8, 8], "what a phase does not name stays as it was"
    assert {phase.batch_arithmetic(2).global_batch_size for phase in phase_configs(config)} == {64}
    with pytest.raises(
        ConfigError, match=r"in phases\.0: train\.global_batch_size = 64 is not micro_batch_size x ranks"
    ):
        config.batch_arithmetic(3 + 13)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"phases": [{"from_epoch": 2, "image_size": (64, 64)}]},
            r"phases\.0\.from_epoch = 2 must be more than 0.*1\.09",
        ),
        ({"phases": [PHASES[1], PHASES[0]]}, r"phases\.1\.from_epoch = 0\.4 must be more than 0\.8"),
        ({"phases": PHASES, "task": "detection", "image": {}}, "phases are for task image_classification"),
        ({"phases": [{"from_epoch": 0.5}]}, r"phases\.0\.image_size"),
    ],
)
def test_phases_that_no_run_could_go_through_are_refused(
    digits: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    tree = tiny_config(digits, tmp_path).model_dump(mode="json") | change
    with pytest.raises(ConfigError, match=told):
        parse_config({key: value for key, value in tree.items() if value != {}})
