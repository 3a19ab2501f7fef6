"""Traces tell a resumed run from the run that was not disturbed, and name what is wrong: proven with planted bugs."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.batch import ImageBatch
from mvit import distributed
from mvit.checkpoint import list_steps
from mvit.config import parse_config
from mvit.guard import NonFiniteError
from mvit.prove import CAUSAL_ORDER, Verdict, compare
from mvit.prove_run import proof_config, save_step, train_traced
from mvit.trace import RankTrace, Record, Trace, read_trace, sample_digests
from tests.mvit.planted_bugs import BUGS, planted
from tests.mvit.test_training import tiny_config
from tests.ranks import run_distributed, run_until_killed

STEPS, KILL_AT, RANKS = 5, 4, 2
SAVED = save_step(KILL_AT)


# --- functions that run on the ranks --------------------------------------------------------------------------


def _undisturbed_then_killed(config: dict[str, Any], folder: Path) -> None:
    run = parse_config(config)
    train_traced(proof_config(run, 10**6), folder / "a", folder / "traces" / "a", steps=STEPS)
    distributed.gather_objects(None)
    traces = folder / "traces" / "killed"
    train_traced(proof_config(run, SAVED), folder / "b", traces, steps=STEPS, kill_at=KILL_AT)


def _resume_with_every_bug(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """Resume a copy of the killed run per planted bug; returns the errors by name."""
    errors = {}
    run = proof_config(parse_config(config), SAVED)
    train_traced(run, folder / "none", folder / "traces" / "none", steps=STEPS)
    for bug in BUGS:
        for checks in (True, False) if bug.refusal else (False,):
            name = _name(bug.plant, checks)
            try:
                with planted(bug, checks=checks):
                    train_traced(run, folder / name, folder / "traces" / name, steps=STEPS)
            except (ValueError, NonFiniteError) as error:
                errors[name] = str(error)
    return errors


def _name(plant: Callable[..., None], checks: bool) -> str:
    return f"{plant.__name__}{'_checked' if checks else ''}"


# --- planted bugs ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Resumes:
    """The traces of all resumes and the errors of those that refused to train."""

    folder: Path
    errors: dict[str, str]

    def trace(self, name: str) -> Trace:
        return read_trace(self.folder / "traces" / name, RANKS)

    def verdict(self, name: str) -> Verdict:
        return compare(self.trace("a"), self.trace("killed"), self.trace(name), STEPS, self.errors.get(name, ""))


@pytest.fixture(scope="module")
def resumes(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Resumes:
    """Train undisturbed, kill a second run in the middle of a step, and resume a copy of it with every bug."""
    folder = tmp_path_factory.mktemp("proof")
    config = tiny_config(
        digits,
        folder,
        train={
            "precision": "bf16",
            "global_batch_size": 16,
            "micro_batch_size": 4,
        },  # its masters and forward weights are different tensors
        zero={"stage": 1},
        optim={"clip_grad_norm": 0.05},  # small enough to act
        schedule={"warmup_epochs": 0},  # during it the length of the run does not show
    ).model_dump(mode="json")
    run_until_killed(_undisturbed_then_killed, RANKS, config, folder)
    assert list_steps(folder / "b") == [SAVED]
    cases = [_name(bug.plant, checks) for bug in BUGS for checks in (True, False)]
    for name in ("none", *cases):
        shutil.copytree(folder / "b", folder / name)
    return Resumes(folder, run_distributed(_resume_with_every_bug, RANKS, config, folder)[0])


@pytest.mark.timeout(900)
def test_a_resume_without_a_bug_is_bit_identical(resumes: Resumes) -> None:
    verdict = resumes.verdict("none")
    assert str(verdict).startswith("BIT-IDENTICAL: 5 steps, 80 samples"), str(verdict)
    assert (verdict.ok, verdict.resumed_from) == (True, SAVED)
    assert resumes.trace("killed").last_step == KILL_AT - 1
    kinds = set(resumes.trace("none").ranks[0].steps[STEPS].facts)
    assert kinds == set(CAUSAL_ORDER) - {"momentum_buffer"}  # SGD's


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.plant.__name__)
def test_a_planted_bug_is_named(resumes: Resumes, bug: Any) -> None:
    name = bug.plant.__name__
    verdict = resumes.verdict(name)
    assert verdict.verdict == "NOT IDENTICAL"
    found = verdict.difference
    assert found is not None
    assert (found.kind, found.at_start) == (bug.kind, bug.at_start), str(found)
    assert found.step == (SAVED if bug.at_start else SAVED + 1)
    assert bug.told in str(found), str(found)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.refusal], ids=lambda bug: bug.plant.__name__)
def test_the_run_s_own_checks_refuse_to_train_with_what_was_not_saved(resumes: Resumes, bug: Any) -> None:
    name = _name(bug.plant, True)
    assert bug.refusal in resumes.errors[name]
    assert resumes.trace(name).first_step is None, "it began to train"
    verdict = resumes.verdict(name)
    assert verdict.verdict == "NOT IDENTICAL"
    assert bug.refusal in str(verdict)


# --- the comparison alone -------------------------------------------------------------------------------------

_GROUPS = {"weight_decay of group decay": 0.05, "weight_decay of group no_decay": 0.0}


def _state(step: int) -> dict[str, dict[str, Any]]:
    states = {
        kind: {name: f"{number:02x}{step:014x}" for name in ("w", "b")}
        for number, kind in enumerate(("exp_avg", "exp_avg_sq", "fp32", "weights", "ema"), 1)
    }
    small = {"rng": {"cpu": f"r{step}"}, "counter": {"step count of group decay": [step], "skipped steps": 0}}
    return states | small | {"hyperparameter": dict(_GROUPS), "buffer": {"mean": "m"}, "frozen": {"stem": "f"}}


def _record(step: int) -> Record:
    chunks = {f"chunk {chunk}": [f"s{step}-{chunk}-{i}" for i in range(3)] for chunk in range(2)}
    facts = {
        "sample": chunks,
        "input": {name: [f"d{key}" for key in keys] for name, keys in chunks.items()},
        "lr": {"learning rate": (step / 100).hex()},
        "loss": {name: (2.0 / step).hex() for name in chunks},
        "grad_norm": {"gradient norm": (1.0 + step).hex()},
    }
    return Record(step, facts | _state(step))


def _trace(first: int = 0, last: int = 6, ranks: int = 2) -> Trace:
    one = RankTrace(Record(first, _state(first)), {step: _record(step) for step in range(first + 1, last + 1)})
    return Trace((one,) * ranks)


def changed(trace: Trace, rank: int, step: int, kind: str, name: str, value: Any) -> Trace:
    """Return the trace with one fact changed, or taken away; the start's if it is of this step."""
    ranks = list(trace.ranks)
    old = ranks[rank]
    record = old.after(step)
    assert record is not None
    facts = {key: dict(values) for key, values in record.facts.items()}
    facts.setdefault(kind, {})[name] = value
    if value is None:
        del facts[kind][name]
    new = dataclasses.replace(record, facts=facts)
    at_start = old.start is not None and old.start.step == step
    ranks[rank] = (
        dataclasses.replace(old, start=new) if at_start else dataclasses.replace(old, steps={**old.steps, step: new})
    )
    return Trace(tuple(ranks))


