"""What the doctor's job does on every rank: measure devices, arithmetic, network, shards and disk, and write it down.

A rank's report is written after each part, so that what hangs or kills it does not take the others' findings along.
"""

import importlib.metadata
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.disk_speed import read_speed, write_speed
from launcher.job import RankPlace
from launcher.processes import node_name
from launcher.run_folder import rank_file, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mvit.distributed import RankInfo

PLANTED_FAULT = "MVIT_DOCTOR_FAULT"  # "gemm@1": rank 1 computes wrongly; for a fire drill, and for the tests
_GROUP_MIN = 0.75  # how long ranks wait for each other
_MEASURE_S = 2.0
_REDUCE_BYTES, _READ_BYTES, _WRITE_BYTES = 64 << 20, 128 << 20, 64 << 20
_PINGS = 5
_PACKAGES = ("torch", "deepspeed", "submitit", "numpy")


@dataclass(frozen=True)
class DoctorJob:
    """The callable that submitit pickles."""

    folder: Path
    cwd: Path
    shards: str | Sequence[str] | None
    """The recipe's training shards; the first is read."""
    local_port: int
    """Where the ranks of a local job meet; under Slurm the job's id decides."""
    cpus_per_rank: int | None

    def __call__(self) -> dict[str, object]:
        """Measure, and write rank_RRRR.json to the folder; a failed check is a line of it and ends nothing."""
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit would requeue the job
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        place = self._join()
        os.chdir(self.cwd)  # relative paths of the recipe start where it was typed
        report = _Report(self.folder, place)
        with report.part("software"):
            report.figures["versions"] = _versions()
        with report.part("shards"):
            if self.shards is not None:
                report.figures |= _read_shard(self.shards)
        with report.part("output_dir"):
            if place.local_rank == 0:
                report.figures["write_mb_s"] = write_speed(self.folder, _WRITE_BYTES, 20.0) / 1e6
        with report.part("devices"):
            report.figures |= _devices(place)
        with report.part("arithmetic"):
            report.figures |= _arithmetic(place)
        with report.part("network"):
            report.figures |= _network()
        report.finish()
        return {}

    def _join(self) -> RankPlace:
        """Export what torch reads to find the other ranks."""
        import submitit

        environment = submitit.JobEnvironment()
        world_size, nodes = environment.num_tasks, environment.num_nodes
        place = RankPlace(environment.global_rank, world_size, environment.local_rank, world_size // nodes)
        if environment.cluster == "slurm":
            host, port = environment.hostnames[0], 15000 + int(environment.raw_job_id) * 7 % 10000
        else:
            host, port = "127.0.0.1", self.local_port
        cpus = self.cpus_per_rank or max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
        os.environ.update(place.environment, MASTER_ADDR=host, MASTER_PORT=str(port))
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))
        return place


@dataclass
class _Report:
    """A rank's report while it grows."""

    folder: Path
    place: RankPlace
    figures: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run one part: whatever it raises becomes a line of the report, and the next part follows."""
        self.errors[name] = "was not finished"
        self._write(done=False)
        try:
            yield
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {error}"
        else:
            del self.errors[name]
        self._write(done=False)

    def finish(self) -> None:
        self._write(done=True)

    def _write(self, *, done: bool) -> None:
        who = {"rank": self.place.rank, "local_rank": self.place.local_rank, "node": node_name()}
        record = who | {"done": done, "figures": self.figures, "errors": self.errors}
        write_json(rank_file(self.folder, self.place.rank, ".json"), record)


def _versions() -> dict[str, str]:
    """Return the versions that must be the same on all ranks."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def _read_shard(shards: str | Sequence[str]) -> dict[str, Any]:
    """Read the beginning of the first shard and return MB/s; raises what a missing or damaged tar raises."""
    from itertools import islice

    from data_pipeline.shards import first_shard
    from data_pipeline.tar_scan import scan_tar

    shard = first_shard(shards)
    if shard is None:  # remote: each rank would fetch a copy
        return {}
    speed = read_speed(Path(shard), _READ_BYTES) / 1e6
    if not list(islice(scan_tar(shard), 10)):
        raise ValueError(f"{shard} holds no sample")
    return {"read_mb_s": speed}


