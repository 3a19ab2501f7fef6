"""Damage: a shard cut or overwritten anywhere is named with its offset before training, never read past in silence."""

import os
from pathlib import Path

import pytest

from data_pipeline.shards import ShardError, open_shards
from data_pipeline.tar_scan import scan_tar
from tests.data_pipeline.pictures import write_shards

SAMPLES = [{"jpg": bytes([65 + i]) * 1500, "cls": str(i).encode()} for i in range(5)]
# In the shard, sample i takes 3,072 bytes: .cls header (512) and data (512), .jpg header (512) and data (1,536).
STRIDE = 3072
END = 5 * STRIDE


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = write_shards(tmp_path, SAMPLES, 100) / "shard-000000.tar"
    assert [member.header for member in scan_tar(str(path))][::2] == [i * STRIDE for i in range(5)]
    return path


@pytest.mark.parametrize(
    ("cut", "offset"),
    [
        (0, 0),
        (2 * STRIDE, 2 * STRIDE),  # between two samples: tarfile and webdataset take it for the end
        (2 * STRIDE + 100, 2 * STRIDE),  # inside a header: likewise
        (2 * STRIDE + 600, 2 * STRIDE + 600),  # inside the padding behind the label
        (2 * STRIDE + 1024, 2 * STRIDE + 1024),  # between label and picture: webdataset yields half a sample
        (2 * STRIDE + 2000, 2 * STRIDE + 1024),  # inside the picture
        (3 * STRIDE - 20, 3 * STRIDE - 20),  # inside the padding behind the picture
        (END, END),  # before the end mark
        (END + 512, END),  # inside the end mark
    ],
)
def test_a_cut_anywhere_is_named_with_its_offset(shard: Path, cut: int, offset: int) -> None:
    os.truncate(shard, cut)
    with pytest.raises(
        ShardError, match=rf"{shard}: at byte {offset} of {cut}, .*(truncated|runs past the end).* Copy"
    ):
        open_shards(shard)


def test_every_cut_before_the_end_mark_is_found(shard: Path) -> None:
    whole = shard.read_bytes()
    for cut in range(0, END + 1024, 128):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ShardError):
            list(scan_tar(str(shard)))
    shard.write_bytes(whole[: END + 1024])
    assert len(list(scan_tar(str(shard)))) == 10


@pytest.mark.parametrize(
    ("offset", "junk", "message"),
    [
        (3 * STRIDE, b"garbage" * 20, rf"at byte {3 * STRIDE} .*checksum fails"),
        (3 * STRIDE, bytes(512), rf"at byte {3 * STRIDE + 512} .*data after the end"),
        (3 * STRIDE, bytes(1024), rf"at byte {3 * STRIDE + 1024} .*data after the end"),
        (0, b"hello", "it is not a tar file"),
        (0, b"\x1f\x8b\x08", r"compressed \(gzip\).*decompress"),
        (END + 3000, b"x", "data after the end"),
    ],
)
def test_overwritten_headers_are_named(shard: Path, offset: int, junk: bytes, message: str) -> None:
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(junk)
    with pytest.raises(ShardError, match=message):
        open_shards(shard)


@pytest.mark.parametrize("missing", ["cls", "jpg"])
def test_a_sample_without_picture_or_label_is_named(tmp_path: Path, missing: str) -> None:
    samples = [dict(sample) for sample in SAMPLES]
    del samples[3][missing]
    folder = write_shards(tmp_path, samples, 2)
    with pytest.raises(ShardError, match=rf"shard-000001.tar: 1 sample\(s\) lack .*\.{missing}.* the first is 000003"):
        open_shards(folder)


def test_a_label_that_is_no_number_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [*SAMPLES, {"jpg": b"x", "cls": b"cat"}], 100)
    with pytest.raises(ShardError, match=r"label of sample 000005 is 'cat', no integer"):
        open_shards(folder)


def test_a_shard_cut_while_training_reads_it_is_named(shard: Path) -> None:
    shards = open_shards(shard)
    assert shards.read(0) == SAMPLES[0]
    os.truncate(shard, 2 * STRIDE)
    with pytest.raises(ShardError, match=r"cut before byte \d+ after this run opened it"):
        shards.read(4)
    shards.close()
    with pytest.raises(ShardError, match="has changed since this run opened it"):
        shards.read(4)


def test_an_empty_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    with pytest.raises(ShardError, match="holds no sample"):
        open_shards(tmp_path / "empty.tar")
