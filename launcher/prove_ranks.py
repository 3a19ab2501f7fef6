"""The ranks of one attempt of a proof: plain processes of this machine, watched, and ended as a whole.

Each rank leads a process group of its own, so that its data workers end with it, and dies with this process.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.job import record_error
from launcher.preemption import EXIT_FAILED
from launcher.processes import free_port
from launcher.run_folder import rank_file, read_records, write_json

GRACE_S = 5.0  # for the other ranks to write their own traceback after one has failed
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def planned(plan: Mapping[str, object], folder: Path) -> list[str]:
    """Write down what the ranks of an attempt do and return the command that makes a process one of them."""
    write_json(folder / "plan.json", plan)
    return [sys.executable, "-m", "launcher.prove_ranks", str(folder / "plan.json")]


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    exit_code: int | None
    """Negative: the signal that killed it, as `subprocess` has it. None: ended here, because of another rank."""


class StalledError(RuntimeError):
    """The ranks did nothing for too long and were ended."""


def run_ranks(
    command: Sequence[str],
    world_size: int,
    folder: Path,
    *,
    stall_s: float,
    is_over: Callable[[], bool] = lambda: False,
    tick: Callable[[], int],
) -> list[RankEnd]:
    """Start `command` as `world_size` ranks, wait for their end, and leave none behind; returns how each ended.

    Logs and errors are written to `folder`. When a rank fails, or is killed, the others are killed, too: after
    `GRACE_S`, at once if `is_over` says that it was meant. `tick` is called again and again; it returns a number that
    changes while the ranks make progress. Raises StalledError if it is the same for `stall_s`.
    """
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world_size):
            with rank_file(folder, rank, ".log").open("wb") as log:
                process = subprocess.Popen(
                    command,
                    env=_environment(rank, world_size, port),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            processes.append(process)
        return _watch(processes, stall_s, is_over, tick)
    finally:
        for process in processes:
            _end(process)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the rank's environment; a rank of a CPU world computes with one thread, so that they do not compete."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def _die_with_parent() -> None:
    """Run between fork and exec: whatever ends this command, no rank goes on alone."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(
    processes: Sequence["subprocess.Popen[bytes]"], stall_s: float, is_over: Callable[[], bool], tick: Callable[[], int]
) -> list[RankEnd]:
    deadline, progress, since = None, tick(), time.monotonic()
    while True:
        codes = [_exit_code(process) for process in processes]
        now = time.monotonic()
        if None not in codes or (deadline is not None and now > deadline):
            return [RankEnd(rank, code) for rank, code in enumerate(codes)]
        if deadline is None and any(codes):
            deadline = now if is_over() else now + GRACE_S
        latest = tick()
        if latest != progress:
            progress, since = latest, now
        elif now - since > stall_s:
            raise StalledError(f"no rank did anything for {stall_s:g} s")
        time.sleep(_POLL_S)


def _exit_code(process: "subprocess.Popen[bytes]") -> int | None:
    """Look how a rank ended without reaping it: while it is a zombie, its process group cannot be a stranger's."""
    state = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a rank and its data workers, and reap it."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failure_of(folder: Path, ends: Sequence[RankEnd], num_lines: int = 20) -> str:
    """Tell what the first rank that failed said: its exception, how it ended, and the last lines of its log."""
    errors = sorted(read_records(folder, "rank_*.error.json"), key=lambda error: error["time"])
    if errors:
        rank, told = errors[0]["rank"], f"rank {errors[0]['rank']}: {errors[0]['type']}: {errors[0]['message']}"
    else:
        failed = next((end for end in ends if end.exit_code), None)
        if failed is None:
            rank, told = 0, "no rank failed by itself"
        else:
            rank, told = failed.rank, f"rank {failed.rank} {_how(failed.exit_code or 0)}"
    log = rank_file(folder, rank, ".log")
    lines = log.read_text(errors="replace").splitlines()[-num_lines:] if log.exists() else []
    return "\n".join([told, f"--- end of {log}", *lines])


def first_error(folder: Path) -> str:
    """Return the first exception of any rank as `type: message`, empty if there was none."""
    errors = sorted(read_records(folder, "rank_*.error.json"), key=lambda error: error["time"])
    return f"{errors[0]['type']}: {errors[0]['message']}" if errors else ""


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL, not by the proof: often the kernel's out-of-memory killer (see dmesg)"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def main(arguments: Sequence[str]) -> int:
    """Train as the rank that the environment names, by what `planned` wrote down."""
    plan = json.loads(Path(arguments[0]).read_text())
    try:
        from mvit import distributed
        from mvit.config import parse_config
        from mvit.prove_run import train_traced

        train_traced(
            parse_config(plan["config"]),
            Path(plan["run_dir"]),
            Path(plan["traces"]),
            steps=plan["steps"],
            kill_at=plan["kill_at"],
        )
        distributed.shutdown()
    except BaseException as error:  # leave a trace, then no atexit: NCCL or a data worker may hang there
        record_error(Path(arguments[0]).parent, int(os.environ["RANK"]), error)
        sys.stdout.flush()
        os._exit(EXIT_FAILED)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
