"""`mvit export`: the parser, and what it calls; weights as one file."""

import argparse
from argparse import Namespace

from launcher.arguments import add_command


def add_export(group: "argparse._SubParsersAction") -> None:
    """Add `export`."""
    parser = add_command(
        group,
        "export",
        export,
        "write a run's weights as one plain file, and verify that the model built from it is the run's",
        "mvit export runs/digits digits.safetensors --ema",
    )
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder (its newest valid checkpoint), or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="file to write: .safetensors, .pth, .pt or .pyth")
    formats = ("safetensors", "timm", "facebook", "torch")
    text = "safetensors: for mvit.load_model; timm: its names, loads strictly there; facebook: the official .pyth; "
    text += "torch: a plain state dict; without it the suffix decides: .pth and .pt torch, .pyth facebook"
    parser.add_argument("--format", choices=formats, help=text)
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the last ones")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step instead of the newest")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    text = "do not compare tensors and logits with the run's; then memory for one tensor is enough"
    parser.add_argument("--no-verify", action="store_true", help=text)


def export(args: Namespace) -> int:
    """Write a run's weights as one file."""
    from mvit.export import export_weights
    from mvit.progress import counting

    with counting(quiet=False) as count:
        out = export_weights(
            args.run_dir,
            args.out,
            format=args.format,
            ema=args.ema,
            step=args.step,
            overwrite=args.overwrite,
            verify=not args.no_verify,
            progress=count,
        )
    which = "averaged weights" if args.ema else "last weights"
    checked = "not verified" if args.no_verify else "tensors and logits are the run's own"
    print(f"wrote {out}: {which}, {checked}")
    return 0
