"""What goes wrong in or after a save, on one rank or on the medium, harms neither later saves nor older checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mvit.checkpoint
import mvit.checkpoint_files
import mvit.checkpoint_save
from mvit import distributed
from mvit.checkpoint import CheckpointError, checkpoint_path, checkpoints_dir, list_steps, newest_valid, verify
from mvit.checkpoint_load import check_loaded, load_buffers
from mvit.checkpoint_save import Contents, Outcome, Saver
from mvit.engine import Engine
from mvit.fragments import EMA, MASTER, MOMENTS, Fragment
from mvit.retention import Retention, clear_leftovers, prune_after_save, scores_of
from tests.mvit.test_zero_stages import _engine, _load, _save, _step
from tests.ranks import run_distributed


def _whole(value: float, score: float | None = None, buffers: dict[str, torch.Tensor] | None = None) -> Contents:
    states = {state: torch.full((6,), value) for state in (MASTER, *MOMENTS)}
    fragment = Fragment("weight", 6, 0, states, True, states[MASTER])
    return Contents([fragment], {"weight": [6]}, [], {"counters": {}}, buffers=buffers or {}, score=score)


def _saved(saver: Saver, step: int, *, read_back: bool = True, score: float | None = None) -> Outcome:
    saver.begin(step, _whole(float(step), score), read_back=read_back)
    saver._join(hurry=False)
    (outcome,) = saver.poll()
    return outcome


def _spoil(run_dir: Path, step: int) -> None:
    file = checkpoint_path(run_dir, step) / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_stop_after_a_damaged_save_keeps_the_last_one_that_was_read_back(
    alone: distributed.RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int
) -> None:
    saver = Saver(tmp_path, alone, Retention(keep_last=keep_last))
    _saved(saver, 10)
    monkeypatch.setattr(mvit.checkpoint_files, "at_point", lambda name: name == "listed" and _spoil(tmp_path, 20))
    assert _saved(saver, 20).damage
    monkeypatch.undo()
    assert _saved(saver, 25, read_back=False).error == ""  # a stop
    assert list_steps(tmp_path) == [10, 20, 25]
    _spoil(tmp_path, 25)
    assert newest_valid(tmp_path) == checkpoint_path(tmp_path, 10)
    _saved(saver, 30)
    assert 20 not in list_steps(tmp_path), "the damaged one goes when a later one is whole"
    saver.close()


def _fail_once(folder: str) -> list[str]:
    """Raise a KeyError on rank 1 in its first write, and break the group in the third save."""
    ranks = distributed.start()
    real, calls = mvit.checkpoint_save.write_shard, 0

    def write(*args: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 1 and ranks.rank == 1:
            raise KeyError("a defect")
        return real(*args)

    def publish(*args: Any) -> None:
        raise TypeError("not JSON")

    def agree(*args: Any) -> Any:
        raise RuntimeError("a peer closed the connection")

    mvit.checkpoint_save.write_shard = write
    saver, errors = Saver(Path(folder), ranks), []
    states = {state: torch.ones(3) for state in (MASTER, *MOMENTS)}
    for step, name, fault in (
        (1, "", None),
        (2, "", None),
        (3, "publish", publish),
        (4, "broadcast_object", agree),
        (5, "", None),
    ):
        fragment = Fragment("weight", 6, 3 * ranks.rank, states, False, states[MASTER])
        kept = getattr(mvit.checkpoint_save, name, None)
        contents = Contents([fragment], {"weight": [6]}, [], {})
        if name == "publish":
            setattr(mvit.checkpoint_save, name, fault)
        saver.begin(step, contents) if name != "broadcast_object" else _begin_broken(saver, step, contents, fault)
        errors += [outcome.error for outcome in saver.finish()]
        if name == "publish":
            setattr(mvit.checkpoint_save, name, kept)
    saver.close()
    distributed.shutdown()
    return errors


def _begin_broken(saver: Saver, step: int, contents: Contents, fault: Any) -> None:
    """Let the thread's agreement fail, not that of the main thread before it."""
    real = saver._write_own

    def write(*args: Any) -> Any:
        mvit.checkpoint_save.gather_objects = lambda value, group=None: fault() if group is not None else [value]
        return real(*args)

    kept, saver._write_own = mvit.checkpoint_save.gather_objects, write
    saver.begin(step, contents)
    saver._join(hurry=True)
    saver._write_own, mvit.checkpoint_save.gather_objects = real, kept


def test_one_rank_s_error_fails_its_save_on_all_ranks_and_no_later_one(tmp_path: Path) -> None:
    for errors in run_distributed(_fail_once, 2, str(tmp_path)):
        assert errors[0] == "rank 1: KeyError: 'a defect'"
        assert errors[1] == ""
        assert errors[2] == "rank 0: TypeError: not JSON"
        assert "could not agree" in errors[3]
        assert errors[4] == ""
    assert list_steps(tmp_path) == [2, 5]


