"""Checking packed data: whatever is changed, removed or added is named."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.check import check_shards
from data_pipeline.shards import ShardError, open_shards
from tests.data_pipeline.pictures import photo_samples, write_shards


@pytest.fixture
def packed(digits: Path, tmp_path: Path) -> Path:
    """Return a copy of one packed folder of two shards, times kept."""
    return Path(shutil.copytree(digits / "validation", tmp_path / "validation"))


def test_a_good_folder_is_found_good_byte_for_byte(digits: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = check_shards(digits, progress=lambda done, total: calls.append((done, total)))
    assert report.ok, str(report)
    assert (report.num_shards, report.num_samples, report.num_decoded) == (8, 1797, 1797)
    assert calls == [(i, 8) for i in range(1, 9)]
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True
    assert "all is well" in str(report)


def flip(path: Path, offset: int) -> None:
    """Change one byte and keep size and time."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def picture_offset(folder: Path, sample: int) -> int:
    shards = open_shards(folder)
    return next(offset for extension, offset, _ in shards._opened(0)[1].members(sample) if extension == "png")


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "shard-000000.tar", picture_offset(f, 3) + 45), r"shard-000000.tar: .*SHA-256 differs"),
        (lambda f: flip(f / "shard-000000.tar", picture_offset(f, 3) + 1), r"shard-000000.tar/000003: cannot decode"),
        (lambda f: flip(f / "shard-000001.tar", 0), "it is not a tar file"),
        (lambda f: flip(f / "shard-000001.tar.idx", -9 % 400), "does not describe its tar"),
        (lambda f: os.truncate(f / "shard-000001.tar", 5000), r"shard-000001.tar has 5000 bytes, manifest.json says"),
        (lambda f: (f / "shard-000001.tar").unlink(), r"shard-000001.tar is listed in manifest.json but missing"),
        (lambda f: shutil.copy(f / "shard-000001.tar", f / "x.tar"), r"x.tar is not listed in manifest.json"),
        (lambda f: flip(f / "sources.jsonl", 40), r"sources.jsonl: its bytes are not those that were packed"),
        (lambda f: (f / "sources.jsonl").unlink(), r"sources.jsonl cannot be read"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest.json is damaged"),
        (lambda f: change_manifest(f, lambda m: m["class_names"].pop()), r"has label 9, allowed: 0 to 8"),
        (lambda f: change_manifest(f, lambda m: m["counts"].update({"4": 1})), r"class 4 has 36 samples, .* says 1"),
        (lambda f: change_manifest(f, lambda m: m["shards"][0].update(samples=7)), r"has 256 samples, .* says 7"),
    ],
)
def test_every_kind_of_damage_is_named(packed: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(packed)
    report = check_shards(packed)
    assert not report.ok
    assert any(re.search(message, problem) for problem in report.problems), report
    assert str(len(report.problems)) in str(report).splitlines()[0]


def test_training_refuses_a_shard_that_is_not_the_manifests(packed: Path) -> None:
    shutil.copy(packed / "shard-000001.tar", packed / "shard-000000.tar")
    with pytest.raises(ShardError, match=r"the manifest says 256 in .* Copy it again; `mvit data check`"):
        open_shards(packed)


def test_an_index_made_for_another_time_is_only_a_note(packed: Path) -> None:
    os.utime(packed / "shard-000000.tar")
    report = check_shards(packed, decode=False)
    assert report.ok
    assert report.num_decoded == 0
    assert "built again when opened" in report.notes[0]


def test_bare_tars_are_checked_as_far_as_possible_and_it_says_so(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "bare", photo_samples(7), 4)
    report = check_shards(folder)
    assert report.ok
    assert report.num_decoded == 7
    assert "has no manifest.json" in report.notes[0]
    shutil.copy(folder / "shard-000001.tar", folder / "shard-000002.tar")
    assert "3 key(s) occur more than once, the first: 000004" in str(check_shards(folder))


def test_a_folder_without_anything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds neither manifest.json nor .tar shards"):
        check_shards(tmp_path)


def test_one_lost_shard_is_one_problem_and_not_one_for_each_class(packed: Path) -> None:
    (packed / "shard-000001.tar").unlink()
    report = check_shards(packed, decode=False)
    assert len(report.problems) == 1, report
    assert any("class counts and sources not compared" in note for note in report.notes)