_CHANGES = [
    ("sample", "chunk 1", ["s5-1-0", "other", "s5-1-2"], "chunk 1, sample 1", "another seed"),
    ("sample", "chunk 1", ["s5-1-1", "s5-1-0", "s5-1-2"], "chunk 1, sample 0", "the same samples in another order"),
    ("input", "chunk 0", ["ds5-0-0", "ds5-0-1", "x"], "chunk 0, sample 2", "augmented otherwise"),
    ("rng", "cpu", "x", "cpu", "seeded otherwise"),
    ("lr", "learning rate", (0.06).hex(), "learning rate", "off by one step (ahead)"),
    ("lr", "learning rate", (0.03).hex(), "learning rate", "off by 2 steps (behind)"),
    ("lr", "learning rate", (0.5).hex(), "learning rate", "computed from other numbers"),
    ("loss", "chunk 0", (0.5).hex(), "chunk 0", "gave another loss"),
    ("loss", "chunk 0", "nan", "chunk 0", "gave another loss"),
    ("grad_norm", "gradient norm", (0.5).hex(), "gradient norm", "other gradients"),
    ("counter", "step count of group decay", [6], "step count of group decay", "one step tensor shared"),
    ("counter", "skipped steps", 1, "skipped steps", "not restored"),
    (
        "hyperparameter",
        "weight_decay of group no_decay",
        0.05,
        "weight_decay of group no_decay",
        "value of group decay",
    ),
    ("hyperparameter", "weight_decay of group decay", 0.1, "weight_decay of group decay", "the recipe has changed"),
    ("buffer", "mean", "x", "mean", "changed otherwise"),
    ("frozen", "stem", "x", "stem", "changed otherwise"),
    ("exp_avg", "w", "x", "w", "gradient clipping"),
    ("exp_avg_sq", "w", "x", "w", "gradient clipping"),
    ("fp32", "w", "x", "w", "the same moments and rate gave other weights"),
    ("weights", "w", "x", "w", "does not use the weights that were updated"),
    ("ema", "b", None, "b", "optim.ema_decay"),
    ("ema", "new", "x", "new", "optim.ema_decay"),
]


