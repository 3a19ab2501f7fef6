"""The commands that train, submit, pack and measure: load what they need, call it, print."""

import difflib
import json
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.submit import Submission

_NEAR_MISS = 0.75  # similarity of a key to one of the cluster file's; no key of a recipe comes near
_NEAR_BUT_RIGHT = {"detector"}  # a recipe's section; a test finds any other that looks like a key of the cluster file

# Every import of launcher modules stands in a function: `mvit --help` must not wait for pydantic, submitit or torch.


def train(args: Namespace) -> int:
    """Train in this process."""
    from launcher.job import export_srun_rank, train_inline, wait_without_spinning

    wait_without_spinning()
    from launcher.recipe_folder import refuse_missing

    refuse_missing(args.recipe)
    import mvit
    from launcher.run_folder import RunFolder
    from launcher.submit import create_run, refuse_active

    rank = export_srun_rank()
    config = mvit.load_config(args.recipe, args.overrides)
    run = RunFolder(config.run_dir.absolute())
    if rank == 0:
        if args.resume and run.run_file.exists():
            refuse_active(run)
        else:
            run = create_run(config, sys.argv)
    return train_inline(config, run)


def submit(args: Namespace) -> int:
    """Create a run, or a chain of runs, and submit it."""
    from launcher.chain import ChainError, Step, check_chain, dry_run_chain, plan_chain, run_chain_here, submit_chain

    steps = [Step(args.recipe, *split_overrides(args)), *(Step(*_split_step(text)) for text in args.then)]
    chain = plan_chain(steps, args.cluster, evaluate=args.then_evaluate, after=args.after)
    if args.dry_run:
        print(dry_run_chain(chain))
        return 0
    check_chain(chain, check_data=not args.no_data_check)
    if len(chain.links) > 1 and chain.is_local:
        if not args.follow:
            raise ChainError(
                "without Slurm, one job cannot wait for another: add --follow to stay and run them in turn"
            )
        return run_chain_here(chain, sys.argv, lambda submission: _show_and_follow(args, submission))
    submissions = submit_chain(chain, sys.argv)
    if len(submissions) == 1:
        return _show_and_follow(args, submissions[0])
    return _show_and_follow_chain(args, submissions)


def resume(args: Namespace) -> int:
    """Continue a run where it was started: in this process, or on its cluster or another one."""
    from launcher.cluster import load_cluster
    from launcher.job import train_inline
    from launcher.overview import the_run
    from launcher.submit import enter_run, refuse_active, resumed_config, saved_cluster, submit_resume

    of_recipe, of_cluster = split_overrides(args)
    run = the_run(Path(args.run_dir).absolute())
    refuse_active(run)  # before torch is imported for its config
    cluster = load_cluster(args.cluster, of_cluster) if args.cluster else saved_cluster(run, of_cluster)
    config = resumed_config(run, of_recipe)
    if cluster is None:
        enter_run(run)
        return train_inline(config, run)
    return _show_and_follow(args, submit_resume(run, config, cluster))


def prove_resume(args: Namespace) -> int:
    """Prove on this machine that a recipe resumes as if nothing had happened; exit code 0 only if it does."""
    from launcher.job import wait_without_spinning

    wait_without_spinning()
    from launcher.prove import plan_proof, prove
    from mvit.progress import ProgressDisplay

    proof = plan_proof(
        args.recipe,
        args.overrides,
        steps=args.steps,
        kill_at=args.kill_at,
        ranks=args.ranks,
        resume_ranks=args.resume_ranks,
        resume_with=args.resume_with,
        tolerance=args.tolerance,
    )
    if args.json:
        verdict, folder = prove(
            proof,
            args.work,
            keep=args.keep,
            tell=lambda text: print(text, file=sys.stderr, flush=True),
            count=lambda done, total: None,
        )
        print(json.dumps(verdict.to_dict() | {"ok": verdict.ok, "work": None if folder is None else str(folder)}))
        return 0 if verdict.ok else 1
    with ProgressDisplay() as display:
        verdict, folder = prove(
            proof,
            args.work,
            keep=args.keep,
            tell=display.note,
            count=lambda done, total: display.update({"kind": "progress", "step": done, "total_steps": total}),
        )
    print(verdict)
    if folder is not None:
        print(f"the runs, their logs and traces are kept in {folder}")
    return 0 if verdict.ok else 1


