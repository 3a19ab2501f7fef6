"""`mvit checkpoint` says what is there, finds damage, removes only what may go, and names what differs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cli import main
from mvit import distributed
from mvit.checkpoint import checkpoint_path, list_steps
from mvit.checkpoint_save import Contents, Saver
from mvit.config import parse_config
from mvit.fragments import MASTER, MOMENTS, Fragment
from mvit.retention import Retention


@pytest.fixture
def run(alone: distributed.RankInfo, tmp_path: Path) -> Path:
    """Return a run folder with checkpoints of the steps 10, 20, 30."""
    return make_run(alone, tmp_path / "run", (10, 20, 30))


def make_run(ranks: distributed.RankInfo, folder: Path, steps: tuple[int, ...], spoil: float = 0.0) -> Path:
    config = parse_config({"name": folder.name, "output_dir": str(folder.parent), "train": {"keep_last": 3}})
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    saver = Saver(folder, ranks, Retention(keep_last=5))
    for step in steps:
        states = {state: torch.arange(6.0) + index for index, state in enumerate((MASTER, *MOMENTS))}
        states["exp_avg"][4] += spoil + step
        fragment = Fragment("head.weight", 6, 0, states, True, states[MASTER])
        group: dict[str, Any] = {"name": "decay", "parameters": ["head.weight"], "weight_decay": 0.05}
        saver.begin(
            step,
            Contents(
                [fragment],
                {"head.weight": [2, 3]},
                [group],
                {"counters": {"skipped_steps": 0}, "config": config.model_dump(mode="json")},
                score=1 / step,
            ),
        )
        saver._join(hurry=False)
    saver.close()
    return folder


def _json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def _damage(run: Path, step: int) -> None:
    file = checkpoint_path(run, step) / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_list_shows_what_the_manifests_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = _json(capsys)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[0]["world_size"] == 1
    assert rows[0]["read_back"] is True
    assert rows[2]["score"] == pytest.approx(1 / 30)
    assert rows[1]["bytes"] == sum(f.stat().st_size for f in checkpoint_path(run, 20).glob("rank_*"))
    (checkpoint_path(run, 20) / "manifest.json").write_text("{")
    assert main(["checkpoint", "list", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step 20  DAMAGED" in out
    assert "1 rank(s), ZeRO-2" in out
    os.truncate(checkpoint_path(run, 30) / "rank_00000.safetensors", 10)
    assert main(["checkpoint", "list", str(run)]) == 0
    assert "step 30  DAMAGED: 1 file(s) missing or of another size" in capsys.readouterr().out


def test_verify_finds_the_damaged_one_and_says_where_a_resume_lands(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "continue from step 30" in capsys.readouterr().out
    _damage(run, 30)
    assert main(["checkpoint", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert "step 30: DAMAGED" in out
    assert "step 20: whole" in out
    assert "a resume would continue from step 20" in out
    assert main(["checkpoint", "verify", str(run), "--step", "20"]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run), "--json"]) == 1
    found = _json(capsys)
    assert found["newest_valid"] == 20
    assert [row["ok"] for row in found["checkpoints"]] == [False, True, True]
    assert main(["checkpoint", "verify", str(run), "--step", "25"]) == 1
    assert "it has 10, 20, 30" in capsys.readouterr().err


def test_prune_never_removes_the_newest_valid_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _damage(run, 30)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "would remove step 10" in out
    assert "left step 30 alone: damaged" in out
    assert list_steps(run) == [10, 20, 30]
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1", "--json"]) == 0
    assert _json(capsys) == {"kept": [20], "removed": [10], "damaged": [30], "dry_run": False}
    assert list_steps(run) == [20, 30], "20 is the newest valid one; the damaged one stays for a look"
    _damage(run, 20)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 1
    assert "none is usable" in capsys.readouterr().err
    assert list_steps(run) == [20, 30]


def test_prune_keeps_what_the_settings_keep(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "prune", str(run)]) == 0
    assert "removed nothing" in capsys.readouterr().out  # the recipe keeps three
    assert main(["checkpoint", "prune", str(run), "--keep-last", "0"]) == 1
    assert "at least one newest checkpoint must stay" in capsys.readouterr().err
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1", "--keep-best", "1"]) == 0
    assert list_steps(run) == [10, 30], "the score falls with the step"


def test_diff_names_what_differs(
    run: Path, alone: distributed.RankInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "diff", str(run), "--steps", "10", "30"]) == 1
    out = capsys.readouterr().out
    assert "step: 10 -> 30" in out
    assert "exp_avg of head.weight: 1 of 6 elements, largest 20" in out
    assert "1 of 3 tensors and 1 other facts differ" in out
    other = make_run(alone, tmp_path / "other", (30,), spoil=0.5)
    assert main(["checkpoint", "diff", str(run), str(other), "--json"]) == 1
    found = _json(capsys)
    assert found["facts"] == ["config.name: run -> other"]
    assert found["tensors"] == [
        {
            "state": "exp_avg",
            "name": "head.weight",
            "differing": 1,
            "numel": 6,
            "largest": 0.5,
            "relative": pytest.approx(0.5 / sum(x * x for x in (1, 2, 3, 4, 35, 6)) ** 0.5),
        }
    ]
    _damage(run, 10)
    assert main(["checkpoint", "diff", str(run), "--steps", "10", "30"]) == 2
    assert "damaged, so not compared" in capsys.readouterr().err
    assert main(["checkpoint", "diff", str(run), "--steps", "11", "30"]) == 2
    same = str(checkpoint_path(run, 20))
    assert main(["checkpoint", "diff", same, same]) == 0
    assert "0 of 3 tensors and 0 other facts differ" in capsys.readouterr().out


def test_diff_sees_buffers_and_what_is_frozen(
    alone: distributed.RankInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for index, frozen in enumerate((False, True)):
        saver, values = Saver(tmp_path / str(index), alone), torch.arange(6.0)
        states = {MASTER: values} if frozen else {state: values for state in (MASTER, *MOMENTS)}
        fragment = Fragment("head.weight", 6, 0, states, True, values)
        buffers = {"count": torch.tensor(index)} | ({"new": torch.ones(2)} if frozen else {})
        saver.begin(1, Contents([fragment], {"head.weight": [6]}, [], {"counters": {}}, buffers=buffers))
        assert [outcome.error for outcome in saver.finish()] == [""]
        saver.close()
        paths.append(str(checkpoint_path(tmp_path / str(index), 1)))
    for pair in (paths, paths[::-1]):
        assert main(["checkpoint", "diff", *pair, "--json"]) == 1
        found = _json(capsys)
        assert found["tensors"] == []
        assert found["facts"] == [
            "head.weight: trained in one, frozen in the other",
            "buffer count: differs",
            "buffer new: only in one",
        ]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("list", "verify", "prune", "diff"):
        assert main(["checkpoint", command, str(tmp_path)]) == (2 if command == "diff" else 1)
        assert "is not a run folder" in capsys.readouterr().err
    assert main(["checkpoint", "list", str(tmp_path / "nowhere")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err


def test_one_checkpoint_instead_of_a_run_is_told_from_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(checkpoint_path(run, 20))]) == 1
    assert f"name its run and the step: {run}, step 20" in capsys.readouterr().err
