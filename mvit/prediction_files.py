"""Which files a prediction is asked for, and where the drawn copies of pictures go."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvit.prediction_results import Unreadable


@dataclass(frozen=True)
class AskedFile:
    """A file to predict for."""

    path: Path
    below: Path
    """The path within the folder that was named; of a file that was named itself, its name."""
    problem: Unreadable | None = None


def asked_files(paths: Sequence[Path], what: str, extensions: Sequence[str], out: Path | None) -> Iterator[AskedFile]:
    """Yield what is named, folders file by file; hidden files and what lies in `out` are left out of folders."""
    own = None if out is None else out.resolve()
    for path in paths:
        if not path.is_dir():
            yield AskedFile(path, Path(path.name))
            continue
        found = 0
        unseen: list[OSError] = []
        visited = {_place(path)}
        for folder, folders, names in os.walk(path, followlinks=True, onerror=unseen.append):
            kept = [name for name in folders if not name.startswith(".") and (Path(folder) / name).resolve() != own]
            folders[:] = [name for name in sorted(kept) if _is_new(_place(Path(folder) / name), visited)]
            for name in sorted(names):
                if not name.startswith(".") and Path(name).suffix[1:].lower() in extensions:
                    file = Path(folder) / name
                    found += 1
                    yield AskedFile(file, file.relative_to(path))
        for error in unseen:
            closed = Path(error.filename)
            yield AskedFile(closed, closed, Unreadable(closed, error.strerror or str(error)))
        if not found and not unseen:
            reason = f"the folder holds no {what} ({', '.join(extensions)})"
            yield AskedFile(path, path, Unreadable(path, reason))


def _place(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def _is_new(place: tuple[int, int], visited: set[tuple[int, int]]) -> bool:
    """Tell whether a folder is met for the first time: links may lead back to one that holds them."""
    new = place not in visited
    visited.add(place)
    return new


def make_out(out: Path) -> None:
    """Make the folder for results. Raises ValueError if that cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out = {out} is no folder that can be written ({error.strerror}); name another") from error


def refuse_existing(targets: Sequence[Path], overwrite: bool) -> None:
    """Raise ValueError if a target is there already and may not be replaced."""
    there = [target for target in targets if target.is_dir() or (target.exists() and not overwrite)]
    if not there:
        return
    more = f" and {len(there) - 1} more" if len(there) > 1 else ""
    if there[0].is_dir():
        raise ValueError(f"{there[0]}{more}: a folder is where a file is to be written; choose another folder as out")
    raise ValueError(
        f"{there[0]}{more} would be replaced; choose another folder as out, or allow it with --overwrite "
        "(overwrite=True)"
    )


def copies_in(files: Sequence[AskedFile], out: Path) -> Iterator[Path | None]:
    """Yield where each picture's copy goes, no two to the same place; ValueError if one is an original's."""
    originals = {file.path.resolve() for file in files}
    taken: set[Path] = set()
    for file in files:
        if file.problem is not None:
            yield None
            continue
        wanted = out / file.below.with_suffix(".png")
        copy, number = wanted, 1
        while copy in taken:
            number += 1
            copy = wanted.with_name(f"{wanted.stem}-{number}.png")
        if copy.resolve() in originals:
            raise ValueError(f"{copy} is one of the pictures, and would be replaced by its copy; choose another folder")
        taken.add(copy)
        yield copy
