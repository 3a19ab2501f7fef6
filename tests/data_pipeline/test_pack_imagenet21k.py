"""Packing ImageNet-21K: tars or folders of classes, ImageNet-1K's first, each picture once, nothing left out unsaid."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_pipeline.check import check_shards
from data_pipeline.pack import PackError, PackOptions, PackReport
from data_pipeline.pack_imagenet21k import pack_imagenet21k
from data_pipeline.shards import open_shards
from data_pipeline.sources.imagenet21k import imagenet1k_classes
from data_pipeline.tar_scan import ShardError
from launcher.cli import main
from tests.data_pipeline.pictures import encoded

TENCH, GOLDFISH, TEDDY = "n01440764", "n01443537", "n04399382"
ORGANISM, FUNGUS = "n00004475", "n12992868"  # of ImageNet-21K alone, one sorted before and one behind
ONE = PackOptions(workers=1)


def class_tar(folder: Path, name: str, pictures: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for file, content in pictures.items():
            member = tarfile.TarInfo(file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder / f"{name}.tar"


def class_folder(folder: Path, name: str, pictures: dict[str, bytes]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file, content in pictures.items():
        (folder / name / file).write_bytes(content)


def photos(name: str, *numbers: int) -> dict[str, bytes]:
    return {f"{name}_{number}.JPEG": encoded(number) for number in numbers}


@pytest.fixture
def winter(tmp_path: Path) -> Path:
    """Return a small release: two classes of ImageNet-1K, two others, one of them in a folder."""
    folder = tmp_path / "winter21"
    class_tar(folder, TENCH, photos(TENCH, 1, 2))
    class_tar(folder, GOLDFISH, photos(GOLDFISH, 3))
    class_tar(folder, ORGANISM, photos(ORGANISM, 4, 5, 6))
    class_folder(folder, FUNGUS, photos(FUNGUS, 7))
    return folder


def labels(report: PackReport) -> dict[str, int]:
    [split] = report.splits
    shards = open_shards(split.folder)
    lines = (Path(split.folder) / "sources.jsonl").read_text().splitlines()
    sources = [json.loads(line)[2] for line in lines]
    return {source: int(shards.read(i)["cls"]) for i, source in enumerate(sources)}


def test_the_first_thousand_classes_are_imagenet_1k_s_and_the_others_are_sorted(winter: Path, tmp_path: Path) -> None:
    report = pack_imagenet21k(winter, tmp_path / "out", options=ONE)
    assert report.class_names[:1000] == imagenet1k_classes() == sorted(report.class_names[:1000])
    assert report.class_names[1000:] == [ORGANISM, FUNGUS]
    found = labels(report)
    assert found[f"{TENCH}/{TENCH}_1.JPEG"] == 0
    assert found[f"{GOLDFISH}/{GOLDFISH}_3.JPEG"] == 1
    assert found[f"{ORGANISM}/{ORGANISM}_6.JPEG"] == 1000
    assert found[f"{FUNGUS}/{FUNGUS}_7.JPEG"] == 1001
    assert len(found) == 7
    assert check_shards(tmp_path / "out" / "train").ok
    assert "no sample of: n01484850" in str(report)
    assert "and 988 more" in str(report)


def test_bytes_come_out_of_the_tars_unchanged(winter: Path, tmp_path: Path) -> None:
    report = pack_imagenet21k(winter, tmp_path / "out", options=ONE)
    shards = open_shards(report.splits[0].folder)
    packed = {bytes(shards.read(i)["jpeg"]) for i in range(len(shards))}
    assert packed == {encoded(number) for number in range(1, 8)}


def test_imagenet_1k_brings_its_classes_and_no_picture_twice(winter: Path, tmp_path: Path) -> None:
    images = tmp_path / "imagenet1k"
    class_folder(images, TENCH, photos(TENCH, 2, 8))  # 2 is in the release, too
    class_folder(images, TEDDY, photos(TEDDY, 9))  # the class that the release lacks
    report = pack_imagenet21k(winter, tmp_path / "out", imagenet1k=images, options=ONE)
    found = labels(report)
    assert sorted(name for name in found if name.startswith(TENCH)) == [f"{TENCH}/{TENCH}_{n}.JPEG" for n in (1, 2, 8)]
    assert found[f"{TEDDY}/{TEDDY}_9.JPEG"] == imagenet1k_classes().index(TEDDY) == 850
    assert len(report.class_names) == 1002


def test_a_list_of_classes_sets_the_order_and_has_to_begin_with_imagenet_1k(winter: Path, tmp_path: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join([*imagenet1k_classes(), FUNGUS, ORGANISM]))
    report = pack_imagenet21k(winter, tmp_path / "out", classes=listed, options=ONE)
    assert report.class_names[1000:] == [FUNGUS, ORGANISM]
    listed.write_text("\n".join([*imagenet1k_classes(), FUNGUS]))
    with pytest.raises(ValueError, match=f"1 classes of the source are not in it, {ORGANISM} for one"):
        pack_imagenet21k(winter, tmp_path / "out2", classes=listed, options=ONE)
    listed.write_text("\n".join([ORGANISM, *imagenet1k_classes(), FUNGUS]))
    with pytest.raises(ValueError, match=r"its first 1000 lines must be ImageNet-1K's classes in order.*line 1 is not"):
        pack_imagenet21k(winter, tmp_path / "out2", classes=listed, options=ONE)


def test_what_is_no_class_and_no_picture_is_listed(winter: Path, tmp_path: Path) -> None:
    (winter / "readme.txt").write_text("hello")
    class_tar(winter, "n00005787", {"a.JPEG": encoded(1), "a.xml": b"<x/>", "b.JPEG": b"no picture"})
    report = pack_imagenet21k(winter, tmp_path / "out", options=ONE)
    reasons = {bad.source: bad.reason for bad in report.splits[0].quarantined}
    assert reasons["readme.txt"] == "no class tar and no class folder by its name"
    assert reasons["n00005787/a.xml"] == "not a picture by its extension '.xml'"
    assert "cannot decode" in reasons["n00005787/b.JPEG"]
    assert report.splits[0].num_samples == 8


def test_a_wrong_folder_a_cut_tar_and_a_class_twice_are_refused(winter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no class tars.*did you mean .*winter21"):
        pack_imagenet21k(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="Unpack the release first"):
        pack_imagenet21k(winter / f"{TENCH}.tar", tmp_path / "out")
    with pytest.raises(ValueError, match="has classes that ImageNet-1K has not, n00004475 for one"):
        pack_imagenet21k(winter, tmp_path / "out", imagenet1k=winter)
    tar = winter / f"{GOLDFISH}.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(ShardError, match=GOLDFISH):
        pack_imagenet21k(winter, tmp_path / "out", options=ONE)
    tar.unlink()
    class_folder(winter, TENCH, photos(TENCH, 1))
    with pytest.raises(ValueError, match=f"has {TENCH} as a folder and as a tar"):
        pack_imagenet21k(winter, tmp_path / "out", options=ONE)
    assert not (tmp_path / "out").exists()


def test_the_command_packs_and_says_how_many_classes_the_model_needs(
    winter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "pack", "imagenet21k", str(winter), str(tmp_path / "out"), "--json", "--workers", "1"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["splits"][0]["num_samples"] == 7
    assert "1002 classes, the published head has 19168: train with model.num_classes=1002" in told.err
    assert main(["data", "pack", "imagenet21k", str(winter), str(tmp_path / "out"), "--json"]) == 1  # it exists
    with pytest.raises(PackError, match="exists"):
        pack_imagenet21k(winter, tmp_path / "out")
