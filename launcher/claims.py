"""Whose a run is while two lives of it run at once: the fence between a life and the orphans of earlier ones.

A node that Slurm has given up may live on behind a cut cable, with ranks that train and save. Every life therefore
claims the run before it reads or writes a checkpoint, by a file named after its number; the highest number owns the
run. Claims are never taken back, so no clock and no lock is needed, and an orphan that starts late finds it has lost.
"""

import tempfile
from pathlib import Path

from mvit.life import Superseded


def claim_life(run_dir: Path, attempt: int) -> None:
    """Take the run over for life `attempt`; raises Superseded if a later life has it already."""
    folder = _folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{attempt:06d}").touch()
    check_claim(run_dir, attempt)


def check_claim(run_dir: Path, attempt: int) -> None:
    """Raise Superseded if a later life than `attempt` has claimed the run."""
    _refresh(_folder(run_dir))
    owner = owner_of(run_dir)
    if owner > attempt:
        raise Superseded(f"life {owner} of {run_dir} has taken over from life {attempt}: this one writes nothing more")


def owner_of(run_dir: Path) -> int:
    """Return the life that owns the run, 0 before the first claim."""
    folder = _folder(run_dir)
    if not folder.is_dir():
        return 0
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)


def _refresh(folder: Path) -> None:
    """Make an NFS client ask its server what the folder holds: without a change of its own it may show an old list."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".look-"):
            pass
    except OSError:
        return  # full or read-only: what is about to be published cannot be written either


def _folder(run_dir: Path) -> Path:
    return run_dir / "claims"
