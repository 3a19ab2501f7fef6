"""Slurm's settings that decide what becomes of a long run, and what each of them means for it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.cluster import ClusterConfig
from launcher.doctor_report import Finding
from launcher.slurm import Partition, SlurmFacts, parse_seconds

_DEFAULT_EXPIRE_S = 120  # of a job credential
_ADMIN = "An administrator sets it in slurm.conf"


@dataclass(frozen=True)
class StopTime:
    """How long a run takes to stop with everything saved: a full save and one step."""

    save_s: float
    step_s: float
    source: str

    @property
    def seconds(self) -> float:
        return self.save_s + self.step_s

    def __str__(self) -> str:
        step = f" and a step {self.step_s:.1f} s" if self.step_s else ""
        return f"A save takes {self.save_s:.1f} s{step} ({self.source})"


def slurm_findings(
    facts: SlurmFacts, cluster: ClusterConfig, partition: Partition | None, stop: StopTime | None
) -> Iterator[Finding]:
    """Judge the settings of a cluster for jobs of `partition` that need `stop` to save."""
    yield _version(facts)
    yield from _preemption(facts, partition, stop)
    yield from _requeue(facts, cluster)
    yield from _ending(facts, partition)
    yield from _nodes(facts)
    yield _accounting(facts)


def lead_finding(cluster: ClusterConfig, stop: StopTime | None) -> Finding:
    """Compare the signal's lead with the time a stop takes."""
    found, lead = f"signal_delay_s={cluster.signal_delay_s}", cluster.signal_delay_s
    if stop is None:
        return Finding(
            "signal lead",
            "WARN",
            found,
            "How long a save takes is not known.",
            "Give the recipe, or --run RUN of a run that has saved.",
        )
    if lead < stop.seconds:
        rule = f"{stop}: the job is killed before it has saved, and loses the steps since its last save."
        return Finding("signal lead", "FAIL", found, rule, f"Set signal_delay_s={_rounded(stop.seconds + 60)}.")
    if lead < stop.seconds + 60:
        rule = f"{stop}: less than a minute is left for a slow moment of the file system."
        return Finding("signal lead", "WARN", found, rule, f"Set signal_delay_s={_rounded(stop.seconds + 60)}.")
    return Finding("signal lead", "PASS", found, f"{stop}.")


def granularity_finding(cluster: ClusterConfig) -> Finding:
    """Say how exact Slurm is about a time limit."""
    why = (
        "Slurm counts whole minutes and looks at the clock now and then: the signal may come up to 60 s early and the "
        "end up to a minute late."
    )
    share = (cluster.signal_delay_s + 60) / (60 * (cluster.timeout_min or 1))
    found = f"timeout_min={cluster.timeout_min}"
    if share > 0.2:
        more = f" Stopping takes up to {share:.0%} of each life."
        return Finding("time limit", "WARN", found, why + more, "A longer timeout_min, where the partition allows it.")
    return Finding("time limit", "PASS", found, why)


def _version(facts: SlurmFacts) -> Finding:
    version = facts.setting("SLURM_VERSION")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < (20, 11):
        why = "Tested with 22.05; before 20.11, a step takes the whole job's resources in another way."
        return Finding("Slurm", "WARN", version or "unknown version", why)
    return Finding("Slurm", "PASS", version)


def _preemption(facts: SlurmFacts, partition: Partition | None, stop: StopTime | None) -> Iterator[Finding]:
    kind, mode = facts.setting("PreemptType"), facts.setting("PreemptMode")
    if partition is not None and "partition_prio" in kind and partition.preempt_mode:
        mode = partition.preempt_mode
    found = f"PreemptType={kind or 'none'}, PreemptMode={mode}"
    if kind in ("", "preempt/none") or mode == "OFF":
        yield Finding("preemption", "PASS", found, "Jobs of this partition are not preempted.")
        return
    if "REQUEUE" in mode:
        yield Finding("preemption", "PASS", found, "A preempted job goes back to the queue by itself.")
    elif "CANCEL" in mode:
        why = "A preempted job is cancelled, not requeued: the run ends until somebody continues it."
        yield Finding("preemption", "WARN", found, why, "Another partition or QOS, or `mvit resume RUN` afterwards.")
    else:
        why = "A preempted job stands still and goes on later: ranks wait, and time-outs of the network may end them."
        yield Finding("preemption", "WARN", found, why, "Another partition or QOS.")
    parameters = f"{facts.setting('SlurmctldParameters')},{facts.setting('PreemptParameters')}"
    if "send_user_signal" in parameters:
        yield Finding("preemption signal", "PASS", "preempt_send_user_signal is on", "A preempted job is told to save.")
    else:
        yield Finding(
            "preemption signal",
            "WARN",
            "preempt_send_user_signal is off",
            "A preempted job gets SIGTERM instead of USR2: ranks save on it, but what `setup` started may end.",
            f"{_ADMIN}: SlurmctldParameters=preempt_send_user_signal (PreemptParameters=send_user_signal in newer "
            "versions).",
        )
    yield _grace(facts, partition, stop)


