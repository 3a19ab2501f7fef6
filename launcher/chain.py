"""Chains: runs of which each starts from the weights of the one before, when that is finished, and an evaluation."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cluster import ClusterConfig, ClusterError, Placement, load_cluster, place
from launcher.dependency import Upstream, wait_for
from launcher.evaluation_job import Evaluation, create_evaluation
from launcher.recipe_folder import recipe_run_dir, refuse_missing
from launcher.run_folder import RunFolder
from launcher.slurm_queue import ask_squeue
from launcher.submission_checks import check_submission
from launcher.submit import (
    Submission,
    check_data_is_there,
    check_new,
    create_run,
    describe_job,
    dry_run,
    refuse_taken,
    submit_attempt,
)

if TYPE_CHECKING:
    from mvit.config import RunConfig

_GONE_WITHIN_S = 20.0
_WEIGHTS = "model.weights="


class ChainError(ValueError):
    """Runs that cannot follow each other; nothing was created."""


@dataclass(frozen=True)
class Step:
    """One recipe of a chain as it was typed."""

    recipe: str
    overrides: Sequence[str] = ()
    of_cluster: Sequence[str] = ()


@dataclass(frozen=True)
class Link:
    """One job of a chain: a run, or the evaluation of the run before it."""

    config: "RunConfig"
    cluster: ClusterConfig
    placement: Placement
    is_evaluation: bool = False

    @property
    def run(self) -> RunFolder:
        """The folder it will have."""
        trained = RunFolder(self.config.run_dir.absolute())
        return Evaluation(trained).folder if self.is_evaluation else trained

    @property
    def name(self) -> str:
        return f"{self.config.name}-evaluation" if self.is_evaluation else self.config.name


@dataclass(frozen=True)
class Chain:
    """Jobs that follow each other, and the run that the first one waits for."""

    links: tuple[Link, ...]
    after: Upstream | None

    @property
    def is_local(self) -> bool:
        return self.links[0].cluster.executor == "local"


def plan_chain(steps: Sequence[Step], cluster_file: str, *, evaluate: bool = False, after: str | None = None) -> Chain:
    """Read all recipes and the cluster file, and put the jobs in a row.

    The first step's cluster settings hold for all, those of a later one come on top. Each run starts from the one
    before it (the first from `after`), unless its recipe or overrides say model.weights. Raises RunFolderError for a
    folder that is taken, ValueError for what cannot be read, and ChainError or ConfigError for runs that cannot follow
    each other.
    """
    import mvit

    first, *later = steps
    clusters = [load_cluster(cluster_file, list(first.of_cluster))]
    clusters += [load_cluster(cluster_file, [*first.of_cluster, *step.of_cluster]) for step in later]
    _check_folders(steps)
    upstream, before = None, None
    if after is not None:
        upstream = wait_for(after, clusters[0].executor)
        before = mvit.load_config(RunFolder(Path(upstream.run_dir)).config_file), upstream.run_dir
    links = []
    for step, cluster in zip(steps, clusters, strict=True):
        config = _load(step, before)
        links.append(Link(config, cluster, place(cluster)))
        before = config, str(config.run_dir.absolute())
    if evaluate:
        links.append(_evaluation_of(links[-1]))
    _check_row(links)
    return Chain(tuple(links), upstream)


def _check_folders(steps: Sequence[Step]) -> None:
    """Refuse what the recipes' files alone tell, before torch is imported for the whole configs."""
    for step in steps:
        refuse_missing(step.recipe)
    seen: dict[Path, str] = {}
    for step in steps:
        if (run_dir := recipe_run_dir(step.recipe, step.overrides)) is None:
            continue
        if run_dir in seen:
            raise _same_folder(seen[run_dir], step.recipe, run_dir)
        seen[run_dir] = step.recipe
        refuse_taken(RunFolder(run_dir))


def _same_folder(one: str, other: str, run_dir: Path) -> ChainError:
    return ChainError(f"{one} and {other} would have the same run folder {run_dir}: give one of them another name=…")


def check_chain(chain: Chain, *, check_data: bool) -> None:
    """Check everything that can be known before anything is created or submitted; raises ValueError."""
    for number, link in enumerate(chain.links):
        if link.is_evaluation:
            check_submission(link.cluster, link.placement)
            continue
        check_new(link.config, link.cluster, chain.after if number == 0 else None)
        if check_data:
            check_data_is_there(link.config)


def submit_chain(chain: Chain, command: Sequence[str]) -> list[Submission]:
    """Create all runs and submit them to Slurm, each waiting for the one before.

    After a refused submission the earlier ones are cancelled and all folders removed.
    """
    created: list[RunFolder] = []
    submitted: list[Submission] = []
    try:
        for link in chain.links:
            created.append(_create(link, command))
        after = chain.after
        for link in chain.links:
            submitted.append(submit_attempt(link.run, link.cluster, link.placement, after))
            after = Upstream(str(link.run.path), submitted[-1].job_id)
    except BaseException:
        _undo(created, submitted)
        raise
    return submitted


