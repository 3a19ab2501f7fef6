"""What detectors compute over ranks: the norm of their heads and COCO's figures. Two processes serve all tests here."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mvit import distributed
from mvit.detection.norm import RegionBatchNorm
from tests.mvit.detection.test_coco_metric import random_set, share
from tests.mvit.detection.test_norm import regions
from tests.ranks import run_distributed

COUNTS = ([7, 3], [10, 0])


def _normed(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, gradient and running statistics of a norm, on a loss of half of its channels."""
    norm = RegionBatchNorm(4)
    x = x.clone().requires_grad_()
    out = norm(x)
    out.square()[:, :2].sum().backward()
    assert x.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return out.detach(), x.grad, norm.running_mean, norm.running_var


def _on_rank() -> dict[str, Any]:
    ranks = distributed.start()
    truth, results = random_set(2)
    ids = [image["id"] for image in truth["images"]]
    found: dict[str, Any] = {"figures": share(truth, results, ids[ranks.rank :: ranks.world_size], 0)}
    try:
        share(truth, results, ids, 0)
    except RuntimeError as error:
        found["error"] = str(error)
    found["norms"] = [_normed(regions().split(counts)[ranks.rank]) for counts in COUNTS]
    return found


@pytest.fixture(scope="module")
def both_ranks() -> list[dict[str, Any]]:
    return run_distributed(_on_rank, 2)


def test_cocos_figures_are_the_same_on_two_ranks(both_ranks: list[dict[str, Any]]) -> None:
    truth, results = random_set(2)
    alone = share(truth, results, [image["id"] for image in truth["images"]], 0)
    assert [rank["figures"] for rank in both_ranks] == [alone, alone]


def test_an_image_seen_on_both_ranks_is_refused_on_both(both_ranks: list[dict[str, Any]]) -> None:
    assert all("24 images were seen more than once" in rank["error"] for rank in both_ranks)


@pytest.mark.parametrize("case", range(len(COUNTS)))
def test_regions_spread_unevenly_over_ranks_are_normalised_as_one_batch(
    both_ranks: list[dict[str, Any]], case: int
) -> None:
    out, gradient, mean, variance = _normed(regions())
    norms = [rank["norms"][case] for rank in both_ranks]
    torch.testing.assert_close(torch.cat([norm[0] for norm in norms]), out)
    torch.testing.assert_close(torch.cat([norm[1] for norm in norms]), gradient)
    for norm in norms:
        torch.testing.assert_close(norm[2:], (mean, variance))
