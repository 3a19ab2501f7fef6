"""Fingerprints add up over any partition and change with any wrong bit or place."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvit.fingerprint import differing, fingerprint, own_sums, to_hex
from mvit.fragments import MASTER, Fragment

LENGTH = 70_000  # four blocks and a rest
VALUES = torch.randn(LENGTH, generator=torch.Generator().manual_seed(0))
WHOLE = int(fingerprint(VALUES))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, LENGTH), max_size=6))
def test_the_parts_add_up_to_the_whole_however_it_is_cut(cuts: list[int]) -> None:
    borders = sorted({0, LENGTH, *cuts})
    parts = [int(fingerprint(VALUES[a:b], a)) for a, b in itertools.pairwise(borders)]
    assert sum(parts) % 2**64 == WHOLE % 2**64


@settings(max_examples=60, deadline=None)
@given(st.integers(0, LENGTH - 1), st.integers(0, 31))
def test_any_flipped_bit_shows(index: int, bit: int) -> None:
    bits = VALUES.clone().view(torch.int32)
    bits[index] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert int(fingerprint(bits.view(torch.float32))) != WHOLE


@settings(max_examples=60, deadline=None)
@given(st.integers(0, LENGTH - 1), st.integers(0, LENGTH - 1))
def test_two_values_in_each_other_s_place_show(first: int, second: int) -> None:
    swapped = VALUES.clone()
    swapped[first], swapped[second] = VALUES[second], VALUES[first]
    assert (int(fingerprint(swapped)) == WHOLE) == (first == second)


def test_a_shifted_range_shows_and_every_type_of_the_model_has_one() -> None:
    part = VALUES[:10]
    assert int(fingerprint(part, 3)) != int(fingerprint(part, 4))
    assert int(fingerprint(VALUES[:0], 5)) == 0
    assert int(fingerprint(torch.tensor([0.0]))) != int(fingerprint(torch.tensor([-0.0])))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert int(fingerprint(VALUES[:100].to(dtype))) != int(fingerprint(VALUES[1:101].to(dtype)))


def test_it_stays_the_same_over_versions_and_machines() -> None:
    """Checkpoints carry it: this number must never change."""
    assert int(fingerprint(torch.arange(10.0))) == 6692354774237446144


def test_differences_are_named_by_state_and_parameter() -> None:
    def fragments(value: float) -> list[Fragment]:
        states = {MASTER: torch.arange(4.0), "exp_avg": torch.tensor([1.0, value])}
        return [Fragment("b", 4, 0, states, True, states[MASTER])]

    names = ["a", "b"]
    prints = [{s: to_hex(names, v) for s, v in own_sums(fragments(value), names).items()} for value in (2.0, 3.0)]
    assert prints[0][MASTER]["a"] == "0" * 16
    assert differing(prints[0], prints[1]) == [("exp_avg", "b")]
    assert differing(prints[0], {}) == [(s, n) for s in (MASTER, "exp_avg") for n in names]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same() -> None:
    assert int(fingerprint(VALUES.cuda())) == WHOLE
