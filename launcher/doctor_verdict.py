"""Which node is at fault: the reports of all ranks compared with the request, and with each other."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.cluster import Placement
from launcher.doctor_report import NodeVerdict

SLOW_WARN, SLOW_FAIL = 0.7, 0.4  # of the median rate of all ranks
_DISK_WARN = 0.3  # of the median of all nodes: a shared file system is uneven by itself
_CLOCK_WARN_S, _CLOCK_FAIL_S = 1.0, 60.0
_SHM_GIB = 0.25
_Reports = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RankEnd:
    """How a rank without a complete report ended."""

    told: str
    for_another: bool = False
    """Whether it was ended because another rank had failed."""


def judge(
    reports: _Reports, placement: Placement, job_nodes: Sequence[str], ends: Mapping[int, RankEnd]
) -> tuple[NodeVerdict, ...]:
    """Return a verdict for each node, in the order of their ranks; `ends` tells of ranks without a complete report."""
    by_rank = {report["rank"]: report for report in reports}
    world = _World(reports, _absent(by_rank, placement, ends), ends)
    verdicts = []
    for index in range(placement.nodes):
        ranks = range(index * placement.ranks_per_node, (index + 1) * placement.ranks_per_node)
        found = [by_rank[rank] for rank in ranks if rank in by_rank]
        spare = job_nodes[index] if index < len(job_nodes) else f"node {index + 1} of {placement.nodes}"
        node = found[0]["node"] if found else spare
        fails, warnings = [], []
        for rank in ranks:
            if rank not in by_rank:
                end = ends.get(rank, RankEnd("it never started"))
                (warnings if end.for_another else fails).append(f"rank {rank} left no report: {end.told}")
        for report in found:
            _judge_parts(report, world, fails, warnings)
            _judge_rank(report, world, fails, warnings)
        _judge_devices(found, placement, fails, warnings)
        level = "FAIL" if fails else "WARN" if warnings else "PASS"
        verdicts.append(NodeVerdict(node, level, _figures(found), (*fails, *warnings)))
    return tuple(verdicts)


class _World:
    """What a rank is compared with: the medians and the most common versions of all ranks, and who was absent."""

    def __init__(self, reports: _Reports, absent: str | None, ends: Mapping[int, RankEnd]) -> None:
        self.absent, self.ends = absent, ends
        self.medians = {name: _median(reports, name) for name in ("tflops", "read_mb_s", "write_mb_s")}
        kinds = Counter(str(report["figures"].get("name")) for report in reports)
        self.by_device = {
            kind: _median([one for one in reports if str(one["figures"].get("name")) == kind], "tflops")
            for kind in kinds
        }
        versions = Counter(_versions(report) for report in reports if "versions" in report["figures"])
        self.versions = versions.most_common(1)[0][0] if versions else ()


def _absent(by_rank: Mapping[int, Mapping[str, Any]], placement: Placement, ends: Mapping[int, RankEnd]) -> str | None:
    """Name a rank that could not take part in what all ranks do together; the others are not to blame then."""
    for rank in range(placement.world_size):
        if rank in ends and ends[rank].for_another:
            continue
        if rank not in by_rank:
            return f"rank {rank}"
        report = by_rank[rank]
        if "devices" in report["errors"] or (not report["done"] and "network" not in report["errors"]):
            return f"rank {rank} on {report['node']}"
    return None


def _judge_parts(report: Mapping[str, Any], world: _World, fails: list[str], warnings: list[str]) -> None:
    """Tell the parts that raised or were not finished."""
    rank, end = report["rank"], world.ends.get(report["rank"])
    for part, error in report["errors"].items():
        if end is not None and end.for_another:
            warnings.append(f"rank {rank}: {part} was not finished: {end.told}")
        elif part == "network" and world.absent is not None:
            warnings.append(f"rank {rank}: the network was not measured, since {world.absent} was absent")
        else:
            fails.append(f"rank {rank}: {part}: {error}" + (f" ({end.told})" if end else ""))


def _judge_rank(report: Mapping[str, Any], world: _World, fails: list[str], warnings: list[str]) -> None:
    """Tell wrong results, other software, slowness and want of room."""
    rank, figures = report["rank"], report["figures"]
    for name, wrong in (
        ("finite", "a matrix product is not finite"),
        ("repeatable", "the same matrix product twice gave different bits"),
        ("right", "a matrix product with a known answer is wrong"),
        ("sum_right", "the sum over all ranks is wrong"),
    ):
        if figures.get(name) is False:
            fails.append(f"rank {rank}: {wrong}")
    if "versions" in figures and (other := set(_versions(report)) - set(world.versions)):
        usual = dict(world.versions)
        told = ", ".join(f"{name} {version} (others {usual.get(name)})" for name, version in sorted(other))
        fails.append(f"rank {rank}: other software than most ranks: {told}")
    _judge_speed(report, world, fails, warnings)
    _judge_room(report, fails, warnings)


def _judge_speed(report: Mapping[str, Any], world: _World, fails: list[str], warnings: list[str]) -> None:
    rank, figures = report["rank"], report["figures"]
    usual = world.by_device.get(str(figures.get("name"))) or world.medians["tflops"]
    share = figures["tflops"] / usual if usual and "tflops" in figures else 1.0
    if share < SLOW_WARN:
        text = f"rank {rank}: {figures['tflops']:.3g} TFLOP/s, {share:.2f} of the median of all ranks"
        is_gpu = "gpu_total_gib" in figures  # a CPU may be somebody else's as well
        (fails if is_gpu and share < SLOW_FAIL else warnings).append(text)
    for name, what in (("read_mb_s", "reads shards"), ("write_mb_s", "writes output_dir")):
        usual = world.medians[name]
        if usual and figures.get(name, usual) < _DISK_WARN * usual:
            warnings.append(f"rank {rank}: {what} with {figures[name]:.0f} MB/s, the median is {usual:.0f}")


def _judge_room(report: Mapping[str, Any], fails: list[str], warnings: list[str]) -> None:
    rank, figures = report["rank"], report["figures"]
    ahead = abs(figures.get("clock_ms", 0.0)) / 1000
    if ahead > _CLOCK_WARN_S:
        text = f"rank {rank}: its clock differs from rank 0's by {ahead:.1f} s"
        (fails if ahead > _CLOCK_FAIL_S else warnings).append(text)
    if figures.get("shm_gib", _SHM_GIB) < _SHM_GIB:
        shm = figures["shm_gib"] * 1024
        warnings.append(f"rank {rank}: /dev/shm has {shm:.0f} MiB, through which data workers hand over batches")
    if "gpu_total_gib" in figures and figures["gpu_free_gib"] < 0.9 * figures["gpu_total_gib"]:
        taken = figures["gpu_total_gib"] - figures["gpu_free_gib"]
        warnings.append(f"rank {rank}: {taken:.1f} of {figures['gpu_total_gib']:.1f} GiB of its GPU are taken")


def _judge_devices(found: _Reports, placement: Placement, fails: list[str], warnings: list[str]) -> None:
    """Count the different GPUs that a node's ranks see and drive."""
    told = [report["figures"] for report in found if "visible" in report["figures"]]
    if not told:
        return
    seen, asked = len({uuid for figures in told for uuid in figures["visible"]}), placement.gpus_per_node
    if seen < asked:
        fails.append(f"its ranks see {seen} GPU(s), gpus_per_node={asked}")
    elif seen > asked:
        warnings.append(f"its ranks see {seen} GPU(s), gpus_per_node={asked}: others may use the rest")
    driven = [figures["device"] for figures in told if figures["device"] is not None]
    if len(set(driven)) < len(driven):
        fails.append(f"{len(driven)} ranks drive {len(set(driven))} GPU(s) of {seen}")


def _figures(found: _Reports) -> dict[str, float | None]:
    """Return the figures of a node: those of its weakest rank."""
    clock = max((report["figures"].get("clock_ms", 0.0) for report in found), key=abs, default=None)
    rooms = [figures.get("gpu_free_gib", figures.get("free_gib")) for figures in (one["figures"] for one in found)]
    seen = {uuid for report in found for uuid in report["figures"].get("visible", ())}
    lowest = {name: _lowest(found, name) for name in ("tflops", "allreduce_gb_s", "read_mb_s", "write_mb_s")}
    free = min((room for room in rooms if room is not None), default=None)
    return {"gpus": float(len(seen)) if found else None, **lowest, "clock_ms": clock, "free_gib": free}


def _values(reports: _Reports, name: str) -> list[float]:
    return [report["figures"][name] for report in reports if name in report["figures"]]


def _lowest(reports: _Reports, name: str) -> float | None:
    return min(_values(reports, name), default=None)


def _median(reports: _Reports, name: str) -> float | None:
    values = _values(reports, name)
    return statistics.median(values) if values else None


def _versions(report: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(report["figures"].get("versions", {}).items()))
