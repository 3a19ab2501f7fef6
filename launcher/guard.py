"""The parent of one rank: knows how it ended, ends the job when any rank dies or hangs, leaves no process behind.

Neither of submitit's executors does that. Locally nobody looks at exit codes and tasks outlive their controller; under
Slurm a rank that was killed leaves no word, and one that hangs takes the allocation with it. So each task is this small
process (no torch, no lock that training could hold), which starts the rank and then watches the rank, the marks that
other guards and later lives leave in the run folder, and its own parent. Linux only: /proc, prctl, sigtimedwait.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.claims import owner_of
from launcher.failure import describe_end
from launcher.heartbeat import HEARTBEAT_FD, Heartbeat
from launcher.lives import close_attempt_if_over, is_alive_record
from launcher.preemption import EXIT_FENCED, EXIT_HUNG, STOP_SIGNALS
from launcher.processes import describe_state, identify, node_name
from launcher.run_folder import RunFolder, rank_file, read_records, write_first, write_json
from launcher.say import say
from launcher.stacks import STACKS_FD, read_stacks
from launcher.watchdog import RESERVE_S, AwakeClock, Stall, Watchdog

POLL_S = 0.25
GRACE_S = 1.5  # for a rank to write its own traceback after a peer has failed
_RANKS_PER_LOOK_PER_S = 100  # of all guards together at the run folder: a shared file system serves others too
_WATCHED = {signal.SIGCHLD, *STOP_SIGNALS}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Guard:
    """One rank's guard: where its attempt keeps records, and whom it watches."""

    run: RunFolder
    attempt: int
    rank: int
    world_size: int
    parent_pid: int  # submitit's controller, or Slurm's step daemon
    is_local: bool
    hang_timeout_s: float | None = None
    start_timeout_s: float = 1800.0

    @property
    def attempt_dir(self) -> Path:
        return self.run.attempt_dir(self.attempt)

    @property
    def look_s(self) -> float:
        """How often this guard looks into the run folder."""
        return max(2 * POLL_S, self.world_size / _RANKS_PER_LOOK_PER_S)

    def guard(self, command: Sequence[str]) -> int:
        """Start the rank, watch until it has ended, record how, and return its exit code (128 + signal)."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # collected by sigtimedwait below: no handlers, no races
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # whatever the rank leaves behind becomes our child
        heartbeat, stacks = Heartbeat.create(), os.memfd_create("mvit-stacks", 0)
        child = subprocess.Popen(
            command,
            start_new_session=True,
            preexec_fn=_prepare_rank,
            pass_fds=(heartbeat, stacks),
            env=os.environ | {HEARTBEAT_FD: str(heartbeat), STACKS_FD: str(stacks)},
        )
        watch = _Watch(self, child.pid, Heartbeat(heartbeat), stacks)
        watch.until_end()
        _kill_descendants(keep=child.pid)  # data workers first; the dead rank keeps its pid until it is reaped
        code = child.wait()
        watch.record_end(code)
        if watch.exit_code is not None:
            return watch.exit_code
        return code if code >= 0 else 128 - code


class _Watch:
    """A rank being watched: what is known of it, why it is being ended, and its record."""

    def __init__(self, guard: Guard, pid: int, heartbeat: Heartbeat, stacks: int) -> None:
        self._guard, self._pid, self._heartbeat, self._stacks = guard, pid, heartbeat, stacks
        # A look after the limit every guard knows of the hang, another one later all are ended.
        self._watchdog = Watchdog(guard.hang_timeout_s, guard.start_timeout_s, RESERVE_S + 2 * guard.look_s)
        self._clock = AwakeClock(time.monotonic())
        self._has_begun = self._hangs_somewhere = False
        self._told: set[str] = set()
        self._ended = 0.0
        self._reason: str | None = None
        self._deadline = float("inf")  # when the rank is killed
        self._next_look = time.monotonic()
        self.exit_code: int | None = None
        """What the guard exits with instead of the rank's code."""
        own, process = identify(os.getpid()), identify(pid)
        assert own is not None
        self._record: dict[str, Any] = {
            "rank": guard.rank,
            "world_size": guard.world_size,
            "node": node_name(),
            "pid": pid,
            "process": None if process is None else process.to_dict(),
            "guard": own.to_dict(),
            "started": time.time(),
            "signals": [],
        }
        self._write()

    def until_end(self) -> None:
        """Watch until the rank has ended, and end it where there is a reason to."""
        while os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            received = signal.sigtimedwait(_WATCHED, POLL_S)
            if received is not None and received.si_signo in STOP_SIGNALS:  # 0 after a suspension
                self._forward(received.si_signo)
            now = time.monotonic()
            beat = self._heartbeat.read()
            stall = self._watchdog.look(beat, self._clock.read(now))
            if beat is not None and not self._has_begun:
                self._has_begun = True
                self._forward_again()
            if os.getppid() != self._guard.parent_pid:
                who = "submitit's controller" if self._guard.is_local else "Slurm's step daemon"
                self._end_because(f"{who} (pid {self._guard.parent_pid}) is gone", 0.0)
            elif now >= self._next_look or (stall is not None and self._reason is None):
                self._next_look = now + self._guard.look_s
                self._look(stall)
            if now > self._deadline:
                os.kill(self._pid, signal.SIGKILL)
        self._ended = time.time()  # now: what follows takes its time, and the order of the ranks' ends tells the first

    def record_end(self, code: int) -> None:
        """Write how the rank ended, and tell the other guards if it ended badly by itself."""
        self._record |= {
            "ended": self._ended,
            "exit_code": code if code >= 0 else None,
            "signal": signal.Signals(-code).name if code < 0 else None,
            "ended_because": self._reason,
        } | self._last_beat()
        self._write()
        if (headline := describe_end(self._record)) is None:
            return
        say(headline)
        if self._reason is None and code != EXIT_FENCED:
            mark = {"rank": self._guard.rank, "time": time.time()}
            self._try(lambda: write_first(self._guard.attempt_dir / "failed.json", mark), "the mark of this failure")

    def _forward(self, signum: int) -> None:
        os.kill(self._pid, signum)
        received = {"name": signal.Signals(signum).name, "time": time.time()}
        self._record |= {"signals": [*self._record["signals"], received]} | self._last_beat()
        self._write()  # at once: SIGKILL may be next

    def _forward_again(self) -> None:
        """Repeat what was forwarded before the rank had handlers: it ignored that."""
        for received in self._record["signals"]:
            os.kill(self._pid, signal.Signals[received["name"]])

    def _look(self, stall: Stall | None) -> None:
        """Look for a reason to end the rank: a later life, a failed or hung peer, its own silence."""
        self._try(self._look_at_run, "a look into the run folder")
        if self._reason is not None:
            return
        if stall is not None:
            self._try(lambda: write_first(self._hang_file, self._hang(stall)), "the mark of this hang")
        if stall is not None or self._hangs_somewhere:
            self._dump(stall)

    def _look_at_run(self) -> None:
        if (owner := owner_of(self._guard.run.path)) > self._guard.attempt:
            self.exit_code = EXIT_FENCED
            self._end_because(f"life {owner} of the run has taken over", 0.0)
        if self._reason is None and (peer := self._failed_peer()):
            self._end_because(peer, GRACE_S)
        self._hangs_somewhere = self._hang_file.exists()

    @property
    def _hang_file(self) -> Path:
        return self._guard.attempt_dir / "hang.json"

    def _hang(self, stall: Stall) -> dict[str, Any]:
        return {
            "rank": self._guard.rank,
            "node": node_name(),
            "step": stall.step,
            "phase": stall.phase,
            "age_s": round(stall.age_s, 1),
            "limit_s": stall.limit_s,
            "time": time.time(),
        }

    def _dump(self, stall: Stall | None) -> None:
        """Dump this rank's stacks, since some rank hangs, and end it when all others had time to do the same."""
        self._record |= {"hung": stall is not None, "state": describe_state(self._pid)} | self._last_beat()
        stacks = read_stacks(self._pid, self._stacks)
        file = rank_file(self._guard.attempt_dir, self._guard.rank, ".stacks.txt")
        if not self._try(lambda: file.write_text(stacks), "the stacks of its rank, which are below"):
            say(stacks)
        self._write()
        self.exit_code = EXIT_HUNG
        self._end_because("a rank hangs (hang.json)", 2 * self._guard.look_s + 1)

    def _end_because(self, reason: str, grace_s: float) -> None:
        if self._reason is None:
            self._reason, self._deadline = reason, time.monotonic() + grace_s

    def _failed_peer(self) -> str | None:
        if (mark := self._guard.attempt_dir / "failed.json").exists():
            failed = read_records(mark.parent, mark.name)
            return f"rank {failed[0]['rank']} failed" if failed else None
        if self._guard.is_local:  # a guard that was killed leaves no mark; under Slurm srun sees it
            for record in read_records(self._guard.attempt_dir, "rank_[0-9]*[0-9].json"):
                if record["rank"] != self._guard.rank and "ended" not in record and not is_alive_record(record):
                    return f"the guard of rank {record['rank']} is gone"
        return None

    def _last_beat(self) -> dict[str, Any]:
        beat = self._heartbeat.read()
        if beat is None:
            return {"last_step": None, "last_phase": None, "last_beat": None}
        return {"last_step": beat.step, "last_phase": beat.phase, "last_beat": beat.time}

    def _write(self) -> None:
        file = rank_file(self._guard.attempt_dir, self._guard.rank, ".json")
        self._try(lambda: write_json(file, self._record), "its record")

    def _try(self, action: Callable[[], object], what: str) -> bool:
        """Do something with the file system, go on if it is full or away, and say whether it was done.

        The rank dies with its guard: it must live on and save, and its exit code must not be lost.
        """
        try:
            action()
            return True
        except OSError as error:
            if (told := f"the guard of rank {self._guard.rank} lacks {what}: {error}") not in self._told:
                self._told.add(told)  # a look fails several times a second
                say(told)
            return False


