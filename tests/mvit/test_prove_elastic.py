"""On other ranks or another stage batches and state must agree exactly, losses within a tolerance; or it is told."""

from typing import Any

import pytest

from mvit.prove import Verdict
from mvit.prove_elastic import compare_elastic
from mvit.trace import RankTrace, Record, Trace
from tests.mvit.test_prove import changed

STATES = ("exp_avg", "exp_avg_sq", "fp32", "ema")
FIRST, LAST = 3, 6


def _whole(step: int, state: int, name: str) -> int:
    return (step * 1009 + state * 31 + len(name)) * 0x9E3779B97F4A7C15 % 2**64


def _state(step: int, rank: int, ranks: int) -> dict[str, dict[str, Any]]:
    """Return one rank's part: "w" is split over the ranks, "own" belongs to the first, "replicated" to all."""
    facts: dict[str, dict[str, Any]] = {"rng": {"cpu": f"{ranks}-{rank}-{step}"}}
    for number, state in enumerate(STATES):
        whole = _whole(step, number, "w")
        share = whole if ranks == 1 else (whole - 12345) % 2**64 if rank == 0 else 12345
        values = {"w": share, "replicated": _whole(step, number, "replicated")}
        if rank == 0:
            values["own"] = _whole(step, number, "own")
        facts[state] = {name: f"{value:016x}" for name, value in values.items()}
    facts["counter"] = {"step count of group decay": [step], "skipped steps": 0}
    if ranks == 2:
        facts["counter"]["loss scaler's cur_scale"] = 65536  # the other stage has none
    return facts | {"hyperparameter": {"weight_decay of group decay": 0.05}}


def _step(step: int, rank: int, ranks: int, drift: float, chunk_size: int) -> Record:
    per_rank = 12 // (ranks * chunk_size)
    samples, inputs, losses = {}, {}, {}
    for accumulation in range(per_rank):
        at = (accumulation * ranks + rank) * chunk_size
        samples[f"chunk {accumulation}"] = [f"s{step}-{i}" for i in range(at, at + chunk_size)]
        inputs[f"chunk {accumulation}"] = [f"d{step}-{i}" for i in range(at, at + chunk_size)]
        losses[f"chunk {accumulation}"] = (2.0 / step * (1 + drift)).hex()
    facts = {"sample": samples, "input": inputs, "loss": losses, "lr": {"learning rate": (step / 100).hex()}}
    return Record(step, facts | _state(step, rank, ranks))


def _trace(ranks: int, first: int, last: int, drift: float = 0.0, chunk_size: int = 3) -> Trace:
    return Trace(
        tuple(
            RankTrace(
                Record(first, _state(first, rank, ranks), frozenset({"replicated"})),
                {step: _step(step, rank, ranks, drift, chunk_size) for step in range(first + 1, last + 1)},
            )
            for rank in range(ranks)
        )
    )


def _compare(resumed: Trace, error: str = "") -> Verdict:
    return compare_elastic(_trace(2, 0, LAST), _trace(2, 0, 4), resumed, LAST, tolerance=1e-4, error=error)


def test_another_number_of_ranks_is_equivalent_and_its_drift_is_told() -> None:
    verdict = _compare(_trace(1, FIRST, LAST, drift=1e-6))
    assert verdict.ok, str(verdict)
    assert verdict.verdict == "EQUIVALENT"
    assert verdict.loss_difference == pytest.approx(1e-6, rel=1e-3)
    assert (verdict.killed_at, verdict.resumed_from, verdict.num_samples, verdict.num_tensors) == (5, 3, 72, 12)


@pytest.mark.parametrize("drift", [1e-3, float("nan"), float("inf")])
def test_losses_that_drift_apart_are_not_equivalent(drift: float) -> None:
    verdict = _compare(_trace(1, FIRST, LAST, drift=drift))
    assert verdict.verdict == "NOT EQUIVALENT"
    assert "drift apart" in str(verdict)


@pytest.mark.parametrize(
    ("step", "kind", "name", "value", "named"),
    [
        (3, "exp_avg", "w", "0000000000000001", "w"),
        (3, "ema", "replicated", "0000000000000001", "replicated"),
        (3, "fp32", "own", None, "own"),
        (3, "counter", "step count of group decay", [0], "step count of group decay"),
        (3, "hyperparameter", "weight_decay of group decay", 0.0, "weight_decay of group decay"),
        (5, "sample", "chunk 2", ["s5-6", "x", "s5-8"], "sample 7 of the global batch"),
        (5, "input", "chunk 2", ["d5-6", "d5-7", "x"], "sample 8 of the global batch"),
        (5, "lr", "learning rate", (0.06).hex(), "learning rate"),
    ],
)
def test_what_must_agree_exactly_is_named_when_it_does_not(
    step: int, kind: str, name: str, value: Any, named: str
) -> None:
    verdict = _compare(changed(_trace(1, FIRST, LAST), 0, step, kind, name, value))
    assert verdict.verdict == "NOT EQUIVALENT"
    assert verdict.difference is not None
    assert (verdict.difference.step, verdict.difference.kind, verdict.difference.name) == (step, kind, named)
    assert verdict.loss_difference is None


def test_losses_of_other_micro_batches_are_not_compared_and_it_is_said() -> None:
    verdict = _compare(_trace(1, FIRST, LAST, drift=0.5, chunk_size=6))
    assert verdict.ok
    assert verdict.loss_difference is None
    assert "losses were not compared" in str(verdict)


def test_what_proves_nothing_is_not_called_equivalent() -> None:
    assert "nothing was resumed" in str(_compare(_trace(1, 0, LAST)))
    assert "ended after step 5" in str(_compare(_trace(1, FIRST, 5)))
    assert "out of memory" in str(_compare(_trace(1, FIRST, 5), "rank 0: out of memory"))
    for resumed in (_trace(1, 0, LAST), _trace(1, FIRST, 5)):
        assert not _compare(resumed).ok


def test_a_run_that_does_not_repeat_itself_is_told_before_the_resume_is_judged() -> None:
    whole = _trace(2, 0, LAST)
    killed = changed(_trace(2, 0, 4), 1, 2, "loss", "chunk 0", "0x1p0")
    verdict = compare_elastic(whole, killed, _trace(1, FIRST, LAST), LAST, tolerance=1e-4)
    assert verdict.difference is not None
    assert "resuming is not to blame" in verdict.difference.likely_cause
