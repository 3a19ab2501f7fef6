"""The commands that start, watch and end runs, as argparse sees them."""

import argparse

from launcher import commands
from launcher.arguments import add_cluster, add_command, add_follow, add_json, add_overrides, add_recipe, add_run_dir


def add_runs(group: "argparse._SubParsersAction") -> None:
    train = add_command(
        group,
        "train",
        commands.train,
        "train in this process, or as each rank under torchrun or srun",
        "mvit train configs/demo/digits.yaml train.global_batch_size=64",
    )
    add_recipe(train)
    train.add_argument("--resume", action="store_true", help="continue if the run folder exists already")

    submit = add_command(
        group,
        "submit",
        commands.submit,
        "submit a run to Slurm or to this machine, with a snapshot of the code",
        "mvit submit configs/demo/digits.yaml --cluster configs/cluster/local.yaml --follow",
    )
    add_recipe(submit)
    add_cluster(submit, required=True)
    text = "submit although data.train or data.validation is not visible from here (a node-local disk, say)"
    submit.add_argument("--no-data-check", action="store_true", help=text)
    submit.add_argument(
        "--dry-run", action="store_true", help="print batch arithmetic and batch script, create nothing"
    )
    text = "then another run, from the weights of the one before (EMA if it has them); can be given several times"
    submit.add_argument("--then", action="append", default=[], metavar='"RECIPE [KEY=VALUE …]"', help=text)
    text = "at the end, evaluate the last run once on one node and write evaluation.json into its folder"
    submit.add_argument("--then-evaluate", action="store_true", help=text)
    text = "start when this run is finished, from its weights; a run that was submitted before"
    submit.add_argument("--after", metavar="RUN_DIR", help=text)
    add_follow(submit)
    add_json(submit)

    resume = add_command(
        group,
        "resume",
        commands.resume,
        "continue a run in its folder, from its newest valid checkpoint, with its own config and code",
        "mvit resume runs/digits ranks_per_node=1 zero.stage=3 --follow",
    )
    add_run_dir(resume)
    add_overrides(resume)
    add_cluster(resume, required=False)
    add_follow(resume)
    add_json(resume)

    status = add_command(
        group, "status", commands.status, "show what became of a run", "mvit status runs/digits --json"
    )
    add_run_dir(status)
    add_follow(status)
    add_json(status)

    stop = add_command(
        group, "stop", commands.stop, "let a run save and end; resume continues it", "mvit stop runs/digits --wait"
    )
    add_run_dir(stop)
    stop.add_argument("--wait", action="store_true", help="return when it has ended; exit code 0 if it was saved")
    stop.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds --wait waits (600)")

    cancel = add_command(
        group, "cancel", commands.cancel, "end a run at once, without a save", "mvit cancel runs/digits"
    )
    add_run_dir(cancel)
