"""Bad submissions fail at once: what a job asks for, compared with what the Slurm cluster has.

Slurm itself takes a job with more nodes than there are, or too long a time limit, and lets it wait for ever.
"""

import difflib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from launcher.cluster import ClusterConfig, ClusterError, Placement
from launcher.slurm import Node, Partition, SlurmFacts, expand_hostlist, read_slurm
from launcher.slurm_queue import final_state

_UNITS = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}  # MiB of one
_BAD_ENDS = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a request, and what will only delay it."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def check_submission(cluster: ClusterConfig, placement: Placement, dependency: str | None = None) -> None:
    """Raise ClusterError naming key, value, rule and way out if Slurm can never run this job; warn on stderr.

    `dependency` is in sbatch's notation, `afterok:123` for one. Says so on stderr, and goes on, where Slurm cannot be
    asked. A local job has nothing to check here.
    """
    if cluster.executor != "slurm":
        return
    facts = read_slurm()
    if facts is None:
        print("note: Slurm does not answer here, the request is not checked against the cluster", file=sys.stderr)
        return
    verdict = examine_request(facts, cluster, placement, dependency)
    for warning in verdict.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if verdict.problems:
        raise ClusterError("\n".join(verdict.problems))


def examine_request(
    facts: SlurmFacts, cluster: ClusterConfig, placement: Placement, dependency: str | None = None
) -> Verdict:
    """Compare a request with a cluster."""
    problems = [
        *_unknown_features(facts, cluster.constraint),
        *_unknown_charge(facts, cluster),
        *dependency_problems(dependency or str(cluster.sbatch.get("dependency", ""))),
    ]
    excluded, complaint = _excluded(facts, cluster.exclude)
    problems += complaint
    partitions, complaint = _partitions(facts, cluster.partition)
    problems += complaint
    if not problems:  # of several partitions, Slurm takes any that fits
        found = [_partition_problems(facts, one, cluster, placement, excluded) for one in partitions]
        problems += min(found, key=len, default=[])
    return Verdict(tuple(problems), tuple(_warnings(facts, partitions, placement, excluded)))


def _partitions(facts: SlurmFacts, asked: str | None) -> tuple[list[Partition], list[str]]:
    """Return the partitions asked for (the default one), and complaints about those that do not exist."""
    if asked is None:
        default = facts.partition(None)
        if default is None:
            return [], [f"partition is not set, and this cluster has no default one. Set it: {_listed(facts)}."]
        return [default], []
    found = [(name, facts.partition(name)) for name in asked.split(",")]
    known = [one.name for one in facts.partitions]
    unknown = [f"partition={n}: this cluster has none of this name{_meant(n, known)}" for n, p in found if p is None]
    return [partition for _, partition in found if partition is not None], unknown


def _partition_problems(
    facts: SlurmFacts, partition: Partition, cluster: ClusterConfig, placement: Placement, excluded: Collection[str]
) -> list[str]:
    problems = []
    if partition.state in ("DRAIN", "INACTIVE"):
        problems.append(
            f"partition={partition.name}: it is {partition.state} and takes no new jobs. Choose another: "
            f"{_listed(facts)}."
        )
    flags = facts.accounting.qos_flags.get(cluster.qos or "", ()) if facts.accounting else ()
    limit = None if "PartitionTimeLimit" in flags else partition.max_time_min
    if limit is not None and cluster.timeout_min is not None and cluster.timeout_min > limit:
        problems.append(
            f"timeout_min={cluster.timeout_min}: the longest job of partition {partition.name!r} is {limit:g} minutes "
            f"(MaxTime); a longer one waits for ever. Set timeout_min={int(limit)}: a run is requeued and goes on."
        )
    most = None if "PartitionMaxNodes" in flags else partition.max_nodes
    if most is not None and placement.nodes > most:
        problems.append(
            f"nodes={placement.nodes}: a job of partition {partition.name!r} may have {most} (MaxNodes). Lower nodes, "
            f"or choose another partition: {_listed(facts)}."
        )
        return problems
    return [*problems, *_too_few_nodes(facts, partition, cluster, placement, excluded)]


def nodes_that_fit(
    facts: SlurmFacts, partition: str, cluster: ClusterConfig, placement: Placement, excluded: Collection[str]
) -> list[Node]:
    """Return the nodes of a partition on which such a job can run once they are free and in order."""
    nodes, found = facts.nodes_of(partition), facts.partition(partition)
    needs = [] if found is None else _needs(found, cluster, placement, excluded)
    return [node for node in nodes if all(need.fits(node) for need in needs)]


