"""`mvit prove-resume`: a recipe's own run undisturbed, and again with a kill and a resume, compared to the bit."""

import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cluster import count_gpus
from launcher.prove_ranks import RankEnd, StalledError, failure_of, first_error, planned, run_ranks

if TYPE_CHECKING:
    from mvit.config import RunConfig
    from mvit.prove import Verdict

STALL_S = 1800.0  # as long as the process group waits
Tell = Callable[[str], None]
Count = Callable[[int, int], None]


class ProofError(ValueError):
    """A proof that cannot be run, or whose undisturbed run failed by itself."""


@dataclass(frozen=True)
class Proof:
    """What is run and compared."""

    config: "RunConfig"
    resumed_config: "RunConfig"
    ranks: int
    resume_ranks: int
    steps: int
    kill_at: int
    total_steps: int
    changes: tuple[str, ...]
    """What the resumed run computes in another order: bits cannot agree then. Empty if they must."""
    tolerance: float


def plan_proof(
    recipe: str,
    overrides: Sequence[str],
    *,
    steps: int = 12,
    kill_at: int | None = None,
    ranks: int | None = None,
    resume_ranks: int | None = None,
    resume_with: Sequence[str] = (),
    tolerance: float | None = None,
) -> Proof:
    """Check everything that can be checked before time is spent; raises ValueError naming key, value, rule, way out."""
    import mvit
    from mvit.prove_elastic import TOLERANCES
    from mvit.prove_run import MIN_STEPS
    from mvit.run_identity import differences

    config = mvit.load_config(recipe, list(overrides))
    resumed = mvit.load_config(recipe, [*overrides, *resume_with])
    if other := differences(config, resumed):
        raise ProofError(
            f"--resume-with changes what the run computes: {'; '.join(other)}. A run resumes with the settings it was "
            "started with, other than where and how fast it runs: zero.*, train.micro_batch_size, data.num_workers …"
        )
    gpus = count_gpus()
    ranks = _checked_ranks("--ranks", (gpus or 1) if ranks is None else ranks, gpus, config)
    resume_ranks = _checked_ranks("--resume-ranks", ranks if resume_ranks is None else resume_ranks, gpus, resumed)
    total = _total_steps(config)
    steps = min(steps, total)
    if steps < MIN_STEPS:
        of_run = f" (the whole run has {total})" if steps == total else ""
        raise ProofError(
            f"--steps {steps}{of_run}: a proof needs at least {MIN_STEPS} steps, for a save, a step that the kill "
            "loses and steps after the resume; raise --steps or schedule.epochs"
        )
    kill_at = max(2, steps * 2 // 3) if kill_at is None else kill_at
    if not 2 <= kill_at <= steps:
        raise ProofError(
            f"--kill-at {kill_at}: the run must be killed in one of the steps 2 to {steps} (--steps), after a save and "
            "before its end; choose another, or leave it out"
        )
    changes = _changes(config, resumed, ranks, resume_ranks)
    tolerance = TOLERANCES[config.train.precision] if tolerance is None else tolerance
    if not tolerance >= 0:
        raise ProofError(f"--tolerance {tolerance:g}: a relative difference is 0 or more; leave it out for the default")
    return Proof(config, resumed, ranks, resume_ranks, steps, kill_at, total, changes, tolerance)


def _checked_ranks(option: str, ranks: int, gpus: int, config: "RunConfig") -> int:
    if ranks < 1:
        raise ProofError(f"{option} {ranks}: a run has at least one rank")
    if gpus and ranks > gpus:
        raise ProofError(
            f"{option} {ranks}: this machine shows {gpus} GPU(s) to CUDA and a rank drives exactly one; lower it, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= to prove it on the CPU"
        )
    try:
        config.batch_arithmetic(ranks)
    except ValueError as error:
        raise ProofError(f"{option} {ranks}: {error}") from None
    return ranks


def _total_steps(config: "RunConfig") -> int:
    """Open the data as training would and return the steps of the whole run."""
    from data_pipeline.shards import ShardError, open_shards

    if config.data.train is None:
        raise ProofError("data.train is not set: the proof trains on the run's own shards; data.train=FOLDER")
    sizes = {}
    for key, spec in (("train", config.data.train), ("validation", config.data.validation)):
        if spec is None:
            continue
        try:
            data, required = config.data, config.required_members
            shards = open_shards(spec, cache_dir=data.cache_dir, cache_gib=data.cache_gib, required=required)
        except (ShardError, OSError) as error:
            raise ProofError(f"data.{key} = {spec}: {error}") from error
        shards.check_labels(config.model.num_classes)
        sizes[key] = len(shards)
    return config.total_steps(sizes["train"])


def _changes(config: "RunConfig", resumed: "RunConfig", ranks: int, resume_ranks: int) -> tuple[str, ...]:
    """List what changes the order of summation."""
    told = [] if ranks == resume_ranks else [f"{ranks} -> {resume_ranks} ranks"]
    for section, keys in (("zero", None), ("train", ("micro_batch_size", "activation_checkpointing", "compile"))):
        before, after = (getattr(one, section).model_dump(mode="json") for one in (config, resumed))
        told += [
            f"{section}.{key} {before[key]} -> {after[key]}" for key in keys or before if before[key] != after[key]
        ]
    return tuple(told)


def prove(
    proof: Proof, work: str | Path | None = None, *, keep: bool = False, tell: Tell, count: Count
) -> "tuple[Verdict, Path | None]":
    """Run the proof in a new folder inside `work` (the recipe's output_dir) and return its verdict.

    The folder is removed if the verdict is good and it is not to be kept, else returned. `tell` gets lines for the
    user, `count` the steps done and their total. Raises ProofError when the run fails without having been resumed.
    """
    place = Path(work or proof.config.output_dir)
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"prove-resume-{proof.config.name}-", dir=place)).absolute()
    tell(f"the runs of this proof lie in {folder}")
    try:
        verdict = _Attempts(proof, folder, tell, count).verdict()
    except ProofError as error:
        raise ProofError(f"{error}\nthe runs are kept in {folder}") from None
    if verdict.ok and not keep:
        shutil.rmtree(folder)
        return verdict, None
    return verdict, folder


