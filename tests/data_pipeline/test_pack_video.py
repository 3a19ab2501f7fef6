"""Packing videos: lists read as they are published, bytes kept or encoded anew, what is broken left out and named."""

import json
import os
import random
from pathlib import Path

import numpy as np
import psutil
import pytest
from webdataset.compat import WebDataset

from data_pipeline.check import REQUIRED_FOR_VIDEO, check_shards
from data_pipeline.pack import PackError, PackOptions
from data_pipeline.pack_video import VideoPackOptions, pack_kinetics, pack_ssv2
from data_pipeline.shards import open_shards
from data_pipeline.sources.kinetics import read_kinetics
from data_pipeline.sources.ssv2 import read_ssv2
from data_pipeline.sources.video_lists import VideoListError
from data_pipeline.video_decode import Video, video_member
from data_pipeline.video_inspect import Encoding
from tests.data_pipeline.clips import clip, scene, sound_only, turned

TWO = PackOptions(workers=2)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Return a folder of good videos of several kinds, and a list of them with labels 0, 1, 2."""
    folder = tmp_path / "videos"
    folder.mkdir()
    good = {
        "plain.mp4": clip(30),
        "long one, with sound.mp4": clip(75, with_audio=True),
        "variable.mkv": clip(ticks=np.cumsum([0] + [20, 40, 25] * 13).tolist(), container="mkv"),
        "turned.mp4": turned(clip(10), 0, 1, -1, 0),
        "small.webm": clip(12, container="webm", codec="libvpx-vp9", options={"cpu-used": "8"}),
        "old.avi": clip(12, container="avi", codec="mpeg4", options={"g": "12"}),
    }
    for name, data in good.items():
        (folder / name).write_bytes(data)
    (folder / "train.csv").write_text("".join(f"{name} {i % 3}\n" for i, name in enumerate(good)))
    return folder


def bad_ones(folder: Path) -> dict[str, str]:
    """Write broken videos and return their names with what is to be said of each."""
    (folder / "cut.mp4").write_bytes(clip(30)[:1500])
    (folder / "sound.mp4").write_bytes(sound_only())
    (folder / "text.mp4").write_text("<html>this video is private</html>")
    (folder / "empty.webm").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    return {
        "cut.mp4": "truncated",
        "sound.mp4": "no video stream, only audio",
        "text.mp4": "cannot decode",
        "empty.webm": "cannot decode 0 bytes",
        "notes.txt": "not a video by its extension",
        "gone.mp4": "no such file",
        "plain.mp4": "listed before",
    }


def test_bytes_are_kept_facts_are_measured_and_broken_videos_are_left_out_by_name(videos: Path, tmp_path: Path) -> None:
    bad = bad_ones(videos)
    with open(videos / "train.csv", "a") as file:
        file.write("".join(f"{name} 0\n" for name in bad))
    calls: list[tuple[int, int]] = []
    report = pack_kinetics(
        [videos / "train.csv"], tmp_path / "out", options=TWO, progress=lambda done, total: calls.append((done, total))
    )
    [split] = report.splits
    assert (split.name, split.num_samples, report.class_names) == ("train", 6, ["0", "1", "2"])
    reasons = {one.source: one.reason for one in split.quarantined}
    assert set(reasons) == set(bad)
    for name, reason in bad.items():
        assert reason in reasons[name]
    assert calls == [(i, 10) for i in range(1, 11)]
    assert {name: split.measured[name] for name in ("short", "variable_rate", "rotated")} == {
        "short": 5,
        "variable_rate": 1,
        "rotated": 1,
    }
    assert "0.00 hours; 5 shorter than 2.13 s, 1 of variable rate, 1 rotated" in str(report)
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert {one["source"] for one in manifest["quarantined"]} == set(bad)
    assert manifest["measured"] == json.loads(json.dumps(report.as_dict()))["splits"][0]["measured"]

    shards = open_shards(split.folder, required=REQUIRED_FOR_VIDEO)
    traces = [json.loads(line) for line in (Path(split.folder) / "sources.jsonl").read_text().splitlines()]
    for i, (_, _, source) in enumerate(traces):
        members = shards.read(i)
        assert video_member(members) == (videos / source).read_bytes()
        with Video(video_member(members)) as video:
            facts = json.loads(members["json"])
            assert facts["num_frames"] == len(video.times)
            assert (facts["rotation"], facts["is_variable"]) == (video.facts.rotation, video.facts.is_variable)
    theirs = list(WebDataset([str(path) for path in shards.paths], shardshuffle=False, empty_check=False))
    assert [sample["cls"] for sample in theirs] == [shards.read(i)["cls"] for i in range(6)]
    checked = check_shards(tmp_path / "out", workers=2)
    assert checked.ok, str(checked)
    assert checked.num_decoded == 6
    assert "6 videos decoded: all is well" in str(checked)
    assert "1 of variable rate, 1 rotated" in str(checked)


def test_encoded_anew_frames_keep_their_times_stand_upright_and_key_frames_are_near(
    videos: Path, tmp_path: Path
) -> None:
    report = pack_kinetics(
        [videos / "train.csv"],
        tmp_path / "out",
        options=TWO,
        video_options=VideoPackOptions(Encoding(short_side=32, gop=4)),
    )
    [split] = report.splits
    assert not split.quarantined
    assert "encoded anew from" in str(report)
    shards = open_shards(split.folder, required=REQUIRED_FOR_VIDEO)
    traces = [json.loads(line) for line in (Path(split.folder) / "sources.jsonl").read_text().splitlines()]
    for i, (_, _, source) in enumerate(traces):
        with Video((videos / source).read_bytes()) as before, Video(shards.read(i)["mp4"]) as after:
            assert np.allclose(after.times, before.times, atol=2e-5), source
            assert after.facts.codec == "h264"
            assert after.facts.rotation == 0
            sides = (32, 42) if source != "turned.mp4" else (42, 32)
            assert (after.facts.height, after.facts.width) == sides
            assert after.facts.is_variable == (source == "variable.mkv")
            assert max(np.diff([*after._keys, len(after.times)])) <= 4
            small = np.stack([frame for frame in before.every_frame(sides)])
            assert abs(after.frames(range(len(after.times))).astype(int) - small).mean() < 8, source
    assert split.measured["rotated"] == 1
    assert check_shards(tmp_path / "out").ok


def test_a_video_smaller_than_the_short_side_keeps_its_size_and_odd_sides_become_even(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clip(6, size=(63, 47), pix_fmt="yuv444p"))
    (tmp_path / "list.csv").write_text("a.mp4,0\n")
    video_options = VideoPackOptions(Encoding(short_side=256))
    report = pack_kinetics([f"train={tmp_path}/list.csv"], tmp_path / "out", options=TWO, video_options=video_options)
    facts = json.loads(open_shards(report.splits[0].folder, required=REQUIRED_FOR_VIDEO).read(0)["json"])
    assert (facts["height"], facts["width"]) in ((48, 64), (46, 62), (48, 62))


def test_the_same_source_gives_the_same_shards_whatever_the_number_of_processes(videos: Path, tmp_path: Path) -> None:
    def packed(name: str, workers: int) -> list[str]:
        report = pack_kinetics(
            [videos / "train.csv"],
            tmp_path / name,
            options=PackOptions(workers=workers, max_samples=2),
        )
        manifest = json.loads((Path(report.splits[0].folder) / "manifest.json").read_text())
        return [shard["sha256"] for shard in manifest["shards"]]

    assert packed("one", 1) == packed("three", 3)


def test_processes_killed_while_packing_cost_at_most_their_videos(tmp_path: Path) -> None:
    names = [f"{number}.mp4" for number in range(40)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(clip(4 + number))
    (tmp_path / "train.csv").write_text("".join(f"{name} 0\n" for name in names))
    killed = 0

    def kill_one(done: int, total: int) -> None:
        nonlocal killed
        if done in (5, 15, 25):
            workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
            random.Random(done).choice(workers).kill()
            killed += 1

    report = pack_kinetics([tmp_path / "train.csv"], tmp_path / "out", options=TWO, progress=kill_one)
    [split] = report.splits
    assert killed == 3
    assert split.num_samples + len(split.quarantined) == 40
    assert len(split.quarantined) <= 3
    assert all("ended by SIGKILL" in one.reason for one in split.quarantined)
    assert check_shards(tmp_path / "out").ok


def test_strict_stops_at_the_first_broken_video_and_leaves_nothing(videos: Path, tmp_path: Path) -> None:
    (videos / "cut.mp4").write_bytes(clip(30)[:1500])
    with open(videos / "train.csv", "a") as file:
        file.write("cut.mp4 0\n")
    with pytest.raises(PackError, match=r"cut.mp4: .*truncated"):
        pack_kinetics([videos / "train.csv"], tmp_path / "out", options=PackOptions(workers=2, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["videos"]


def test_data_check_names_a_video_that_no_longer_decodes(videos: Path, tmp_path: Path) -> None:
    pack_kinetics([videos / "train.csv"], tmp_path / "out", options=TWO)
    shards = open_shards(tmp_path / "out/train", required=REQUIRED_FOR_VIDEO)
    index = shards._opened(0)[1]
    sample = next(i for i in range(6) if "mp4" in shards.read(i) and len(shards.read(i)["mp4"]) > 3000)
    [offset] = [at for name, at, _ in index.members(sample) if name == "mp4"]
    shards.close()
    tar = tmp_path / "out/train/shard-000000.tar"
    stat = tar.stat()
    with open(tar, "r+b") as file:
        file.seek(offset + 1000)
        file.write(b"\xff" * 1500)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    report = check_shards(tmp_path / "out")
    assert len(report.problems) == 2
    assert "SHA-256 differs" in report.problems[0]
    assert f"shard-000000.tar/{sample:06d}: " in report.problems[1]
    assert report.num_decoded == 5
    some = check_shards(tmp_path / "out", sample=2, span_s=0.5)
    assert some.num_decoded + len(some.problems) - 1 == 2
    assert check_shards(tmp_path / "out", decode=False).num_decoded == 0


def test_splits_are_named_by_the_argument_or_the_file(videos: Path, tmp_path: Path) -> None:
    (videos / "val.csv").write_text("plain.mp4\t2\n\n")
    data = read_kinetics([videos / "train.csv", f"validation={videos}/val.csv"])
    assert {name: len(samples) for name, samples in data.splits.items()} == {"train": 6, "validation": 1}
    assert data.class_names == ["0", "1", "2"]
    assert [s.source for s in data.splits["train"] if " " in s.source] == ["long one, with sound.mp4"]
    (videos / "names.txt").write_text("run\nwalk\nsit still\n")
    assert read_kinetics([videos / "val.csv"], labels=videos / "names.txt").class_names == ["run", "walk", "sit still"]
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    (elsewhere / "train.csv").write_text(f"plain.mp4,0\n{videos}/old.avi,1\n")
    assert len(read_kinetics([elsewhere / "train.csv"], videos=videos).splits["train"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("plain.mp4 0\nold.avi cat\n", "line 2: expected a path and a class number from 0 to 1, found 'old.avi cat'"),
        ("plain.mp4 2\n", "a class number from 0 to 1"),
        ("plain.mp4\n", "line 1: expected a path"),
        ("label,youtube_id,time_start\nrun,a,1\n", "has no column time_end"),
        ("label,youtube_id,time_start,time_end,split\nrun,abc,x,2,train\n", "its times are no numbers"),
        ("label,youtube_id,time_start,time_end,split\n,abc,1,2,train\n", "line 2: expected label"),
        ("label,youtube_id,time_start,time_end,split\nfly,abc,1,2,train\n", "does not name class 'fly'"),
    ],
)
def test_a_list_that_is_none_is_refused_by_line(videos: Path, content: str, message: str) -> None:
    (videos / "names.txt").write_text("run\nwalk\n")
    (videos / "wrong.csv").write_text(content)
    with pytest.raises(VideoListError, match=message):
        read_kinetics([videos / "wrong.csv"], videos=videos, labels=videos / "names.txt")


def test_arguments_that_name_no_list_are_refused(videos: Path) -> None:
    with pytest.raises(VideoListError, match="is no file; name the list of split train"):
        read_kinetics(["train=nowhere.csv"])
    with pytest.raises(VideoListError, match="are both split train"):
        read_kinetics([videos / "train.csv", f"train={videos}/train.csv"])
    with pytest.raises(ValueError, match="gop is 0"):
        Encoding(gop=0)


def test_kinetics_own_annotations_find_clips_by_their_usual_names(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    for name in ("train/riding a bike/abc_000003_000013.mp4", "val/xyz.mp4", "train/abc_000099_000109.webm"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(clip(3))
    header = "label,youtube_id,time_start,time_end,split,is_cc\n"
    (tmp_path / "train.csv").write_text(
        header + "riding a bike,abc,3,13,train,0\n"
        '"juggling, balls",abc,99,109,train,0\nriding a bike,lost_it,0,10,train,0\n'
    )
    (tmp_path / "validate.csv").write_text(header + "abseiling,xyz,7.0,17.0,validate,0\n")
    lists = [tmp_path / "train.csv", f"validation={tmp_path}/validate.csv"]
    data = read_kinetics(lists, videos=root)
    assert data.class_names == ["abseiling", "juggling, balls", "riding a bike"]
    assert [(s.source, s.label) for s in data.splits["train"]] == [("abc_000003_000013", 2), ("abc_000099_000109", 1)]
    assert [(s.source, s.label) for s in data.splits["validation"]] == [("xyz_000007_000017", 0)]
    assert [(one.source, one.reason) for one in data.rejected["train"]] == [("lost_it_000000_000010", "no such file")]
    with pytest.raises(VideoListError, match="--videos"):
        read_kinetics(lists)


def test_something_something_s_own_lists_are_numbered_by_their_labels(tmp_path: Path) -> None:
    root = tmp_path / "20bn"
    root.mkdir()
    for key in ("78", "42"):
        (root / f"{key}.webm").write_bytes(clip(5, container="webm", codec="libvpx-vp9", options={"cpu-used": "8"}))
    (tmp_path / "labels.json").write_text('{"Holding something": "0", "Pushing something onto something": "1"}')
    entries = [
        {"id": "78", "label": "pushing a cup onto a box", "template": "Pushing [something] onto [something]"},
        {"id": "42", "label": "holding a cup", "template": "Holding [something]"},
        {"id": "9", "label": "holding a box", "template": "Holding [something]"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    report = pack_ssv2([tmp_path / "train.json"], tmp_path / "out", videos=root, options=TWO)
    assert report.class_names == ["Holding something", "Pushing something onto something"]
    assert list(report.splits[0].counts.values()) == [1, 1]
    assert [one.source for one in report.splits[0].quarantined] == ["9"]
    (tmp_path / "test.json").write_text('[{"id": "1"}]')
    with pytest.raises(VideoListError, match="without labels cannot be packed"):
        read_ssv2([tmp_path / "test.json"], videos=root)
    (tmp_path / "labels.json").write_text('{"Holding something": "0"}')
    with pytest.raises(VideoListError, match="the template of video 78 is not among the 1 labels"):
        read_ssv2([tmp_path / "train.json"], videos=root)
    (tmp_path / "labels.json").write_text('{"Holding something": "0", "Other": "3"}')
    with pytest.raises(VideoListError, match="2 classes are not numbered 0 to 1"):
        read_ssv2([tmp_path / "train.json"], videos=root)


def test_a_scene_is_recognised_after_packing(videos: Path, tmp_path: Path) -> None:
    """The picture a training run sees is the one that was filmed: frame 20 of 30, with its bright corner."""
    report = pack_kinetics([videos / "train.csv"], tmp_path / "out", options=TWO)
    shards = open_shards(report.splits[0].folder, required=REQUIRED_FOR_VIDEO)
    traces = [json.loads(line) for line in (Path(report.splits[0].folder) / "sources.jsonl").read_text().splitlines()]
    place = [source for _, _, source in traces].index("plain.mp4")
    with Video(shards.read(place)["mp4"]) as video:
        assert abs(video.frames([20])[0].astype(int) - scene(20)).mean() < 8
