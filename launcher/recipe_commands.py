"""`mvit recipes` and `mvit config`: what recipes there are, how they differ from what is published, what a job does."""

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from launcher.arguments import add_command, add_json, add_recipe

# Every import of mvit stands in a function: `mvit --help` must not wait for pydantic and torch.


def add_recipes(group: "argparse._SubParsersAction") -> None:
    """Add `recipes` and `recipes check`."""
    text = "list the recipes of the paper: table row, published result, parameters"
    recipes = add_command(group, "recipes", list_recipes, text, "mvit recipes")
    add_json(recipes)
    check = add_command(
        recipes.add_subparsers(dest="subcommand", metavar="COMMAND"),
        "check",
        check_recipes,
        "compare recipes with what is published, key by key; exit code 1 on a difference that has no reason",
        "mvit recipes check imagenet1k/mvitv2_base",
    )
    text = "recipes as `mvit recipes` names them, or their files (all); of named ones every key is shown"
    check.add_argument("recipes", metavar="RECIPE", nargs="*", help=text)
    check.add_argument("--all", action="store_true", help="show the keys that are the same, too")
    text = "do not build the models to count their parameters"
    check.add_argument("--no-parameters", action="store_true", help=text)
    add_json(check)


def add_config(group: "argparse._SubParsersAction") -> None:
    """Add `config`."""
    text = "print the resolved config of a recipe, itself a valid recipe, or with --dry-run what a job of it would do"
    example = "mvit config configs/imagenet1k/mvitv2_huge.yaml --dry-run --gpus 64"
    config = add_command(group, "config", show_config, text, example)
    add_recipe(config)
    text = "print batches, steps, rates, parameter groups and checkpoints of a job, without data or GPUs"
    config.add_argument("--dry-run", action="store_true", help=text)
    config.add_argument("--gpus", type=int, metavar="N", help="--dry-run: the job's ranks")
    config.add_argument("--samples", type=int, metavar="N", help="--dry-run: training samples, if the data is not here")
    add_json(config)


def list_recipes(args: Namespace) -> int:
    """List the recipes."""
    from mvit.published import configs_folder, read_published, recipe_files

    configs = configs_folder()
    published = read_published(configs)
    rows = [
        {
            "name": name,
            "file": str(path),
            "row": published[name].row if name in published else "unknown",
            "result": published[name].result if name in published else "unknown",
            "parameters_m": published[name].parameters_m if name in published else None,
        }
        for name, path in recipe_files(configs).items()
    ]
    if args.json:
        print(json.dumps(rows))
        return 0
    width, row_width = max(len(row["name"]) for row in rows), max(len(row["row"]) for row in rows)
    for row in rows:
        millions = "" if row["parameters_m"] is None else f"{row['parameters_m']:g} M"
        print(f"{row['name']:<{width}}  {row['row']:<{row_width}}  {millions:>7}  {row['result']}")
    return 0


def check_recipes(args: Namespace) -> int:
    """Compare recipes with what is published; exit code 1 on anything unexplained."""
    from mvit.progress import counting
    from mvit.published import configs_folder, read_published, recipe_files
    from mvit.recipe_check import check_recipe

    configs = configs_folder()
    published, files = read_published(configs), recipe_files(configs)
    names = [_recipe_name(given, files) for given in args.recipes] or list(files)
    found = {}
    with counting(args.json) as count:
        for number, name in enumerate(names, start=1):
            found[name] = check_recipe(files[name], published.get(name), count=not args.no_parameters)
            if count is not None:
                count(number, len(names))
    lost = [] if args.recipes else sorted(published.keys() - files.keys())
    unexplained = sum(row.status == "UNEXPLAINED" for rows in found.values() for row in rows) + len(lost)
    if args.json:
        from dataclasses import asdict

        recipes = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        print(json.dumps({"ok": not unexplained, "unexplained": unexplained, "recipes": recipes, "without_file": lost}))
        return 1 if unexplained else 0
    for name, rows in found.items():
        same = sum(row.status == "same" for row in rows)
        print(f"{name}: {same} of {len(rows)} keys as published")
        for row in rows:
            if args.recipes or args.all or row.status not in ("same", "ours"):
                print(_line(row))
    for name in lost:
        print(f"{name}: UNEXPLAINED: it is published in configs/published, but there is no such recipe")
    print(f"{len(found)} recipes, {unexplained} unexplained differences")
    return 1 if unexplained else 0


def show_config(args: Namespace) -> int:
    """Print a resolved recipe, or what a job of it would do."""
    from launcher.recipe_folder import refuse_missing

    refuse_missing(args.recipe)
    import mvit

    config = mvit.load_config(args.recipe, args.overrides)
    if not args.dry_run:
        if args.gpus is not None or args.samples is not None:
            raise ValueError("--gpus and --samples belong to --dry-run; add it")
        print(json.dumps(config.model_dump(mode="json")) if args.json else config.to_yaml(), end="")
        return 0
    if args.gpus is None or args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus}: say on how many GPUs the job would run, --gpus 64")
    from mvit.dry_run import count_samples, dry_run

    run = dry_run(config, args.gpus, *count_samples(config, args.samples, known_samples()))
    print(json.dumps(run.as_dict()) if args.json else run)
    return 0


def known_samples() -> dict[str, int]:
    """Return data set → training samples, of those that the recipes train on."""
    from mvit.planner import PUBLISHED_SAMPLES

    # 13,153,500 pictures of the winter release of 2021 and ImageNet-1K's teddy bears; COCO's pictures with an object
    return PUBLISHED_SAMPLES | {"imagenet21k": 13_154_800, "coco": 117_266}


def _recipe_name(given: str, files: dict[str, Path]) -> str:
    """Return the name of a recipe that is given by its name or file."""
    import difflib

    if given in files:
        return given
    found = [name for name, path in files.items() if path.resolve() == Path(given).resolve()]
    if not found:
        close = difflib.get_close_matches(given.removeprefix("configs/").removesuffix(".yaml"), files, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{given}: no recipe of the paper{hint} (`mvit recipes` lists them)")
    return found[0]


def _line(row: Any) -> str:
    source = f" | {row.source}" if row.source else ""
    reason = f" ({row.reason})" if row.reason else ""
    published = "not stated" if row.status == "chosen" else "-" if row.status == "ours" else row.published
    return f"  {row.status:<11} {row.key:<28} {published} | {row.ours}{source}{reason}"
