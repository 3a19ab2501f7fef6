"""The daemons of one cluster: children of the test process that die with it and are ended by their pid."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

START_S = 30.0  # a daemon that is not ready by then never will be


def program(name: str) -> str:
    """Return the path of an installed program, also of one in the system's sbin folders."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise FileNotFoundError(f"{name} is not installed")
    return path


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what a surrounding Slurm job put there."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))}


class Daemons:
    """The running daemons of a cluster, by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> int:
        """Start a daemon in the foreground, its output in log/<name>.out, and return its pid."""
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                # The kernel kills the daemon when the thread that started it ends, however that happens.
                [program("setpriv"), "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
                env={**clean_environment(), **(environment or {})},
                start_new_session=True,
            )
        return self._processes[name].pid

    def end(self, name: str, timeout_s: float = 10.0) -> None:
        """Ask a daemon to end, and kill it when it does not."""
        process = self._processes.pop(name, None)
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self, name: str) -> None:
        """End a daemon without giving it a chance to say goodbye."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def names(self) -> list[str]:
        return list(self._processes)

    def ensure_alive(self, name: str) -> None:
        """Raise with the end of its log when a daemon ended unasked."""
        code = self._processes[name].poll()
        if code is not None:
            raise RuntimeError(f"{name} ended with code {code}:\n{self.last_words(name)}")

    def last_words(self, name: str) -> str:
        logs = [self.root / "log" / f"{name}.{suffix}" for suffix in ("log", "out")]
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs if log.exists())

    def wait_until(self, name: str, ready: Callable[[], object], timeout_s: float = START_S) -> None:
        """Wait until a daemon does what it is for; raise when it ends before, or takes too long."""
        end = time.monotonic() + timeout_s
        while not ready():
            self.ensure_alive(name)
            if time.monotonic() > end:
                raise TimeoutError(f"{name} is not ready after {timeout_s} s:\n{self.last_words(name)}")
            time.sleep(0.02)


def answers(host: str, port: int) -> bool:
    """Tell whether somebody accepts connections there."""
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True
