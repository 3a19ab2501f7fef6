"""`mvit weights inspect`: the parser, and what it calls; the passport of a weights file."""

import argparse
import json
from argparse import Namespace

from launcher.arguments import add_command, add_json


def add_weights(group: "argparse._SubParsersAction") -> None:
    """Add `weights inspect`."""
    weights = group.add_parser("weights", help="look at weights files")
    group = weights.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    parser = add_command(
        group,
        "inspect",
        inspect,
        "say whose weights a file holds, of which model, and what of them loads; exit code 1 if they do not",
        "mvit weights inspect downloaded.pyth --reference",
    )
    parser.add_argument("file", metavar="FILE", help="weights in any published naming, or exported")
    text = "load them into this recipe's model, as model.weights would: what is resized, what starts anew"
    parser.add_argument("--recipe", metavar="RECIPE", help=text)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="settings that replace the recipe's")
    text = "compare the logits of a random input with timm's (images) or torchvision's (clips) for the same weights"
    parser.add_argument("--reference", action="store_true", help=text)
    add_json(parser)


def inspect(args: Namespace) -> int:
    """Print the passport of a weights file."""
    config = None
    if args.recipe is not None:
        from launcher.recipe_folder import refuse_missing

        refuse_missing(args.recipe)
        import mvit

        config = mvit.load_config(args.recipe, args.overrides)
    elif args.overrides:
        raise ValueError(f"{args.overrides[0]}: settings are a recipe's; name it with --recipe")
    from mvit.weight_passport import inspect_weights

    passport = inspect_weights(args.file, config, reference=args.reference)
    print(json.dumps(passport.as_dict()) if args.json else passport)
    return 0 if passport.report is not None else 1
