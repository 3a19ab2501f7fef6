"""The command `mvit doctor`: examine, print, and say in the exit code whether anything failed."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import get_args

_BLOCKING = ("Slurm", "request", "output_dir")  # with one of these failed, no job can run
_OUTPUT_DIR = "runs"  # a recipe's default, too


def doctor(args: Namespace) -> int:
    """Examine a cluster for a run; exit code 0 only if nothing fails."""
    from launcher.cluster import load_cluster, place
    from launcher.commands import split_overrides
    from launcher.doctor import examine
    from launcher.doctor_report import Level, verdict_line
    from launcher.run_folder import RunFolder

    if args.recipe is not None and "=" in args.recipe:  # no recipe, settings only
        args.recipe, args.overrides = None, [args.recipe, *args.overrides]
    of_recipe, of_cluster = split_overrides(args)
    if of_recipe and args.recipe is None:
        raise ValueError(f"{' '.join(of_recipe)}: settings of a recipe, but no RECIPE is given")
    cluster = load_cluster(args.cluster, of_cluster)
    placement = place(cluster)
    config = None
    if args.recipe is not None:
        import mvit

        config = mvit.load_config(args.recipe, of_recipe)
    output_dir = Path(_OUTPUT_DIR if config is None else config.output_dir)
    run = None if args.run is None else RunFolder(Path(args.run).absolute())
    print("looking at disk, recipe and cluster (the disk test takes up to 20 s) …", file=sys.stderr, flush=True)
    report = examine(cluster, placement, config, output_dir, run)
    if not args.json:
        if args.script:
            print(f"--- what a submission would run\n{report.script}\n--- findings")
        print(*sorted(report.findings, key=lambda one: get_args(Level).index(one.level)), sep="\n", flush=True)
    blocked = any(one.level == "FAIL" and one.check in _BLOCKING for one in report.findings)
    if args.submit and not blocked:
        from launcher.doctor_nodes import check_nodes

        nodes = check_nodes(
            cluster,
            placement,
            config,
            output_dir,
            queue_timeout_s=args.timeout,
            tell=lambda text: print(text, file=sys.stderr, flush=True),
        )
        report = replace(report, nodes=nodes)
        if not args.json:
            print(f"--- nodes\n{nodes}")
    elif args.submit:
        print("nothing was submitted: the job could not run", file=sys.stderr)
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        print(verdict_line(report))
    return 0 if report.ok else 1
