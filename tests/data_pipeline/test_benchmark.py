"""The data benchmark: it runs both pipelines on the same shards and compares them."""

from pathlib import Path

from data_pipeline.benchmark import bench_data, image_pipelines
from data_pipeline.image import ImageConfig
from data_pipeline.shards import open_shards
from tests.data_pipeline.pictures import photo_samples, write_shards


def test_every_pipeline_gets_a_row_relative_to_torchvisions(tmp_path: Path) -> None:
    shards = open_shards(write_shards(tmp_path, photo_samples(20), 10))
    rows = bench_data(shards, image_pipelines(ImageConfig(image_size=(32, 32))), batch_size=10, num_batches=5, rounds=1)
    assert [row.pipeline for row in rows] == ["torchvision, PIL, float32", "ours, fast, uint8", "ours, reading only"]
    assert rows[0].ratio == 1.0
    assert all(row.samples_per_second > 0 for row in rows)
    assert rows[2].samples_per_cpu_second > rows[0].samples_per_cpu_second