def run_chain_here(chain: Chain, command: Sequence[str], stay: Callable[[Submission], int]) -> int:
    """Run a chain's jobs on this machine one after the other; return the exit code of the first that is not finished.

    `stay` shows a submission, follows it to its end and returns its exit code. The folders of jobs that did not get
    their turn are removed.
    """
    waiting: list[RunFolder] = []
    try:
        for link in chain.links:
            waiting.append(_create(link, command))
        after = chain.after
        for link in chain.links:
            submission = submit_attempt(link.run, link.cluster, link.placement, after)
            waiting.remove(link.run)
            if code := stay(submission):
                for left in waiting:
                    text = f"not started, since the one before it is not finished (its folder is removed): {left.path}"
                    print(text, file=sys.stderr)
                return code
            after = Upstream(str(link.run.path), None)
    finally:
        _remove_unused(waiting)
    return 0


def dry_run_chain(chain: Chain) -> str:
    """Return what would be submitted, job by job. Creates nothing."""
    texts, dependency = [], None if chain.after is None else chain.after.dependency
    for number, link in enumerate(chain.links, start=1):
        title = f"# ----- {number} of {len(chain.links)}: {link.name}"
        if link.is_evaluation:
            notes = ["evaluates the run before it, on one node"]
            text = describe_job(link.run, link.name, link.cluster, link.placement, notes, dependency)
        else:
            text = dry_run(link.config, link.cluster, dependency)
        texts += [title, text] if len(chain.links) > 1 else [text]
        dependency = f"afterok:ID_OF_JOB_{number}"
    return "\n".join(texts)


def _evaluation_of(trained: Link) -> Link:
    if trained.config.data.validation is None:
        raise ChainError(
            f"{trained.name}: --then-evaluate needs data.validation, which is not set: name shards, or leave the "
            "option out"
        )
    cluster = trained.cluster.model_copy(update={"nodes": 1})
    return Link(trained.config, cluster, place(cluster), is_evaluation=True)


def _check_row(links: Sequence[Link]) -> None:
    names: dict[Path, str] = {}
    for link in links:
        if link.cluster.executor != links[0].cluster.executor:
            raise ChainError(f"{link.name}: the jobs of a chain share one executor; drop cluster.executor=…")
        if link.run.path in names:
            raise _same_folder(names[link.run.path], link.name, link.run.path)
        names[link.run.path] = link.name


def _load(step: Step, before: "tuple[RunConfig, str] | None") -> "RunConfig":
    """Load a recipe that starts from the run before it, unless it says itself what it starts from."""
    import mvit

    config = mvit.load_config(step.recipe, list(step.overrides))
    if before is None:
        return config
    trained, run_dir = before
    if config.model.weights is None and not any(word.startswith(_WEIGHTS) for word in step.overrides):
        config = mvit.load_config(step.recipe, [*step.overrides, f"{_WEIGHTS}{json.dumps(run_dir)}"])
    if config.model.weights is not None and Path(config.model.weights).absolute() == Path(run_dir):
        from mvit.starting_weights import check_start

        check_start(trained, config)
        return config
    start = "new weights" if config.model.weights is None else f"model.weights = {config.model.weights}"
    print(
        f"warning: {config.name} starts from {start}, as its recipe or an override says, not from the run before it: "
        f"to start from that, set model.weights={run_dir}",
        file=sys.stderr,
    )
    return config


def _create(link: Link, command: Sequence[str]) -> RunFolder:
    if link.is_evaluation:
        return create_evaluation(RunFolder(link.run.path.parent), link.name, command, link.cluster)
    return create_run(link.config, command, link.cluster)


def _undo(created: Sequence[RunFolder], submitted: Sequence[Submission]) -> None:
    """Cancel what was submitted and remove the folders, other than those of runs that were there before."""
    ids = [one.job_id for one in reversed(submitted)]  # the last first: none shall start because one before it ends
    if ids:
        _cancel(ids)
    for one in submitted:
        run = RunFolder(Path(one.run_dir))
        if one.attempt == 1:
            shutil.rmtree(run.path, ignore_errors=True)
        else:
            detail = "cancelled: a later job of its chain was refused"
            run.append_event("end", one.attempt, cause="stopped", kind="cancelled", detail=detail, requeued=False)
    _remove_unused(created)


def _cancel(ids: Sequence[str]) -> None:
    told = subprocess.run(["scancel", *ids], capture_output=True, text=True)
    deadline = time.monotonic() + _GONE_WITHIN_S
    while (found := ask_squeue(ids)) is not None and not all(job.is_gone for job in found.values()):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"a job of the chain was refused, and the Slurm jobs {' '.join(ids)} before it could not be cancelled "
                f"({told.stderr.strip() or 'they are still there'}): scancel {' '.join(ids)}"
            )
        time.sleep(0.2)


def _remove_unused(runs: Sequence[RunFolder]) -> None:
    for run in runs:
        if not run.events():
            shutil.rmtree(run.path, ignore_errors=True)
