"""What decoding workers need from the process world: signals, threads and fast starts."""

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_JOB_SIGNALS = {signal.SIGUSR1, signal.SIGUSR2}


def start_worker(worker_id: int) -> None:
    """Prepare a worker process: one thread, and signals that only concern the training process ignored.

    Slurm may send a job's warning signal to every descendant, and a worker that inherited the parent's SIGTERM handler
    could not be terminated: the job would finish and yet run until its time limit.
    """
    import cv2

    del worker_id
    for number in _JOB_SIGNALS | {signal.SIGINT}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back SIGUSR1 and SIGUSR2 while helper processes start; they arrive here afterwards, none is lost.

    The fork server and the resource tracker inherit the blocked mask, and so do workers until `start_worker`: the job's
    warning signal, whose default action is to kill, cannot hit them.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def preload_workers() -> None:
    """Let the fork server import once what this process has loaded of the package.

    Workers then start in milliseconds. Without it each worker imports torch (and timm) by itself, which takes
    CPU-seconds per worker. No effect on a fork server that already runs.
    """
    # The heavy ones by name: before Python 3.12 the fork server's path lacks what the parent added to its own.
    heavy = [name for name in ("torch", "cv2", "timm.data.auto_augment") if name in sys.modules]
    ours = sorted(name for name in sys.modules if name.startswith("data_pipeline."))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", *heavy, *ours])
