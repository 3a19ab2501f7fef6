"""Control groups for toy nodes: each sees a hierarchy of its own, so that slurmd's folders are not this machine's.

Slurm 22.05 names its folders after the node, wherever cgroups are mounted: two clusters would share them, and they
would stay behind. So a node starts in a folder made for it, takes a cgroup namespace there, and mounts what it sees.

Version 1 only: slurmd refuses version 2 where both are mounted, as on the machines this was written on.
"""

import os
from pathlib import Path

FREEZER = Path("/sys/fs/cgroup/freezer")
CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=yes\n"

_ENTER = """\
echo 0 >{folder}/cgroup.procs
exec unshare --cgroup sh {init}.inside
"""
_MOUNT = """\
mount --make-rprivate /
mount -t tmpfs none /sys/fs/cgroup
mkdir /sys/fs/cgroup/freezer
mount -t cgroup -o freezer none /sys/fs/cgroup/freezer
"""


def refused() -> str | None:
    """Return why nodes cannot have cgroups of their own here, or None when they can."""
    if not (FREEZER / "cgroup.procs").exists():
        return f"{FREEZER} of cgroup version 1 is not mounted"
    trial = FREEZER / f"mvit-try-{os.getpid()}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        return str(error)
    return None


def wrap(init: Path, script: str, tag: str, name: str) -> str:
    """Return the script that enters a node's own cgroup and goes on with the given one there."""
    folder = FREEZER / f"mvit-{tag}-{name}"
    _remove_tree(folder)  # of the node's life before a power-off
    folder.mkdir()
    Path(f"{init}.inside").write_text(_MOUNT + script)
    return _ENTER.format(folder=folder, init=init)


def remove(tag: str) -> None:
    """Remove the cgroups of all nodes of a cluster; they are empty once the nodes are without power."""
    for folder in FREEZER.glob(f"mvit-{tag}-*"):
        _remove_tree(folder)


def _remove_tree(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):  # a cgroup's files go with it
        os.rmdir(folder)
