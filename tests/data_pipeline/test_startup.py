"""A start costs seconds, however large the data set: indexes are read, nothing is scanned, no order is drawn whole."""

import os
import subprocess
import sys
from pathlib import Path

from data_pipeline.shards import open_shards
from tests.data_pipeline.pictures import photo_samples, write_shards

ROOT = Path(__file__).parents[2]
START = """
import sys, time
from data_pipeline.image import ImageConfig, ImageTransform, collate_images
from data_pipeline.loader import DataConfig, TrainLoader
from data_pipeline.shards import open_shards
clock, cpu = time.monotonic(), time.process_time()
loader = TrainLoader(
    open_shards(sys.argv[1]), ImageTransform(ImageConfig(image_size=(32, 32), rand_augment=None), train=True),
    collate_images, DataConfig(num_workers=0, pin_memory=False), seed=0, global_batch_size=32, micro_batch_size=32,
    rank=0, world_size=1,
)
batch = next(loader.start(step=1000))
print(len(loader.shards.paths), len(batch.keys), time.process_time() - cpu, time.monotonic() - clock)
"""


def test_the_first_batch_of_ten_thousand_indexed_shards_comes_within_five_seconds(tmp_path: Path) -> None:
    one = write_shards(tmp_path / "one", photo_samples(8), 8) / "shard-000000.tar"
    open_shards(one)
    many = tmp_path / "many"
    many.mkdir()
    for number in range(10_000):
        for suffix in ("", ".idx"):
            os.link(f"{one}{suffix}", many / f"shard-{number:06d}.tar{suffix}")
    done = subprocess.run(
        [sys.executable, "-c", START, str(many)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shards, pictures, cpu_s, _ = done.stdout.split()
    assert (shards, pictures) == ("10000", "32")
    assert float(cpu_s) < 5, done.stdout  # of the CPU, so that a busy machine says nothing; 0.8 s where none is
