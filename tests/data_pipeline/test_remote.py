"""Remote shards: fetched once a node, resumed, verified, tried again, in a bounded cache, and read like local ones."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import cache as cache_module
from data_pipeline import download
from data_pipeline.cache import GIB, hold, let_go
from data_pipeline.download import Patience, Remote
from data_pipeline.image import ImageConfig, ImageTransform, collate_images
from data_pipeline.loader import DataConfig, EvaluationLoader, TrainLoader
from data_pipeline.shards import ShardError, ShardSet, open_shards
from tests.data_pipeline.flaky_server import FlakyServer, serving
from tests.data_pipeline.pictures import photo_samples, write_shards

ROOT = Path(__file__).parents[2]
SAMPLES = [{"jpg": np.random.default_rng(i).bytes(30_000), "cls": str(i % 3).encode()} for i in range(12)]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PATIENCE", Patience(tries=4, first_pause_s=0.01, timeout_s=0.4))


def pack(folder: Path, per_shard: int = 3, samples: list[dict[str, bytes]] = SAMPLES) -> Path:
    """Write shards and the manifest that `mvit data pack` writes beside them."""
    write_shards(folder, samples, per_shard)
    entries = [
        {
            "name": tar.name,
            "bytes": tar.stat().st_size,
            "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
            "samples": min(per_shard, len(samples) - per_shard * number),
        }
        for number, tar in enumerate(sorted(folder.glob("*.tar")))
    ]
    manifest = {
        "format_version": 1,
        "shards": entries,
        "class_names": ["a", "b", "c"],
        "counts": {},
        "sources": {"name": "sources.jsonl", "sha256": ""},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack(tmp_path / "packed")


@pytest.fixture
def server(packed: Path) -> Iterator[FlakyServer]:
    with serving(packed) as running:
        yield running


def all_samples(shards: ShardSet) -> list[dict[str, bytes]]:
    return [shards.read(sample) for sample in range(len(shards))]


def first_remote(shards: ShardSet) -> Remote:
    assert shards.remote[0] is not None
    return shards.remote[0]


def test_a_packed_folder_behind_a_url_is_the_local_one_and_opens_without_a_single_shard(
    server: FlakyServer, packed: Path, tmp_path: Path
) -> None:
    shards = open_shards(server.url, cache_dir=tmp_path / "cache")
    assert [name for name, _ in server.requests] == ["manifest.json"]
    local = open_shards(packed)
    assert shards.fingerprint() == local.fingerprint()
    assert shards.class_names == local.class_names
    assert all_samples(shards) == SAMPLES
    assert [shards.key(i) for i in range(12)] == [local.key(i) for i in range(12)]
    with pytest.raises(ValueError, match="3 classes, but the model has 2"):
        shards.check_labels(2)


def test_without_a_manifest_shards_are_counted_once_and_known_ever_after(
    server: FlakyServer, packed: Path, tmp_path: Path
) -> None:
    (packed / "manifest.json").unlink()
    spec, cache = server.url + "/shard-{000000..000003}.tar", tmp_path / "cache"
    assert all_samples(open_shards(spec, cache_dir=cache)) == SAMPLES
    for tar in cache.rglob("*.tar"):
        tar.unlink()
    requests = len(server.requests)
    shards = open_shards(spec, cache_dir=cache)
    assert [name for name, _ in server.requests[requests:]] == ["manifest.json"]
    assert all_samples(shards) == SAMPLES
    with pytest.raises(ShardError, match=r"holds no manifest.json: name a packed folder, or the shards themselves"):
        open_shards(server.url, cache_dir=cache)


@pytest.mark.parametrize(
    ("faults", "with_manifest", "ranges"),
    [
        ([500, 503, 429], True, [None] * 4),
        (["cut 50000", "cut 20000"], True, [None, "bytes=50000-", "bytes=70000-"]),
        (["cut 50000", "cut 20000"], False, [None, "bytes=50000-", "bytes=70000-"]),
        (["stall 40000"], True, [None, "bytes=40000-"]),
        (["long"], True, [None, None]),
        (["other"], True, [None, None]),
        (["cut 50000", "other"], False, [None, "bytes=50000-"]),
    ],
    ids=str,
)
def test_a_flaky_server_is_asked_again_until_every_byte_is_there(
    server: FlakyServer,
    packed: Path,
    tmp_path: Path,
    faults: list[int | str],
    with_manifest: bool,
    ranges: list[str | None],
) -> None:
    name = "shard-000000.tar"
    if not with_manifest:
        (packed / "manifest.json").unlink()
    server.faults[name] = list(faults)
    if faults[-1] == "other" and not with_manifest:  # another file by now, and no manifest to tell: it is that file
        with pytest.raises(ShardError, match="no whole tar"):
            open_shards(f"{server.url}/{name}", cache_dir=tmp_path / "cache")
        return
    shards = open_shards(f"{server.url}/{name}", cache_dir=tmp_path / "cache")
    assert all_samples(shards) == SAMPLES[:3]
    assert [wanted for requested, wanted in server.requests if requested == name] == ranges
    assert shards.cache is not None
    counts = shards.cache.take_counts()
    assert (counts.retries, counts.shards) == (len(faults), 1)
    assert counts.num_bytes >= (packed / name).stat().st_size
    assert shards.cache.take_counts().num_bytes == 0


def test_a_cut_copy_begins_anew_where_the_server_knows_no_ranges(server: FlakyServer, tmp_path: Path) -> None:
    server.ranges = False
    server.faults["shard-000001.tar"] = ["cut 50000"]
    assert all_samples(open_shards(server.url, cache_dir=tmp_path / "cache")) == SAMPLES


def test_what_never_comes_right_ends_in_an_error_that_names_url_tries_and_way_out(
    server: FlakyServer, packed: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    url = f"{server.url}/shard-000000.tar"
    server.faults["shard-000000.tar"] = [500, "stall 0", "other", 503]
    with pytest.raises(
        ShardError,
        match=rf"Shard {url} cannot be fetched: try 1: HTTP 500.*try 2: .*timed out.*try 3: it is \d+ bytes long "
        r"there, its manifest says \d+; try 4: HTTP 503.*by hand on this node",
    ):
        open_shards(url, cache_dir=cache).read(0)
    requests = len(server.requests)
    (packed / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match="try 1: HTTP 404"):
        open_shards(server.url, cache_dir=cache).read(3)
    assert len(server.requests) - requests == 2, "what does not exist is asked for once"


def test_a_content_that_is_not_the_manifests_is_never_read(server: FlakyServer, packed: Path, tmp_path: Path) -> None:
    shards = open_shards(server.url, cache_dir=tmp_path / "cache")
    tar = packed / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(SAMPLES[0]["jpg"][:8], b"tampered"))
    with pytest.raises(ShardError, match="has another SHA-256 than its manifest says"):
        shards.read(0)
    assert not list((tmp_path / "cache").rglob("*.tar"))


def read_first(arguments: tuple[str, Path]) -> dict[str, bytes]:
    return open_shards(arguments[0], cache_dir=arguments[1]).read(0)


def test_processes_of_a_node_that_want_one_shard_download_it_once(server: FlakyServer, tmp_path: Path) -> None:
    server.bytes_a_second = 300_000
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(read_first, [(server.url, tmp_path / "cache")] * 3) == [SAMPLES[0]] * 3
    assert server.fetched("shard-000000.tar") == 1


def test_a_downloader_killed_in_the_middle_is_gone_on_from_and_its_part_never_read(
    server: FlakyServer, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    server.bytes_a_second = 50_000
    code = f"from tests.data_pipeline.test_remote import *; read_first(({server.url!r}, Path({str(cache)!r})))"
    victim = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 20_000 for path in cache.rglob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not list(cache.rglob("*.tar"))
    server.bytes_a_second = 0
    assert open_shards(server.url, cache_dir=cache).read(0) == SAMPLES[0]
    whole, resumed = (wanted for name, wanted in server.requests if name == "shard-000000.tar")
    assert whole is None
    assert re.fullmatch(r"bytes=[1-9]\d{4,}-", resumed or "")


def test_the_cache_keeps_its_bound_drops_what_was_used_longest_ago_and_never_what_is_in_use(
    server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_ROOM_PATIENCE_S", 0.1)
    size = 115_000
    shards = open_shards(server.url, cache_dir=tmp_path / "cache", cache_gib=2.5 * size / GIB)
    cache, remotes = shards.cache, [one for one in shards.remote if one is not None]
    assert cache is not None
    pinned = cache.pin(remotes[0])
    assert pinned is not None
    assert os.pread(pinned[0], 5, 0)
    cache.fetch(remotes[1])
    cache.fetch(remotes[2])
    assert [cache.path(one).exists() for one in remotes] == [True, False, True, False]
    other = cache.pin(remotes[2])
    assert other is not None
    with pytest.raises(ShardError, match=r"no room for shard shard-000003.tar .* Raise data.cache_gib"):
        cache.fetch(remotes[3])
    let_go(pinned[0])
    cache.fetch(remotes[3])
    assert not hold(pinned[0]), "who kept it open is told that it is gone"
    assert os.fstat(pinned[0]).st_size == 0, "and does not keep the disk full"
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*")) < 2.6 * size
    assert all_samples(shards) == SAMPLES
    for file, _ in (pinned, other):
        os.close(file)


def loader(shards: ShardSet, **settings: Any) -> TrainLoader:
    config = ImageConfig(image_size=(16, 16), rand_augment=None)
    return TrainLoader(
        shards,
        ImageTransform(config, train=True),
        collate_images,
        DataConfig(pin_memory=False, shuffle_window=2, **settings),
        seed=3,
        global_batch_size=4,
        micro_batch_size=4,
        rank=0,
        world_size=1,
    )


def batches(made: TrainLoader, number: int, step: int = 0) -> list[tuple[list[str], int]]:
    stream = made.start(step)
    taken = [
        (list(batch.keys), int(batch.images.long().sum())) for batch, _ in zip(stream, range(number), strict=False)
    ]
    made.close()
    return taken


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_cache_smaller_than_the_data_sees_the_same_samples_also_after_resuming(
    tmp_path: Path, workers: int
) -> None:
    folder = pack(tmp_path / "photos", per_shard=3, samples=photo_samples(48))
    expected = batches(loader(open_shards(folder), num_workers=0), 30)
    largest = max(tar.stat().st_size for tar in folder.glob("*.tar"))
    limit = 7 * (largest + 6000) / GIB
    with serving(folder) as server:
        server.faults["shard-000002.tar"] = [500, "cut 3000"]
        shards = open_shards(server.url, cache_dir=tmp_path / "cache", cache_gib=limit)
        made = loader(shards, num_workers=workers, prefetch=1)
        assert batches(made, 30) == expected
        assert made.fetched.shards > 16, "it was fetched anew in the second epoch"
        assert made.fetched.retries >= 2
        held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar*"))
        assert held <= limit * GIB
        again = loader(open_shards(server.url, cache_dir=tmp_path / "cache", cache_gib=limit), num_workers=workers)
        assert batches(again, 10, step=20) == expected[20:]


def test_shards_are_fetched_before_they_are_needed_and_evaluation_too(tmp_path: Path) -> None:
    folder = pack(tmp_path / "photos", per_shard=3, samples=photo_samples(48))
    with serving(folder) as server:
        shards = open_shards(server.url, cache_dir=tmp_path / "cache")
        made = loader(shards, num_workers=0)
        stream = made.start()
        next(stream)
        deadline = time.monotonic() + 20
        while len({name for name, _ in server.requests}) < 8:  # of the manifest and six shards of three windows
            assert time.monotonic() < deadline
            time.sleep(0.02)
        made.close()
        transform = ImageTransform(ImageConfig(image_size=(16, 16)), train=False)
        shards = open_shards(server.url, cache_dir=tmp_path / "evaluation", cache_gib=0.001)
        evaluation = EvaluationLoader(
            shards, transform, collate_images, DataConfig(num_workers=0), batch_size=7, rank=0, world_size=1
        )
        assert sum(float(batch.weights.sum()) for batch in evaluation) == 48
        assert evaluation.fetched.shards == 16


def test_a_cache_too_small_for_two_windows_is_refused_with_the_least_that_will_do(tmp_path: Path) -> None:
    folder = pack(tmp_path / "photos", per_shard=3, samples=photo_samples(48))
    with serving(folder) as server:
        shards = open_shards(server.url, cache_dir=tmp_path / "cache", cache_gib=1e-5)
        with pytest.raises(
            ShardError, match=r"data.cache_gib = 1e-05: .*shuffle_window = 2 .*GiB \(of .*\); give it that"
        ):
            loader(shards)


def test_an_error_in_a_worker_names_the_url(tmp_path: Path) -> None:
    folder = pack(tmp_path / "photos", per_shard=3, samples=photo_samples(6))
    with serving(folder) as server:
        shards = open_shards(server.url, cache_dir=tmp_path / "cache")
        server.faults["shard-000000.tar"] = server.faults["shard-000001.tar"] = [404] * 99
        with pytest.raises(
            ShardError, match=rf"Shard {server.url}/shard-00000\d.tar cannot be fetched: try 1: HTTP 404"
        ):
            batches(loader(shards, num_workers=1), 1)


def test_passwords_are_sent_and_not_shown(server: FlakyServer, tmp_path: Path) -> None:
    url = server.url.replace("//", "//me:secret@")
    assert open_shards(url, cache_dir=tmp_path / "cache").read(0) == SAMPLES[0]
    with pytest.raises(ShardError) as failure:
        open_shards(f"{url}/none.tar", cache_dir=tmp_path / "cache")
    assert "me:…@127.0.0.1" in str(failure.value)
    assert "secret" not in str(failure.value)