def test_what_fails_after_the_publish_does_not_undo_it(
    alone: distributed.RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stale(*args: object, **options: object) -> None:
        raise OSError(116, "Stale file handle")

    saver = Saver(tmp_path, alone)
    monkeypatch.setattr(mvit.checkpoint_save, "prune_after_save", stale)
    assert _saved(saver, 10).error == ""
    assert "after the checkpoint of step 10 was saved: [Errno 116] Stale file handle" in caplog.text
    assert _saved(saver, 20).error == ""
    saver.close()
    assert verify(checkpoint_path(tmp_path, 20)) == []


def test_a_spoilt_list_of_publications_costs_nothing(
    alone: distributed.RankInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path, alone, Retention(keep_last=1, keep_best=1))
    _saved(saver, 10, score=0.5)
    file = checkpoints_dir(tmp_path) / "published.jsonl"
    file.write_bytes(file.read_bytes() + b'\xff\xfe\n{"step": 1')  # a bad sector, and a line that a kill cut short
    _saved(saver, 20, score=0.9)
    assert newest_valid(tmp_path) == checkpoint_path(tmp_path, 20)
    assert "unreadable line" in caplog.text
    assert scores_of(tmp_path)[20] == 0.9
    _saved(saver, 30, score=0.1)
    assert list_steps(tmp_path) == [20, 30]
    file.unlink()
    assert scores_of(tmp_path) == {20: 0.9, 30: 0.1}, "the manifests know"
    saver.close()


def test_a_checkpoint_that_was_moved_aside_is_never_deleted(
    alone: distributed.RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, alone)
    _saved(saver, 10)
    saver.close()
    aside = checkpoints_dir(tmp_path) / ".step_00000010.abcd1234.old"
    checkpoint_path(tmp_path, 10).rename(aside)

    def refuse(*args: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        clear_leftovers(tmp_path)
    assert aside.is_dir()
    clear_leftovers(tmp_path)
    assert verify(checkpoint_path(tmp_path, 10)) == []


def test_another_life_that_clears_the_folder_cannot_make_a_broken_checkpoint_of_it(
    alone: distributed.RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, alone)
    _saved(saver, 20)

    def clear(name: str) -> None:
        if name == "shard synced":
            for folder in checkpoints_dir(tmp_path).glob(".step_*"):
                shutil.rmtree(folder)
                folder.mkdir()

    monkeypatch.setattr(mvit.checkpoint_files, "at_point", clear)
    assert "does another job write into this run?" in _saved(saver, 20).error
    monkeypatch.undo()
    assert verify(checkpoint_path(tmp_path, 20)) == []

    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(39, "Directory not empty")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert "Directory not empty" in _saved(saver, 20).error
    assert verify(checkpoint_path(tmp_path, 20)) == [], "the older one has its name again at once"
    saver.close()


def test_damaged_steps_of_a_fall_back_do_not_count_as_the_best(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    lines = [f'{{"step": {step}, "score": {score}}}' for step, score in ((10, 0.5), (20, 0.9), (30, 0.6))]
    (checkpoints_dir(tmp_path) / "published.jsonl").write_text("\n".join(lines) + "\n")
    prune_after_save(tmp_path, 30, Retention(keep_last=1, keep_best=1), damaged={20})
    assert list_steps(tmp_path) == [30]


def test_a_buffer_of_another_shape_is_refused(alone: distributed.RankInfo, tmp_path: Path) -> None:
    saver = Saver(tmp_path, alone)
    saver.begin(1, _whole(1.0, buffers={"mean": torch.ones(1)}))
    saver.finish()
    saver.close()
    manifest = mvit.checkpoint.read_manifest(checkpoint_path(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"buffer mean is \[1\] saved, \[4\] in the model"):
        load_buffers(manifest, {"mean": torch.zeros(4)})


# --- refusing a state that is not the saved one ---------------------------------------------------------------


def _refusals(folder: str) -> dict[str, str]:
    """Spoil one thing after the other on one of two ranks; returns what this rank was told."""
    ranks, told = distributed.start(), {}
    for stage in (1, 3):
        engine = _engine(ranks, stage, 4, precision="bf16")
        _step(engine, 1, 4, 1)
        run_dir = Path(folder) / str(stage)
        _save(engine, run_dir, 1)
        manifest = mvit.checkpoint.read_manifest(checkpoint_path(run_dir, 1))
        for what, spoil in _FAULTS.items():
            _load(engine, run_dir, 1)
            if ranks.rank == 1 and not (stage == 3 and what == "another rank's weights"):
                spoil(engine)
            try:
                check_loaded(manifest, engine.fragments(), engine.hyperparameters(), ranks, engine.replicas())
            except CheckpointError as error:
                told[f"{what}, stage {stage}"] = str(error)
        engine.close()
    distributed.shutdown()
    return told


def _spoil_state(state: str) -> Callable[[Engine], None]:
    def spoil(engine: Engine) -> None:
        engine.fragments()[-1].states[state][0] += 1

    return spoil


def _spoil_other_weights(engine: Engine) -> None:
    """Change the forward pass's weights of a parameter whose master another rank has."""
    own = {fragment.name for fragment in engine.fragments()}
    name = next(name for name, _ in engine.module.named_parameters() if name not in own)
    engine.module.get_parameter(name).data.add_(1)


def _spoil_own_weights(engine: Engine) -> None:
    engine.fragments()[-1].weights[0] += 1


_FAULTS: dict[str, Callable[[Engine], None]] = {
    "master": _spoil_state(MASTER),
    "exp_avg": _spoil_state("exp_avg"),
    "exp_avg_sq": _spoil_state("exp_avg_sq"),
    "ema": _spoil_state(EMA),
    "own weights": _spoil_own_weights,
    "another rank's weights": _spoil_other_weights,
}


@pytest.mark.timeout(900)
def test_a_state_that_is_not_the_saved_one_is_refused_on_all_ranks(tmp_path: Path) -> None:
    found = run_distributed(_refusals, 2, str(tmp_path))
    assert found[0] == found[1]
    wanted = {f"{what}, stage {stage}" for what in _FAULTS for stage in (1, 3)} - {"another rank's weights, stage 3"}
    assert set(found[0]) == wanted
    for what in ("exp_avg", "exp_avg_sq", "ema"):
        assert f": {what} of " in found[0][f"{what}, stage 1"]
    assert "rank 1: the weights that the forward pass uses of" in found[0]["another rank's weights, stage 1"]
