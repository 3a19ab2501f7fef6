"""Pack a labelled data set into WebDataset tar shards with indexes and a manifest; all appears at once, or nothing.

A packed folder OUT/<split> holds shard-000000.tar … (members 000123.jpg, the source's bytes unchanged, and 000123.cls),
a .idx beside each, sources.jsonl ([shard, key, source] per sample) and manifest.json, written last. How samples are
read and checked is their kind's: pictures here, videos in data_pipeline.pack_video.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipeline.decode import LABEL_EXTENSION
from data_pipeline.manifest import MANIFEST, SOURCES
from data_pipeline.order import epoch_order
from data_pipeline.pack_kinds import PICTURES, SampleKind
from data_pipeline.shard_index import find_index, write_atomically
from data_pipeline.sources import Rejected, SourceData
from data_pipeline.sources.digits import read_digits
from data_pipeline.sources.imagefolder import read_imagefolder

FORMAT_VERSION = 1

_MOST_BAD_IN_A_ROW = 100
"""Samples are read in a shuffled order: so many bad ones running are no accident, but a file system that is gone."""


class PackError(ValueError):
    """Packing cannot start or go on; nothing was written under the output's name."""


@dataclass(frozen=True)
class PackOptions:
    """How to cut and check; the defaults suit ImageNet-like pictures."""

    max_samples: int = 1000
    """Samples in a shard at most. Shuffling takes whole shards into its window, so keep them moderate."""
    max_bytes: int = 200_000_000
    """A shard is closed once its members reach this size."""
    seed: int = 0
    """Seeds the order in which samples are written, so that each shard holds a mixture of classes."""
    workers: int = 0
    """Threads, for videos processes, that read and decode for checking; 0: one per CPU core."""
    strict: bool = False
    """Stop at the first file that cannot be read as what it is instead of leaving it out and listing it."""
    overwrite: bool = False
    """Replace an existing packed output."""
    max_bad: float = 0.05
    """Share of a split's files that may be left out; with more the shards are written, but the report is not `ok`."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is {self.max_bad}; it is a share of the files, from 0 to 1.")


@dataclass(frozen=True)
class PackedSplit:
    """What became of one split."""

    name: str
    folder: str
    num_samples: int
    num_shards: int
    num_bytes: int
    counts: dict[str, int]
    """Samples of each class; of pictures with objects, the objects."""
    missing_classes: list[str]
    """Classes that other splits have and this one does not."""
    quarantined: list[Rejected]
    """Files left out, with reasons; also in the manifest."""
    dropped: list[Rejected] = field(default_factory=list)
    """Objects left out of pictures that were packed, with reasons; also in the manifest."""
    measured: dict[str, float] = field(default_factory=dict)
    """Sums of what was measured of each sample: seconds, and how many are short, for one; also in the manifest."""
    notes: list[str] = field(default_factory=list)
    """The same in words."""

    @property
    def bad_share(self) -> float:
        """The share of the split's files that were left out."""
        return len(self.quarantined) / (self.num_samples + len(self.quarantined))


@dataclass(frozen=True)
class PackReport:
    """What was packed; `as_dict()` for JSON, `str()` for people."""

    output: str
    class_names: list[str]
    splits: list[PackedSplit]
    max_bad: float

    @property
    def ok(self) -> bool:
        """Whether no split lost more than `max_bad` of its files."""
        return all(split.bad_share <= self.max_bad for split in self.splits)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        lines = [f"Packed into {self.output}: {len(self.class_names)} classes"]
        for split in self.splits:
            lines.append(
                f"  {split.name}: {split.num_samples} samples in {split.num_shards} shard(s), {split.num_bytes:,} bytes"
            )
            lines += [f"    {note}" for note in split.notes]
            if split.missing_classes:
                more = f" … and {len(split.missing_classes) - 10} more" if len(split.missing_classes) > 10 else ""
                lines.append(f"    no sample of: {', '.join(split.missing_classes[:10])}{more}")
            if split.quarantined:
                lines.append(f"    left out {len(split.quarantined)} file(s), listed in {MANIFEST}:")
                lines += [f"      {bad.source}: {bad.reason}" for bad in split.quarantined[:10]]
            if split.dropped:
                lines.append(f"    dropped {len(split.dropped)} object(s), listed in {MANIFEST}:")
                lines += [f"      {bad.source}: {bad.reason}" for bad in split.dropped[:10]]
            if split.bad_share > self.max_bad:
                share = f"{split.bad_share:.1%} of the files are left out, --max-bad allows {self.max_bad:.1%}"
                lines.append(
                    f"    TOO MANY: {share}. The shards are sound: mend the files and pack again, or allow as many"
                )
        return "\n".join(lines)


