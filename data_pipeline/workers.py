"""What decoding workers need from the process world: signals, threads and fast starts."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

import torch

from data_pipeline.helper_signals import start_tracker

_LOOK_S = 2.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT_BYTES = -1, -3, 2**25


def start_worker(worker_id: int) -> None:
    """Prepare a worker process: one thread, and signals that only concern the training process ignored.

    At a preemption Slurm may send SIGTERM to every descendant of a job (proctrack/linuxproc). The training process then
    saves, for which it needs its workers: only the SIGTERM that it sends itself, by which torch ends a worker that does
    not leave, ends one. And a worker leaves when it is gone.
    """
    import cv2

    del worker_id
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before any other thread: all inherit it
    threading.Thread(target=_leave_with_trainer, name="leave-with-trainer", daemon=True).start()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let this process keep up to 32 MiB that it has freed, for the next picture.

    glibc gives each decoded picture's memory back to the kernel, which then clears it page by page for the next one:
    a tenth of a worker's time. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _leave_with_trainer() -> None:
    """End this worker when its training process says so by SIGTERM, or is gone.

    A signal handler of Python is not told who sent a signal. And torch's workers watch their parent, which is the fork
    server here: that stays as long as a worker does, and both would outlive a training process that was killed.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    while trainer.is_alive():
        told = signal.sigtimedwait({signal.SIGTERM}, _LOOK_S)
        if told is not None and told.si_pid == trainer.pid:
            break
    os._exit(0)


def preload_workers() -> None:
    """Let the fork server import once what this process has loaded of the package.

    Workers then start in milliseconds. Without it each worker imports torch (and timm) by itself, which takes
    CPU-seconds per worker. No effect on a fork server that already runs.
    """
    # The heavy ones by name: before Python 3.12 the fork server's path lacks what the parent added to its own.
    heavy = [name for name in ("torch", "cv2", "timm.data.auto_augment") if name in sys.modules]
    ours = sorted(name for name in sys.modules if name.startswith("data_pipeline."))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", *heavy, *ours])
    start_tracker()
