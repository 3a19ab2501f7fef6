"""Packing: bytes unchanged and traceable, deterministic, all or nothing; and webdataset itself reads the result."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline import pack as pack_module
from data_pipeline.check import check_shards
from data_pipeline.decode import decode_rgb
from data_pipeline.pack import PackError, PackOptions, pack_digits, pack_imagefolder
from data_pipeline.shards import open_shards
from tests.data_pipeline.pictures import encoded


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return SRC/{train,val}/<class>/ with JPEG, PNG and an upper-case extension; class "c" only in train."""
    root = tmp_path / "source"
    number = 0
    for split, classes in {"train": "abc", "val": "ab"}.items():
        for name in classes:
            for i in range(4 if split == "train" else 2):
                extension, kind = [("jpg", "JPEG"), ("png", "PNG"), ("JPEG", "JPEG")][i % 3]
                path = root / split / name / "deeper" / f"ünï {number}.x.{extension}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(number, kind=kind))
                number += 1
    return root


def test_bytes_are_unchanged_and_every_sample_leads_back_to_its_file(tree: Path, tmp_path: Path) -> None:
    report = pack_imagefolder(tree, tmp_path / "out", options=PackOptions(max_samples=5))
    assert report.class_names == ["a", "b", "c"]
    assert [(split.name, split.num_samples, split.num_shards) for split in report.splits] == [
        ("train", 12, 3),
        ("val", 4, 1),
    ]
    assert report.splits[1].missing_classes == ["c"]
    for split in report.splits:
        shards = open_shards(split.folder)
        assert shards.class_names == ("a", "b", "c")
        assert shards.num_classes == 3
        traces = [json.loads(line) for line in (Path(split.folder) / "sources.jsonl").read_text().splitlines()]
        sources = {f"{shard}/{key}": source for shard, key, source in traces}
        found = set()
        for i in range(len(shards)):
            source = sources[shards.key(i)]
            found.add(source)
            extension = source.rsplit(".", 1)[1].lower()
            members = shards.read(i)
            assert members[extension] == (tree / source).read_bytes()
            assert members["cls"] == str("abc".index(source.split("/")[1])).encode()
        assert len(found) == len(shards)


def test_webdataset_reads_the_same_keys_and_bytes(tree: Path, tmp_path: Path) -> None:
    report = pack_imagefolder(tree, tmp_path / "out", options=PackOptions(max_samples=5))
    for split in report.splits:
        shards = open_shards(split.folder)
        reader = webdataset.WebDataset([str(path) for path in shards.paths], shardshuffle=False, empty_check=False)
        theirs = list(reader)
        ours = [(shards.key(i).split("/", 1)[1], shards.read(i)) for i in range(len(shards))]
        assert [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in theirs] == ours