Progress = Callable[[int, int], None]


def pack_imagefolder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layout: Literal["auto", "splits", "classes"] = "auto",
    holdout: float = 0.0,
    options: PackOptions | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack SOURCE/<split>/<class>/files, or SOURCE/<class>/files with a `holdout` part, into OUTPUT/<split>.

    Every picture is decoded once; what cannot be is left out and listed (`strict`: PackError). `progress(done, total)`
    is called per sample. Raises PackError, or ValueError for a tree that does not fit `layout`.
    """
    options = options or PackOptions()
    root, output = Path(source), Path(output)
    if output.resolve() == root.resolve() or output.resolve() in root.resolve().parents:
        raise PackError(f"The output {output} contains the source {root}; choose another output folder.")
    check_output(output, options)
    return pack(read_imagefolder(root, layout=layout, holdout=holdout, seed=options.seed), output, options, progress)


def pack_digits(
    output: str | os.PathLike[str], *, options: PackOptions | None = None, progress: Progress | None = None
) -> PackReport:
    """Pack scikit-learn's handwritten digits into OUTPUT/train and OUTPUT/validation.

    The pictures stay 8 x 8; enlarging is the transform's work. The held-out fifth is fixed: of each class every fifth
    sample in the data set's order; the manifest repeats the rule.
    """
    return pack(read_digits(), Path(output), options or PackOptions(max_samples=256), progress)


def pack(
    data: SourceData,
    output: Path,
    options: PackOptions,
    progress: Progress | None = None,
    kind: SampleKind = PICTURES,
) -> PackReport:
    """Write every split of `data` under a temporary name, then rename the whole. Raises PackError."""
    check_output(output, options)
    check_split_names(data.splits)
    rejected = [bad for bads in data.rejected.values() for bad in bads]
    if options.strict and rejected:
        raise PackError(
            f"{len(rejected)} file(s) are no {kind.noun}s, the first: {rejected[0].source}: {rejected[0].reason}"
        )
    for name, samples in data.splits.items():
        if not samples:
            first = next((f", e.g. {bad.source}: {bad.reason}" for bad in data.rejected.get(name, [])), "")
            raise PackError(f"Split {name} of {data.origin} has no {kind.noun}{first}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    if kind.keeps_size:
        _check_space(data, output.parent)
    building = output.parent / f".{output.name}.packing-{os.getpid()}"
    building.mkdir()
    total = sum(map(len, data.splits.values()))
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    try:
        splits = [
            _write_split(building / name, output / name, name, data, options, kind, one_more) for name in data.splits
        ]
        _publish(building, output)
    except OSError as error:
        raise PackError(f"Packing into {output} failed, nothing was written there: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return PackReport(str(output), data.class_names, splits, options.max_bad)


def _write_split(
    folder: Path,
    final: Path,
    name: str,
    data: SourceData,
    options: PackOptions,
    kind: SampleKind,
    one_more: Callable[[], None],
) -> PackedSplit:
    """Write one split's shards, indexes, list of sources and manifest."""
    from webdataset.writer import ShardWriter

    folder.mkdir()
    quarantined, dropped = list(data.rejected.get(name, [])), list(data.dropped.get(name, []))
    labels: Counter[int] = Counter()
    measured: Counter[str] = Counter()
    listed: defaultdict[str, list[int]] = defaultdict(list)
    traces: list[list[str]] = []
    bad_in_a_row = 0
    samples = data.splits[name]
    order = epoch_order([len(samples)], options.seed, 0, 1)
    digits = max(6, len(str(len(samples))))
    pattern = str(folder).replace("%", "%%") + "/shard-%06d.tar"
    # Time 0 makes the shards' bytes a function of the source and the options.
    with (
        tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder.parent) as scratch,
        ShardWriter(pattern, options.max_samples, options.max_bytes, verbose=0, encoder=False, mtime=0) as writer,
    ):
        ordered = (samples[i] for i in order.tolist())
        for sample, checked in kind.check(ordered, options.workers, Path(scratch)):
            one_more()
            if checked.problem:
                if options.strict:
                    raise PackError(f"{sample.source}: {checked.problem}{kind.remedy}")
                quarantined.append(Rejected(sample.source, checked.problem))
                bad_in_a_row += 1
                if bad_in_a_row == _MOST_BAD_IN_A_ROW:
                    raise PackError(
                        f"{bad_in_a_row} {kind.noun}s in a row cannot be packed, the last: {sample.source}: "
                        f"{checked.problem}. Nothing was written: is the source's file system there?"
                    )
                continue
            bad_in_a_row = 0
            key = f"{len(traces):0{digits}d}"
            label = {} if sample.label is None else {LABEL_EXTENSION: str(sample.label).encode()}
            writer.write({"__key__": key, **checked.members, **label})
            traces.append([os.path.basename(str(writer.fname)), key, sample.source])
            labels.update(checked.labels if sample.label is None else [sample.label])
            measured.update(checked.measured)
            for fact, value in checked.listed.items():
                listed[fact].append(value)
    if not traces:
        raise PackError(f"Split {name}: none of {len(samples)} {kind.noun}s can be decoded, e.g. {quarantined[-1]}")
    shards = [_describe(tar) for tar in sorted(folder.glob("*.tar"))]
    lines = "".join(json.dumps(trace) + "\n" for trace in traces).encode()
    write_atomically(folder / SOURCES, lines)
    counts = {class_name: labels[label] for label, class_name in enumerate(data.class_names)}
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": data.origin,
        "split": name,
        "split_rule": data.rule,
        "seed": options.seed,
        "num_samples": len(traces),
        "num_classes": len(data.class_names),
        "class_names": data.class_names,
        "counts": counts,
        "shards": shards,
        "sources": {"name": SOURCES, "sha256": hashlib.sha256(lines).hexdigest()},
        "quarantined": [asdict(bad) for bad in quarantined],
        "measured": dict(measured),
        **({"dropped": [asdict(bad) for bad in dropped]} if dropped else {}),
        **data.facts,
    }
    text = json.dumps(manifest, indent=1)
    for fact, values in listed.items():  # in one line each: they are as long as the set
        text = f'{text[:-2]},\n "{fact}": {json.dumps(values)}\n}}'
    write_atomically(folder / MANIFEST, text.encode())
    missing = [class_name for class_name, number in counts.items() if number == 0]
    num_bytes = sum(shard["bytes"] for shard in shards)
    return PackedSplit(
        name,
        str(final),
        len(traces),
        len(shards),
        num_bytes,
        counts,
        missing,
        quarantined,
        dropped,
        dict(measured),
        kind.tell(measured, counts),
    )