@dataclass(frozen=True)
class _Need:
    """One thing that a job needs of each of its nodes."""

    setting: str
    fits: Callable[[Node], bool]
    shortage: Callable[[Sequence[Node]], str]
    way_out: str


def _too_few_nodes(
    facts: SlurmFacts, partition: Partition, cluster: ClusterConfig, placement: Placement, excluded: Collection[str]
) -> list[str]:
    """Drop the nodes that do not fit, need by need, and name the first that leaves too few."""
    left = everyone = facts.nodes_of(partition.name)
    for need in _needs(partition, cluster, placement, excluded):
        before, left = left, [node for node in left if need.fits(node)]
        if len(left) < placement.nodes:
            asked = f"nodes={placement.nodes}" + (f" with {need.setting}" if need.setting else "")
            if not need.setting:
                return [
                    f"{asked}: partition {partition.name!r} has {len(everyone)} node(s). Slurm would let the job wait "
                    f"for ever. {need.way_out}, or choose another partition: {_listed(facts)}."
                ]
            return [
                f"{asked}: of the {len(everyone)} node(s) of partition {partition.name!r}, {len(left)} "
                f"{need.shortage(before)}. Slurm would let the job wait for ever. {need.way_out}."
            ]
    return []


def _needs(
    partition: Partition, cluster: ClusterConfig, placement: Placement, excluded: Collection[str]
) -> list[_Need]:
    per_rank = cluster.cpus_per_rank or 1
    cpus, gpus, memory = placement.ranks_per_node * per_rank, placement.gpus_per_node, _mebibytes(cluster.mem)

    def cpus_of(node: Node) -> int:
        return min(node.cpus, partition.max_cpus_per_node or node.cpus)

    def memory_of(node: Node) -> int:
        return min(node.memory_mb, partition.max_mem_mb or node.memory_mb)

    needs = [
        _Need("", lambda node: True, lambda nodes: "exist", "Lower nodes"),
        _Need(
            f"exclude={cluster.exclude}",
            lambda node: node.name not in excluded,
            lambda nodes: "are left",
            "Exclude fewer, or lower nodes",
        ),
        _Need(
            f"gpus_per_node={gpus}",
            lambda node: node.gpus >= gpus,
            lambda nodes: f"have as many GPUs, the most is {max((node.gpus for node in nodes), default=0)}",
            "Lower gpus_per_node or nodes",
        ),
        _Need(
            f"ranks_per_node × cpus_per_rank = {placement.ranks_per_node} × {per_rank} = {cpus}",
            lambda node: cpus_of(node) >= cpus,
            lambda nodes: f"have as many CPUs, the most is {max(map(cpus_of, nodes), default=0)}",
            "Lower cpus_per_rank or ranks_per_node",
        ),
        _Need(
            f"mem={cluster.mem}",
            lambda node: memory_of(node) >= memory,
            lambda nodes: f"have as much memory, the most is {max(map(memory_of, nodes), default=0)}M",
            "Lower mem; 0 asks for all of a node's",
        ),
    ]
    if (fits := _feature_test(cluster.constraint)) is not None:
        text = f"constraint={cluster.constraint}"
        needs.insert(2, _Need(text, fits, lambda nodes: "have these features", "Loosen constraint, or lower nodes"))
    return needs


def _mebibytes(mem: str | None) -> float:
    """Return what `mem` asks of a node, 0 for all or nothing; raises ClusterError for what sbatch cannot read."""
    if mem is None:
        return 0
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", mem.upper())
    if found is None:
        raise ClusterError(f"mem={mem}: sbatch reads a whole number and K, M, G or T, `500G` for one; 0 is all.")
    return int(found[1]) * _UNITS[found[2]]


def _feature_words(constraint: str) -> list[str]:
    return re.findall(r"[^\s&|,()\[\]!]+", re.sub(r"\*\d+", "", constraint))


def _feature_test(constraint: str | None) -> Callable[[Node], bool] | None:
    """Return which nodes a constraint of one kind of operator means; None for those with brackets or counts."""
    if constraint is None or re.search(r"[\[\]()*!]", constraint) or ("|" in constraint and "&" in constraint):
        return None
    words, combine = _feature_words(constraint), any if "|" in constraint else all
    return lambda node: combine(word in node.features for word in words)


