"""Showing a run's records as they come: a rich bar on a terminal, one plain line per record elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_NOT_SHOWN = ("kind", "step", "total_steps", "time")


class ProgressDisplay:
    """Draw the records of a run; use it as a context manager.

    A record is a mapping with `kind` and `step`. `train` moves the bar and fills its figures (total_steps, loss, lr,
    samples_per_s, eta_s, each optional); `progress` only moves the bar; any other kind (`evaluate`, `save`) becomes a
    line that stays.
    """

    def __init__(self, total_steps: int | None = None, console: Console | None = None) -> None:
        self._console: Console | None = console or Console()
        self._total_steps = total_steps
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._console is not None and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.fields[of]}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            total = self._total_steps
            self._task = self._bar.add_task("", total=total, figures="", of=_or_question(total))
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, record: Mapping[str, Any]) -> None:
        """Show one record."""
        kind = record.get("kind", "train")
        self._total_steps = record.get("total_steps", self._total_steps)
        if kind not in ("train", "progress"):
            self.note(_event_line(record))
        elif self._bar is not None:
            self._move(record, kind == "train")
        elif kind == "train":
            total = _or_question(self._total_steps)
            self._print(f"step {record['step']}/{total}  {_figures(record)}")

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        self._print(text)

    def _move(self, record: Mapping[str, Any], with_figures: bool) -> None:
        assert self._bar is not None
        total = self._total_steps
        self._bar.update(self._task, total=total, completed=record["step"], of=_or_question(total))
        if with_figures:
            self._bar.update(self._task, figures=_figures(record))

    def _print(self, text: str) -> None:
        if self._console is None:
            return
        try:
            # soft_wrap: a log line stays one line, whatever width a terminal that is not there is said to have
            self._console.print(escape(text), highlight=False, soft_wrap=True)
        except (OSError, SystemExit):  # rich's answer to a reader that is gone; a run must not end for it
            self._console = None


@contextmanager
def counting(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function that shows (done, total) as a bar while the block runs; None if `quiet`."""
    if quiet:
        yield None
        return
    with ProgressDisplay() as display:
        yield lambda done, total: display.update({"kind": "progress", "step": done, "total_steps": total})


def format_duration(seconds: float) -> str:
    """Return `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(record: Mapping[str, Any]) -> str:
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "lr" in record:
        parts.append(f"lr {record['lr']:.2e}")
    if "samples_per_s" in record:
        parts.append(f"{record['samples_per_s']:.1f} samples/s")
    if record.get("eta_s") is not None:
        parts.append(f"ETA {format_duration(record['eta_s'])}")
    return "  ".join(parts)


def _event_line(record: Mapping[str, Any]) -> str:
    values = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in record.items()
        if key not in _NOT_SHOWN
    )
    return f"{record['kind']} at step {record['step']}: " + "  ".join(values)


def _or_question(total: int | None) -> str:
    return "?" if total is None else str(total)
