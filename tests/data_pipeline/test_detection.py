"""Pictures with objects: boxes and masks stay right through every augmentation, and batches are exact."""

import pickle
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.annotations import DETECTION_MEMBERS, AnnotatedPicture, Annotation
from data_pipeline.decode import DecodeError
from data_pipeline.detection import (
    DetectionAugmentConfig,
    DetectionExample,
    DetectionTransform,
    categories,
    collate_detections,
    ground_truth,
    training_samples,
)
from data_pipeline.detection_views import View, evaluation_view, resized, training_view
from data_pipeline.loader import DataConfig, EvaluationLoader, TrainLoader
from data_pipeline.masks import mask_box
from data_pipeline.reads import Item
from data_pipeline.shards import ShardSet, open_shards
from tests.data_pipeline.pictures import write_shards
from tests.data_pipeline.scenes import annotation, blob, box_polygon, sample, scene

QUICK = settings(max_examples=40, deadline=None, database=None, derandomize=True)
SMALL = {
    "short_sides": (48, 64, 96),
    "max_side": 128,
    "crop_short_sides": (50, 70),
    "crop_range": (30, 60),
    "jitter_size": 64,
    "test_short_side": 90,
    "test_max_side": 128,
}
POLICIES = ("multi_scale", "large_scale_jitter", "resize")


def small(**changed: object) -> DetectionAugmentConfig:
    return DetectionAugmentConfig(**{**SMALL, **changed})


def train(members: dict[str, bytes], seed: int, **changed: object) -> DetectionExample:
    return DetectionTransform(small(**changed), train=True)(members, seed)


# --- property tests ---------------------------------------------------------------------------------------------


@QUICK
@given(st.sampled_from(POLICIES), st.integers(0, 10**6), st.integers(40, 90), st.integers(40, 90))
def test_the_box_of_a_transformed_mask_is_the_transformed_box(policy: str, seed: int, height: int, width: int) -> None:
    objects = [annotation(blob(height, width, seed + i), i + 1) for i in range(4)]
    example = train(sample(objects, height, width), seed, policy=policy)
    assert example.masks is not None
    assert example.masks.shape == (len(example.boxes), *example.pixels.shape[:2])
    rows, columns = example.pixels.shape[:2]
    assert (example.boxes >= 0).all()
    assert (example.boxes <= [columns, rows, columns, rows]).all()
    view = training_view(height, width, small(policy=policy), seed)
    scale = max(1.0, view.size[0] / (view.window[3] - view.window[1]))
    for mask, box in zip(example.masks, example.boxes, strict=True):
        found = mask_box(mask)
        assert found is not None, "what is cropped away is dropped"
        # A pixel, and where pixels are enlarged half an old one: the round end of an ellipse loses its tip.
        assert np.abs(np.array(found) - box).max() <= 1 + scale / 2, (found, box)


@QUICK
@given(st.integers(0, 10**6), st.integers(40, 90), st.integers(40, 90))
def test_a_flip_preserves_area_and_mirrors_everything(seed: int, height: int, width: int) -> None:
    objects = [annotation(blob(height, width, seed + i), i + 1, i) for i in range(3)]
    polygon = Annotation(9, 3, (10.5, 8, 20, 12), False, 240, [box_polygon(10.5, 8, 20, 12)])
    members = sample([*objects, polygon], height, width)
    for policy in POLICIES:
        plain, flipped = (train(members, seed, policy=policy, hflip_prob=p) for p in (0.0, 1.0))
        assert plain.masks is not None
        assert flipped.masks is not None
        assert (plain.masks.sum(axis=(1, 2)) == flipped.masks.sum(axis=(1, 2))).all()
        assert (plain.masks == flipped.masks[:, :, ::-1]).all()
        assert (plain.pixels == flipped.pixels[:, ::-1]).all()
        mirrored = flipped.boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [plain.pixels.shape[1], 0] * 2
        assert np.allclose(mirrored, plain.boxes, atol=1e-3)
        assert (plain.labels == flipped.labels).all()


@QUICK
@given(st.sampled_from(POLICIES), st.integers(0, 10**6))
def test_pixels_boxes_and_masks_follow_the_same_map(policy: str, seed: int) -> None:
    """A picture that is white where its object is stays so, but for the edge."""
    mask = np.zeros((60, 80), bool)
    mask[20:40, 25:55] = True
    picture = np.where(mask[..., None], 255, 0).repeat(3, axis=2).astype(np.uint8)
    view = training_view(60, 80, small(policy=policy), seed)
    example = train(sample([annotation(mask)]), seed, policy=policy)
    white = view.pixels(picture)[..., 0] > 127
    if not len(example.boxes):
        assert white.sum() == 0
        return
    assert example.masks is not None
    assert (example.masks[0] != white).sum() <= 0.02 * white.size
    found = mask_box(white)
    assert found is not None
    assert np.abs(np.array(found) - example.boxes[0]).max() <= 1


