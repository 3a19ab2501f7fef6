"""`mvit bench plan`: the parser, and the table of what was foreseen beside what was measured."""

import argparse
import json
from argparse import Namespace
from typing import TYPE_CHECKING

from launcher.arguments import add_command, add_json

if TYPE_CHECKING:
    from mvit.benchmark_plan import PlanRow

_MIB = 2**20


def add_bench_plan(group: "argparse._SubParsersAction") -> None:
    """Add `bench plan`."""
    text = "train a few steps of each setting and compare the memory they took with what `mvit plan` foresees"
    example = "mvit bench plan tiny large --resolution 224 384 --stage 0 1 --checkpointing off all --precision bf16"
    parser = add_command(group, "plan", bench_plan, text, example)
    names = "tiny, small, base, large or huge"
    parser.add_argument("variants", nargs="+", metavar="VARIANT", help=names)
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--resolution", type=int, nargs="+", default=[224], metavar="PX", help="image sides (224)")
    inputs.add_argument("--clip", type=int, nargs=3, metavar=("T", "H", "W"), help="clips of this size, not images")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1], metavar="N", help="samples at once (1)")
    parser.add_argument("--stage", type=int, nargs="+", choices=(0, 1, 2, 3), default=[1], help="ZeRO stages (1)")
    kinds = ("off", "all")
    parser.add_argument("--checkpointing", nargs="+", choices=kinds, default=["off"], help="blocks recomputed (off)")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["bf16"])
    parser.add_argument("--drop-path", type=float, default=0.0, metavar="RATE", help="of the last block (0)")
    parser.add_argument("--bucket-size", type=int, metavar="N", help="zero.bucket_size (its default)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps of each setting (3)")
    parser.add_argument(
        "--within", type=float, default=10.0, metavar="PERCENT", help="exit code 1 if one is off by more"
    )
    add_json(parser)


def bench_plan(args: Namespace) -> int:
    """Measure; exit code 1 if a peak is further from the foreseen one than `--within`, or none was measured."""
    from mvit.benchmark_plan import bench_plan, settings

    configs = settings(
        [name if name.startswith("mvitv2_") else f"mvitv2_{name}" for name in args.variants],
        [args.clip] if args.clip else [(side, side) for side in args.resolution],
        args.micro_batch,
        args.stage,
        args.checkpointing,
        args.precision,
        drop_path=args.drop_path,
        bucket_size=args.bucket_size,
    )
    rows = []
    for row in bench_plan(configs, steps=args.steps):
        rows.append(row)
        if not args.json:
            if len(rows) == 1:
                print(f"{'foreseen':>9} {'measured':>9} {'off':>7} {'set-up':>8} {'resident':>9} {'device':>8}  in MiB")
            print(_line(row), flush=True)
    if args.json:
        print(json.dumps([row.as_dict() for row in rows]))
    measured = [row.off for row in rows if row.off is not None]
    return 0 if measured and max(map(abs, measured)) <= args.within / 100 else 1


def _line(row: "PlanRow") -> str:
    foreseen, found = f"{row.foreseen_bytes / _MIB:>9.0f}", row.measured
    if found is None or row.off is None:
        return f"{foreseen} {'-':>9} {'':>7} {'':>8} {'':>9} {'':>8}  {row.setting}: {row.told}"
    device = "" if found.device_bytes is None else f"{found.device_bytes / _MIB:.0f} of {row.needed_bytes / _MIB:.0f}"
    return (
        f"{foreseen} {found.peak_bytes / _MIB:>9.0f} {row.off:>+7.1%} {found.setup_bytes / _MIB:>8.0f} "
        f"{found.reserved_bytes / _MIB:>9.0f} {device:>8}  {row.setting}"
    )
