"""Settings every test shares: one thread, no GPU probing noise, shards of real digits packed once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
from xdist.scheduler import LoadScopeScheduling

from mvit import distributed

torch.set_num_threads(1)
_SLURM = Path(__file__).parent / "slurm"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; its children would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the Slurm tests, which take longest, on several workers (`make test`)."""
    items.sort(key=lambda item: not item.path.is_relative_to(_SLURM))  # stable: the order of the others stays


class _ByFile(LoadScopeScheduling):
    """Gives a worker whole files, and all Slurm tests to one: there is one cluster a machine, and they mostly wait."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "slurm" if "tests/slurm/" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Share the tests out by `_ByFile`; xdist's own groups (3.8) are lost under pytest 9.2."""
    return _ByFile(config, log)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with scikit-learn's digits packed into train/ and validation/ shards."""
    from data_pipeline.pack import pack_digits

    folder = tmp_path_factory.mktemp("digits") / "shards"
    pack_digits(folder)
    return folder


@pytest.fixture
def alone() -> Iterator[distributed.RankInfo]:
    """Make this process a world of one for one test; a group that was there before stays, DeepSpeed holds on to it."""
    was_there = dist.is_initialized()
    yield distributed.start()
    if not was_there:
        distributed.shutdown()
