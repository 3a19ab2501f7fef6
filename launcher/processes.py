"""Knowing a process again (pid, start time and boot: a signal never reaches a stranger), and a port for its ranks."""

import os
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that can be told from a later one that got the same pid."""

    pid: int
    start_ticks: int  # clock ticks after boot, field 22 of /proc/PID/stat
    boot_id: str  # of the machine's current boot; another machine has another one
    host: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def identify(pid: int) -> ProcessIdentity | None:
    """Return the identity of a live process, None when there is none (a zombie counts as none)."""
    start_ticks = _start_ticks(pid)
    if start_ticks is None:
        return None
    return ProcessIdentity(pid, start_ticks, _boot_id(), socket.gethostname())


def identity_from(record: dict[str, object] | None) -> ProcessIdentity | None:
    """Read back what `to_dict` wrote, None for None."""
    if record is None:
        return None
    pid, start_ticks = record["pid"], record["start_ticks"]
    assert isinstance(pid, int)
    assert isinstance(start_ticks, int)
    return ProcessIdentity(pid, start_ticks, str(record["boot_id"]), str(record["host"]))


def node_name() -> str:
    """Return this machine's name, as Slurm calls it inside one of its jobs."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def describe_state(pid: int) -> str:
    """Say what the kernel says a process is doing: running, sleeping, stopped, waiting for a device …"""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        where = Path(f"/proc/{pid}/wchan").read_text().strip("0")
    except OSError:
        return "gone"
    words = {"R": "running", "S": "sleeping", "D": "waiting for a device or file system", "T": "stopped by a signal"}
    return words.get(state, state) + (f" in {where}" if where else "")


def is_local(process: ProcessIdentity) -> bool:
    """Tell whether the process belongs to this boot of this machine; of others nothing is known here."""
    return process.boot_id == _boot_id() and process.host == socket.gethostname()


def is_alive(process: ProcessIdentity) -> bool:
    """Tell whether that very process still runs on this machine."""
    return is_local(process) and _start_ticks(process.pid) == process.start_ticks


def send_signal(process: ProcessIdentity, signum: signal.Signals) -> bool:
    """Send a signal if the process is still the one meant; return whether it was sent."""
    if not is_alive(process):
        return False
    try:
        os.kill(process.pid, signum)
    except ProcessLookupError:  # it ended between the two lines
        return False
    return True


def _start_ticks(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may itself hold spaces
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def free_port() -> int:
    """Return a TCP port nobody on this host listens on, below the range that connections take theirs from.

    The process that will listen has to import torch first: a port of that range may be taken by then. Raises OSError
    if there is none.
    """
    first = int.from_bytes(os.urandom(2), "big")
    for port in (12000 + (first + offset) % 18000 for offset in range(18000)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 12000 and 30000")
