"""Packing COCO data sets: bytes kept, whatever breaks a rule is named and refused, or dropped and counted if asked."""

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from data_pipeline.annotations import DETECTION_MEMBERS, read_annotations
from data_pipeline.check import check_shards
from data_pipeline.decode import decode_rgb
from data_pipeline.detection import (
    DetectionAugmentConfig,
    DetectionTransform,
    categories,
    ground_truth,
    training_samples,
)
from data_pipeline.masks import mask_box, rasterise
from data_pipeline.pack import PackError, PackOptions, PackReport
from data_pipeline.pack_coco import pack_coco, pack_shapes
from data_pipeline.shards import open_shards
from data_pipeline.sources import shapes
from data_pipeline.sources.coco import CocoError
from data_pipeline.tar_scan import ShardError
from launcher.cli import main
from tests.data_pipeline.pictures import write_shards
from tests.data_pipeline.scenes import coco_set, png

ONE = PackOptions(workers=1)
NUCLEI = Path(__file__).parents[3] / "shared" / "data" / "nuclei-coco"


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, Path]:
    return coco_set(tmp_path / "coco")


def packed(coco: tuple[Path, Path], out: Path, **options: Any) -> PackReport:
    return pack_coco({"train": coco}, out, options=ONE, **options)


def test_pictures_and_objects_come_out_as_they_went_in(coco: tuple[Path, Path], tmp_path: Path) -> None:
    report = packed(coco, tmp_path / "out")
    [split] = report.splits
    assert (split.num_samples, report.class_names, split.counts) == (3, ["dog", "cat"], {"dog": 2, "cat": 4})
    shards = open_shards(split.folder, required=DETECTION_MEMBERS)
    assert categories(shards) == [{"id": 3, "name": "dog", "supercategory": "animal"}, {"id": 7, "name": "cat"}]
    source = json.loads(coco[1].read_text())
    truth = ground_truth(shards, num_classes=2)
    by_image = {
        image["id"]: [a for a in source["annotations"] if a["image_id"] == image["id"]] for image in source["images"]
    }
    for image in truth["images"]:
        ours = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        for a, b in zip(ours, by_image[image["id"]], strict=True):
            expected = {"iscrowd": 0, "area": 96.0, **b}
            assert {**a, "id": 0} == {**expected, "id": 0}, "the polygon's area is that of its pixels"
    assert shards.manifest is not None
    ids = [read_annotations(shards.read(i)).image_id for i in range(3)]
    assert shards.manifest["image_ids"] == ids
    assert sorted(ids) == [10, 11, 12]
    assert shards.manifest["num_objects"] == [0 if i == 12 else 2 for i in ids], "crowds are not counted"
    assert len(training_samples(shards, DetectionAugmentConfig())) == 2
    for i, image_id in enumerate(ids):
        assert shards.read(i)["png"] == (coco[0] / f"p{image_id - 10}.png").read_bytes()
        assert set(shards.read(i)) == {"png", "json"}
        assert set(shards.read(i, ("json",))) == {"json"}
    theirs = list(WebDataset([str(path) for path in shards.paths], shardshuffle=False, empty_check=False))
    assert [one["json"] for one in theirs] == [shards.read(i)["json"] for i in range(3)]


def test_the_report_tells_the_set_in_figures(coco: tuple[Path, Path], tmp_path: Path) -> None:
    report = packed(coco, tmp_path / "out")
    text = str(report)
    assert "4 objects, 1.3 a picture; pictures by objects: 0: 1, 1: 0, 2 to 5: 2" in text
    assert "small (below 32² pixels) 4, medium 0, large (96² or more) 0" in text
    assert "2 crowd regions (33.3%); masks: 4 RLE, 2 polygons, 0 none" in text
    assert "by category: cat 4, dog 2" in text
    [split] = json.loads(json.dumps(report.as_dict()))["splits"]
    assert (split["measured"]["objects"], split["measured"]["crowds"], split["counts"]["cat"]) == (4, 2, 4)
    checked = check_shards(tmp_path / "out")
    assert checked.ok, str(checked)
    assert (checked.num_samples, checked.num_decoded) == (3, 3)
    assert "train: by category: cat 4, dog 2" in str(checked)
    assert checked.as_dict()["objects"][f"{tmp_path}/out/train"]["by_category"] == {"dog": 2, "cat": 4}


