"""`mvit predict`: the parser, and what it calls; classes and objects in words, as JSON, and drawn."""

import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.arguments import add_command, add_json

if TYPE_CHECKING:
    from mvit.prediction_results import Result

_DRAWN = "predictions"  # where a detector's pictures go without --out


def add_predict(group: "argparse._SubParsersAction") -> None:
    """Add `predict`."""
    text = "say what is in pictures or videos: classes, or objects drawn on copies; exit code 1 if one is unreadable"
    parser = add_command(group, "predict", predict, text, "mvit predict photos street.jpg --weights run.safetensors")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="pictures or videos, or folders of them")
    text = "what `mvit export` wrote, a run's folder or a checkpoint; with --recipe any weights"
    parser.add_argument("--weights", required=True, metavar="W", help=text)
    text = "the model's recipe, where the weights carry none; KEY=VALUE anywhere replaces settings of either"
    parser.add_argument("--recipe", metavar="RECIPE", help=text)
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a run or a checkpoint")
    text = f"folder for drawn copies and predictions.json (of a detector: {_DRAWN}; of a classifier: none is written)"
    parser.add_argument("--out", metavar="DIR", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier prediction wrote there")
    text = "leave out objects below this (0.5); a detector itself has none below its score_threshold"
    parser.add_argument("--score", type=float, default=0.5, metavar="P", help=text)
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes told of each file (5)")
    text = "class names in the order of their numbers: text, or JSON (the training data's, if that is here)"
    parser.add_argument("--names", metavar="FILE", help=text)
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda; cuda where there is one")
    add_json(parser)
    parser.set_defaults(overrides=[])  # settings among the inputs are sorted out below


def predict(args: Namespace) -> int:
    """Predict; exit code 1 if something could not be read."""
    # A setting is what no file is called: `video.num_clips=10`
    settings = [word for word in args.inputs if "=" in word and not Path(word).exists()]
    inputs = [word for word in args.inputs if word not in settings]
    if not inputs:
        raise ValueError("no file is named; give pictures, videos, or folders of them")
    settings += args.overrides
    if args.recipe is not None:
        from launcher.recipe_folder import refuse_missing

        refuse_missing(args.recipe)
    import mvit
    from mvit.prediction import RESULTS_FILE, load_predictor, predict_files
    from mvit.prediction_files import make_out
    from mvit.progress import ProgressDisplay

    if args.out is not None:
        make_out(Path(args.out))  # before the model is loaded
    config, rest = (None, settings) if args.recipe is None else (mvit.load_config(args.recipe, settings), [])
    predictor = load_predictor(args.weights, config, rest, names=args.names, ema=args.ema, device=args.device)
    out = args.out or (_DRAWN if predictor.detects else None)
    if args.json:
        results = predict_files(predictor, inputs, out=out, overwrite=args.overwrite, score=args.score, topk=args.topk)
        facts = {"task": predictor.config.task, "weights": args.weights, "names": predictor.names.origin}
        print(json.dumps({**facts, "out": out, "results": [result.as_dict() for result in results]}))
    else:
        print(f"class names: {predictor.names.origin}")
        with ProgressDisplay() as display:

            def tell(done: int, total: int, result: "Result") -> None:
                display.update({"kind": "progress", "step": done, "total_steps": total})
                display.note(str(result))

            results = predict_files(
                predictor, inputs, out=out, overwrite=args.overwrite, score=args.score, topk=args.topk, tell=tell
            )
        if out is not None:
            print(f"wrote {Path(out) / RESULTS_FILE}")
    return _complain(results, named=not args.json)


def _complain(results: "list[Result]", named: bool) -> int:
    """Count, and name where that was not done yet, what could not be read, or its copy not be written."""
    from mvit.prediction_results import Detected, Unreadable

    bad = [one for one in results if isinstance(one, Unreadable) or (isinstance(one, Detected) and one.unwritten)]
    if not bad:
        return 0
    lines = [f"error: {len(bad)} of {len(results)} could not be read or drawn", *(f"  {one}" for one in bad)]
    print("\n".join(lines[:1] if named else lines), file=sys.stderr)
    return 1
