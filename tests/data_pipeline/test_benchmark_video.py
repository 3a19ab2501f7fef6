"""The benchmark of clips: every pipeline reads the same shards, and the peers' clips look like ours."""

from pathlib import Path

import pytest

from data_pipeline.benchmark import bench_data
from data_pipeline.benchmark_video import _by_pyav, clip_contenders
from data_pipeline.pack import PackOptions
from data_pipeline.pack_video import pack_kinetics
from data_pipeline.shards import open_shards
from data_pipeline.video import VIDEO_MEMBERS, VideoConfig
from tests.data_pipeline.clips import clip, scene

CONFIG = VideoConfig(num_frames=4, frame_stride=4, target_fps=25, image_size=(32, 32), short_side=32)


def test_every_pipeline_of_clips_gets_a_row_and_ours_are_compared(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(clip(30))
    (tmp_path / "train.csv").write_text("".join(f"{number}.mp4 {number % 2}\n" for number in range(4)))
    pack_kinetics([tmp_path / "train.csv"], tmp_path / "out", options=PackOptions(workers=1))
    shards = open_shards(str(tmp_path / "out" / "train"), required=VIDEO_MEMBERS)
    rows = bench_data(shards, clip_contenders(CONFIG), batch_size=2, num_batches=3, rounds=1)
    found = {(row.pipeline, row.augmentation): row for row in rows}
    plain, bare = "no RandAugment", "decoding to the clip's end alone"
    assert {("pyav", plain), ("mvit (pyav)", plain), ("mvit (pyav)", "RandAugment"), (bare, None)} <= set(found)
    assert {"pyav", bare} <= set(found["mvit (pyav)", plain].ratios)
    assert set(found["mvit (pyav)", "RandAugment"].ratios) == {bare}, "peers do without"
    assert all(row.samples_per_cpu_second > 0 for row in rows)
    with pytest.raises(ValueError, match=r"--against webdataset: .* compared with pyav, torchcodec, decord"):
        clip_contenders(CONFIG, ["webdataset"])


def test_the_peer_s_clip_holds_the_frames_shown_at_its_times() -> None:
    frames = _by_pyav(clip(16), CONFIG, seed=1)  # as long as the clip: it can only begin at 0
    assert frames.shape[0] == 4
    for number, frame in zip((0, 4, 8, 12), frames, strict=True):
        assert abs(frame.astype(int) - scene(number)).mean() < 8, number