def bench_detection(args: Namespace) -> int:
    """Measure a detector's backbone with each type of attention, and the metric beside pycocotools."""
    from mvit.benchmark_detection import as_dict, bench_attention, bench_metric, show_rows

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    metric = [] if args.only == "attention" else bench_metric(args.images, rounds=args.rounds, tell=tell)
    attention = [] if args.only == "metric" else bench_attention(
        args.variant,
        args.size,
        args.attention,
        precision=args.precision,
        batch=args.batch,
        rounds=args.rounds,
        device=args.device,
        num_threads=args.threads,
        tell=tell,
    )  # fmt: skip
    if args.json:
        print(json.dumps(as_dict(attention, metric)))
    else:
        show_rows(attention, metric)
    return 0


def _show_and_follow(args: Namespace, submission: "Submission") -> int:
    if args.json:
        print(json.dumps(submission.to_dict()), flush=True)
    else:
        print(submission, flush=True)
    if args.follow:
        from launcher.follow import follow

        return follow(Path(submission.run_dir), as_json=args.json)
    if not args.json:
        print(f"watch it: mvit status {submission.run_dir} --follow; stop it: mvit stop {submission.run_dir}")
    return 0


def _show_and_follow_chain(args: Namespace, submissions: "list[Submission]") -> int:
    from launcher.follow import follow

    if args.json:
        print(json.dumps({"runs": [one.to_dict() for one in submissions]}), flush=True)
    else:
        print("\n".join(str(one) for one in submissions), flush=True)
    if not args.follow:
        if not args.json:
            print(f"watch them: mvit status {' '.join(one.run_dir for one in submissions)}")
        return 0
    codes = (follow(Path(one.run_dir), as_json=args.json) for one in submissions)
    return next((code for code in codes if code), 0)


def _split_step(text: str) -> tuple[str, list[str], list[str]]:
    """Read `RECIPE k=v k=v` of --then: the recipe, its overrides, and those of the cluster file."""
    recipe, *words = shlex.split(text) or [""]
    wrong = [word for word in words if "=" not in word]
    if not recipe or "=" in recipe or wrong:
        raise ValueError(
            f"--then {text!r}: write a recipe and its settings in one word: --then 'RECIPE.yaml key=value'"
        )
    return recipe, *_split_words(words)


def split_overrides(args: Namespace) -> tuple[list[str], list[str]]:
    of_recipe, of_cluster = _split_words(args.overrides)
    if args.nodes is not None:
        of_cluster.append(f"nodes={args.nodes}")
    return of_recipe, of_cluster


def _split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the recipe's overrides from those of the cluster file: `cluster.nodes=2`, or `nodes=2` for short.

    Raises ClusterError for a key that is nearly one of the cluster file's.
    """
    from launcher.cluster import ClusterConfig, ClusterError

    of_recipe, of_cluster = [], []
    for word in words:
        key = re.split(r"[.=]", word)[0]
        is_cluster = key == "cluster" or key in ClusterConfig.model_fields  # no recipe has a key like these
        close = difflib.get_close_matches(key, ClusterConfig.model_fields, n=1, cutoff=_NEAR_MISS)
        if close and not is_cluster and key not in _NEAR_BUT_RIGHT:
            raise ClusterError(f"{word}: unknown key {key!r}: did you mean {close[0]} (of the cluster file)?")
        (of_cluster if is_cluster else of_recipe).append(word.removeprefix("cluster."))
    return of_recipe, of_cluster
