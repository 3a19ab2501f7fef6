"""`mvit checkpoint` lists, verifies, prunes and compares a run's checkpoints; `mvit bench checkpoint` times them."""

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvit.checkpoint import Manifest

_MAX_SHOWN = 20
# As in commands.py, imports stand in the functions: `mvit --help` must not wait for torch.


def show_list(args: Namespace) -> int:
    """List a run's checkpoints: what their manifests say; nothing is verified."""
    from mvit.checkpoint import CheckpointError, checkpoint_path, list_steps, publications, read_manifest

    run_dir = _run_dir(args.run_dir)
    read_back = {line["step"]: line["read_back"] for line in publications(run_dir)}
    rows = []
    for step in list_steps(run_dir):
        path = checkpoint_path(run_dir, step)
        row: dict[str, object] = {"step": step, "path": str(path), "read_back": read_back.get(step, False)}
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            rows.append(row | {"problem": str(error)})
            continue
        if wrong := [one["file"] for one in manifest.files if not _has_size(path / one["file"], one["bytes"])]:
            told = f"{len(wrong)} file(s) missing or of another size, {wrong[0]} first; see mvit checkpoint verify"
            rows.append(row | {"problem": told, "read_back": False})
            continue
        stage = manifest.state.get("config", {}).get("zero", {}).get("stage")
        rows.append(
            row
            | {
                "created": manifest.created,
                "bytes": manifest.num_bytes,
                "world_size": manifest.world_size,
                "zero_stage": stage,
                "ema": manifest.has_ema,
                "score": manifest.score,
            }
        )
    print(json.dumps(rows) if args.json else _table(rows) or "no checkpoint yet")
    return 0


def _has_size(file: Path, num_bytes: int) -> bool:
    return file.is_file() and file.stat().st_size == num_bytes


def _table(rows: list[dict[str, object]]) -> str:
    lines = []
    for row in rows:
        if "problem" in row:
            lines.append(f"step {row['step']}  DAMAGED: {row['problem']}")
            continue
        size, score = row["bytes"], row["score"]
        assert isinstance(size, int)
        facts = [
            f"step {row['step']}",
            str(row["created"]),
            f"{size / 2**30:.3f} GiB",
            f"{row['world_size']} rank(s), ZeRO-{row['zero_stage']}{', EMA' if row['ema'] else ''}",
            *([f"score {score:.4g}"] if isinstance(score, float) else []),
            "read back whole when saved" if row["read_back"] else "not read back when saved, as at a stop",
        ]
        lines.append("  ".join(facts))
    return "\n".join(lines)


def verify(args: Namespace) -> int:
    """Read every byte of a run's checkpoints; exit code 1 if any is damaged."""
    from mvit.checkpoint import checkpoint_path, verify
    from mvit.progress import counting

    run_dir = _run_dir(args.run_dir)
    steps = _steps(run_dir, args.step)
    rows = []
    for step in reversed(steps):
        with counting(args.json) as count:
            problems = verify(checkpoint_path(run_dir, step), progress=count)
        rows.append({"step": step, "ok": not problems, "problems": problems})
        if not args.json:
            print(f"step {step}: " + ("whole" if not problems else "DAMAGED\n  " + "\n  ".join(problems)), flush=True)
    usable = next((row["step"] for row in rows if row["ok"]), None)
    if args.json:
        print(json.dumps({"checkpoints": rows, "newest_valid": usable}))
    elif args.step is None:
        print(f"a resume would continue from step {usable}" if usable is not None else "no checkpoint is usable")
    return 0 if all(row["ok"] for row in rows) else 1


def prune(args: Namespace) -> int:
    """Remove checkpoints that the run's settings, or the options, do not keep."""
    from launcher.run_folder import RunFolderError
    from launcher.status import run_state
    from mvit.retention import Retention, prune
    from mvit.run_identity import read_config

    run_dir = _run_dir(args.run_dir)
    if (run_dir / "run.json").exists() and run_state(run_dir).state in ("pending", "running") and not args.dry_run:
        raise RunFolderError(
            f"{run_dir} is pending or running and removes its old checkpoints itself; wait, or stop it"
        )
    ours = read_config(run_dir).train
    given = (args.keep_last, args.keep_every, args.keep_best)
    defaults = (ours.keep_last, ours.keep_every, ours.keep_best)
    chosen = [default if one is None else one for one, default in zip(given, defaults, strict=True)]
    if chosen[0] < 1 or min(chosen) < 0:
        raise ValueError(
            f"--keep-last {chosen[0]} --keep-every {chosen[1]} --keep-best {chosen[2]}: at least one newest checkpoint "
            "must stay and no number may be negative"
        )
    kept, removed, damaged = prune(run_dir, Retention(*chosen), dry_run=args.dry_run)
    if args.json:
        print(json.dumps({"kept": kept, "removed": removed, "damaged": damaged, "dry_run": args.dry_run}))
        return 0
    verb = "would remove" if args.dry_run else "removed"
    print(f"{verb} {', '.join(f'step {step}' for step in removed) or 'nothing'}")
    print(f"kept {', '.join(f'step {step}' for step in kept) or 'nothing'}")
    if damaged:
        told = ", ".join(f"step {step}" for step in damaged)
        print(f"left {told} alone: damaged; a resumed run replaces them, or remove their folders by hand")
    return 0