@pytest.mark.parametrize(("kind", "name", "value", "named", "told"), _CHANGES)
def test_every_kind_of_difference_is_found_on_its_rank_and_step(
    kind: str, name: str, value: Any, named: str, told: str
) -> None:
    resumed = changed(_trace(first=3), 1, 5, kind, name, value)
    later = changed(resumed, 0, 6, "sample", "chunk 0", ["nothing"])  # comes after and must not be named
    verdict = compare(_trace(), _trace(last=4), later, 6)
    found = verdict.difference
    assert found is not None
    assert (found.step, found.at_start, found.rank, found.kind, found.name) == (5, False, 1, kind, named)
    assert told in found.likely_cause
    assert not verdict.ok


def test_equal_traces_are_bit_identical_and_their_extent_is_told() -> None:
    verdict = compare(_trace(), _trace(last=4), _trace(first=3), 6)
    assert verdict.ok
    assert (verdict.steps, verdict.num_samples, verdict.num_tensors, verdict.resumed_from) == (6, 72, 12, 3)


def test_the_cause_is_named_and_not_its_consequences() -> None:
    resumed = _trace(first=3)
    for kind, name in (("ema", "w"), ("fp32", "w"), ("loss", "chunk 0"), ("lr", "learning rate")):
        resumed = changed(resumed, 0, 4, kind, name, (0.5).hex())
    resumed = changed(resumed, 1, 4, "input", "chunk 0", ["x", "y", "z"])
    found = compare(_trace(), _trace(last=4), resumed, 6).difference
    assert found is not None
    assert (found.kind, found.rank) == ("input", 1)


def test_the_state_an_attempt_starts_from_is_compared_with_the_state_after_that_step() -> None:
    wanted = _state(3)
    for kind, value, told in (
        ("rng", "x", "was not restored"),
        ("exp_avg", wanted["exp_avg_sq"]["w"], "belongs to exp_avg_sq"),
        ("exp_avg_sq", "0" * 16, "it is zero"),
        ("ema", wanted["fp32"]["w"], "began again at the weights"),
        ("fp32", "x", "what was loaded is not what was saved"),
        ("weights", "x", "that were loaded"),
    ):
        resumed = changed(_trace(first=3), 0, 3, kind, "cpu" if kind == "rng" else "w", value)
        found = compare(_trace(), _trace(last=4), resumed, 6).difference
        assert found is not None
        assert (found.step, found.at_start, found.kind) == (3, True, kind)
        assert told in found.likely_cause


def test_a_difference_before_the_kill_is_not_blamed_on_the_resume() -> None:
    killed = changed(_trace(last=4), 0, 2, "loss", "chunk 0", "0x1p0")
    found = compare(_trace(), killed, _trace(first=3), 6).difference
    assert found is not None
    assert found.step == 2
    assert "resuming is not to blame" in found.likely_cause


@pytest.mark.parametrize(
    ("resumed", "told"),
    [
        (_trace(), "nothing was resumed"),
        (_trace(first=3, last=5), "ended after step 5"),
        (_trace(first=6, last=6), "nothing is left to compare"),
        (Trace((RankTrace(), RankTrace())), "did not start"),
        (Trace((_trace(first=3).ranks[0], RankTrace())), "did not start"),
    ],
)
def test_what_proves_nothing_is_not_called_identical(resumed: Trace, told: str) -> None:
    verdict = compare(_trace(), _trace(last=4), resumed, 6)
    assert not verdict.ok
    assert told in str(verdict)
    short = compare(_trace(last=5), _trace(last=4), _trace(first=3), 6)
    assert not short.ok
    assert "undisturbed run ended after step 5" in str(short)


def test_a_line_that_the_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rank_00000.jsonl"
    line = '{"kind": "step", "step": 1, "facts": {"rng": {"cpu": "x"}}}\n'
    file.write_text('{"kind": "start", "step": 0, "facts": {}, "replicated": ["w"]}\n' + line + line[:20])
    trace = read_trace(tmp_path, 1).ranks[0]
    assert trace.start is not None
    assert trace.start.replicated == {"w"}
    assert list(trace.steps) == [1]


def test_a_sample_s_digest_depends_on_its_own_pixels_and_label_alone() -> None:
    batch = ImageBatch(
        images=torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4),
        labels=torch.tensor([1, 2]),
        weights=torch.ones(2),
        sample_ids=torch.tensor([7, 8]),
        keys=("a", "b"),
    )
    digests = sample_digests(batch)
    other = batch.images.clone()
    other[1, 0, 0, 0] += 1
    assert sample_digests(dataclasses.replace(batch, images=other))[0] == digests[0]
    assert sample_digests(dataclasses.replace(batch, images=other))[1] != digests[1]
    assert sample_digests(dataclasses.replace(batch, labels=torch.tensor([3, 2])))[0] != digests[0]
    channels_last = batch.images.to(memory_format=torch.channels_last)
    assert sample_digests(dataclasses.replace(batch, images=channels_last)) == digests
