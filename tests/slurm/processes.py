"""What /proc tells about processes: who descends from whom, and with which environment each was started."""

from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the direct children of a process; none when it is gone."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """Return everything below a process, parents before their children."""
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment a process was started with; empty when it is gone."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)


def executable_of(pid: int) -> str:
    """Return the path of the program a process runs; empty when it is gone."""
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return ""


def start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since boot: with the pid it names a process for good."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""
