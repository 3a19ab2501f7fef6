"""ClusterConfig: where a run's ranks are placed, read from configs/cluster/*.yaml."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from data_pipeline.settings import Settings
from launcher import faults

NUM_CPU_RANKS = 2  # of `ranks_per_node: auto` without GPUs: the fewest that exercise every distributed path
_LEAST_MEM_MB = 1024  # below this, a number without a unit was not meant in sbatch's megabytes
_SLURM_ONLY = ("mem", "partition", "account", "qos", "constraint", "exclude", "comment", "setup", "sbatch")
_OWN_SBATCH = {  # sbatch's name → the key of the cluster file that sets it
    "nodes": "nodes",
    "ntasks-per-node": "ranks_per_node",
    "ntasks": "ranks_per_node",
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_rank",
    "time": "timeout_min",
    "signal": "signal_delay_s",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "mem": "mem",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "comment": "comment",
    "job-name": "name of the recipe",
    "output": "output_dir of the recipe",
    "error": "output_dir of the recipe",
    "open-mode": "output_dir of the recipe",
    "array": "nodes",
}


class ClusterError(ValueError):
    """A cluster file that is wrong or asks for what this machine does not have."""


class ClusterConfig(Settings):
    """One cluster: how many processes, on what, for how long."""

    executor: Literal["local", "slurm"]
    """`local`: processes of this machine; `slurm`: a batch job."""
    nodes: PositiveInt = 1
    """Machines of one job."""
    gpus_per_node: NonNegativeInt | Literal["auto"] = 0
    """GPUs asked for on each node; 0: the ranks compute on CPUs; `auto` (local only): all that are visible."""
    ranks_per_node: PositiveInt | Literal["auto"] = "auto"
    """Processes on each node; `auto`: one per GPU, or 2 on a local machine without GPUs."""
    cpus_per_rank: PositiveInt | None = None
    """CPU cores of each rank, data workers included; also its OMP_NUM_THREADS."""
    mem: str | None = None
    """Memory per node in sbatch's notation, `500G` for one; `0` for all of it."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    comment: str | None = None
    timeout_min: PositiveInt | None = None
    """Time limit of one life of the job in minutes; None (local only): no limit."""
    signal_delay_s: PositiveInt = 180
    """Seconds before the time limit at which the job is told to save: more than a save, a step and a minute."""
    requeue: bool = True
    """Whether the job goes back to the queue after a time limit, a preemption or a failure."""
    max_failures_without_progress: PositiveInt = 3
    """Failed lives in a row without a newer checkpoint after which the job is not requeued any more."""
    max_node_faults: PositiveInt = 10
    """Lives in a row without a newer checkpoint that may be lost with a node."""
    exclude_after: NonNegativeInt = 2
    """Blames after which a node is left out of later lives; 0 never leaves one out."""
    exclude_hours: PositiveFloat = 24.0
    """For how long, and how far back blames count."""
    hang_timeout_s: PositiveInt | None = None
    """Longest silence of a rank while it steps; none: max(2 x p99 of the step time, 120 s), the requeue included."""
    start_timeout_s: PositiveInt = 1800
    """Longest silence of a rank before its first step, in a save and at the end."""
    setup: tuple[str, ...] = ()
    """Shell commands of the batch script before the ranks start (`module load …`)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every rank."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Any other sbatch parameter by its name: `exclusive: true`, `mail-type: END`."""

    @field_validator("mem", mode="before")
    @classmethod
    def _mem_has_a_unit(cls, value: object) -> object:
        """Accept a number that YAML has read, and refuse one that sbatch would take for far too few megabytes."""
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.isdigit() and 0 < int(value) < _LEAST_MEM_MB:
            raise ValueError(
                f"mem={value}: sbatch reads a number without a unit as megabytes, so this is {value} MB for all ranks "
                f"of a node. Set mem={value}G for gigabytes, mem=0 for all of a node's memory, or mem={value}M if it "
                "is meant so."
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.executor == "local":
            self._check_local()
        else:
            self._check_slurm()
        faults.parse(self.env.get(faults.VARIABLE, ""))
        gpus, ranks = self.gpus_per_node, self.ranks_per_node
        if isinstance(gpus, int) and isinstance(ranks, int) and gpus > 0 and ranks != gpus:
            raise ValueError(
                f"ranks_per_node={ranks} contradicts gpus_per_node={gpus}: a rank drives exactly one GPU. "
                "Drop ranks_per_node, or set gpus_per_node=0 for CPU ranks."
            )
        taken_s = self.signal_delay_s + 60
        if self.timeout_min is not None and self.timeout_min * 60 <= taken_s:
            raise ValueError(
                f"timeout_min={self.timeout_min} ({self.timeout_min * 60} s) leaves no time to train: the job is told "
                f"to save signal_delay_s={self.signal_delay_s} s before its end, and by Slurm's whole minutes up to "
                f"60 s earlier still, {taken_s} s in all. Set timeout_min={taken_s // 60 + 1} at least; "
                f"timeout_min={math.ceil(taken_s / 12)} trains for four fifths of each life. Or lower signal_delay_s "
                "to what a save and a step take."
            )
        return self

    def _check_local(self) -> None:
        if self.nodes != 1:
            raise ValueError(
                f"nodes={self.nodes} with executor=local: the local executor uses this machine only. "
                "Set nodes=1, or executor: slurm."
            )
        for key in _SLURM_ONLY:
            if getattr(self, key):
                raise ValueError(f"{key} has no meaning with executor=local: remove it, or set executor: slurm.")

    def _check_slurm(self) -> None:
        if self.timeout_min is None:
            raise ValueError("timeout_min is missing: a Slurm job needs a time limit (minutes of one life).")
        if self.gpus_per_node == "auto":
            raise ValueError(
                "gpus_per_node=auto with executor=slurm: the nodes' GPUs cannot be counted from here. "
                "Set the number, 0 for CPU ranks."
            )
        if self.gpus_per_node == 0 and self.ranks_per_node == "auto":
            raise ValueError(
                "ranks_per_node=auto with gpus_per_node=0: how many CPU ranks a node should run cannot be "
                "derived. Set ranks_per_node, or gpus_per_node for one rank per GPU."
            )
        for name, value in self.sbatch.items():
            own = _OWN_SBATCH.get(name.replace("_", "-"))
            if own is not None:
                raise ValueError(f"sbatch.{name} is set by this project: use {own} instead.")
            if value is False:
                raise ValueError(f"sbatch.{name}=false: a flag is given or left out, remove the line.")


@dataclass(frozen=True)
class Placement:
    """The resolved numbers of one job."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def load_cluster(path: str | Path, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Read a cluster file and apply `key=value` overrides (without the `cluster.` in front).

    Raises ClusterError naming file, key, value and the way out.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        raise ClusterError(_no_such_file(path))
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ClusterError(f"{path}: {error}") from error
    return parse_cluster(content, str(path), overrides)


def parse_cluster(content: object, source: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Check a cluster's settings, changed by `key=value`; `source` begins the message of a ClusterError."""
    from omegaconf import OmegaConf

    if not isinstance(content, dict):
        raise ClusterError(f"{source}: a cluster file is a mapping of keys to values, `executor: local` for one.")
    changed = OmegaConf.to_container(OmegaConf.merge(content, OmegaConf.from_dotlist(list(overrides))))
    assert isinstance(changed, dict)
    try:
        return ClusterConfig(**{str(key): value for key, value in changed.items()})
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise ClusterError(f"{source}: " + "\n".join(problems)) from None


def place(cluster: ClusterConfig) -> Placement:
    """Resolve `auto` and check the request against this machine where the job would run on it.

    Raises ClusterError when a local job asks for more GPUs than there are.
    """
    gpus = cluster.gpus_per_node
    if cluster.executor == "local" and gpus != 0:
        available = count_gpus()
        if gpus == "auto":
            gpus = available
            if gpus and cluster.ranks_per_node not in ("auto", gpus):
                gpus = min(gpus, int(cluster.ranks_per_node))
        elif gpus > available:
            raise ClusterError(
                f"gpus_per_node={gpus}, but this machine shows {available} GPU(s) to CUDA. Lower it, set "
                "gpus_per_node=0 ranks_per_node=2 for CPU ranks, or check CUDA_VISIBLE_DEVICES and the driver."
            )
    assert isinstance(gpus, int)
    if cluster.ranks_per_node == "auto":
        return Placement(cluster.nodes, gpus or NUM_CPU_RANKS, gpus)
    if gpus and cluster.ranks_per_node != gpus:
        raise ClusterError(
            f"ranks_per_node={cluster.ranks_per_node}, but only {gpus} GPU(s) are visible and a rank drives "
            "exactly one. Lower ranks_per_node, or set gpus_per_node=0 for CPU ranks."
        )
    return Placement(cluster.nodes, cluster.ranks_per_node, gpus)


def count_gpus() -> int:
    """Return how many GPUs CUDA would show a process here, without importing torch where there is no device."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    import torch

    return torch.cuda.device_count()


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"][:1]) or "cluster"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, ClusterConfig.model_fields, n=1)
        known = ", ".join(ClusterConfig.model_fields)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {known}."
        return f"unknown key {key!r}: {hint} (Other sbatch parameters go under `sbatch:`.)"
    if problem["type"] == "missing":
        return f"{key} is missing: set `executor: local` or `executor: slurm`."
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}={problem['input']!r}: {problem['msg']}."


def _no_such_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs/cluster")
    names = sorted(file.name for file in folder.glob("*.yaml"))
    close = difflib.get_close_matches(path.name, names, n=1)
    hint = f"did you mean {folder / close[0]}?" if close else f"{folder} has: {', '.join(names) or 'none'}."
    return f"the cluster file {path} does not exist: {hint}"
