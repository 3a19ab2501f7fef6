"""Fine-tuning as docs/training.md has it: from a run, for other classes, with as much of the model as is to change."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mvit
from mvit.checkpoint import checkpoint_path, list_steps
from mvit.checkpoint_load import whole_weights
from mvit.config import RunConfig, load_config
from mvit.starting_weights import starting_weights
from tests.mvit.synthetic_checkpoint import write_checkpoint
from tests.mvit.test_training import tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def before(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return a run for 12 classes to start from."""
    config = tiny_config(digits, tmp_path_factory.mktemp("before"), "before", model={"num_classes": 12})
    write_checkpoint(config)
    return config


@pytest.mark.parametrize(
    ("frozen", "starts"),
    [("backbone", ("patch_embed.", "blocks.", "norm.")), (2, ("patch_embed.", "blocks.0.", "blocks.1."))],
)
def test_what_is_frozen_keeps_the_weights_it_started_from_and_the_rest_learns(
    digits: Path, tmp_path: Path, before: RunConfig, frozen: Any, starts: tuple[str, ...]
) -> None:
    config = tiny_config(
        digits,
        tmp_path,
        model={"weights": str(before.run_dir), "new_head": True},
        optim={"freeze": frozen, "layer_decay": 0.75},
        train={"evaluate_every": 0, "save_every": 2},
    )
    calls = iter(range(100))
    mvit.train(config, stop_requested=lambda: next(calls) >= 2, show_progress=False)
    after = dict(whole_weights(checkpoint_path(config.run_dir, max(list_steps(config.run_dir)))))
    state, _ = starting_weights(before.run_dir)
    assert isinstance(state, dict)
    same = {name for name, tensor in after.items() if torch.equal(tensor, state[name])}
    assert same == {name for name in after if name.startswith(starts)}
    assert after["head.projection.weight"].shape[0] == 10


def test_the_recipe_for_one_s_own_folder_refuses_to_guess_the_classes() -> None:
    config = load_config(ROOT / "configs/demo/finetune.yaml", ["model.num_classes=4", "model.weights=w.safetensors"])
    assert (config.model.new_head, config.optim.layer_decay) == (True, 0.75)
    assert (
        load_config(ROOT / "configs/demo/finetune.yaml").model.num_classes == 2
    )  # fewer than any folder's are refused