def test_the_same_source_and_seed_give_the_same_bytes_and_another_seed_another_order(
    tree: Path, tmp_path: Path
) -> None:
    def packed(name: str, seed: int) -> list[str]:
        folder = Path(pack_imagefolder(tree, tmp_path / name, options=PackOptions(seed=seed)).splits[0].folder)
        return [shard["sha256"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]

    assert packed("one", 0) == packed("two", 0) != packed("three", 1)


def test_shards_hold_a_mixture_of_classes(digits: Path) -> None:
    shards = open_shards(digits / "train")
    first = [shards.label(i) for i in range(100)]
    assert len(set(first)) == 10
    assert max(first.count(label) for label in range(10)) < 25


def test_shards_are_cut_by_size_too(tree: Path, tmp_path: Path) -> None:
    report = pack_imagefolder(tree, tmp_path / "out", options=PackOptions(max_bytes=1))
    assert report.splits[0].num_shards == 12


def test_unreadable_files_are_left_out_listed_and_counted(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "a" / "bad.jpg").write_bytes(encoded(1)[:200])
    (tree / "train" / "a" / "empty.png").write_bytes(b"")
    (tree / "train" / "b" / "notes.txt").write_text("hello")
    (tree / "train" / "loose.jpg").write_bytes(encoded(1))
    (tree / "train" / "b" / "gone.jpg").symlink_to("nowhere")
    calls: list[tuple[int, int]] = []
    report = pack_imagefolder(tree, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    quarantined = {bad.source: bad.reason for bad in report.splits[0].quarantined}
    assert set(quarantined) == {
        f"train/{f}" for f in ("a/bad.jpg", "a/empty.png", "b/notes.txt", "loose.jpg", "b/gone.jpg")
    }
    assert "cannot decode 200 bytes" in quarantined["train/a/bad.jpg"]
    assert quarantined["train/a/empty.png"] == "cannot decode 0 bytes as a picture: of no format that PIL knows"
    assert quarantined["train/loose.jpg"] == "not in a class folder"
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert {bad["source"] for bad in manifest["quarantined"]} == set(quarantined)
    assert report.splits[0].num_samples == 12
    assert "left out 5 file(s)" in str(report)
    assert calls == [(i, 18) for i in range(1, 19)]
    with pytest.raises(PackError, match=r"file\(s\) are no pictures, the first: train/"):
        pack_imagefolder(tree, tmp_path / "strict", options=PackOptions(strict=True))
    for name in ("a/empty.png", "b/notes.txt", "loose.jpg", "b/gone.jpg"):
        (tree / "train" / name).unlink()
    with pytest.raises(PackError, match=r"train/a/bad.jpg: cannot decode"):
        pack_imagefolder(tree, tmp_path / "strict", options=PackOptions(strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_more_left_out_than_allowed_is_written_but_not_ok(tree: Path, tmp_path: Path) -> None:
    for name in ("bad.jpg", "worse.jpg"):
        (tree / "train" / "a" / name).write_bytes(b"no picture")
    strict = pack_imagefolder(tree, tmp_path / "out")
    assert not strict.ok
    assert f"TOO MANY: {2 / (strict.splits[0].num_samples + 2):.1%} of the files are left out" in str(strict)
    assert open_shards(strict.splits[0].folder)
    assert pack_imagefolder(tree, tmp_path / "allowed", options=PackOptions(max_bad=0.5)).ok
    with pytest.raises(ValueError, match=r"max_bad is 5; it is a share of the files, from 0 to 1"):
        PackOptions(max_bad=5)


def test_a_source_that_is_gone_ends_the_packing_instead_of_listing_everything(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for number in range(150):
        (tmp_path / "photos" / "a" / f"{number}.jpg").write_bytes(b"gone")
    with pytest.raises(
        PackError, match=r"100 pictures in a row cannot be packed, .* is the source's file system there"
    ):
        pack_imagefolder(tmp_path / "photos", tmp_path / "out", layout="classes")
    assert not (tmp_path / "out").exists()


def test_class_folders_alone_are_divided_by_class_and_seed(tree: Path, tmp_path: Path) -> None:
    report = pack_imagefolder(tree / "train", tmp_path / "out", holdout=0.25)
    assert [(split.name, split.counts) for split in report.splits] == [
        ("train", {"a": 3, "b": 3, "c": 3}),
        ("validation", {"a": 1, "b": 1, "c": 1}),
    ]
    shutil.rmtree(tree / "val")
    whole = pack_imagefolder(tree / "train", tmp_path / "whole")
    assert [split.name for split in whole.splits] == ["train"]
    with pytest.raises(ValueError, match="has splits of its own"):
        pack_imagefolder(tree, tmp_path / "no", holdout=0.2)


def test_an_existing_output_is_kept_unless_overwriting_packed_data_is_asked_for(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_imagefolder(tree, out)
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(PackError, match="exists; choose another folder"):
        pack_digits(out)
    assert sorted(path.name for path in out.rglob("*")) == before
    pack_digits(out, options=PackOptions(overwrite=True))
    assert open_shards(out / "validation").num_classes == 10
    (out / "precious").write_text("mine")
    with pytest.raises(PackError, match="holds other things than packed data"):
        pack_digits(out, options=PackOptions(overwrite=True))
    with pytest.raises(PackError, match="contains the source"):
        pack_imagefolder(tree, tree.parent, options=PackOptions(overwrite=True))
    assert (out / "precious").exists()
    assert tree.exists()


def test_a_failure_half_way_leaves_nothing_and_keeps_the_old(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pack_imagefolder(tree, out)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_module, "write_atomically", full)
    with pytest.raises(PackError, match="No space left on device"):
        pack_imagefolder(tree, out, options=PackOptions(overwrite=True))
    assert check_shards(out).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_too_little_disk_space_is_said_before_the_start(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PackError, match=r"has 1,000 bytes free, .* need about [\d,]+"):
        pack_imagefolder(tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trees_without_classes_or_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        pack_imagefolder(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "source").mkdir()
    with pytest.raises(ValueError, match="has no class folders"):
        pack_imagefolder(tmp_path / "source", tmp_path / "out")
    (tmp_path / "source" / "a").mkdir()
    with pytest.raises(PackError, match="has no picture"):
        pack_imagefolder(tmp_path / "source", tmp_path / "out")
    (tmp_path / "source" / "a" / "x.jpg").write_bytes(b"x")
    with pytest.raises(PackError, match="none of 1 pictures can be decoded"):
        pack_imagefolder(tmp_path / "source", tmp_path / "out")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    real.mkdir()
    (real / "x.jpg").write_bytes(encoded(1))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").symlink_to(real)
    (real / "circle").symlink_to(real)
    assert pack_imagefolder(tmp_path / "source", tmp_path / "out").splits[0].num_samples == 1


def test_digits_are_scikit_learns_with_every_fifth_of_a_class_held_out(digits: Path) -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    held = {c: np.flatnonzero(labels == c)[4::5].tolist() for c in range(10)}
    validation = open_shards(digits / "validation")
    traces = [json.loads(line) for line in (digits / "validation" / "sources.jsonl").read_text().splitlines()]
    numbers = [int(source.split("/")[1]) for _, _, source in traces]
    assert sorted(numbers) == sorted(number for numbers in held.values() for number in numbers)
    assert len(validation) + len(open_shards(digits / "train")) == 1797
    for i, number in enumerate(numbers[:50]):
        members = validation.read(i)
        assert int(members["cls"]) == labels[number]
        picture = decode_rgb(members["png"])
        assert picture.shape == (8, 8, 3)
        assert np.array_equal(np.rint(picture[..., 0] * (16 / 255)), pixels[number].reshape(8, 8))


def test_a_percent_sign_in_the_path_is_only_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "100%d" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "x.png")
    report = pack_imagefolder(folder.parent, tmp_path / "out%s")
    assert os.listdir(report.splits[0].folder)
    assert check_shards(tmp_path / "out%s").ok
