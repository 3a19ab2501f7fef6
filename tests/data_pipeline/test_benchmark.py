"""The data benchmark: peers and ours on the same shards, the device that waits, and memory over many samples."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.benchmark import bench_data, bench_feed
from data_pipeline.benchmark_peers import DECODING, READING, detection_contenders, image_contenders
from data_pipeline.benchmark_soak import SoakPoint, slope, soak
from data_pipeline.detection import DETECTION_MEMBERS
from data_pipeline.detection_views import DetectionAugmentConfig
from data_pipeline.image import ImageConfig
from data_pipeline.shards import ShardSet, open_shards
from tests.data_pipeline.pictures import photo_samples, write_shards
from tests.data_pipeline.scenes import scene

CONFIG = ImageConfig(image_size=(32, 32))
PLAIN, AUGMENTED = "no RandAugment", "RandAugment"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return open_shards(write_shards(tmp_path_factory.mktemp("photos"), photo_samples(20), 10))


def test_ours_are_compared_with_peers_of_the_same_augmentation_and_with_bare_decoding(shards: ShardSet) -> None:
    rows = bench_data(shards, image_contenders(CONFIG), (0, 1), batch_size=10, num_batches=4, rounds=1)
    found = {(row.pipeline, row.augmentation, row.workers): row for row in rows}
    names = {(DECODING, None), (READING, None)}
    names |= {(name, kind) for name in ("webdataset", "torchvision", "mvit (fast)") for kind in (PLAIN, AUGMENTED)}
    assert set(found) == {(*name, workers) for name in names for workers in (0, 1)}
    assert all(row.samples_per_second > 0 for row in rows)
    for workers in (0, 1):
        for kind in (PLAIN, AUGMENTED):
            ours = found["mvit (fast)", kind, workers]
            assert set(ours.ratios) == {"webdataset", "torchvision", DECODING}
            peer = found["webdataset", kind, workers]
            ratio = ours.samples_per_cpu_second / peer.samples_per_cpu_second
            assert ours.ratios["webdataset"] == pytest.approx(ratio)
            assert not peer.ratios
    assert found[READING, None, 0].samples_per_cpu_second > found["webdataset", PLAIN, 0].samples_per_cpu_second


def test_without_rand_augment_there_is_one_row_each_and_unknown_peers_are_refused() -> None:
    plain = CONFIG.model_copy(update={"rand_augment": None})
    assert [c.augmentation for c in image_contenders(plain) if c.role != "reference"] == [PLAIN, PLAIN, PLAIN, None]
    assert [c.name for c in image_contenders(plain, [])] == ["mvit (fast)", DECODING, READING]
    with pytest.raises(ValueError, match=r"--against ffcv: .* compared with webdataset, torchvision"):
        image_contenders(CONFIG, ["webdataset", "ffcv"])
    with pytest.raises(ValueError, match=r"--against torchvision: .* compared with no peer; --against none"):
        detection_contenders(DetectionAugmentConfig(), ["torchvision"])


def test_webdataset_is_not_measured_with_more_workers_than_shards(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="at least one a worker; here are 2 for 3 workers"):
        bench_data(shards, image_contenders(CONFIG, ["webdataset"]), (3,), batch_size=10, num_batches=2, rounds=1)


def test_pictures_with_objects_are_measured_too(tmp_path: Path) -> None:
    samples = [scene(seed, 2) for seed in range(8)]
    shards = open_shards(write_shards(tmp_path, samples, 8), required=DETECTION_MEMBERS)
    contenders = detection_contenders(DetectionAugmentConfig())
    rows = bench_data(shards, contenders, batch_size=2, num_batches=2, rounds=1)
    assert [row.pipeline for row in rows] == ["mvit", DECODING, READING]
    assert set(rows[0].ratios) == {DECODING}


def test_a_device_waits_for_too_slow_a_pipeline_and_not_for_one_that_keeps_up(shards: ShardSet) -> None:
    ours = image_contenders(CONFIG, [])[1]
    slow, fast = (bench_feed(shards, ours, (0,), rate, batch_size=10, num_batches=4)[0] for rate in (1e6, 10))
    assert slow.wait_share > 0.7
    assert (
        fast.wait_share < 0.4
    )  # without workers each picture is waited for, about 1 ms of 100 where nothing else runs


def test_a_soak_looks_at_all_processes_at_equal_distances_and_finds_the_slope(shards: ShardSet) -> None:
    told: list[SoakPoint] = []
    ours = image_contenders(CONFIG, [])[1]
    points = soak(shards, ours, 300, workers=1, batch_size=10, num_points=5, tell=told.append)
    assert points == told
    assert points[-1].samples == 300
    assert len(points) == 5
    assert all(min(point.main_pss_mib, point.workers_pss_mib) > 1 for point in points)
    made = [SoakPoint(int(n), 0, 100 + n * 3e-5 + (50 if n < 2e4 else 0), 0, 40, 0) for n in np.linspace(0, 1e5, 11)]
    assert slope(made) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="two points"):
        slope(made[-1:])
