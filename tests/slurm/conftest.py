"""The cluster of the Slurm tests: four toy nodes, up while these tests run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable_reason

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def slurm_available() -> None:
    """Skip a test that needs a cluster where none can run, and say why."""
    reason = unavailable_reason()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="package")
def cluster(slurm_available: None) -> Iterator[Cluster]:
    """Return a running cluster of four nodes; a test leaves its nodes idle. Tests of other folders find it gone."""
    with Cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take what a failed test leaves in the queue out of it, so that the tests after it have the nodes they expect."""
    yield
    if "cluster" not in request.fixturenames:
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    if cluster.run("squeue", "-h"):
        cluster.run("scancel", "-u", "root")
        cluster.wait_nodes("idle")
