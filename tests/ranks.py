"""Runs an ordinary function on several ranks, each a process of its own joined by gloo."""

import io
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.helper_signals import start_tracker
from launcher.processes import free_port

TIMEOUT_S = 600


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return what each rank returned, in rank order.

    `function` must be importable (defined at the top of a test module). An exception on any rank fails the test with
    that rank's traceback.
    """
    processes, queue = _spawn(function, world_size, args)
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, error = queue.get(timeout=TIMEOUT_S)
            assert error is None, f"rank {rank} of {world_size}:\n{error}"
            results[rank] = torch.load(io.BytesIO(result), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=20 if len(results) == world_size else 0.1)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def _spawn(function: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> tuple[list[Any], Any]:
    start_tracker()  # later tests send signals to every helper of this process
    context = multiprocessing.get_context("spawn")
    port, queue = free_port(), context.Queue()
    processes = [
        context.Process(target=_rank, args=(function, args, rank, world_size, port, queue))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, queue


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, queue: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        # Bytes, because tensors in a queue are shared memory that ends with the process.
        result = io.BytesIO()
        torch.save(function(*args), result)
        queue.put((rank, result.getvalue(), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise


def run_until_killed(function: Callable[..., Any], world_size: int, *args: Any) -> int:
    """Call `function(*args)` on `world_size` ranks until one is killed by a signal; then kill the others, too.

    Returns the rank that died first. Fails if all ranks come to their end.
    """
    processes, _ = _spawn(function, world_size, args)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            codes = [process.exitcode for process in processes]
            if -signal.SIGKILL in codes:
                return codes.index(-signal.SIGKILL)
            assert not all(code is not None for code in codes), f"nobody was killed; exit codes {codes}"
            time.sleep(0.05)
        raise AssertionError(f"no rank was killed within {TIMEOUT_S} s")
    finally:
        for process in processes:
            process.kill()
            process.join()
