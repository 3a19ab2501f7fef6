"""Settings every test shares: one thread, no GPU probing noise, shards of real digits packed once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist

from mvit import distributed

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; its children would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the Slurm tests and keep what shares fixtures together, for runs on several workers (`make test`).

    Slurm's tests wait most of the time; there is one cluster a machine, so one worker has them all, while the other
    does the rest file by file.
    """
    slurm = Path(__file__).parent / "slurm"
    items.sort(key=lambda item: not item.path.is_relative_to(slurm))  # stable: the order of the others stays
    for item in items:
        group = "slurm" if item.path.is_relative_to(slurm) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


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