def _prepare_rank() -> None:
    """Run between fork and exec in the rank: it dies with its guard, and ignores signals until it has handlers."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks for the stacks, later
    for signum in STOP_SIGNALS:  # told again once it has handlers
        signal.signal(signum, signal.SIG_IGN)
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
    """Run `RUN_DIR FIRST_ATTEMPT HANG_TIMEOUT_S START_TIMEOUT_S COMMAND…` as the rank the environment names.

    A hang timeout of 0 is derived from the step time.
    """
    run, first_attempt, hang_s, start_s = RunFolder(Path(arguments[0])), *map(int, arguments[1:4])
    is_local = "SUBMITIT_LOCAL_GLOBALID" in os.environ
    prefix = "SUBMITIT_LOCAL_GLOBALID SUBMITIT_LOCAL_NTASKS" if is_local else "SLURM_PROCID SLURM_NTASKS"
    rank, world_size = (int(os.environ[name]) for name in prefix.split())
    guard = Guard(
        run,
        first_attempt + (0 if is_local else int(os.environ.get("SLURM_RESTART_COUNT") or 0)),
        rank,
        world_size,
        int(os.environ["SUBMITIT_LOCAL_JOB_ID"]) if is_local else os.getppid(),
        is_local,
        hang_s or None,
        start_s,
    )
    code = guard.guard(arguments[4:])
    if is_local:
        close_attempt_if_over(guard.run, guard.attempt, world_size)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
