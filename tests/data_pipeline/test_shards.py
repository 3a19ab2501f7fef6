"""Shards: what is read is what was written; indexes are reused, rebuilt and raced for safely."""

import gc
import io
import multiprocessing
import os
import pickle
import sys
import tarfile
import time
from pathlib import Path

import pytest

from data_pipeline import download, shard_index
from data_pipeline.shards import ShardError, ShardSet, open_shards
from tests.data_pipeline.pictures import write_shards

SAMPLES = [{"jpg": bytes([i]) * (300 * i + 1), "cls": str(i % 3).encode()} for i in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", SAMPLES, 4)


def test_samples_are_read_back_byte_for_byte_in_any_order(folder: Path) -> None:
    shards = open_shards(folder)
    assert shards.shard_sizes.tolist() == [4, 4, 2]
    for sample in [9, 0, 4, 3, 8]:
        assert shards.read(sample) == SAMPLES[sample]
        assert shards.label(sample) == sample % 3
    assert shards.key(5) == "shard-000001.tar/000005"
    with pytest.raises(IndexError):
        shards.read(10)


def test_packed_folders_with_other_classes_are_refused_in_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(ShardError, match="different class lists"):
        ShardSet([], [], [], [{"class_names": ["cat"]}, {"class_names": ["dog"]}])
    gc.collect()
    assert not ignored, "the half-made set raised again when it was collected"


def test_a_pickled_set_reads_the_same(folder: Path) -> None:
    shards = open_shards(folder)
    shards.read(0)
    assert pickle.loads(pickle.dumps(shards)).read(7) == SAMPLES[7]


@pytest.mark.parametrize(
    "spec", ["{}", "{}/*.tar", "{}/shard-{{000000..000002}}.tar", "file:{}/shard-00000{{0,1,2}}.tar"]
)
def test_folders_globs_and_braces_name_the_same_shards(folder: Path, spec: str) -> None:
    assert open_shards(spec.format(folder)).fingerprint() == open_shards(folder).fingerprint()


def test_a_list_is_read_in_its_order(folder: Path) -> None:
    shards = open_shards([folder / "shard-000002.tar", folder / "shard-000000.tar"])
    assert [shards.key(i)[-6:] for i in range(len(shards))] == [
        "000008",
        "000009",
        "000000",
        "000001",
        "000002",
        "000003",
    ]


def test_an_index_is_reused_until_its_tar_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_shards(folder)
    scans: list[str] = []
    build = shard_index.build_index
    monkeypatch.setattr(shard_index, "build_index", lambda tar: scans.append(tar) or build(tar))
    open_shards(folder)
    assert scans == []
    changed = folder / "shard-000001.tar"
    os.utime(changed, ns=(0, time.time_ns()))
    assert open_shards(folder).read(5) == SAMPLES[5]
    assert scans == [str(changed)]


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"mvit-idx-2\n" + b"\xff" * 60])
def test_a_damaged_index_is_built_again(folder: Path, damage: bytes) -> None:
    open_shards(folder)
    (folder / "shard-000000.tar.idx").write_bytes(damage)
    assert open_shards(folder).read(2) == SAMPLES[2]


def test_a_cut_index_is_built_again(folder: Path) -> None:
    open_shards(folder)
    path = folder / "shard-000000.tar.idx"
    path.write_bytes(path.read_bytes()[:-5])
    assert open_shards(folder).read(3) == SAMPLES[3]


def test_in_a_read_only_folder_the_index_goes_to_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shard_index.write_atomically

    def read_only(path: str, content: bytes) -> None:
        if Path(path).parent == folder:
            raise PermissionError("read-only")
        write(path, content)

    monkeypatch.setattr(shard_index, "write_atomically", read_only)
    cache = tmp_path / "cache"
    assert open_shards(folder, cache_dir=cache).read(9) == SAMPLES[9]
    assert not list(folder.glob("*.idx"))
    assert len(list(cache.glob("*.idx"))) == 3


def open_and_read(folder: str) -> bool:
    shards = open_shards(folder)
    return all(shards.read(i) == SAMPLES[i] for i in range(10))


