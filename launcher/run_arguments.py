"""The commands that start, watch and end runs, as argparse sees them."""

import argparse

from launcher import commands, doctor_commands, watch_commands
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

    _add_watching(group)
    _add_ending(group)


def _add_watching(group: "argparse._SubParsersAction") -> None:
    status = add_command(
        group,
        "status",
        watch_commands.status,
        "show what became of a run, or of all runs in a table",
        "mvit status runs/digits --json",
    )
    status.add_argument("run_dirs", metavar="RUN", nargs="*", help="run folders; without one all runs of --runs")
    status.add_argument("--runs", default="runs", metavar="DIR", help="where to look for runs (./runs)")
    how = status.add_mutually_exclusive_group()
    add_follow(how)
    how.add_argument("--watch", action="store_true", help="refresh every two seconds until all runs are at rest")
    add_json(status)

    logs = add_command(
        group,
        "logs",
        watch_commands.logs,
        "print what a rank wrote in the newest life of a run",
        "mvit logs runs/digits --all --follow",
    )
    add_run_dir(logs)
    ranks = logs.add_mutually_exclusive_group()
    ranks.add_argument("--rank", type=int, metavar="R", help="this rank (0; with --stacks and --submitit: all)")
    ranks.add_argument("--all", action="store_true", help="all ranks, each line with its rank before it")
    logs.add_argument("--attempt", type=int, metavar="N", help="this life, counted from 1 (the newest)")
    logs.add_argument("--lines", type=int, metavar="N", help="the last N lines only (all; with --follow 20)")
    logs.add_argument("--follow", action="store_true", help="go on, through requeues, until the run ends")
    kind = logs.add_mutually_exclusive_group()
    kind.add_argument("--stacks", action="store_true", help="the Python stacks that were dumped when a rank hung")
    text = "the output of the batch script, and of ranks before they had their own log"
    kind.add_argument("--submitit", action="store_true", help=text)

    why = add_command(
        group,
        "why",
        watch_commands.why,
        "explain how a run's last life ended, what followed, and why a queued job does not start",
        "mvit why runs/digits --attempt 2",
    )
    add_run_dir(why)
    why.add_argument("--attempt", type=int, metavar="N", help="this life, counted from 1 (the last that ended)")
    add_json(why)


def _add_ending(group: "argparse._SubParsersAction") -> None:
    stop = add_command(
        group,
        "stop",
        watch_commands.stop,
        "let runs save and end, or leave the queue; resume continues them",
        "mvit stop runs/digits --wait",
    )
    _add_ended(stop, "return when they have ended; exit code 0 if they were saved")

    cancel = add_command(
        group,
        "cancel",
        watch_commands.cancel,
        "end runs at once, without a save",
        "mvit cancel runs/digits runs/letters --wait",
    )
    _add_ended(cancel, "return when no process of them is left")


def _add_ended(parser: argparse.ArgumentParser, wait: str) -> None:
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument("--wait", action="store_true", help=wait)
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds --wait waits for each (600)")
    text = "print a list for scripts: of each run run_dir, state, done (what was done) or error; with --wait also ended"
    parser.add_argument("--json", action="store_true", help=text)


def add_doctor(group: "argparse._SubParsersAction") -> None:
    doctor = add_command(
        group,
        "doctor",
        doctor_commands.doctor,
        "check a cluster for a run before it costs time; exit code 1 if a check fails",
        "mvit doctor configs/imagenet1k/mvitv2_large.yaml --cluster configs/cluster/slurm_8x8.yaml --submit",
    )
    doctor.add_argument("recipe", metavar="RECIPE", nargs="?", help="the run to check it for, if there is one already")
    add_overrides(doctor)
    add_cluster(doctor, required=True)
    doctor.add_argument("--script", action="store_true", help="also print the script that a submission would run")
    doctor.add_argument("--submit", action="store_true", help="also run a job of two minutes that measures every node")
    text = "seconds the job of --submit may wait in the queue (600)"
    doctor.add_argument("--timeout", type=float, default=600.0, metavar="S", help=text)
    text = "a run whose measured saves and steps are compared with signal_delay_s"
    doctor.add_argument("--run", metavar="RUN_DIR", help=text)
    add_json(doctor)
