"""Shards in a real S3 server: opened by their manifest, fetched, gone on with, and what is missing is named."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import download
from data_pipeline.download import Patience, note_path
from data_pipeline.shards import ShardError, open_shards
from tests.data_pipeline.test_remote import SAMPLES, all_samples, first_remote, pack

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'mvit[s3]'")
pytest.importorskip("moto.server", reason="the S3 server for the tests is not installed: pip install 'moto[server]'")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket with a packed folder, train, in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = pack(tmp_path_factory.mktemp("s3") / "train")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name, value in {
            "ACCESS_KEY_ID": "me",
            "SECRET_ACCESS_KEY": "secret",
            "DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert server.poll() is None, "the S3 server does not start"
                assert time.monotonic() < deadline
                time.sleep(0.1)
            files = s3fs.S3FileSystem()
            files.mkdir("photos")
            for path in folder.iterdir():
                files.put(str(path), f"photos/train/{path.name}")
            yield "s3://photos"
        finally:
            server.terminate()
            server.wait(10)


@pytest.mark.parametrize("spec", ["train", "train/", "train/shard-{000000..000003}.tar"])
def test_a_bucket_is_read_like_the_folder(bucket: str, tmp_path: Path, spec: str) -> None:
    shards = open_shards(f"{bucket}/{spec}", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar")), "opening fetches no shard"
    assert all_samples(shards) == SAMPLES


def test_a_cut_copy_is_gone_on_with_if_it_is_of_the_same_object(bucket: str, tmp_path: Path) -> None:
    shards = open_shards(f"{bucket}/train", cache_dir=tmp_path / "cache")
    assert shards.cache is not None
    place = shards.cache.path(first_remote(shards))
    shards.read(0)
    whole = place.read_bytes()
    identity = s3fs.S3FileSystem().info("photos/train/shard-000000.tar")["ETag"]
    for said, fetched in ((identity, len(whole) - 40_000), ("another", len(whole))):
        shards = open_shards(f"{bucket}/train", cache_dir=tmp_path / said.strip('"'))
        assert shards.cache is not None
        place = shards.cache.path(first_remote(shards))
        partial = place.with_name(place.name + ".partial")
        partial.parent.mkdir(parents=True)
        partial.write_bytes(whole[:40_000])
        note_path(partial).write_text(json.dumps({"bytes": len(whole), "identity": said}))
        assert shards.read(0) == SAMPLES[0]
        assert shards.cache.take_counts().num_bytes == fetched


def test_what_is_missing_or_refused_is_named(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PATIENCE", Patience(tries=2, first_pause_s=0.01))
    with pytest.raises(
        ShardError, match=r"Shard s3://photos/train/none.tar cannot be fetched: try 1: FileNotFoundError"
    ):
        open_shards(f"{bucket}/train/none.tar", cache_dir=tmp_path / "cache")
    with pytest.raises(ShardError, match=r"s3://nobucket/train holds no manifest.json"):
        open_shards("s3://nobucket/train", cache_dir=tmp_path / "cache")