@QUICK
@given(st.sampled_from(POLICIES), st.integers(0, 10**6), st.integers(1, 400), st.integers(1, 400))
def test_every_picture_has_a_view_within_it(policy: str, seed: int, height: int, width: int) -> None:
    config = small(policy=policy)
    for view in (training_view(height, width, config, seed), evaluation_view(height, width, config)):
        left, top, right, bottom = view.window
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert min(view.size) >= 1
        assert max(view.size) <= 128
        assert view.pixels(np.zeros((height, width, 3), np.uint8)).shape == (*view.size, 3)


# --- the policies -----------------------------------------------------------------------------------------------


def test_objects_cropped_away_are_dropped_and_cut_ones_get_the_box_of_what_is_left() -> None:
    """An L, of which a crop of the lower right keeps the foot alone: the clipped box would reach higher."""
    letter = np.zeros((60, 80), bool)
    letter[10:50, 10:20] = True
    letter[40:50, 10:70] = True
    gone = np.zeros((60, 80), bool)
    gone[2:8, 2:8] = True
    transform = DetectionTransform(small(), train=True)
    view = View((30, 20, 80, 60), (40, 50))
    record = AnnotatedPicture(1, "x", 60, 80, (annotation(letter, 1, 4), annotation(gone, 2, 5)))
    example = transform._seen(np.zeros((60, 80, 3), np.uint8), record, view)
    assert example.labels.tolist() == [4]
    assert example.boxes.tolist() == [[0, 20, 40, 30]]
    without = DetectionTransform(small(masks=False), train=True)._seen(np.zeros((60, 80, 3), np.uint8), record, view)
    assert without.masks is None
    assert without.boxes.tolist() == [[0, 0, 40, 30]], "without masks the clipped box is all that is known"


def test_sizes_are_those_of_the_published_policies() -> None:
    config = DetectionAugmentConfig(hflip_prob=0)
    assert resized(480, 640, 800, 1333) == (800, 1067)
    assert resized(427, 640, 800, 1333) == (800, 1199)
    assert resized(300, 640, 800, 1333) == (625, 1333)
    assert evaluation_view(480, 640, config).size == (800, 1067)
    shorts, whole = set(), 0
    for seed in range(300):
        view = training_view(480, 640, config, seed)
        whole += view.window == (0, 0, 640, 480)
        if view.window == (0, 0, 640, 480):
            shorts.add(min(view.size))
        scale = [(view.window[2] - view.window[0]) / view.size[1], (view.window[3] - view.window[1]) / view.size[0]]
        assert scale[0] == pytest.approx(scale[1], rel=0.01), "pixels stay square"
        assert max(view.size) <= 1333
    assert shorts == set(range(480, 801, 32))
    assert 110 < whole < 190
    jitter = DetectionAugmentConfig(policy="large_scale_jitter", hflip_prob=0)
    scales = []
    for seed in range(300):
        view = training_view(480, 640, jitter, seed)
        scales.append(view.size[1] / (view.window[2] - view.window[0]) * 640 / 1024)
        assert max(view.size) <= 1024
        if scales[-1] > 4 / 3:
            assert view.size == (1024, 1024)
    assert (min(scales), max(scales)) == (pytest.approx(0.1, abs=0.03), pytest.approx(2.0, abs=0.03))
    assert np.mean(scales) == pytest.approx(1.05, abs=0.07)


@pytest.mark.parametrize("policy", POLICIES)
def test_training_is_a_pure_function_of_members_and_seed(policy: str) -> None:
    transform = DetectionTransform(small(policy=policy), train=True)
    members = scene(3, 4)
    again = pickle.loads(pickle.dumps(transform))
    for seed in (0, 1, 2):
        one, two = transform(members, seed), again(members, seed)
        assert np.array_equal(one.pixels, two.pixels)
        assert np.array_equal(one.boxes, two.boxes)
        assert one.masks is not None
        assert two.masks is not None
        assert np.array_equal(one.masks, two.masks)
    assert len({transform(members, seed).pixels.tobytes() for seed in range(8)}) > (1 if policy == "resize" else 6)


