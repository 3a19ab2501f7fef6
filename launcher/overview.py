"""Several runs at a glance: found under a folder, one line each, refreshed while somebody watches."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.run_folder import RunFolder, RunFolderError
from launcher.slurm_queue import SlurmQueue
from launcher.status import RunState, run_state

WATCH_S = 2.0
_NAMED = 5  # runs that an error names
_DEPTH = 3  # folders below `runs` that are looked through: output_dir may be runs/sweep/seed
_ORDER = ("running", "pending", "failed", "stopped", "finished")
_HEADER = ("run", "state", "attempt", "step", "%", "samples/s", "loss", "ETA", "goodput", "job")
_CLEAR = "\x1b[H\x1b[2J"  # the screen, not what was scrolled off it


@dataclass(frozen=True)
class Overview:
    """What was found out about several runs."""

    states: list[RunState]
    errors: dict[str, str]  # run folder → why nothing is known of it

    def to_list(self) -> list[dict[str, object]]:
        broken: list[dict[str, object]] = [{"run_dir": run_dir, "error": text} for run_dir, text in self.errors.items()]
        return [*(state.to_dict() for state in self.states), *broken]

    @property
    def at_rest(self) -> bool:
        return all(state.at_rest for state in self.states)

    def __str__(self) -> str:
        rows = [_HEADER, *(_row(state) for state in self.states)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        numbers = range(2, 9)
        lines = [
            "  ".join(
                cell.rjust(width) if column in numbers else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(f"error: {text}" for text in self.errors.values())])


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders in `folder`, at most three levels down.

    Raises RunFolderError when there are none.
    """
    found: list[Path] = []
    top = len(folder.parts)
    for path, folders, files in os.walk(folder):
        here = Path(path)
        if "run.json" in files:
            found.append(here)
        if "run.json" in files:
            folders[:] = [name for name in folders if name == "evaluation"]  # the last job of a chain has its own
        elif len(here.parts) - top >= _DEPTH:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    if not found:
        what = "holds no run folder" if folder.is_dir() else "does not exist"
        raise RunFolderError(f"{folder} {what}: name the runs (mvit status RUN …), or their folder with --runs DIR.")
    return sorted(found)


def the_run(path: Path) -> RunFolder:
    """Return a run's folder.

    Raises RunFolderError if it is none, naming the runs in it: the folder of runs is easily taken for one.
    """
    run = RunFolder(path)
    try:
        run.identity()
    except RunFolderError as error:
        if run.run_file.exists():  # damaged
            raise
        try:
            inside = find_runs(path)
        except RunFolderError:
            raise error from None
        more = f" and {len(inside) - _NAMED} more" if len(inside) > _NAMED else ""
        names = ", ".join(str(one.relative_to(path)) for one in inside[:_NAMED])
        raise RunFolderError(f"{error} Runs in it: {names}{more}.") from None
    return run


def look(run_dirs: Sequence[Path], queue: SlurmQueue) -> Overview:
    """Find out about several runs with one question to Slurm: those that live first, then by name."""
    queue.expect(job_id for run_dir in run_dirs if (job_id := _slurm_job(run_dir)) is not None)
    states, errors = [], {}
    for run_dir in run_dirs:
        try:
            states.append(run_state(run_dir, queue))
        except RunFolderError as error:
            errors[str(run_dir)] = str(error)
    states.sort(key=lambda state: (_ORDER.index(state.state), state.run_dir))
    return Overview(states, errors)


def watch(find: Callable[[], list[Path]], show: Callable[[Overview], str]) -> Overview:
    """Show runs every two seconds until none of them can change any more, or Ctrl-C; return what was seen last."""
    queue = SlurmQueue()
    seen = look(find(), queue)
    try:
        while True:
            start = _CLEAR if sys.stdout.isatty() else ""
            print(f"{start}{show(seen)}", flush=True)
            if seen.at_rest:
                return seen
            time.sleep(WATCH_S)
            seen = look(find(), queue)
    except KeyboardInterrupt:  # how one leaves
        return seen


def _slurm_job(run_dir: Path) -> str | None:
    events = RunFolder(run_dir).events()
    return next((str(e["job_id"]) for e in reversed(events) if e.get("executor") == "slurm" and e.get("job_id")), None)


def _row(state: RunState) -> tuple[str, ...]:
    from mvit.progress import format_duration

    path = Path(state.run_dir)
    here = Path.cwd()
    goodput = state.ledger.get("ettr")
    return (
        str(path.relative_to(here)) if path.is_relative_to(here) else str(path),
        state.state,
        str(state.attempt),
        str(state.step) if state.total_steps is None else f"{state.step}/{state.total_steps}",
        f"{state.step / state.total_steps:.0%}" if state.total_steps else "-",
        "-" if state.samples_per_s is None else f"{state.samples_per_s:.1f}",
        "-" if state.loss is None else f"{state.loss:.4f}",
        "-" if state.eta_s is None else format_duration(state.eta_s),
        f"{goodput:.0%}" if goodput else "-",
        state.job_id or "-",
    )
