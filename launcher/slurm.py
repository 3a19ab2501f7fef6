"""Facts about a Slurm cluster, asked of its own commands: settings, partitions, nodes, accounts.

Nothing is changed. Where a command is missing, fails or does not answer in time, its answer is None. These are commands
for one process of a person, never for each rank: a controller that 1000 ranks ask at once stops answering.
"""

import getpass
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

TIMEOUT_S = 10.0  # without its slurm.conf, scontrol tries again for a minute
_UNUSABLE = ("DOWN", "DRAIN", "FAIL", "ERROR", "INVAL", "FUTURE", "NOT_RESPONDING", "MAINT")
_GONE = ("DOWN", "FAIL", "ERROR", "NOT_RESPONDING")  # a drained node lets its jobs end
_PAIR = re.compile(r"(?:^|\s)([A-Za-z][\w:/]*)=(.*?)(?=\s+[A-Za-z][\w:/]*=|\s*$)")
_SETTING = re.compile(r"^(\S+)\s*=[ \t]?(.*)$", re.MULTILINE)
_NOTHING = ("", "(null)", "N/A", "NONE", "UNLIMITED", "INFINITE", "NOT_SET")


@dataclass(frozen=True)
class Partition:
    """One partition; None is no limit."""

    name: str
    is_default: bool
    state: str  # UP, or DOWN (queues), DRAIN and INACTIVE (takes no job)
    max_nodes: int | None
    max_time_min: float | None
    max_cpus_per_node: int | None
    max_mem_mb: int | None
    grace_time_s: int
    preempt_mode: str
    over_time_limit: str


@dataclass(frozen=True)
class Node:
    """One machine as Slurm has it."""

    name: str
    partitions: tuple[str, ...]
    states: tuple[str, ...]
    cpus: int
    memory_mb: int
    gpus: int
    features: tuple[str, ...]
    reason: str

    @property
    def is_usable(self) -> bool:
        """Whether a job could start here once it is free."""
        return not any(state.startswith(_UNUSABLE) for state in self.states)

    @property
    def is_gone(self) -> bool:
        """Whether Slurm has lost what ran here."""
        return any(state.startswith(_GONE) for state in self.states)


@dataclass(frozen=True)
class Accounting:
    """What slurmdbd says: the names that exist, and those that this user may charge."""

    accounts: tuple[str, ...]
    own_accounts: tuple[str, ...]
    own_qos: tuple[str, ...]
    qos_flags: Mapping[str, tuple[str, ...]]  # of every QOS


@dataclass(frozen=True)
class SlurmFacts:
    """One cluster."""

    settings: Mapping[str, str]
    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]
    accounting: Accounting | None  # None: there is none, or slurmdbd does not answer

    @property
    def has_accounting(self) -> bool:
        return not self.setting("AccountingStorageType").endswith("/none")

    def setting(self, name: str) -> str:
        """Return a setting of `scontrol show config`, '' when it is absent or null."""
        value = self.settings.get(name, "")
        return "" if value == "(null)" else value

    def partition(self, name: str | None) -> Partition | None:
        """Return a partition by name, the default one for None."""
        found = (one for one in self.partitions if (one.is_default if name is None else one.name == name))
        return next(found, None)

    def nodes_of(self, partition: str) -> list[Node]:
        return [node for node in self.nodes if partition in node.partitions]


def read_slurm(accounting: bool = True) -> SlurmFacts | None:
    """Ask Slurm about itself, and its database unless told not to; None if it does not answer here."""
    config = _ask("scontrol", "show", "config")
    if config is None:  # the others would wait for nothing, too
        return None
    partitions = _ask("scontrol", "-o", "-a", "show", "partition")
    nodes = _ask("scontrol", "-o", "-a", "show", "node")
    if partitions is None or nodes is None:
        return None
    settings = parse_settings(config)
    off = not accounting or settings.get("AccountingStorageType", "accounting_storage/none").endswith("/none")
    return SlurmFacts(settings, parse_partitions(partitions), parse_nodes(nodes), None if off else _read_accounting())


def expand_hostlist(text: str) -> tuple[str, ...] | None:
    """Return the names that `node[1-3],x7` stands for; None if Slurm cannot tell."""
    shown = _ask("scontrol", "show", "hostnames", text)
    return None if shown is None else tuple(shown.split())


