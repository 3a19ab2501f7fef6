"""The run folder answers what every rank of every life asks, and stays cheap to ask however many lives there were."""

import os
from pathlib import Path
from typing import Any

import pytest

from launcher.run_folder import RunFolder
from tests.launcher.written import create


def _requeued(path: Path, lives: int, submissions: tuple[int, ...] = (1,)) -> RunFolder:
    run = create(path)
    for life in range(1, lives + 1):
        run.attempt_dir(life).mkdir(parents=True)
    for attempt in submissions:
        run.submitit_dir(attempt).mkdir(parents=True)
    return run


def test_a_life_knows_its_submission(tmp_path: Path) -> None:
    run = _requeued(tmp_path / "run", 1200, submissions=(1, 40, 1100))
    (run.submitit_dir(1).parent / "notes").touch()
    asked = (1, 39, 40, 999, 1000, 1099, 1100, 1200)
    assert [run.submission_of(life) for life in asked] == [1, 1, 40, 40, 40, 40, 1100, 1100]
    assert create(tmp_path / "inline").submission_of(3) == 3, "of `mvit train`"


def test_a_stop_asked_of_one_life_is_seen_by_all_later_ones_of_the_submission_only(tmp_path: Path) -> None:
    run = _requeued(tmp_path / "run", 300, submissions=(1, 200))
    run.stop_file(150).touch()
    assert all(run.stop_file(life).exists() for life in range(150, 200))
    assert not any(run.stop_file(life).exists() for life in range(200, 301))


def test_a_rank_of_a_late_life_looks_for_a_stop_in_a_handful_of_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = _requeued(tmp_path / "run", 300), []

    def counted(real: Any) -> Any:
        def count(path: Any, *rest: Any, **options: Any) -> Any:
            calls.append(str(path))
            return real(path, *rest, **options)

        return count

    with monkeypatch.context() as patched:
        for name in ("stat", "listdir", "scandir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        assert not run.stop_file(300).exists()
    assert len(calls) <= 4, calls