def diff(args: Namespace) -> int:
    """Compare two checkpoints; exit code 1 if they differ, 2 if one cannot be read."""
    import sys

    from mvit.checkpoint import CheckpointError, verify
    from mvit.checkpoint_diff import compare_checkpoints
    from mvit.progress import counting

    try:
        first, second = _pair(args)
        for manifest in (first, second):
            if problems := verify(manifest.path):
                raise CheckpointError(f"damaged, so not compared: {'; '.join(problems)}")
        with counting(args.json) as count:
            found = compare_checkpoints(first, second, progress=count)
    except (ValueError, OSError) as error:  # as of diff(1): differing and failing are told apart
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"first": str(first.path), "second": str(second.path), **found.as_dict()}))
        return 1 if found else 0
    print(f"- {first.path}\n+ {second.path}")
    for fact in found.facts:
        print(f"  {fact}")
    worst = sorted(found.tensors, key=lambda one: one.relative, reverse=True)
    for one in worst[:_MAX_SHOWN]:
        print(
            f"  {one.state} of {one.name}: {one.differing} of {one.numel} elements, largest {one.largest:.3g}, "
            f"{one.relative:.3g} of its norm"
        )
    if len(worst) > _MAX_SHOWN:
        print(f"  and {len(worst) - _MAX_SHOWN} more tensors, which differ less (--json lists all)")
    print(f"{len(worst)} of {found.compared} tensors and {len(found.facts)} other facts differ")
    return 1 if found else 0


def bench(args: Namespace) -> int:
    """Time saving and loading; under torchrun rank 0 prints."""
    import os

    from mvit.benchmark_checkpoint import bench_checkpoint

    rows = bench_checkpoint(
        args.variant,
        zero_stage=args.stage,
        precision=args.precision,
        ema=args.ema,
        against=args.against,
        rounds=args.rounds,
        folder=None if args.folder is None else Path(args.folder),
    )
    if os.environ.get("RANK", "0") != "0":
        return 0
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        verb = "takes" if row["what"] in ("load", "prove the loaded state") else "training waits"
        ratio = "" if row["stall_ratio"] is None else f", {row['stall_ratio']:.2f} x DeepSpeed's"
        print(
            f"{row['what']}: {verb} {row['stall_s']:.3f} s (first time {row['first_stall_s']:.3f}{ratio}), "
            f"done after {row['total_s']:.2f} s, {row['gib']:.2f} GiB, {row['stall_s_per_gb']:.3f} s per GB, "
            f"{row['extra_gib']:.2f} GiB of memory more"
        )
    return 0


def _pair(args: Namespace) -> "tuple[Manifest, Manifest]":
    """Find the two checkpoints: of one run, or one of each of two runs; any may be a checkpoint folder itself."""
    from mvit.checkpoint import checkpoint_path, list_steps, read_manifest

    if args.other is None:
        run_dir = _run_dir(args.run_dir)
        steps = args.steps or list_steps(run_dir)[-2:]
        if len(steps) < 2:
            raise ValueError(f"{run_dir} has {len(steps)} checkpoint(s); two are compared: name another run, too")
        pair = [checkpoint_path(run_dir, _known(run_dir, step)) for step in steps]
    else:
        pair = []
        for position, given in enumerate((args.run_dir, args.other)):
            folder = Path(given).absolute()
            if not (folder / "manifest.json").is_file():
                folder = _run_dir(given)
                step = args.steps[position] if args.steps else _steps(folder, None)[-1]
                folder = checkpoint_path(folder, _known(folder, step))
            pair.append(folder)
    return read_manifest(pair[0]), read_manifest(pair[1])


def _run_dir(text: str) -> Path:
    from mvit.run_identity import read_config

    run_dir = Path(text).absolute()
    if (run_dir / "manifest.json").is_file():
        step = run_dir.name.removeprefix("step_").lstrip("0")
        raise ValueError(f"{run_dir} is one checkpoint; name its run and the step: {run_dir.parents[1]}, step {step}")
    read_config(run_dir)  # refuses a folder that is no run
    return run_dir


def _steps(run_dir: Path, step: int | None) -> list[int]:
    from mvit.checkpoint import list_steps

    steps = list_steps(run_dir) if step is None else [_known(run_dir, step)]
    if not steps:
        raise ValueError(f"{run_dir} has no checkpoint yet")
    return steps


def _known(run_dir: Path, step: int) -> int:
    from mvit.checkpoint import list_steps

    steps = list_steps(run_dir)
    if step not in steps:
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
    return step