def parse_settings(text: str) -> dict[str, str]:
    """Read `scontrol show config`."""
    return {name: value.strip() for name, value in _SETTING.findall(text)}


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """Read `scontrol -o show partition`."""
    return tuple(_partition(fields) for fields in _records(text, "PartitionName"))


def parse_nodes(text: str) -> tuple[Node, ...]:
    """Read `scontrol -o show node`."""
    return tuple(_node(fields) for fields in _records(text, "NodeName"))


def parse_minutes(text: str) -> float | None:
    """Return the minutes of `[D-]HH:MM:SS`, None for UNLIMITED."""
    if text.upper() in _NOTHING:
        return None
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = ([0, 0, *(int(part) for part in clock.split(":"))])[-3:]
    return (int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60


def parse_seconds(text: str) -> float | None:
    """Return the seconds of a setting such as `30 sec` or `2 min`; None for UNLIMITED or what is no time."""
    found = re.match(r"(\d+)\s*(sec|min|)", text)
    return None if found is None else int(found[1]) * (60.0 if found[2] == "min" else 1.0)


def _records(text: str, first: str) -> Iterator[dict[str, str]]:
    for line in text.splitlines():
        fields = {key: value.strip() for key, value in _PAIR.findall(line)}
        if first in fields:
            yield fields


def _partition(fields: Mapping[str, str]) -> Partition:
    return Partition(
        name=fields["PartitionName"],
        is_default=fields.get("Default") == "YES",
        state=fields.get("State", "UP"),
        max_nodes=_number(fields.get("MaxNodes", "")),
        max_time_min=parse_minutes(fields.get("MaxTime", "")),
        max_cpus_per_node=_number(fields.get("MaxCPUsPerNode", "")),
        max_mem_mb=_number(fields.get("MaxMemPerNode", "")),
        grace_time_s=_number(fields.get("GraceTime", "")) or 0,
        preempt_mode=fields.get("PreemptMode", ""),
        over_time_limit=fields.get("OverTimeLimit", ""),
    )


def _node(fields: Mapping[str, str]) -> Node:
    gres = re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", fields.get("Gres", ""))
    counted = re.search(r"(?:^|,)gres/gpu=(\d+)", fields.get("CfgTRES", ""))
    return Node(
        name=fields["NodeName"],
        partitions=_names(fields.get("Partitions", "")),
        states=_states(fields.get("State", "")),
        cpus=_number(fields.get("CPUEfctv", "")) or _number(fields.get("CPUTot", "")) or 0,
        memory_mb=_number(fields.get("RealMemory", "")) or 0,
        gpus=max(sum(int(count) for count in gres), int(counted[1]) if counted else 0),
        features=_names(fields.get("AvailableFeatures", "")),
        reason=fields.get("Reason", ""),
    )


def _states(text: str) -> tuple[str, ...]:
    """Return `IDLE*+DRAIN` as words; the star is a node that does not respond."""
    words = [part.rstrip("*~#!%$@^-") for part in text.split("+")]
    return (*words, "NOT_RESPONDING") if "*" in text else tuple(words)


def _read_accounting() -> Accounting | None:
    accounts = _ask("sacctmgr", "-n", "-P", "show", "account", "format=Account")
    qos = _ask("sacctmgr", "-n", "-P", "show", "qos", "format=Name,Flags")
    own = _ask("sacctmgr", "-n", "-P", "show", "assoc", f"user={getpass.getuser()}", "format=Account,QOS")
    if accounts is None or qos is None or own is None:
        return None
    return parse_accounting(accounts, qos, own)


def parse_accounting(accounts: str, qos: str, own: str) -> Accounting:
    """Read sacctmgr's parsable lists: accounts, QOS with flags, and the user's associations (account, QOS)."""
    pairs = [line.split("|") for line in own.splitlines() if line]
    return Accounting(
        accounts=tuple(accounts.split()),
        own_accounts=_unique(pair[0] for pair in pairs),
        own_qos=_unique(name for pair in pairs for name in _names(pair[1])),
        qos_flags={name: _names(flags) for name, flags in (line.split("|") for line in qos.splitlines() if line)},
    )


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _names(text: str) -> tuple[str, ...]:
    return () if text in _NOTHING else tuple(name for name in text.split(",") if name)


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _ask(*command: str) -> str | None:
    """Return what a command prints, None if it is missing, fails or takes too long."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
