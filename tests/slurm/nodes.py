"""Toy nodes: each its own process table, mounts, host name and network address, on a bridge of the cluster's own."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.slurm import cgroups
from tests.slurm.daemons import Daemons, program
from tests.slurm.processes import children, executable_of, start_time

MARK = "mvit-slurm"
ROOT_PREFIX = f"/tmp/{MARK}-"  # not $TMPDIR: the path of a socket may have 107 letters
NAMESPACES = ["--pid", "--fork", "--kill-child", "--mount", "--uts", "--net", "--mount-proc"]

# Process 1 of a node. It outlives slurmd and reaps what is handed to it, so that a killed slurmd and a power-off
# are two different faults.
INIT = """\
mount --make-rprivate /
mount --bind {root}/hosts /etc/hosts
hostname {name}
tries=0
until ip link show {cable} >/dev/null 2>&1; do
  tries=$((tries+1)); [ $tries -gt 250 ] && exit 9; sleep 0.02
done
ip link set lo up
ip link set {cable} name eth0
ip addr add {address}/24 dev eth0
ip link set eth0 up
{slurmd} -D -N {name} -f {root}/slurm.conf </dev/null >>{root}/log/{name}.out 2>&1 &
while :; do wait; sleep 3600 & done
"""


@dataclass(frozen=True)
class Network:
    """A private network: the controller at .1, the nodes from .11 on."""

    tag: str  # four hex digits that tell this cluster's interfaces from another's
    prefix: str  # the first three numbers of every address

    @property
    def bridge(self) -> str:
        return f"mvb{self.tag}"

    @property
    def controller(self) -> str:
        return f"{self.prefix}.1"

    def address(self, index: int) -> str:
        return f"{self.prefix}.{11 + index}"

    def cable(self, index: int) -> str:
        """Return the name of the bridge's end of a node's cable."""
        return f"mvc{self.tag}n{index}"


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run([program("ip"), *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def namespaces_refused() -> str | None:
    """Return why this machine lets us make no nodes, or None when it does."""
    script = "hostname x && ip link add a0 type veth peer name a1 && ip link add b0 type bridge"
    done = subprocess.run(["unshare", *NAMESPACES, "sh", "-c", script], capture_output=True, text=True)
    return done.stderr.strip() or f"unshare ended with code {done.returncode}" if done.returncode else None


def create_network(root: Path) -> Network:
    """Make the bridge of a cluster, on addresses nobody here uses, marked with who owns it."""
    taken = _ip("-4", "-brief", "address")
    while True:
        first, second, *rest = os.urandom(4)
        prefix = f"10.{64 + first % 190}.{1 + second % 254}"
        if f" {prefix}." not in taken:
            break
    network = Network(tag=bytes(rest).hex(), prefix=prefix)
    _ip("link", "add", network.bridge, "type", "bridge")
    _ip("link", "set", network.bridge, "alias", f"{MARK}:{os.getpid()}:{start_time(os.getpid())}:{root}")
    _ip("address", "add", f"{network.controller}/24", "dev", network.bridge)
    _ip("link", "set", network.bridge, "up")
    return network


def remove_network(network: Network) -> None:
    cgroups.remove(network.tag)
    _ip("link", "del", network.bridge, check=False)


def sweep() -> None:
    """Take away what a killed test run leaves behind: its empty bridge and its folder."""
    for alias in Path("/sys/class/net").glob("mvb*/ifalias"):
        try:
            mark = re.fullmatch(rf"{MARK}:(\d+):(\d+):(.*)", alias.read_text().strip())
        except OSError:  # gone meanwhile: its owner stopped
            continue
        if mark and start_time(int(mark[1])) != mark[2]:
            _ip("link", "del", alias.parent.name, check=False)
            cgroups.remove(alias.parent.name.removeprefix("mvb"))
            if mark[3].startswith(ROOT_PREFIX):
                shutil.rmtree(mark[3], ignore_errors=True)


def boot(daemons: Daemons, network: Network, index: int, name: str, own_cgroup: bool = False) -> None:
    """Start a node: its namespaces, its cable to the bridge, and slurmd in it."""
    root, cable = daemons.root, network.cable(index)
    init = root / "run" / f"{name}.init"
    script = INIT.format(
        root=root, name=name, cable=f"{cable}p", address=network.address(index), slurmd=program("slurmd")
    )
    init.write_text(cgroups.wrap(init, script, network.tag, name) if own_cgroup else script)
    pid = daemons.start(name, [program("unshare"), *NAMESPACES, "sh", str(init)])
    daemons.wait_until(name, lambda: children(pid))
    _ip("link", "del", cable, check=False)  # of a node that was unplugged when it lost its power
    # The namespaces exist once `unshare` has its child; the init script waits for its end of the cable.
    _ip("link", "add", cable, "type", "veth", "peer", "name", f"{cable}p", "netns", str(children(pid)[0]))
    _ip("link", "set", cable, "master", network.bridge, "up")


def cut_power(daemons: Daemons, network: Network, index: int, name: str) -> None:
    """End every process of a node at once, and wait until the last one is gone."""
    if name not in daemons.names():
        return
    for init in children(daemons.pid(name)):
        os.kill(init, 9)  # the kernel kills the namespace with it; `unshare` ends when that is done
    daemons.end(name)
    _ip("link", "del", network.cable(index), check=False)  # unsent data would keep the node's network alive


def slurmd_pids(daemons: Daemons, name: str) -> list[int]:
    """Return the host pids of the slurmd daemon of a node, not of its steps."""
    slurmd = os.path.realpath(program("slurmd"))
    inits = children(daemons.pid(name))
    return [pid for init in inits for pid in children(init) if executable_of(pid) == slurmd]


def set_cable(network: Network, index: int, state: str) -> None:
    """Set a node's cable "up" or "down": its processes live on either way."""
    _ip("link", "set", network.cable(index), state)
