"""A joint head is validated on its first classes alone, as published for ImageNet-21K with ImageNet-1K's first."""

from pathlib import Path

import pytest
import torch

import mvit
from mvit.config import ConfigError
from mvit.evaluation import open_validation
from mvit.tasks import create_task
from mvit.tasks.classification import TopK
from tests.mvit.test_training import tiny_config


def test_a_joint_head_is_evaluated_like_the_head_of_its_first_classes(digits: Path, tmp_path: Path) -> None:
    alone = tiny_config(digits, tmp_path)
    torch.manual_seed(0)
    state = create_task(alone).build_model().state_dict()
    joint_state = dict(state)
    for name in ("head.projection.weight", "head.projection.bias"):  # two further classes that always win
        more = torch.full((2, *state[name].shape[1:]), 100.0 if name.endswith("bias") else 0.0)
        joint_state[name] = torch.cat((state[name], more))
    joint = tiny_config(
        digits,
        tmp_path,
        model={"num_classes": 12},
        image={"evaluated_classes": 10},
    )
    of_all = joint.model_copy(update={"image": joint.image.model_copy(update={"evaluated_classes": None})})
    expected = mvit.evaluate(alone, state, show_progress=False)
    assert mvit.evaluate(joint, joint_state, show_progress=False) == pytest.approx(expected)
    assert mvit.evaluate(of_all, joint_state, show_progress=False)["top1"] == 0


def test_top5_counts_among_the_first_classes_only() -> None:
    class Batch:
        labels = torch.tensor([0, 1])
        weights = torch.ones(2)

    metric = TopK(6, torch.device("cpu"))
    metric.update(torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7, 8], [9.0, 1, 2, 3, 4, 5, 9, 9, 9]]), Batch())  # pyright: ignore[reportArgumentType]
    figures = metric.compute()
    assert (figures["top1"], figures["top5"], figures["samples"]) == (0, 0, 2)


def test_more_evaluated_classes_than_classes_are_refused(digits: Path, tmp_path: Path) -> None:
    config = tiny_config(digits, tmp_path, image={"evaluated_classes": 11})
    with pytest.raises(ConfigError, match=r"evaluated_classes = 11 is more than model\.num_classes = 10"):
        create_task(config)


def test_validation_shards_with_classes_beyond_are_refused(digits: Path, tmp_path: Path) -> None:
    config = tiny_config(digits, tmp_path, image={"evaluated_classes": 8})
    with pytest.raises(
        ConfigError, match=r"data\.validation has other classes than image\.evaluated_classes: .*label 9"
    ):
        open_validation(config)
