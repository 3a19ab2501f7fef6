"""What run.json says: which run this is, what was typed, and with which code and versions it was made."""

import getpass
import platform
import shlex
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launcher.snapshot import package_dir

_VERSIONS_OF = ("torch", "torchvision", "timm", "deepspeed", "submitit", "webdataset", "numpy")


def describe_run(
    name: str, command: Sequence[str], code_sha256: str, cluster: Mapping[str, object] | None
) -> dict[str, Any]:
    """Return the content of a new run's run.json; `cluster` is None for a run of `mvit train`."""
    return {
        "id": uuid.uuid4().hex,
        "name": name,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(command),
        "cwd": str(Path.cwd()),  # relative paths of the recipe start here, in every attempt
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "python": platform.python_version(),
        "versions": _versions(),
        "git": _git_state(package_dir("launcher")),
        "code_sha256": code_sha256,
        "cluster": None if cluster is None else dict(cluster),
    }


def _versions() -> dict[str, str | None]:
    return {package: _version_or_none(package) for package in _VERSIONS_OF}


def _version_or_none(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, object] | None:
    """Return commit and whether files differ from it, None outside a git checkout or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
