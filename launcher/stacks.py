"""The Python stacks of a rank, on request: the rank registers a dump, its guard asks for it and keeps the text.

The text goes through memory shared by both, so that nothing is created on the file system until a rank hangs.
"""

import faulthandler
import os
import signal
import time

STACKS_FD = "MVIT_STACKS_FD"
_WAIT_S = 2.0  # faulthandler writes within milliseconds, if the process runs at all
_LOOK_S = 0.1


def register_dump() -> None:
    """Let SIGUSR1 dump the stacks of all threads, whatever they wait for; and a crash print them to stderr."""
    faulthandler.enable()
    descriptor = os.environ.get(STACKS_FD)
    if descriptor is not None:
        faulthandler.register(signal.SIGUSR1, file=int(descriptor), all_threads=True, chain=False)


def read_stacks(pid: int, descriptor: int) -> str:
    """Ask a rank for its stacks and return them; where it does not answer, words that say so."""
    os.kill(pid, signal.SIGUSR1)
    deadline, size = time.monotonic() + _WAIT_S, 0
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        before, size = size, os.fstat(descriptor).st_size
        if size and size == before:
            break
    text = os.pread(descriptor, size, 0).decode(errors="replace")
    return text or "no answer: the process is stopped, stuck in the kernel, or has not begun to train\n"
