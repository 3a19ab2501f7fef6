"""`mvit data pack` and `check` from the command line, on real videos."""

import json
import subprocess
import sys
from pathlib import Path

from tests.data_pipeline.clips import clip
from tests.launcher.project import ROOT


def mvit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_videos_are_packed_encoded_and_checked_and_the_report_is_one_json_object(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.mp4").write_bytes(clip(20 + number))
    (tmp_path / "cut.mp4").write_bytes(clip(20)[:1000])
    (tmp_path / "train.csv").write_text("0.mp4 0\n1.mp4 1\ncut.mp4 1\n")
    (tmp_path / "val.csv").write_text("2.mp4,1\n")
    out = tmp_path / "out"
    lists = (tmp_path / "train.csv", f"validation={tmp_path}/val.csv")
    packed = mvit(
        "data",
        "pack",
        "kinetics",
        *lists,
        out,
        "--short-side",
        "32",
        "--gop",
        "4",
        "--span",
        "0.82",
        "--max-bad",
        "0.5",
        "--json",
    )
    assert packed.returncode == 0, packed.stderr
    report = json.loads(packed.stdout)
    assert {split["name"]: split["num_samples"] for split in report["splits"]} == {"train": 2, "validation": 1}
    assert [bad["source"] for bad in report["splits"][0]["quarantined"]] == ["cut.mp4"]
    assert report["splits"][0]["measured"]["short"] == 1

    checked = mvit("data", "check", out, "--sample", "1", "--workers", "1")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "2 videos decoded: all is well" in checked.stdout

    again = mvit("data", "pack", "kinetics", *lists, out)
    assert again.returncode == 1
    assert "exists; choose another folder" in again.stderr
    wrong = mvit("data", "pack", "ssv2", tmp_path / "nothing.json", tmp_path / "other")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")
    assert "Traceback" not in wrong.stderr