def _grace(facts: SlurmFacts, partition: Partition | None, stop: StopTime | None) -> Finding:
    grace = 0 if partition is None else partition.grace_time_s
    wait = parse_seconds(facts.setting("KillWait")) or 0.0
    found = f"GraceTime={grace} s, then KillWait={wait:g} s"
    if stop is None:
        return Finding("grace time", "PASS" if grace else "WARN", found, "How long a save takes is not known.")
    if grace + wait < stop.seconds:
        why = f"{stop}: a preempted job is killed before it has saved, and loses the steps since its last save."
        out = f"{_ADMIN}: GraceTime={_rounded(stop.seconds + 30)} for this partition. Until then, a smaller save_every."
        return Finding("grace time", "WARN", found, why, out)
    return Finding("grace time", "PASS", found, f"{stop}.")


def _requeue(facts: SlurmFacts, cluster: ClusterConfig) -> Iterator[Finding]:
    found = f"JobRequeue={facts.setting('JobRequeue')}, requeue: {str(cluster.requeue).lower()} in the cluster file"
    if cluster.requeue:
        why = "Jobs ask for it by --requeue, whatever JobRequeue is: they come back after a lost node or a preemption."
        yield Finding("requeue", "PASS", found, why)
    else:
        why = "A run ends with its first life, at the time limit, too."
        yield Finding("requeue", "WARN", found, why, "Set requeue: true, or continue it with `mvit resume RUN`.")
    given = re.search(r"cred_expire=(\d+)", facts.setting("AuthInfo"))
    expire = int(given[1]) if given else _DEFAULT_EXPIRE_S
    found = f"cred_expire={expire} s" + ("" if given else " (the default)")
    why = f"A requeued job waits {expire + 1} s before it may start again."
    if expire > _DEFAULT_EXPIRE_S:
        yield Finding("requeue delay", "WARN", found, why, f"{_ADMIN}: AuthInfo=cred_expire={_DEFAULT_EXPIRE_S}.")
    else:
        yield Finding("requeue delay", "PASS", found, why)


def _ending(facts: SlurmFacts, partition: Partition | None) -> Iterator[Finding]:
    wait = parse_seconds(facts.setting("KillWait")) or 0.0
    why = "Between SIGTERM and SIGKILL of a cancelled or requeued job."
    level, out = ("PASS", "") if wait >= 5 else ("WARN", f"{_ADMIN}: 30 is usual; a rank needs seconds for its traces.")
    yield Finding("KillWait", level, f"{wait:g} s", why, out)
    why = "Ranks are started with --kill-on-bad-exit=1, whatever this setting is."
    yield Finding("KillOnBadExit", "PASS", facts.setting("KillOnBadExit"), why)
    over = facts.setting("OverTimeLimit")
    if partition is not None and partition.over_time_limit not in ("", "NONE"):
        over = partition.over_time_limit
    if over.upper().startswith("UNLIMITED"):
        why = "A job that hangs in its save is never ended by its time limit."
        yield Finding("OverTimeLimit", "WARN", over, why, "The watchdog (hang_timeout_s) ends it.")
    else:
        yield Finding("OverTimeLimit", "PASS", over, "So much longer than its time limit may a job run.")
    kind = facts.setting("ProctrackType").removeprefix("proctrack/")
    if kind == "cgroup":
        yield Finding("ProctrackType", "PASS", kind, "No process outlives its job; only a step's own tasks get USR2.")
    else:
        why = "A process that leaves its parent or group may outlive its job; data workers get the job's signals, too."
        yield Finding("ProctrackType", "WARN", kind, why, f"{_ADMIN}: proctrack/cgroup is surer. Runs work with it.")


def _nodes(facts: SlurmFacts) -> Iterator[Finding]:
    timeout = parse_seconds(facts.setting("SlurmdTimeout"))
    found = facts.setting("SlurmdTimeout")
    if not timeout:
        why = "A node that is lost is never noticed: its job neither ends nor is requeued."
        yield Finding("SlurmdTimeout", "WARN", found, why, f"{_ADMIN}: 300 is usual.")
        return
    why = f"A lost node is noticed after {timeout:g} s or somewhat more; only then is its job requeued."
    level, out = ("PASS", "") if timeout <= 600 else ("WARN", f"{_ADMIN}: 300 is usual.")
    yield Finding("SlurmdTimeout", level, found, why, out)


def _accounting(facts: SlurmFacts) -> Finding:
    if not facts.has_accounting:
        why = "There is no sacct; `mvit status` and `mvit why` read the run folder, which needs none."
        return Finding("accounting", "PASS", "off", why)
    if facts.accounting is None:
        why = "slurmdbd does not answer: account and QOS were not checked."
        return Finding("accounting", "WARN", facts.setting("AccountingStorageType"), why)
    enforced = facts.setting("AccountingStorageEnforce") or "none"
    return Finding("accounting", "PASS", f"on, enforced: {enforced}")


def _rounded(seconds: float) -> int:
    """Round up to whole tens."""
    return int(-(-seconds // 10) * 10)
