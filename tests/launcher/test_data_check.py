"""A submission finds in milliseconds what would end the job on its nodes: absent, cut or ill-fitting shards."""

import shutil
from pathlib import Path

import pytest

from launcher.cluster import ClusterError
from launcher.submit import check_data_is_there
from tests.mvit.test_training import tiny_config


def test_good_shards_pass(digits: Path, tmp_path: Path) -> None:
    assert check_data_is_there(tiny_config(digits, tmp_path)) is None


def test_more_classes_than_the_model_has_are_refused(digits: Path, tmp_path: Path) -> None:
    config = tiny_config(digits, tmp_path, model={"num_classes": 9})
    with pytest.raises(ClusterError, match=r"num_classes = 9, but data\.train .* has 10 classes; set .*num_classes=10"):
        check_data_is_there(config)


def test_a_shard_shorter_than_its_manifest_says_is_refused(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cut"
    shutil.copytree(digits, copy)
    shard = next((copy / "validation").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ClusterError, match=r"data\.validation = .*bytes, its manifest says"):
        check_data_is_there(tiny_config(copy, tmp_path))


def test_no_training_shards_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"data\.train is not set"):
        check_data_is_there(tiny_config(digits, tmp_path, data={"train": None}))
