"""The fixture of the launcher's tests: a project of their own, whose processes are gone afterwards."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.project import Project, create_project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = create_project(tmp_path)
    yield project
    for process in project.processes():
        process.kill()
