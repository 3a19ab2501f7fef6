"""`mvit bench model`: the parser, and what it hands to the benchmark."""

import argparse
import json
from argparse import Namespace

from launcher.arguments import add_command, add_json


def add_bench_model(group: "argparse._SubParsersAction") -> None:
    """Add `bench model`."""
    text = "time forward and training steps of a variant, beside other libraries' models"
    example = "mvit bench model --variant large --resolution 224 384 --precision bf16 --against timm,reference"
    parser = add_command(group, "model", bench_model, text, example)
    names = "tiny, small, base, large or huge"
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=names)
    parser.add_argument("--variant", dest="more_variants", nargs="+", default=[], metavar="VARIANT", help="the same")
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--resolution", type=int, nargs="+", default=[224], metavar="PX", help="image sides (224)")
    inputs.add_argument("--clip", type=int, nargs=3, metavar=("T", "H", "W"), help="clips of this size, not images")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images or clips per step (4)")
    peers = (
        "peers in the same run, by spaces or commas (images: timm, clips: torchvision; reference: attention as the "
        "published code computes it; NAME=FILE.py:FUNCTION: your own); none given: without"
    )
    parser.add_argument("--against", nargs="*", metavar="PEER", help=peers)
    forms = ("auto", "reference", "matmul", "fused")
    parser.add_argument("--forms", nargs="+", choices=forms, default=["auto"], help="attention forms to compare")
    text = "recompute every block's activations in the backward pass; both: measure without and with"
    parser.add_argument("--checkpointing", nargs="?", choices=("yes", "both"), const="yes", help=text)
    parser.add_argument("--drop-path", type=float, default=0.0, metavar="RATE", help="of the last block (0)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's default)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each (5)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda; cuda where there is one")
    add_json(parser)


def bench_model(args: Namespace) -> int:
    """Time a model."""
    variants = [*args.variants, *args.more_variants]
    if not variants:
        raise ValueError("mvit bench model needs a variant: --variant tiny, small, base, large or huge")
    from mvit.benchmark import bench_model

    rows = bench_model(
        [name if name.startswith("mvitv2_") else f"mvitv2_{name}" for name in variants],
        [args.clip] if args.clip else [(side, side) for side in args.resolution],
        args.precision,
        args.batch,
        against=None if args.against is None else [name for text in args.against for name in text.split(",") if name],
        forms=args.forms,
        rounds=args.rounds,
        checkpointing={None: (False,), "yes": (True,), "both": (False, True)}[args.checkpointing],
        drop_path=args.drop_path,
        device=args.device,
        num_threads=args.threads,
        show=not args.json,
    )
    if args.json:
        print(json.dumps(rows))
    return 0
