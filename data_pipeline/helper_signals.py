"""Processes that Python starts to help others must outlive the signals that a job sends to all of its processes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_JOB_SIGNALS = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP}
"""What concerns the training process only: Slurm may send it to every process of a job, a terminal to its group."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back signals that concern this process only while helper processes start; they arrive here afterwards.

    The fork server and the resource tracker inherit the blocked mask and keep it, and so do workers until
    `start_worker`: none of them dies of the job's warning signal or of SIGTERM. They end when this process does.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def start_tracker() -> None:
    """Start the process that keeps track of semaphores, unless it runs; whoever starts a process first starts it, too.

    At once, since starting it unblocks SIGTERM here, and a fork server must not inherit that.
    """
    with signals_held():
        resource_tracker.ensure_running()
