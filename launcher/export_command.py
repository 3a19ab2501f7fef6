"""`mvit export`: the parser, and what it calls; weights as one file or folder, or the model as a program."""

import argparse
from argparse import Namespace

from launcher.arguments import add_command

_FORMATS = ("safetensors", "timm", "facebook", "torch", "huggingface", "onnx", "torch.export")


def add_export(group: "argparse._SubParsersAction") -> None:
    """Add `export`."""
    parser = add_command(
        group,
        "export",
        export,
        "write a run's weights as one plain file, and verify that the model built from it is the run's",
        "mvit export runs/digits digits.safetensors --ema",
    )
    text = "a run's folder (its newest valid checkpoint), or a checkpoint; for programs also an exported .safetensors"
    parser.add_argument("run_dir", metavar="RUN", help=text)
    text = "file to write: .safetensors, .pth, .pt, .pyth, .onnx or .pt2; of huggingface the folder"
    parser.add_argument("out", metavar="OUT", help=text)
    text = "safetensors: for mvit.load_model; timm: its names, loads strictly there; facebook: the official .pyth; "
    text += "torch: a plain state dict; huggingface: a folder that timm loads; onnx, torch.export (.pt2): a program; "
    text += "without it the suffix decides: .pth and .pt torch, .pyth facebook"
    parser.add_argument("--format", choices=_FORMATS, help=text)
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the last ones")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step instead of the newest")
    parser.add_argument("--batch", type=int, metavar="N", help="of a program: N inputs at once (any number)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    text = "do not compare tensors and logits with the run's; then memory for one tensor is enough (program: model)"
    parser.add_argument("--no-verify", action="store_true", help=text)


def export(args: Namespace) -> int:
    """Write a run's weights, or its model as a program."""
    from mvit.export import export_weights
    from mvit.export_folder import export_folder
    from mvit.export_program import export_program, is_program
    from mvit.progress import counting

    which = "averaged weights" if args.ema else "last weights"
    if is_program(args.format, args.out):
        program = export_program(
            args.run_dir,
            args.out,
            format=args.format,
            batch=args.batch,
            ema=args.ema,
            step=args.step,
            overwrite=args.overwrite,
            verify=not args.no_verify,
        )
        shape = "x".join(map(str, program.input_shape))
        checked = "not verified"
        if program.difference is not None:
            checked = f"logits are the run's own within {program.difference:.1e}"
        print(f"wrote {' and '.join(map(str, program.files))}: inputs {shape}, {checked}")
        return 0
    if args.batch is not None:
        raise ValueError(f"--batch {args.batch}: belongs to the formats onnx and torch.export; leave it out")
    if args.format == "huggingface":
        folder = export_folder(
            args.run_dir, args.out, ema=args.ema, step=args.step, overwrite=args.overwrite, verify=not args.no_verify
        )
        print(f"wrote {folder.path}: {which}, {_checked(args)}")
        if folder.timm is not None:
            print(f'timm loads it: timm.create_model("local-dir:{folder.path}", pretrained=True)')
        else:
            print(f'not for timm: {folder.reason}; mvit.load_model("{folder.path}") loads it')
        return 0
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
    print(f"wrote {out}: {which}, {_checked(args)}")
    return 0


def _checked(args: Namespace) -> str:
    return "not verified" if args.no_verify else "tensors and logits are the run's own"
