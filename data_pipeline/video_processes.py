"""Look videos over in processes of their own: one that crashes, or never ends, costs its video and is replaced.

Each process has one video at a time and gets it through a pipe; results are handed on in order, with a bounded number
of them waiting. The time limit is the process's own alarm, whose default action ends it within native code, too, and
even when the packing process is gone.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

from data_pipeline.helper_signals import start_tracker
from data_pipeline.video_inspect import Finding, Inspection, inspect

Work = Callable[[Inspection], Finding]

_READY = "ready"
_MOST_STILLBORN = 5


class ProcessError(ValueError):
    """The processes that decode cannot be started."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    number: int | None = None
    """Of the task it has."""
    task: Inspection | None = None
    is_ready: bool = False


def inspect_all(
    tasks: Iterable[Inspection],
    *,
    workers: int = 0,
    time_limit_s: float = 600,
    work: Work = inspect,
) -> Iterator[tuple[Inspection, Finding]]:
    """Yield each task with what was found, in order; `workers` 0: one per CPU core that this process may use.

    A video whose process dies, or takes longer than `time_limit_s`, has that for its problem. Raises ProcessError if
    a process dies before it could begin.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}; it is a number of processes, or 0 for one per CPU core.")
    crew = _Crew(workers or len(os.sched_getaffinity(0)), time_limit_s, work)
    coming, exhausted = iter(tasks), False
    given: deque[tuple[int, Inspection]] = deque()
    number = 0
    try:
        while True:
            while not exhausted and len(given) < 4 * crew.limit and crew.has_room():
                task = next(coming, None)
                if task is None:
                    exhausted = True
                else:
                    crew.give(number, task)
                    given.append((number, task))
                    number += 1
            while given and given[0][0] in crew.found:
                first, task = given.popleft()
                yield task, crew.found.pop(first)
            if exhausted and not given:
                return
            crew.listen()
    finally:
        crew.end()


class _Crew:
    """The worker processes, and what they have found."""

    def __init__(self, limit: int, time_limit_s: float, work: Work) -> None:
        self.limit = limit
        self.found: dict[int, Finding] = {}
        self._workers: list[_Worker] = []
        self._time_limit_s = time_limit_s
        self._work = work
        self._has_begun = False
        self._num_stillborn = 0  # in a row

    def has_room(self) -> bool:
        """Whether a worker has no task, or one more may be started."""
        return len(self._workers) < self.limit or any(worker.number is None for worker in self._workers)

    def give(self, number: int, task: Inspection) -> None:
        """Give a task to a worker without one; one that died meanwhile is replaced."""
        while True:
            worker = next((worker for worker in self._workers if worker.number is None), None) or self._start()
            try:
                worker.pipe.send(task)
            except OSError:
                self._lose(worker)
            else:
                worker.number, worker.task = number, task
                return

    def listen(self) -> None:
        """Wait until workers with a task say something or die; with no such worker there is nothing to wait for."""
        busy = {worker.pipe: worker for worker in self._workers if worker.number is not None}
        for pipe in wait(list(busy)) if busy else ():
            worker = busy[cast(Connection, pipe)]
            try:
                said = worker.pipe.recv()
            except (EOFError, OSError):
                self._lose(worker)
                continue
            if said == _READY:
                worker.is_ready = self._has_begun = True
                self._num_stillborn = 0
            else:
                assert worker.number is not None
                self.found[worker.number] = said
                worker.number = None

    def end(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def _start(self) -> _Worker:
        start_tracker()
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        ours, theirs = context.Pipe()
        arguments = (theirs, self._time_limit_s, self._work)
        process = context.Process(target=_serve, args=arguments, name="video", daemon=True)
        process.start()
        theirs.close()  # else its end would not be seen when it dies
        self._workers.append(_Worker(process, cast(Connection, ours)))
        return self._workers[-1]

    def _lose(self, worker: _Worker) -> None:
        """Note the death of a worker as what is wrong with its video. Raises ProcessError if it never began."""
        self._workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        exit_code = worker.process.exitcode
        if not worker.is_ready:
            self._num_stillborn += 1
            if not self._has_begun or self._num_stillborn >= _MOST_STILLBORN:
                raise ProcessError(
                    f"A process that decodes videos ended before it began (exit code {exit_code}), "
                    f"{self._num_stillborn} in a row: see what it printed, or ask for fewer --workers."
                )
            if worker.number is not None and worker.task is not None:  # its video has done nothing
                self.give(worker.number, worker.task)
        elif worker.number is not None:
            self.found[worker.number] = Finding(_cause_of_death(exit_code, self._time_limit_s))


def _cause_of_death(exit_code: int | None, time_limit_s: float) -> str:
    if exit_code == -signal.SIGALRM:
        return f"decoding it took longer than {time_limit_s:g} s"
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"the process that decoded it was ended by {name}{memory}"
    return f"the process that decoded it ended with exit code {exit_code}"


def _serve(pipe: Connection, time_limit_s: float, work: Work) -> None:
    """Work until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the packing process decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    pipe.send(_READY)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, time_limit_s)
        try:
            finding = work(task)
        except Exception as error:  # nothing that one video does may end the packing of all
            finding = Finding(f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(finding)
