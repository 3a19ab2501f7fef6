"""The parent of one local rank: knows how it ended, ends the job when any rank dies, leaves no process behind.

submitit's local executor neither looks at exit codes nor ends the other ranks, and its tasks outlive it. So each task
is this small process (no torch, no lock that training could hold), which starts the rank and then watches the rank,
the guards of the other ranks and submitit's controller. Linux only: it uses /proc, prctl and sigtimedwait.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.failure import describe_end
from launcher.lives import close_attempt_if_over, is_alive_record
from launcher.preemption import EXIT_STOPPED, STOP_SIGNALS
from launcher.processes import identify
from launcher.run_folder import rank_file, read_records, write_json

POLL_S = 0.25
GRACE_S = 1.5  # for a rank to write its own traceback after a peer has failed
_WATCHED = {signal.SIGCHLD, *STOP_SIGNALS}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Guard:
    """One rank's guard: where its attempt keeps records, and whom it watches."""

    attempt_dir: Path
    rank: int
    world_size: int
    controller_pid: int

    def run(self, command: Sequence[str]) -> int:
        """Start the rank, watch until it has ended, record how, and return its exit code (128 + signal)."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # collected by sigtimedwait below: no handlers, no races
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # whatever the rank leaves behind becomes our child
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=_prepare_rank)
        record = self._record(child.pid)
        self._write(record)
        ended_because = self._watch(child.pid)
        _kill_descendants(keep=child.pid)  # data workers first; the dead rank keeps its pid until it is reaped
        code = child.wait()
        record |= {
            "ended": time.time(),
            "exit_code": code if code >= 0 else None,
            "signal": signal.Signals(-code).name if code < 0 else None,
            "ended_because": ended_because,
        }
        self._write(record)
        if (headline := describe_end(record)) is not None:
            print(headline, file=sys.stderr, flush=True)
        return code if code >= 0 else 128 - code

    def _watch(self, pid: int) -> str | None:
        """Wait for the rank's end; return why this guard ended it, None if it ended by itself."""
        deadline, reason = None, None
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            received = signal.sigtimedwait(_WATCHED, POLL_S)
            if received is not None and received.si_signo != signal.SIGCHLD:
                os.kill(pid, received.si_signo)
            if os.getppid() != self.controller_pid:
                reason = f"submitit's controller (pid {self.controller_pid}) is gone"
                os.kill(pid, signal.SIGKILL)
            elif deadline is None:
                reason = self._failed_peer()
                deadline = None if reason is None else time.monotonic() + GRACE_S
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        return reason

    def _failed_peer(self) -> str | None:
        for record in read_records(self.attempt_dir, "rank_[0-9]*[0-9].json"):
            if record["rank"] == self.rank:
                continue
            if "ended" in record:
                if record["exit_code"] not in (0, EXIT_STOPPED):
                    return f"rank {record['rank']} failed"
            elif not is_alive_record(record):
                return f"the guard of rank {record['rank']} is gone"
        return None

    def _record(self, pid: int) -> dict[str, Any]:
        guard = identify(os.getpid())
        assert guard is not None
        process = identify(pid)
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "pid": pid,
            "process": None if process is None else process.to_dict(),
            "guard": guard.to_dict(),
            "started": time.time(),
        }

    def _write(self, record: dict[str, Any]) -> None:
        write_json(rank_file(self.attempt_dir, self.rank, ".json"), record)


def _prepare_rank() -> None:
    """Run between fork and exec in the rank: it dies with its guard, and ignores USR2 until it has a handler."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


def _kill_descendants(keep: int) -> None:
    import psutil  # here, since starting is the common case and this the rare one

    for _ in range(5):  # a process killed while forking leaves one more
        children = [child for child in psutil.Process().children(recursive=True) if child.pid != keep]
        if not children:
            return
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(children, timeout=1)


def main(arguments: Sequence[str]) -> int:
    """Run `ATTEMPT_DIR COMMAND…` as the rank that submitit's environment names."""
    attempt_dir = Path(arguments[0])
    guard = Guard(
        attempt_dir=attempt_dir,
        rank=int(os.environ["SUBMITIT_LOCAL_GLOBALID"]),
        world_size=int(os.environ["SUBMITIT_LOCAL_NTASKS"]),
        controller_pid=int(os.environ["SUBMITIT_LOCAL_JOB_ID"]),
    )
    code = guard.run(arguments[1:])
    close_attempt_if_over(attempt_dir, guard.world_size)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