def test_ranks_may_race_to_build_the_indexes(folder: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert all(pool.map(open_and_read, [str(folder)] * 8))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_fingerprint_follows_the_content_not_the_folder(folder: Path, tmp_path: Path) -> None:
    copy = write_shards(tmp_path / "copy", SAMPLES, 4)
    other = write_shards(tmp_path / "other", SAMPLES[:-1], 4)
    assert open_shards(copy).fingerprint() == open_shards(folder).fingerprint() != open_shards(other).fingerprint()


def test_labels_out_of_range_name_the_sample(folder: Path) -> None:
    shards = open_shards(folder)
    shards.check_labels(3)
    with pytest.raises(ValueError, match=r"shard-000000.tar/000002 has label 2.*2 classes \(labels 0 to 1\)"):
        shards.check_labels(2)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read_in_every_tar_format(tmp_path: Path, form: int) -> None:
    deep = "/".join(["a-long-folder-name" * 2] * 3) + "/ünïcode-名.part"
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        tar.addfile(_directory("folder"))
        for name, content in [(f"{deep}.jpg", b"x" * 700), (f"{deep}.cls", b"4"), ("__meta__", b"?"), ("README", b"?")]:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5
            tar.addfile(member, io.BytesIO(content))
    # webdataset ends the key at the first dot: ".part.jpg" is one extension
    shards = open_shards(tmp_path / "s.tar", required=[["part.jpg"], ["part.cls"]])
    assert shards.read(0) == {"part.jpg": b"x" * 700, "part.cls": b"4"}
    assert shards.key(0) == "s.tar/" + deep.removesuffix(".part")


def _directory(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    return member


def test_pipes_are_copied_once_into_the_cache_and_survive_pickling(folder: Path, tmp_path: Path) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    spec = f"pipe:echo x >> {log}; cat {folder}/shard-{{000000..000002}}.tar"
    shards = open_shards(spec, cache_dir=cache)
    assert [pickle.loads(pickle.dumps(shards)).read(i) for i in range(10)] == SAMPLES
    assert shards.fingerprint() == open_shards(folder).fingerprint()
    open_shards(spec, cache_dir=cache)
    assert log.read_text() == "x\n" * 3


def fetch_in_process(arguments: tuple[str, Path]) -> int:
    return len(open_shards(arguments[0], cache_dir=arguments[1]))


def test_one_process_of_a_node_downloads_for_all(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    spec = f"pipe:echo x >> {log}; sleep 0.3; cat {folder}/shard-000000.tar"
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(fetch_in_process, [(spec, tmp_path / "cache")] * 3) == [4, 4, 4]
    assert log.read_text() == "x\n"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pipe:cat {}/shard-000000.tar; exit 7", r"cannot be fetched: .*exit 7"),
        ("pipe:head -c 3000 {}/shard-000000.tar", r"is no whole tar"),
        ("xyz://bucket/shard-000000.tar", r"no reader for xyz: \(http, https, s3, pipe"),
    ],
)
def test_a_failed_download_names_the_url_and_leaves_nothing(
    folder: Path, tmp_path: Path, spec: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PATIENCE", download.Patience(first_pause_s=0.01))
    with pytest.raises(ShardError, match=message):
        open_shards(spec.format(folder), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_remote_shard_without_a_cache_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ShardError, match=r"set data.cache_dir"):
        open_shards(f"pipe:cat {folder}/shard-000000.tar")


def test_missing_shards_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"2 of 5 shards .* do not exist, the first: .*000003.tar"):
        open_shards(f"{folder}/shard-{{000000..000004}}.tar")
    with pytest.raises(ShardError, match="No shard matches"):
        open_shards(f"{tmp_path}/*.tar")
    with pytest.raises(ShardError, match="list of shards is empty"):
        open_shards([])
    with pytest.raises(ShardError, match="listed more than once"):
        open_shards([folder, folder / "shard-000000.tar"])


def test_the_folder_above_packed_folders_suggests_them(digits: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no .tar shard. Name one of its packed folders: train, validation"):
        open_shards(digits)