def _unknown_features(facts: SlurmFacts, constraint: str | None) -> list[str]:
    known = sorted({feature for node in facts.nodes for feature in node.features})
    return [
        f"constraint={constraint}: no node has the feature {word!r}{_meant(word, known)}"
        for word in _feature_words(constraint or "")
        if word not in known
    ]


def _unknown_charge(facts: SlurmFacts, cluster: ClusterConfig) -> list[str]:
    """Complain about an account or QOS that does not exist, or that Slurm will not let this user have."""
    accounting, enforced = facts.accounting, facts.setting("AccountingStorageEnforce").lower()
    if accounting is None:
        return []
    problems = []
    for key, value, known, own, needed in (
        ("account", cluster.account, accounting.accounts, accounting.own_accounts, "associations"),
        ("qos", cluster.qos, tuple(accounting.qos_flags), accounting.own_qos, "qos"),
    ):
        if value is None:
            continue
        if value not in known:
            problems.append(f"{key}={value}: this cluster has none of this name{_meant(value, known)}")
        elif needed in enforced and value not in own:
            problems.append(f"{key}={value}: it exists, but is not yours; yours: {', '.join(own) or 'none'}.")
    return problems


def _excluded(facts: SlurmFacts, exclude: str | None) -> tuple[frozenset[str], list[str]]:
    """Return the names of the excluded nodes, and complaints about those that do not exist."""
    if exclude is None or "/" in exclude:  # a file's path: sbatch reads it
        return frozenset(), []
    names, known = expand_hostlist(exclude), [node.name for node in facts.nodes]
    if names is None:
        return frozenset(), [f"exclude={exclude}: Slurm cannot read this list of nodes; write `node3,node[5-7]`."]
    strange = [
        f"exclude={exclude}: there is no node {name!r}{_meant(name, known)}" for name in names if name not in known
    ]
    return frozenset(names), strange


def dependency_problems(dependency: str) -> list[str]:
    """Complain about jobs to wait for that Slurm does not know, or that already ended in the wrong way."""
    problems = []
    for one in re.split(r"[,?]", dependency):
        kind, _, jobs = one.rpartition(":") if one.isdigit() else one.partition(":")
        for job_id in re.findall(
            r"(?:^|:)(\d+)", jobs
        ):  # `1+30` waits for 30 more minutes, `1_2` is a task of an array
            problem = _dependency_problem(kind or "afterany", job_id)
            problems += [f"dependency={dependency}: {problem}"] if problem else []
    return problems


def _dependency_problem(kind: str, job_id: str) -> str | None:
    state = final_state(job_id) or ""
    if not state.isupper():  # nobody remembers it; a sacct without accounting may say so in words
        return (
            f"Slurm knows no job {job_id}. It would take the dependency for met and start at once; look at `squeue`, "
            "or leave the dependency out if that job ended well long ago."
        )
    if kind in ("afterok", "aftercorr") and state.startswith(_BAD_ENDS):
        return (
            f"job {job_id} ended {state}, and {kind} wants it to end well: this job would wait for ever. Submit that "
            "one again first, or wait with afterany."
        )
    if kind == "afternotok" and state == "COMPLETED":
        return f"job {job_id} ended well, and afternotok wants a failure: this job would wait for ever."
    return None


def _warnings(
    facts: SlurmFacts, partitions: Sequence[Partition], placement: Placement, excluded: Collection[str]
) -> Iterable[str]:
    for partition in partitions:
        if partition.state == "DOWN":
            yield f"partition {partition.name!r} is DOWN: jobs queue, none starts until it is up again."
        nodes = [node for node in facts.nodes_of(partition.name) if node.name not in excluded]
        usable = [node for node in nodes if node.is_usable]
        if nodes and len(usable) < min(placement.nodes, len(nodes)):
            bad = [f"{node.name} {'+'.join(node.states)} {node.reason}".strip() for node in nodes if not node.is_usable]
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            yield (
                f"{len(usable)} of the {len(nodes)} nodes of partition {partition.name!r} can run a job now, "
                f"{placement.nodes} are asked for: the job waits for {', '.join(bad[:5])}{more}."
            )


def _listed(facts: SlurmFacts) -> str:
    return ", ".join(f"{one.name} ({len(facts.nodes_of(one.name))} nodes)" for one in facts.partitions)


def _meant(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(known)) or 'none'}."
