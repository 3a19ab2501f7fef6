"""`mvit evaluate`: the parser, and what it calls; figures, files beside them, and the certificate of the count."""

import argparse
import json
import os
from argparse import Namespace

from launcher.arguments import add_command, add_json, add_recipe

_FILES = ("results", "per_class", "confusion")


def add_evaluate(group: "argparse._SubParsersAction") -> None:
    """Add `evaluate`."""
    parser = add_command(
        group,
        "evaluate",
        evaluate,
        "evaluate weights on a recipe's validation shards, each sample exactly once on any number of ranks",
        "mvit evaluate configs/demo/digits.yaml --weights digits.safetensors --per-class classes.csv --json",
    )
    add_recipe(parser)
    text = "exported or published weights, a run's folder or a checkpoint's"
    parser.add_argument("--weights", required=True, metavar="FILE", help=text)
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a checkpoint")
    text = "write what was predicted: of a detector in COCO's results format, of a classifier 5 classes of each sample"
    parser.add_argument("--results", metavar="FILE.json", help=text)
    text = (
        "write a table of the classes: accuracy, precision, what each is taken for; of a detector AP of each category"
    )
    parser.add_argument("--per-class", metavar="FILE.csv", help=text)
    text = "of a classifier: draw which classes are taken for which"
    parser.add_argument("--confusion", metavar="FILE.png", help=text)
    text = (
        "labels to judge a classifier by: a list in the order of the pictures' names (ImageNet-ReaL's real.json), or "
    )
    text += "an object class or file name -> the model's class or classes (ImageNet-V2)"
    parser.add_argument("--labels", metavar="FILE.json", help=text)
    add_json(parser)


def evaluate(args: Namespace) -> int:
    """Evaluate weights, in this process or on each rank under torchrun or srun; rank 0 tells the figures."""
    from launcher.job import export_srun_rank
    from launcher.recipe_folder import refuse_missing

    refuse_missing(args.recipe)
    import mvit

    rank = export_srun_rank()
    figures = mvit.evaluate(
        mvit.load_config(args.recipe, args.overrides),
        args.weights,
        ema=args.ema,
        results=args.results,
        per_class=args.per_class,
        confusion=args.confusion,
        labels=args.labels,
        show_progress=not args.json,
    )
    if rank != 0:
        return 0
    from mvit.certificate import certificate_of

    certificate = certificate_of(figures, int(os.environ.get("WORLD_SIZE", "1")))
    shown = {key: value for key, value in figures.items() if key not in certificate.as_dict()}
    if args.json:
        print(json.dumps(shown | {"undecodable": figures["undecodable"], "certificate": certificate.as_dict()}))
        return 0
    for key, value in shown.items():
        print(f"{key}: {value:.4g}")
    print(certificate)
    for path in filter(None, (getattr(args, name) for name in _FILES)):
        print(f"wrote {path}")
    return 0