def _devices(place: RankPlace) -> dict[str, Any]:
    """Return this rank's device, all it can see, and the free memory in GiB."""
    import psutil
    import torch

    free = psutil.virtual_memory().available / 2**30
    figures: dict[str, Any] = {"free_gib": free, "shm_gib": shutil.disk_usage("/dev/shm").free / 2**30}
    if not torch.cuda.is_available():
        return figures | {"visible": [], "device": None, "name": platform.processor() or platform.machine()}
    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    own = place.local_rank % count
    free_bytes, total_bytes = torch.cuda.mem_get_info(own)
    return figures | {
        "visible": [str(one.uuid) for one in properties],
        "device": str(properties[own].uuid),
        "name": properties[own].name,
        "gpu_free_gib": free_bytes / 2**30,
        "gpu_total_gib": total_bytes / 2**30,
    }


def _arithmetic(place: RankPlace) -> dict[str, Any]:
    """Return the rate of large matrix products, and whether they are finite, repeatable and right."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    first, again = left @ right, left @ right
    figures = {
        "finite": bool(torch.isfinite(first).all()),
        "repeatable": torch.equal(first, again),
        "right": _known_answer(place.rank, device, dtype),
    }
    return figures | {"tflops": _rate(left, right)}


def _known_answer(rank: int, device: "torch.device", dtype: "torch.dtype") -> bool:
    """Multiply matrices of +1 and -1, whose product of 256 terms every number format holds exactly."""
    import torch

    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randint(0, 2, (256, 256), generator=generator) * 2 - 1 for _ in range(2))
    expected = left @ right  # integers, on the CPU
    found = (left.to(device, dtype) @ right.to(device, dtype)).cpu()
    if os.environ.get(PLANTED_FAULT) == f"gemm@{rank}":
        found[3, 5] += 2
    return torch.equal(found.to(torch.int64), expected)


def _rate(left: "Tensor", right: "Tensor") -> float:
    """Return TFLOP/s: the median of a GPU's rounds; of a CPU's the best, since others may use its cores."""
    import statistics

    import torch

    synchronize: Callable[[], None] = torch.cuda.synchronize if left.is_cuda else lambda: None
    products = 20 if left.is_cuda else 1
    rates: list[float] = []
    end = time.perf_counter() + _MEASURE_S
    while time.perf_counter() < end or len(rates) < 3:
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right)
        synchronize()
        rates.append(products * 2 * left.shape[0] ** 3 / (time.perf_counter() - start) / 1e12)
    return statistics.median(rates) if left.is_cuda else max(rates)


def _network() -> dict[str, Any]:
    """Return the all-reduce's bus bandwidth over all ranks and the clock's difference to rank 0."""
    from mvit import distributed

    ranks = distributed.start(timeout_min=_GROUP_MIN)
    try:
        figures = {"clock_ms": 1000 * _clock_difference(ranks)}
        return figures | ({} if ranks.world_size == 1 else _all_reduce(ranks))
    finally:
        distributed.shutdown()


def _all_reduce(ranks: "RankInfo") -> dict[str, Any]:
    """Add 64 MiB over all ranks, check the sum, and return GB/s as the links between ranks see them."""
    import torch

    from mvit.distributed import barrier, broadcast_object, sum_over_ranks

    world, count = ranks.world_size, _REDUCE_BYTES // 4
    sums = sum_over_ranks(torch.full((count,), float(ranks.rank + 1), device=ranks.device))
    right = bool((sums == world * (world + 1) / 2).all())
    sums.zero_()  # sums of sums would overflow

    def seconds(times: int) -> float:
        barrier()
        start = time.perf_counter()
        for _ in range(times):
            sum_over_ranks(sums)
        if sums.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    first = seconds(1)
    times = broadcast_object(max(1, min(20, int(_MEASURE_S / first))))
    moved = 2 * (world - 1) / world * _REDUCE_BYTES
    return {"sum_right": right, "allreduce_gb_s": moved / seconds(times) / 1e9}


def _clock_difference(ranks: "RankInfo") -> float:
    """Return how many seconds this rank's clock is ahead of rank 0's: the ping with the shortest way decides."""
    import torch
    import torch.distributed as dist

    answer = torch.zeros(1, dtype=torch.float64)
    best, difference = float("inf"), 0.0
    for rank in range(1, ranks.world_size):
        for _ in range(_PINGS):
            if ranks.rank == 0:
                dist.recv(answer, rank)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), rank)
            elif ranks.rank == rank:
                sent = time.time()
                dist.send(answer, 0)
                dist.recv(answer, 0)
                back = time.time()
                if back - sent < best:
                    best, difference = back - sent, (sent + back) / 2 - answer.item()
    return difference
