"""What a test may choose about its cluster, and the slurm.conf that follows from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.slurm.nodes import Network

NODE_PORT = 6818  # the same on every node: each has a network of its own


@dataclass(frozen=True)
class Settings:
    """A small cluster that schedules at once and notices faults within seconds."""

    nodes: int = 4
    cpus: int = 2  # of each node; more than the host has is fine
    mem_mb: int = 4000
    gpus: int = 0  # of each node; files that look like devices
    node_timeout_s: int = 8  # SlurmdTimeout: a silent node is given up after two to three times this
    kill_wait_s: int = 5
    cred_expire_s: int = 5  # a requeued job starts no sooner than this plus one; below 5 Slurm takes 120
    grace_time_s: int = 25
    send_user_signal: bool = True  # whether a preempted job gets its --signal
    accounting: Literal["shim", "none", "dbd"] = "shim"
    proctrack: Literal["linuxproc", "pgid", "cgroup"] = "linuxproc"
    job_requeue: bool = True
    extra: tuple[str, ...] = ()  # lines added to slurm.conf


@dataclass(frozen=True)
class Site:
    """Where the parts of one cluster are."""

    root: Path
    host: str  # of the controller
    network: Network
    controller_port: int
    dbd_port: int = 0

    @property
    def munge_socket(self) -> Path:
        return self.root / "run" / "munge.socket"


def slurm_conf(settings: Settings, site: Site, names: list[str]) -> str:
    """Return the whole slurm.conf."""
    parts = [
        _places(site, settings.cred_expire_s),
        _resources(settings),
        _scheduling(settings),
        _accounting(settings, site),
        [_node_line(settings, site, index, name) for index, name in enumerate(names)],
        _partitions(settings),
        settings.extra,
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def gres_conf(settings: Settings, root: Path) -> str:
    """Return the gres.conf that declares the device files of `root`/dev as GPUs."""
    last = settings.gpus - 1
    return f"AutoDetect=off\nName=gpu File={root}/dev/nvidia{f'[0-{last}]' if last else 0}\n"


def _places(site: Site, cred_expire_s: int) -> list[str]:
    root = site.root
    return [
        "ClusterName=toy",
        f"SlurmctldHost={site.host}({site.network.controller})",
        f"SlurmctldPort={site.controller_port}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={site.munge_socket},cred_expire={cred_expire_s}",
        f"StateSaveLocation={root}/state",
        f"SlurmdSpoolDir={root}/spool/%n",
        f"SlurmctldPidFile={root}/run/slurmctld.pid",
        f"SlurmdPidFile={root}/run/slurmd.%n.pid",
        f"SlurmctldLogFile={root}/log/slurmctld.log",
        f"SlurmdLogFile={root}/log/%n.log",
        "SlurmctldDebug=info",
        "SlurmdDebug=info",
    ]


def _resources(settings: Settings) -> list[str]:
    return [
        f"ProctrackType=proctrack/{settings.proctrack}",
        "TaskPlugin=task/none",  # nothing is bound: the nodes together are larger than the host
        "JobAcctGatherType=jobacct_gather/none",
        "SlurmdParameters=config_overrides",  # believe the declared size of a node
        "MpiDefault=none",
        "SwitchType=switch/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=100",
        *(["GresTypes=gpu"] if settings.gpus else []),
    ]


def _scheduling(settings: Settings) -> list[str]:
    return [
        "SchedulerType=sched/backfill",
        "SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=50000,batch_sched_delay=0",
        f"SlurmdTimeout={settings.node_timeout_s}",
        "SlurmctldTimeout=60",
        "HealthCheckInterval=0",
        "MessageTimeout=10",
        "TCPTimeout=2",
        "BatchStartTimeout=10",
        f"KillWait={settings.kill_wait_s}",
        "CompleteWait=0",
        "UnkillableStepTimeout=60",
        "InactiveLimit=0",
        "WaitTime=0",
        "ReturnToService=2",  # a node that comes back is used again
        "MinJobAge=86400",  # what became of a job stays known until the cluster is gone
        f"JobRequeue={int(settings.job_requeue)}",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        *(["SlurmctldParameters=preempt_send_user_signal"] if settings.send_user_signal else []),
    ]


def _accounting(settings: Settings, site: Site) -> list[str]:
    if settings.accounting != "dbd":
        return ["AccountingStorageType=accounting_storage/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        f"AccountingStorageHost={site.network.controller}",
        f"AccountingStoragePort={site.dbd_port}",
        f"AccountingStoragePass={site.munge_socket}",  # so is the munge socket towards slurmdbd called
    ]


def _node_line(settings: Settings, site: Site, index: int, name: str) -> str:
    gpus = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    return (
        f"NodeName={name} NodeAddr={site.network.address(index)} NodeHostname={name} Port={NODE_PORT} "
        f"Feature={'ab'[index % 2]} CPUs={settings.cpus} RealMemory={settings.mem_mb}{gpus} State=UNKNOWN"
    )


def _partitions(settings: Settings) -> list[str]:
    return [
        "PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=INFINITE DefaultTime=10",
        f"PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace_time_s}",
        "PartitionName=high Default=NO PriorityTier=10 PreemptMode=OFF",
    ]
