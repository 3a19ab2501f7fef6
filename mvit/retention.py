"""Which checkpoints of a run are kept, and removing the others."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mvit.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoints_dir,
    list_steps,
    newest_valid,
    publications,
    read_manifest,
)
from mvit.distributed import logger


@dataclass(frozen=True)
class Retention:
    """The newest `keep_last`, every multiple of `keep_every` (0: none), and the `keep_best` best evaluated."""

    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 0

    def kept(self, steps: Sequence[int], scores: Mapping[int, float]) -> set[int]:
        """Return which of `steps` (ascending) stay; of equally good ones the newest."""
        best = sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step), reverse=True)
        return {
            *steps[-self.keep_last :],
            *(step for step in steps if self.keep_every and step % self.keep_every == 0),
            *best[: self.keep_best],
        }


def scores_of(run_dir: Path) -> dict[int, float]:
    """Return the figures of merit of the evaluated checkpoints on disk, by step."""
    listed = {line["step"]: line.get("score") for line in publications(run_dir)}
    for step in list_steps(run_dir):
        if step not in listed:  # published, but the line was lost
            try:
                listed[step] = read_manifest(checkpoint_path(run_dir, step)).score
            except CheckpointError:
                continue
    return {step: score for step, score in listed.items() if score is not None}


def prune_after_save(
    run_dir: Path, newest: int, retention: Retention, *, read_back: bool = True, damaged: Collection[int] = ()
) -> list[int]:
    """Remove what `retention` does not keep, up to step `newest`, which has just been published; returns the removed.

    `damaged` ones do not count among the kept, and go as soon as a later one is whole. Unless `newest` was read back
    from disk itself, the last one that was stays, and two at least. What cannot be removed is reported and stays: the
    new checkpoint is published, so nothing has failed.
    """
    # Beyond the one just published lie only damaged ones that the run has fallen back from: they must not count as
    # the newest, or the good ones would go. They are replaced when the run comes to their step again.
    steps = [step for step in list_steps(run_dir) if step <= newest]
    good = [step for step in steps if step not in damaged]
    if read_back:
        kept = retention.kept(good, scores_of(run_dir))
    else:
        kept = replace(retention, keep_last=max(2, retention.keep_last)).kept(good, scores_of(run_dir))
        proven = [line["step"] for line in publications(run_dir) if line["read_back"] and line["step"] in good]
        kept |= {*proven[-1:], *(step for step in steps if step in damaged)}
    return [step for step in steps if step not in kept and _remove(checkpoint_path(run_dir, step))]


def prune(run_dir: Path, retention: Retention, *, dry_run: bool = False) -> tuple[list[int], list[int], list[int]]:
    """Remove what `retention` does not keep of a run at rest; returns the steps kept, removed, and left as damaged.

    The newest checkpoint is read whole first. If it is damaged, the newest valid one counts as the newest, and damaged
    ones beyond it stay for a look. Raises CheckpointError if none is usable: then nothing may be removed.
    """
    newest = newest_valid(run_dir)
    if newest is None:
        return [], [], []
    steps = list_steps(run_dir)
    limit = int(newest.name.removeprefix("step_"))
    up_to = [step for step in steps if step <= limit]
    kept = retention.kept(up_to, scores_of(run_dir))
    doomed = [step for step in up_to if step not in kept]
    removed = doomed if dry_run else [step for step in doomed if _remove(checkpoint_path(run_dir, step))]
    return [step for step in up_to if step not in removed], removed, steps[len(up_to) :]


def clear_leftovers(run_dir: Path) -> None:
    """Remove what attempts that died while saving left behind, at the start of another one.

    A checkpoint that was moved aside for a successor which never came gets its name back.
    """
    folder = checkpoints_dir(run_dir)
    for leftover in sorted(folder.glob(".step_*")):
        name = leftover.name[1:].split(".")[0]
        try:
            if leftover.suffix == ".old" and not (folder / name).exists():
                leftover.rename(folder / name)
                logger.warning("%s had been moved aside by a save that was killed; it is back", folder / name)
                continue
        except OSError as error:
            logger.warning("%s cannot get its name back, rename it yourself: %s", leftover, error)
            continue
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(path: Path) -> bool:
    doomed = path.with_name(f".{path.name}.pruned")
    shutil.rmtree(doomed, ignore_errors=True)  # of an earlier one of this step that could not go
    try:
        path.rename(doomed)  # no half-deleted folder keeps a checkpoint's name
    except OSError as error:
        logger.warning("the old checkpoint %s cannot be removed: %s", path, error)
        return False
    shutil.rmtree(doomed, ignore_errors=True)
    return True
