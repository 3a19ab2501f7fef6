"""`mvit bench data`: the parser, and what it hands to the benchmark, the soak and the device that waits."""

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from launcher.arguments import add_command, add_json, add_recipe

if TYPE_CHECKING:
    from data_pipeline.benchmark import Contender, DataBenchRow
    from data_pipeline.shards import ShardSet
    from mvit.config import RunConfig


def add_bench_data(group: "argparse._SubParsersAction") -> None:
    """Add `bench data`."""
    text = "time reading and augmenting a recipe's training shards, beside other libraries' usual pipelines"
    example = "mvit bench data configs/demo/digits.yaml --against webdataset,torchvision --workers 0 2"
    parser = add_command(group, "data", bench_data, text, example)
    peers = "peers in the same run, by spaces or commas (images: webdataset, torchvision; clips: pyav, torchcodec, "
    parser.add_argument("--against", nargs="+", metavar="PEER", help=f"{peers}decord; none: without); default: all")
    parser.add_argument("--workers", type=int, nargs="+", metavar="N", help="worker processes (0; soak and feed: 2)")
    parser.add_argument("--batch", type=int, metavar="N", help="samples per batch (50; clips and detection: 4)")
    parser.add_argument("--batches", type=int, default=10, metavar="N", help="batches per measurement (10)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of each (3)")
    instead = parser.add_mutually_exclusive_group()
    text = "instead: how long a device that takes so many samples a second waits for its data"
    instead.add_argument("--feed", type=float, metavar="RATE", help=text)
    text = "instead: read N samples and watch the memory of all processes"
    instead.add_argument("--soak", type=int, metavar="N", help=text)
    add_recipe(parser)
    add_json(parser)


def bench_data(args: Namespace) -> int:
    """Time the data pipeline."""
    import mvit
    from data_pipeline.shards import open_shards

    recipe = mvit.load_config(args.recipe, args.overrides)
    data = recipe.data
    if data.train is None:
        raise ValueError("data.train is not set: name the shards to read, data.train=shards/train")
    against = None
    if args.against is not None:
        against = [name for text in args.against for name in text.split(",") if name and name != "none"]
    contenders, batch = _contenders(recipe, against)
    shards = open_shards(
        data.train, cache_dir=data.cache_dir, cache_gib=data.cache_gib, required=recipe.required_members
    )
    batch = args.batch or batch
    ours = [contender for contender in contenders if contender.role == "ours"][-1]
    if args.soak is not None:
        return _soak(args, shards, ours, batch)
    if args.feed is not None:
        return _feed(args, shards, ours, batch)
    from data_pipeline.benchmark import bench_data

    rows = bench_data(
        shards, contenders, args.workers or [0], batch_size=batch, num_batches=args.batches, rounds=args.rounds
    )
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        _show(rows)
    return 0


def _contenders(recipe: "RunConfig", against: Sequence[str] | None) -> tuple[list["Contender"], int]:
    """Return who takes part for a recipe of this task, and the usual batch."""
    if recipe.task == "video_classification":
        from data_pipeline.benchmark_video import clip_contenders

        return clip_contenders(recipe.video, against), 4
    from data_pipeline.benchmark_peers import IMAGE_PEERS, detection_contenders, image_contenders

    if recipe.task == "detection":
        return detection_contenders(recipe.detection, against or ()), 4
    return image_contenders(recipe.image, IMAGE_PEERS if against is None else against), 50


def _show(rows: Sequence["DataBenchRow"]) -> None:
    print("samples per CPU-second of all processes (per second by the clock), medians")
    for row in rows:
        name = row.pipeline if row.augmentation is None else f"{row.pipeline}, {row.augmentation}"
        ratios = ", ".join(f"{ratio:.2f} x {peer}" for peer, ratio in row.ratios.items())
        rates = f"{row.samples_per_cpu_second:8.4g} ({row.samples_per_second:.4g})"
        print(f"{name:36} {row.workers:2} worker(s) {rates:20} {ratios}".rstrip())


def _feed(args: Namespace, shards: "ShardSet", ours: "Contender", batch: int) -> int:
    from data_pipeline.benchmark import bench_feed

    rows = bench_feed(shards, ours, args.workers or [2], args.feed, batch_size=batch, num_batches=4 * args.batches)
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    for row in rows:
        print(f"{args.feed:g} samples/s, {row.workers} worker(s): the device waits {row.wait_share:.1%} of the time")
    return 0


def _soak(args: Namespace, shards: "ShardSet", ours: "Contender", batch: int) -> int:
    from data_pipeline.benchmark_soak import SoakPoint, slope, soak

    def tell(point: SoakPoint) -> None:
        print(
            f"{point.samples:9,} samples, {point.seconds:6.0f} s: RSS main {point.main_rss_mib:.1f} MiB, "
            f"workers {point.workers_rss_mib:.1f}; PSS main {point.main_pss_mib:.1f}, "
            f"workers {point.workers_pss_mib:.1f}",
            file=sys.stderr if args.json else sys.stdout,
            flush=True,
        )

    workers = (args.workers or [2])[0]
    points = soak(shards, ours, args.soak, workers=workers, batch_size=batch, tell=tell)
    growth = slope(points)
    if args.json:
        print(json.dumps({"points": [asdict(point) for point in points], "mib_per_100000_samples": growth}))
    else:
        print(f"after the first quarter: RSS {growth:+.2f} MiB per 100,000 samples, all processes together")
    return 0
