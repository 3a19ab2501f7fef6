"""What the doctor found: findings with a verdict, a sentence why and a way out, and the figures of each node."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

Level = Literal["PASS", "WARN", "FAIL"]
"""From good to bad: what is bad is printed last, beside the verdict."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    found: str
    why: str = ""
    way_out: str = ""

    def __str__(self) -> str:
        lines = [f"{self.level}  {self.check}: {self.found}"]
        return "\n".join([*lines, *(f"      {text}" for text in (self.why, self.way_out) if text)])


@dataclass(frozen=True)
class NodeVerdict:
    """One node after its two minutes: figures by name, and what is wrong."""

    node: str
    level: Level
    figures: dict[str, float | None]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodesReport:
    """What the job on the nodes found."""

    folder: str
    job_id: str
    nodes: tuple[NodeVerdict, ...]

    @property
    def ok(self) -> bool:
        return all(node.level != "FAIL" for node in self.nodes)

    def __str__(self) -> str:
        problems = [f"{node.node}: {problem}" for node in self.nodes for problem in node.problems]
        return "\n".join([_table(self.nodes), *problems, f"every rank's figures: {self.folder}"])


@dataclass(frozen=True)
class Report:
    """Everything."""

    findings: tuple[Finding, ...]
    script: str
    nodes: NodesReport | None = None
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        fine = all(finding.level != "FAIL" for finding in self.findings)
        object.__setattr__(self, "ok", fine and (self.nodes is None or self.nodes.ok))

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def verdict_line(report: Report) -> str:
    """Return the last line: OK or FAIL, how many findings of each level, and how many nodes."""
    told = _counted([finding.level for finding in report.findings])
    if report.nodes is not None:
        told += f"; nodes: {_counted([node.level for node in report.nodes.nodes])}"
    return f"{'OK' if report.ok else 'FAIL'}: {told}"


def _counted(levels: Sequence[Level]) -> str:
    return ", ".join(f"{levels.count(level)} {level}" for level in get_args(Level) if level in levels) or "none"


COLUMNS = {  # figure → heading; the unit stands in it
    "gpus": "GPUs",
    "tflops": "TFLOP/s",
    "allreduce_gb_s": "all-reduce GB/s",
    "read_mb_s": "read MB/s",
    "write_mb_s": "write MB/s",
    "clock_ms": "clock ms",
    "free_gib": "free GiB",
}


def _table(nodes: Sequence[NodeVerdict]) -> str:
    rows = [["node", "", *COLUMNS.values()]]
    rows += [[node.node, node.level, *(_number(node.figures.get(name)) for name in COLUMNS)] for node in nodes]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
