"""The command line: parse, load, dispatch. Everything heavy is imported by the command that needs it."""

import argparse
import json
import sys
from collections.abc import Sequence

from launcher import checkpoint_commands as checkpoints
from launcher import commands
from launcher.arguments import Parser, ShowVersion, add_command, add_json, add_recipe, add_run_dir
from launcher.bench_data_command import add_bench_data
from launcher.bench_model_command import add_bench_model
from launcher.bench_plan_command import add_bench_plan
from launcher.data_commands import add_data
from launcher.evaluate_command import add_evaluate
from launcher.export_command import add_export
from launcher.plan_command import add_plan
from launcher.predict_command import add_predict
from launcher.recipe_commands import add_config, add_recipes
from launcher.run_arguments import add_doctor, add_runs
from launcher.weights_command import add_weights


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(prog="mvit", description="Train multiscale vision transformers (MViTv2) on your own cluster.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action=ShowVersion, help="show the versions of mvit and what it stands on")
    group = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_runs(group)
    add_doctor(group)
    _add_results(group)
    add_predict(group)
    add_plan(group)
    _add_checkpoints(group)
    _add_prove_resume(group)
    add_data(group)
    _add_bench(group)
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse one command line; raises SystemExit with code 2 for what is not a command."""
    args, rest = build_parser().parse_known_args(arguments)
    _take_overrides(args.parser, args, rest)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 only on success."""
    args = parse(arguments)
    try:
        return args.handler(args)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        sys.stderr.close()
        return 141
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        if getattr(args, "json", False):
            print(json.dumps({"error": str(error)}))
        return 1


def _take_overrides(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Put `key=value` words that argparse left over, since options stood before them, to the others."""
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *rest]
        for word in args.overrides:
            if "=" not in word:
                parser.error(f"{word!r} is not a setting: write key=value, schedule.epochs=10 for one")


def _add_results(group: "argparse._SubParsersAction") -> None:
    add_recipes(group)
    add_config(group)
    add_evaluate(group)
    add_export(group)
    add_weights(group)


def _add_checkpoints(group: "argparse._SubParsersAction") -> None:
    checkpoint = group.add_parser("checkpoint", help="look at a run's checkpoints, verify and remove them")
    group = checkpoint.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    listing = add_command(
        group, "list", checkpoints.show_list, "list a run's checkpoints", "mvit checkpoint list runs/digits"
    )
    add_run_dir(listing)
    add_json(listing)

    verify = add_command(
        group,
        "verify",
        checkpoints.verify,
        "read every byte of a run's checkpoints and compare hashes; exit code 1 if one is damaged",
        "mvit checkpoint verify runs/digits --step 1000",
    )
    add_run_dir(verify)
    verify.add_argument("--step", type=int, metavar="N", help="this checkpoint only")
    add_json(verify)

    prune = add_command(
        group,
        "prune",
        checkpoints.prune,
        "remove checkpoints that the run's settings do not keep, never the newest valid one",
        "mvit checkpoint prune runs/digits --keep-last 1 --dry-run",
    )
    add_run_dir(prune)
    prune.add_argument("--keep-last", type=int, metavar="N", help="newest kept (train.keep_last)")
    prune.add_argument("--keep-every", type=int, metavar="N", help="multiples of this step kept (train.keep_every)")
    prune.add_argument("--keep-best", type=int, metavar="N", help="best evaluated kept (train.keep_best)")
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed, remove nothing")
    add_json(prune)

    diff = add_command(
        group,
        "diff",
        checkpoints.diff,
        "compare two checkpoints, whatever their ranks and stages; exit code 1 if they differ, 2 on error",
        "mvit checkpoint diff runs/a runs/b --steps 100 100",
    )
    diff.add_argument("run_dir", metavar="RUN_DIR", help="a run's folder, or one checkpoint's")
    diff.add_argument("other", nargs="?", metavar="OTHER", help="another run's folder or checkpoint (the same run)")
    diff.add_argument("--steps", type=int, nargs=2, metavar=("A", "B"), help="their steps (the newest)")
    add_json(diff)


def _add_prove_resume(group: "argparse._SubParsersAction") -> None:
    prove = add_command(
        group,
        "prove-resume",
        commands.prove_resume,
        "train a few steps of a recipe undisturbed, and again with a kill and a resume, and compare them bit by bit",
        "mvit prove-resume configs/demo/digits.yaml --ranks 2",
    )
    add_recipe(prove)
    prove.add_argument("--steps", type=int, default=12, metavar="N", help="steps compared (12)")
    prove.add_argument("--kill-at", type=int, metavar="K", help="step in whose middle a rank is killed (2/3 of N)")
    prove.add_argument("--ranks", type=int, metavar="R", help="processes (one per GPU of this machine, 1 without)")
    prove.add_argument("--resume-ranks", type=int, metavar="R", help="processes of the resumed run (as many)")
    text = "settings of the resumed run, zero.stage=3 for one; where bits cannot agree, batches, state and losses are "
    prove.add_argument("--resume-with", nargs="+", default=[], metavar="KEY=VALUE", help=f"{text}compared")
    text = "largest relative difference of a loss where bits cannot agree (1e-4 in fp32, 1e-2 in bf16, 2e-3 in fp16)"
    prove.add_argument("--tolerance", type=float, metavar="X", help=text)
    prove.add_argument("--work", metavar="DIR", help="where the temporary runs lie (the recipe's output_dir)")
    prove.add_argument("--keep", action="store_true", help="keep them; without it they are removed on success")
    add_json(prove)


def _add_bench(group: "argparse._SubParsersAction") -> None:
    bench = group.add_parser("bench", help="measure speed on this machine").add_subparsers(
        dest="subcommand", metavar="COMMAND", required=True
    )
    add_bench_model(bench)
    add_bench_data(bench)
    add_bench_plan(bench)

    checkpoint = add_command(
        bench,
        "checkpoint",
        checkpoints.bench,
        "time saving and loading a variant's full training state, beside DeepSpeed's own save; also under torchrun",
        "mvit bench checkpoint mvitv2_large --stage 1 --rounds 3",
    )
    checkpoint.add_argument("variant", metavar="VARIANT", help="mvitv2_tiny, small, base, large or huge")
    checkpoint.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=1, help="ZeRO stage (1)")
    checkpoint.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    checkpoint.add_argument("--ema", action="store_true", help="with a moving average of the weights")
    checkpoint.add_argument(
        "--against", nargs="*", choices=("deepspeed",), default=["deepspeed"], help="peers, or none"
    )
    checkpoint.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of each (3)")
    checkpoint.add_argument("--folder", metavar="DIR", help="file system to write to (the temporary folder's)")
    add_json(checkpoint)

    detection = add_command(
        bench,
        "detection",
        commands.bench_detection,
        "measure a detector's backbone with each type of attention, and COCO's metric beside pycocotools",
        "mvit bench detection mvitv2_tiny --size 1024 1024 --threads 1",
    )
    text = "mvitv2_tiny (which is the default), small, base, large or huge"
    detection.add_argument("variant", nargs="?", default="mvitv2_tiny", metavar="VARIANT", help=text)
    detection.add_argument(
        "--size", type=int, nargs=2, default=[1024, 1024], metavar=("H", "W"), help="of the pictures (1024 1024)"
    )
    kinds = ("full", "hwin", "window", "swin")
    detection.add_argument("--attention", nargs="+", choices=kinds, default=list(kinds), help="types to compare (all)")
    detection.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    detection.add_argument("--batch", type=int, default=1, metavar="N", help="pictures per step (1)")
    text = "synthetic pictures that the metric is timed on (5000)"
    detection.add_argument("--images", type=int, default=5000, metavar="N", help=text)
    detection.add_argument("--only", choices=("attention", "metric"), help="one of the two measurements")
    detection.add_argument("--threads", type=int, metavar="N", help="CPU threads of the backbone (torch's default)")
    detection.add_argument("--rounds", type=int, default=1, metavar="N", help="measurements of each (1)")
    detection.add_argument("--device", metavar="DEVICE", help="cpu or cuda; cuda where there is one")
    add_json(detection)


if __name__ == "__main__":
    sys.exit(main())