def _describe(tar: Path) -> dict[str, Any]:
    """Index a finished shard, force it to the disk, and return its manifest entry."""
    _, head = find_index(str(tar), tar.parent)
    with open(tar, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": tar.name, "samples": head.num_samples, "bytes": head.tar_bytes, "sha256": digest}


def check_split_names(names: Iterable[str]) -> None:
    """Raise PackError for a split that can be no folder of the output."""
    for name in names:
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise PackError(f"split {name!r} cannot be a folder of the output; use a plain name such as train")


def check_output(output: Path, options: PackOptions) -> None:
    """Refuse an output that exists, unless `overwrite` and it is packed data."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not options.overwrite:
        raise PackError(f"{output} exists; choose another folder, or replace it with --overwrite (overwrite=True).")
    if not (output.is_dir() and all((entry / MANIFEST).is_file() for entry in output.iterdir())):
        raise PackError(f"{output} holds other things than packed data and is not overwritten; remove it yourself.")


def _check_space(data: SourceData, folder: Path) -> None:
    """Fail before writing if the shards cannot fit: each member is padded to 512 bytes after a header of 512."""
    samples = [sample for split in data.splits.values() for sample in split]
    sizes = [size for sample in samples for size in (sample.size, *map(len, sample.members.values()))]
    needed = sum(512 + -(-size // 512) * 512 for size in sizes) + (1024 + 256) * len(samples) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PackError(f"{folder} has {free:,} bytes free, the shards of {data.origin} need about {needed:,}.")


def _publish(building: Path, output: Path) -> None:
    """Put the finished folder in the output's place; the old one goes only after the new one is there."""
    old = output.parent / f".{output.name}.replaced-{os.getpid()}"
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(building, output)
    except OSError:
        if old.exists():
            os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)