def test_the_same_set_and_seed_give_the_same_bytes_from_a_folder_or_a_tar(
    coco: tuple[Path, Path], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(coco[0], "deeper/folder")
    (tmp_path / "set.json").write_bytes(coco[1].read_bytes())
    one = packed(coco, tmp_path / "one")
    two = packed((tmp_path / "p.tar", coco[1]), tmp_path / "two")
    hashes = [
        json.loads((Path(report.splits[0].folder) / "manifest.json").read_text())["shards"][0]["sha256"]
        for report in (one, two)
    ]
    assert hashes[0] == hashes[1]
    (tmp_path / "p.tar").write_bytes((tmp_path / "p.tar").read_bytes()[:3000])
    with pytest.raises(ShardError, match="truncated"):
        packed((tmp_path / "p.tar", coco[1]), tmp_path / "three")


Change = Callable[[dict[str, Any]], object]


def changed(coco: tuple[Path, Path], change: Change) -> None:
    content = json.loads(coco[1].read_text())
    change(content)
    coco[1].write_text(json.dumps(content))


def set_in(key: str, place: int, **values: Any) -> Change:
    return lambda content: content[key][place].update(values)


OBJECTS = {
    "no area": (set_in("annotations", 0, bbox=[30, 20, 0, 8]), r"annotation 1 of p0.png \(image 10\): bbox .* no area"),
    "negative": (set_in("annotations", 0, bbox=[30, 20, 4, -8]), "has no area: width and height must be above 0"),
    "leaves": (set_in("annotations", 0, bbox=[70, 20, 12.5, 8]), "leaves the picture of 80x60 by more than 1 pixel"),
    "outside": (set_in("annotations", 0, bbox=[80, 20, 0.5, 8]), "lies outside the picture of 80x60"),
    "three numbers": (set_in("annotations", 0, bbox=[70, 20, 5]), "must be four finite numbers"),
    "nan": (set_in("annotations", 0, bbox=[70, 20, 5, float("nan")]), "must be four finite numbers"),
    "huge number": (set_in("annotations", 0, bbox=[70, 20, 10**400, 5]), "must be four finite numbers"),
    "huge corner": (set_in("annotations", 0, segmentation=[[1, 2, 3, 4, 5, 10**400]]), "must be finite numbers"),
    "huge id": (set_in("annotations", 0, id=2**70), "it must be a whole number of at most 64 bits"),
    "text": (set_in("annotations", 0, bbox="x"), "must be four finite numbers"),
    "category": (set_in("annotations", 0, category_id=4), "category_id 4 is not among the categories"),
    "RLE": (set_in("annotations", 1, segmentation={"size": [60, 80], "counts": "1"}), "annotation 2 .* broken RLE '1'"),
    "RLE's size": (
        set_in("annotations", 1, segmentation={"size": [80, 60], "counts": [4800]}),
        r"RLE of size \[80, 60",
    ),
    "polygon": (set_in("annotations", 0, segmentation=[[1, 2, 3]]), "it needs three points"),
    "image": (set_in("annotations", 0, image_id=99), "annotation 1: image_id 99 is not among the images"),
    "id": (set_in("annotations", 1, id=1), "annotation 1 .* id 1 occurs more than once"),
    "no id": (lambda c: c["annotations"][0].pop("id"), "id None: it must be a whole number"),
    "crowd": (set_in("annotations", 0, iscrowd=2), "iscrowd 2: it must be 0 or 1"),
    "null": (lambda c: c["annotations"].__setitem__(0, None), r"annotations\[0\]: None is no annotation"),
}
PICTURES = {
    "missing": (set_in("images", 0, file_name="gone.png"), r"gone.png \(image 10\): no such file below .*3 objects go"),
    "zero byte": (set_in("images", 0, file_name="a\0.png"), "can be no file's name"),
    "half a character": (set_in("images", 0, file_name="\ud800.png"), "can be no file's name"),
    "huge id": (set_in("images", 2, id=2**70), "it must be a whole number of at most 64 bits"),
    "escapes": (set_in("images", 0, file_name="../x.png"), "leads out of"),
    "no picture": (set_in("images", 0, file_name="instances.json"), "is no picture by its extension"),
    "id": (set_in("images", 1, id=10), r"p1.png \(image 10\): image id 10 occurs more than once"),
    "file twice": (
        set_in("images", 1, file_name="p0.png"),
        "image 10 has the same file_name; its 3 objects go with it",
    ),
    "size": (set_in("images", 0, width="80"), "height 60, width '80': they must be whole numbers"),
    "text id": (set_in("images", 2, id="a"), "id 'a': it must be a whole number"),
    "other size": (set_in("images", 2, width=60), "the picture is 80x60, the annotations say 60x60"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_a_bad_object_is_refused_by_name_and_dropped_alone_if_asked(
    coco: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    change, told = OBJECTS[name]
    changed(coco, change)
    with pytest.raises(PackError, match=r"0 picture\(s\) and [1-9] object\(s\) break a rule.*--drop-bad") as error:
        packed(coco, tmp_path / "out")
    assert re.search(told, str(error.value)), error.value
    assert not (tmp_path / "out").exists()
    report = packed(coco, tmp_path / "out", drop_bad=True)
    [split] = report.splits
    assert report.ok
    assert split.num_samples == 3
    assert len(split.dropped) == 1
    assert sum(split.counts.values()) == 5
    assert "dropped 1 object(s), listed in manifest.json" in str(report)
    assert re.search(told, str(report)), report
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert len(manifest["dropped"]) == 1
    assert check_shards(tmp_path / "out").ok


@pytest.mark.parametrize("name", PICTURES)
def test_a_bad_picture_is_refused_by_name_and_left_out_with_its_objects_if_asked(
    coco: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    change, told = PICTURES[name]
    changed(coco, change)
    with pytest.raises(PackError, match="--drop-bad") as error:
        packed(coco, tmp_path / "out")
    assert re.search(told, str(error.value)) or "objects go" in told, error.value
    report = packed(coco, tmp_path / "out", drop_bad=True)
    [split] = report.splits
    assert (split.num_samples, len(split.quarantined)) == (2, 1)
    assert re.search(told, str(report)), report
    assert not report.ok, "a third of the pictures is more than --max-bad allows"
    assert check_shards(tmp_path / "out").ok


def test_an_undecodable_picture_is_refused_or_left_out(coco: tuple[Path, Path], tmp_path: Path) -> None:
    (coco[0] / "p1.png").write_bytes(b"nothing")
    with pytest.raises(PackError, match=r"p1.png: cannot decode .* --drop-bad"):
        packed(coco, tmp_path / "out")
    [split] = packed(coco, tmp_path / "out", drop_bad=True).splits
    assert [bad.source for bad in split.quarantined] == ["p1.png"]


def test_a_box_that_leaves_by_rounding_alone_is_kept_and_cut_off(coco: tuple[Path, Path], tmp_path: Path) -> None:
    changed(coco, set_in("annotations", 0, bbox=[-0.4, 20, 80.9, 8]))
    [split] = packed(coco, tmp_path / "out").splits
    shards = open_shards(split.folder, required=DETECTION_MEMBERS)
    boxes = np.concatenate([read_annotations(shards.read(i)).boxes() for i in range(3)])
    assert [0, 20, 80, 28] in boxes.tolist()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c["categories"].clear(), "lists no category"),
        (set_in("categories", 0, id=3), "2 categories have the id 3"),
        (set_in("categories", 0, name="dog"), "2 categories have the name 'dog'"),
        (set_in("categories", 0, id=None), "needs a whole id and a name"),
    ],
)
def test_a_json_that_is_no_coco_data_set_is_refused(
    coco: tuple[Path, Path], tmp_path: Path, change: Change, told: str
) -> None:
    changed(coco, change)
    with pytest.raises(CocoError, match=told):
        packed(coco, tmp_path / "out", drop_bad=True)


def test_what_is_not_there_is_an_error_that_says_so(coco: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CocoError, match="does not exist; name the folder or the tar"):
        packed((tmp_path / "gone", coco[1]), tmp_path / "out")
    with pytest.raises(CocoError, match="cannot be read as JSON"):
        packed((coco[0], coco[0] / "p0.png"), tmp_path / "out")
    other = coco_set(tmp_path / "other")
    changed(other, set_in("categories", 0, name="horse"))
    with pytest.raises(CocoError, match="has other categories than"):
        pack_coco({"train": coco, "validation": other}, tmp_path / "out", options=ONE)


def test_check_finds_bad_objects_in_shards_made_elsewhere(tmp_path: Path) -> None:
    good = {"id": 1, "label": 0, "bbox": [1, 1, 5, 5], "iscrowd": 0, "area": 25, "segmentation": None}

    def members(number: int, **changes: Any) -> dict[str, bytes]:
        record = {"image_id": number, "file_name": f"{number}.png", "size": [60, 80], "annotations": [good | changes]}
        return {"png": png(number, 60, 80), "json": json.dumps(record).encode()}

    folder = write_shards(
        tmp_path / "bare",
        [
            members(1),
            members(2, id=2, bbox=[1, 1, 0, 5]),
            members(3, id=3, label=-1),
            members(4, id=4, segmentation={"size": [60, 80], "counts": "?"}),
            members(1, id=1),
            {**members(6, id=6), "png": png(0, 50, 80)},
            {**members(7, id=7), "json": b"{}"},
            {**members(8, id=8), "png": b"x"},
            members(9, id=2**70),
        ],
        4,
    )
    problems = "\n".join(check_shards(folder).problems)
    for told in (
        r"shard-000000.tar/000001: annotation 2 of image 2 \(2.png\): bbox .* has no area",
        r"000002: annotation 3 .* label -1, allowed: 0 to …",
        r"000003: annotation 4 .* broken RLE '\?'",
        r"1 image id\(s\) occur more than once, the first: 1",
        r"1 annotation id\(s\) occur more than once, the first: 1",
        r"000005: the picture is \(50, 80\) \(height, width\), its annotations say \(60, 80\)",
        r"000006: the .json member is no list of objects",
        r"000007: cannot decode",
        r"000008: the .json member is no list of objects: .*id 1180591620717411303424 is beyond 64 bits",
    ):
        assert re.search(told, problems), (told, problems)


def test_an_object_with_an_empty_mask_is_one_without_and_told(coco: tuple[Path, Path], tmp_path: Path) -> None:
    changed(coco, set_in("annotations", 0, segmentation=[]))
    report = packed(coco, tmp_path / "out")
    assert "masks: 4 RLE, 1 polygons, 1 none; training with masks refuses the pictures of the last" in str(report)


def test_check_compares_the_shards_with_the_manifest(coco: tuple[Path, Path], tmp_path: Path) -> None:
    packed(coco, tmp_path / "out")
    path = tmp_path / "out/train/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["image_ids"][0] += 1
    manifest["counts"]["cat"] = 1
    manifest["class_names"].pop()
    path.write_text(json.dumps(manifest))
    problems = "\n".join(check_shards(tmp_path / "out").problems)
    assert "image_ids in the manifest are not those of the shards" in problems
    assert "says 1" in problems
    assert "label 1, allowed: 0 to 0" in problems


# --- the shapes of the demo, and real masks ---------------------------------------------------------------------


def test_drawn_shapes_have_exact_masks_of_what_is_visible() -> None:
    seen, hidden = set(), 0
    for seed in range(40):
        pixels, picture = shapes.draw("x.png", 1, seed)
        assert pixels.shape == (picture.height, picture.width, 3)
        masks = np.zeros((len(picture.annotations), picture.height, picture.width), bool)
        for a, mask in zip(picture.annotations, masks, strict=True):
            whole = (0.0, 0.0, float(picture.width), float(picture.height))
            assert a.segmentation is not None
            rasterise(a.segmentation, mask.shape, whole, mask.shape, mask)
            box = mask_box(mask)
            assert box is not None
            assert a.bbox == (box[0], box[1], box[2] - box[0], box[3] - box[1])
            assert a.area == mask.sum() > 50
            seen.add(a.label)
            assert (pixels[mask].std(axis=0) < 45).all(), "one colour, more or less"
        assert (masks.sum(axis=0) <= 1).all(), "what is hidden is no object's"
        discs = [a for a in picture.annotations if a.label == 0]
        hidden += any(abs(a.area - np.pi / 4 * max(a.bbox[2:]) ** 2) > 0.1 * a.area for a in discs)
    assert seen == {0, 1, 2, 3}
    assert hidden, "some discs are hidden in part"
    one, two = shapes.draw("x.png", 1, 5), shapes.draw("x.png", 1, 5)
    assert (one[0] == two[0]).all()
    assert one[1] == two[1]


def test_shapes_are_packed_into_training_and_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "NUM_PICTURES", {"train": 12, "validation": 5})
    report = pack_shapes(tmp_path / "shapes", options=ONE)
    assert [(split.name, split.num_samples) for split in report.splits] == [("train", 12), ("validation", 5)]
    assert check_shards(tmp_path / "shapes").ok
    train, validation = (open_shards(split.folder, required=DETECTION_MEMBERS) for split in report.splits)
    ids = [a["image_id"] for shards in (train, validation) for a in [read(shards, i) for i in range(len(shards))]]
    assert sorted(ids) == list(range(1, 18))
    assert train.class_names == ("disc", "square", "triangle", "ring")


def read(shards: Any, i: int) -> dict[str, Any]:
    return json.loads(shards.read(i)["json"])


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="the nuclei are not here")
def test_real_masks_are_packed_from_their_tar_and_agree_with_their_boxes(tmp_path: Path) -> None:
    report = pack_coco({"validation": (NUCLEI / "val.tar", NUCLEI / "instances_val.json")}, tmp_path / "n", options=ONE)
    [split] = report.splits
    assert (split.num_samples, split.counts, split.dropped) == (60, {"nucleus": 1923}, [])
    assert check_shards(tmp_path / "n", workers=1).ok
    shards = open_shards(split.folder, required=DETECTION_MEMBERS)
    transform = DetectionTransform(DetectionAugmentConfig(test_short_side=256), train=False)
    for i in range(0, 60, 10):
        example = transform(shards.read(i), 0)
        assert example.masks is not None
        found = np.array([mask_box(mask) for mask in example.masks])
        assert np.abs(found - example.boxes).max() == 0
        assert (example.pixels == decode_rgb(shards.read(i)["png"])).all()


def test_the_command_packs_two_splits_refuses_what_is_bad_and_drops_it_if_told(
    coco: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = coco_set(tmp_path / "other", 30)
    changed(other, set_in("annotations", 0, bbox=[70, 20, 15, 8]))
    command = ["data", "pack", "coco", *map(str, coco), str(tmp_path / "out"), "--validation", *map(str, other)]
    assert main(command) == 1
    assert "error: coco: " in (told := capsys.readouterr().err)
    assert "annotation 1 of p0.png (image 10): bbox [70, 20, 15, 8] leaves the picture of 80x60" in told
    assert main([*command, "--drop-bad", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(split["name"], split["num_samples"], len(split["dropped"])) for split in report["splits"]] == [
        ("train", 3, 0),
        ("validation", 30, 1),
    ]
    assert main([*command, "--split", "validation"]) == 1
    assert "name the same split" in capsys.readouterr().err
    for name in ("", "../escaped", "a/b", ".hidden"):
        assert main([*command[:5], str(tmp_path / "new"), "--split", name]) == 1
        assert f"split {name!r} cannot be a folder of the output" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "out"), "--sample", "2"]) == 0
    assert "33 samples, 4 pictures decoded: all is well" in capsys.readouterr().out