def test_the_test_keeps_every_object_in_its_place() -> None:
    tiny = np.zeros((60, 80), bool)
    tiny[5, 5] = True
    members = sample([annotation(tiny), annotation(blob(60, 80, 1), 2, is_crowd=True)])
    example = DetectionTransform(small(test_short_side=20), train=False)(members, 5)
    assert example.pixels.shape == (20, 27, 3)
    assert len(example.boxes) == 2
    assert example.is_crowd.tolist() == [False, True]
    assert np.allclose(example.boxes[0], [5 * 27 / 80, 5 / 3, 6 * 27 / 80, 2], atol=1e-4)
    assert (example.original_size, example.image_id) == ((60, 80), 1)


def test_what_is_no_annotated_picture_is_a_bad_sample() -> None:
    good = scene(0, 2)
    transform = DetectionTransform(small(), train=True)
    other_size = {"png": scene(0, 1, 50, 50)["png"], "json": good["json"]}
    for members in ({"png": good["png"]}, {"json": good["json"]}, {**good, "json": b"[1]"}, other_size):
        with pytest.raises(DecodeError):
            transform(members, 0)
    broken = sample([Annotation(3, 0, (1, 1, 5, 5), False, 25, {"size": [60, 80], "counts": "1"})])
    with pytest.raises(DecodeError, match=r"mask of annotation 3: .*Invalid RLE"):
        transform(broken, 0)
    bare = sample([Annotation(1, 0, (1, 1, 5, 5), False, 25, None)])
    with pytest.raises(DecodeError, match=r"have no mask, e\.g\. 1; for boxes alone set detection\.masks=false and"):
        transform(bare, 0)
    assert len(DetectionTransform(small(masks=False), train=False)(bare, 0).boxes) == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"short_sides": ()}, "short_sides .* must list"),
        ({"crop_range": (600, 384)}, "crop_range .* must rise"),
        ({"jitter_scale": (0, 2)}, "jitter_scale .* must rise"),
        ({"jitter_size": 1000}, "jitter_size 1000 is no multiple of size_divisibility 32"),
        ({"test_short_side": 1400}, "test_max_side 1333 is less than the short side 1400"),
        ({"crop_pct": 1}, "crop_pct"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DetectionAugmentConfig(**wrong)  # pyright: ignore[reportArgumentType]


# --- batches ----------------------------------------------------------------------------------------------------


def test_pictures_of_different_sizes_make_one_batch_padded_right_and_bottom() -> None:
    config = small(test_short_side=40, test_max_side=100)
    transform = DetectionTransform(config, train=False)
    members = [scene(0, 2, 60, 80), scene(1, 0, 90, 60), scene(2, 3, 50, 50)]
    examples = [transform(one, 0) for one in members] + [transform.padding()]
    batch = collate_detections([Item(e, i, f"k{i}", float(i < 3)) for i, e in enumerate(examples)], config)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes.tolist() == [[40, 53], [60, 40], [40, 40], [32, 32]]
    assert batch.original_sizes.tolist() == [[60, 80], [90, 60], [50, 50], [32, 32]]
    assert batch.image_ids.tolist() == [1, 2, 3, -1]
    assert [len(boxes) for boxes in batch.boxes] == [2, 0, 3, 0] == list(batch.num_objects)
    assert [tuple(masks.shape) for masks in batch.masks or ()] == [(n, 64, 64) for n in (2, 0, 3, 0)]
    assert [labels.tolist() for labels in batch.labels] == [[0, 1], [], [0, 1, 0], []]
    assert (batch.images[0, :, :40, :53].permute(1, 2, 0).numpy() == examples[0].pixels).all()
    assert (batch.images[0, :, 40:].permute(1, 2, 0) == torch.tensor(config.fill)).all(), "about 0 once normalised"
    assert batch.masks is not None
    assert not batch.masks[0][:, 40:].any()
    assert not batch.masks[0][:, :, 53:].any()
    assert (len(batch), len(batch.to("cpu")), batch.to("cpu").num_objects) == (4, 4, (2, 0, 3, 0))
    alone = collate_detections([Item(examples[1], 0, "k", 1.0)], config)
    assert alone.all_boxes.shape == (0, 4), "a batch without any object"
    jitter = small(policy="large_scale_jitter")
    for seed in range(3):
        example = DetectionTransform(jitter, train=True)(members[0], seed)
        assert collate_detections([Item(example, 0, "k", 1.0)], jitter).images.shape == (1, 3, 64, 64)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Return seven pictures with 0, 1, 2, 0, 1, 2, 0 objects in bare tars of three."""
    members = [scene(i, i % 3, 50 + 2 * i, 60) for i in range(7)]
    return open_shards(write_shards(tmp_path, members, 3), required=DETECTION_MEMBERS)


def training(shards: ShardSet, workers: int, rank: int = 0, world_size: int = 1) -> TrainLoader:
    config = small()
    return TrainLoader(
        shards,
        DetectionTransform(config, train=True),
        partial(collate_detections, config=config),
        DataConfig(num_workers=workers, pin_memory=False),
        seed=1,
        global_batch_size=4,
        micro_batch_size=2,
        rank=rank,
        world_size=world_size,
    )


def test_pictures_without_objects_are_left_out_of_training_and_only_if_asked(shards: ShardSet) -> None:
    chosen = training_samples(shards, small())
    assert (len(shards), len(chosen), chosen.shard_sizes.tolist()) == (7, 4, [2, 2, 0])
    assert [chosen.key(i) for i in range(4)] == [shards.key(i) for i in (1, 2, 4, 5)]
    assert [chosen.read(i) for i in range(4)] == [shards.read(i) for i in (1, 2, 4, 5)]
    assert (
        chosen.fingerprint()
        != shards.fingerprint()
        == open_shards([Path(p) for p in shards.paths], required=DETECTION_MEMBERS).fingerprint()
    )
    assert training_samples(shards, small(skip_empty=False)) is shards
    loader = training(chosen, 0)
    seen = [int(i) for batch in islice(loader.start(), 4) for i in batch.image_ids]
    assert sorted(seen) == sorted([2, 3, 5, 6] * 2), "each once an epoch"
    loader.close()
    with pytest.raises(ValueError, match="None of the 3 training pictures has an object"):
        training_samples(shards.select(np.array([0, 3, 6])), small())


def test_workers_and_ranks_change_no_batch_and_a_stream_goes_on_where_it_stopped(shards: ShardSet) -> None:
    alone = training(shards, 0)
    expected = list(islice(alone.start(), 8))  # two of a step
    worked = training(shards, 2)
    resumed = list(islice(worked.start(2), 4))
    worked.close()
    two = [list(islice(training(shards, 0, rank, 2).start(), 4)) for rank in (0, 1)]
    interleaved = [batch for pair in zip(*two, strict=True) for batch in pair]
    for ours, theirs in (*zip(expected[4:], resumed, strict=True), *zip(expected, interleaved, strict=True)):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.all_boxes, theirs.all_boxes)
        assert torch.equal(ours.all_masks, theirs.all_masks)
        assert ours.num_objects == theirs.num_objects


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_evaluation_sees_every_picture_once_and_pads_with_weight_0(shards: ShardSet, world_size: int) -> None:
    config = small()
    seen: list[int] = []
    for rank in range(world_size):
        loader = EvaluationLoader(
            shards,
            DetectionTransform(config, train=False),
            partial(collate_detections, config=config),
            DataConfig(num_workers=0, pin_memory=False),
            batch_size=2,
            rank=rank,
            world_size=world_size,
        )
        batches = list(loader)
        assert len(batches) == -(-7 // (2 * world_size))
        for batch in batches:
            assert ((batch.weights == 0) == (batch.image_ids == -1)).all()
            seen += [int(i) for i in batch.image_ids[batch.weights > 0]]
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]


def test_the_ground_truth_of_bare_shards_is_a_coco_data_set(shards: ShardSet) -> None:
    truth = ground_truth(shards, num_classes=3)
    assert [image["id"] for image in truth["images"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert truth["categories"] == [{"id": n + 1, "name": str(n)} for n in range(3)], "the model may find the third"
    assert categories(shards) == []
    with pytest.raises(DecodeError, match=r"label 1, allowed: 0 to 0.*mvit data check"):
        ground_truth(shards, num_classes=1)


def test_a_mask_that_is_no_code_is_named_instead_of_keeping_the_metric_busy_for_ever(tmp_path: Path) -> None:
    broken = replace(annotation(blob(60, 80, 1), 4), segmentation={"size": [60, 80], "counts": "?"})
    shards = open_shards(write_shards(tmp_path, [scene(0, 1), sample([broken])], 2), required=DETECTION_MEMBERS)
    with pytest.raises(DecodeError, match=r"annotation 4 of image 1 .* broken RLE '\?'"):
        ground_truth(shards, num_classes=2)