class _Attempts:
    """The three attempts of one proof, done one after the other."""

    def __init__(self, proof: Proof, folder: Path, tell: Tell, count: Count) -> None:
        from mvit.prove_run import save_step

        self._proof, self._folder, self._tell, self._count = proof, folder, tell, count
        self._saved = save_step(proof.kill_at)
        self._done = 0

    def verdict(self) -> "Verdict":
        from mvit.prove import compare
        from mvit.prove_elastic import compare_elastic
        from mvit.trace import read_trace

        proof = self._proof
        self._tell(f"1/3  undisturbed: {proof.steps} of {proof.total_steps} steps on {proof.ranks} rank(s)")
        self._succeed("undisturbed", "the undisturbed run")
        self._tell(
            f"2/3  again: saves after step {self._saved}, killed by SIGKILL in the middle of step {proof.kill_at}"
        )
        self._succeed("killed", "the run that was to be killed")
        how = ", ".join(proof.changes) or f"on {proof.resume_ranks} rank(s)"
        self._tell(f"3/3  resumed: {how}")
        error = self._run("resumed")
        first, second = (read_trace(self._trace_dir(name), proof.ranks) for name in ("undisturbed", "killed"))
        third = read_trace(self._trace_dir("resumed"), proof.resume_ranks)
        if not proof.changes:
            return compare(first, second, third, proof.steps, error)
        found = compare_elastic(first, second, third, proof.steps, tolerance=proof.tolerance, error=error)
        return replace(found, note="\n".join([found.note or _ELASTIC, f"changed: {', '.join(proof.changes)}"]))

    def _trace_dir(self, name: str) -> Path:
        return self._folder / name / "traces"

    def _succeed(self, name: str, what: str) -> None:
        if error := self._run(name):
            raise ProofError(f"{what} failed, before anything was resumed: {error}")

    def _run(self, name: str) -> str:
        """Run one attempt; return an error that ended it, empty if it ended as planned."""
        from mvit.prove_run import killed_mark, proof_config

        proof, folder, traces = self._proof, self._folder / name, self._trace_dir(name)
        folder.mkdir()
        resumed, killed = name == "resumed", name == "killed"
        world_size = proof.resume_ranks if resumed else proof.ranks
        save_every = proof.total_steps + 1 if name == "undisturbed" else self._saved
        config = proof_config(proof.resumed_config if resumed else proof.config, save_every)
        plan = {
            "config": config.model_dump(mode="json"),
            "run_dir": str(self._folder / ("undisturbed_run" if name == "undisturbed" else "run")),
            "traces": str(traces),
            "steps": proof.steps,
            "kill_at": proof.kill_at if killed else None,
        }
        mark = killed_mark(traces)
        try:
            ends = run_ranks(
                planned(plan, folder),
                world_size,
                folder,
                stall_s=STALL_S,
                is_over=mark.exists,
                tick=lambda: self._watch(traces, folder, world_size),
            )
        except StalledError as error:
            return f"{error}\n{failure_of(folder, [])}"
        self._done += self._steps_of(traces)
        if killed:
            return "" if mark.exists() and _last_was_killed(ends) else failure_of(folder, ends)
        if all(end.exit_code == 0 for end in ends):
            return ""
        return first_error(folder) if resumed and first_error(folder) else failure_of(folder, ends)

    def _watch(self, traces: Path, folder: Path, world_size: int) -> int:
        """Show how far the attempt is; return a number that changes when any rank writes a trace or a log."""
        proof = self._proof
        total = proof.steps + proof.kill_at - 1 + proof.steps - self._saved
        self._count(self._done + self._steps_of(traces), total)
        files = [*traces.glob("rank_*.jsonl"), *folder.glob("rank_*.log")]
        return sum(file.stat().st_size for file in files)

    def _steps_of(self, traces: Path) -> int:
        from mvit.trace import trace_file

        file = trace_file(traces, 0)
        return max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0


_ELASTIC = (
    "samples, augmentation and learning rate of every step and the state right after loading agree exactly; losses "
    "cannot, because sums over ranks and buckets are rounded in another order"
)


def _last_was_killed(ends: Sequence[RankEnd]) -> bool:
    return ends[-1].exit_code == -signal.SIGKILL
