"""What a recipe's file alone tells, in half a second (its whole config would import torch): is it there, its folder."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OUTPUT_DIR = "runs"  # RunConfig's default


class NoRecipeError(ValueError):
    """A recipe's file that does not exist; the message names the likeliest one."""


def refuse_missing(recipe: str | Path) -> None:
    """Raise NoRecipeError if there is no such file."""
    path = Path(recipe)
    if path.is_file():
        return
    names = [one.name for one in sorted(path.parent.glob("*.yaml")) if not _is_cluster_file(one)]
    close = difflib.get_close_matches(path.name, names, n=1)
    raise NoRecipeError(f"{path}: no such recipe" + (f"; did you mean {close[0]!r}?" if close else ""))


def _is_cluster_file(path: Path) -> bool:
    return any(line.startswith("executor:") for line in path.read_text(errors="replace").splitlines())


def recipe_run_dir(recipe: str | Path, overrides: Sequence[str] = ()) -> Path | None:
    """Return output_dir/name of a recipe with its `base:` chain and overrides.

    None where that cannot be told: then loading the config says what is wrong with it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree = OmegaConf.merge(_read(Path(recipe)), OmegaConf.from_dotlist(list(overrides)))
        name, output_dir = OmegaConf.select(tree, "name"), OmegaConf.select(tree, "output_dir", default=_OUTPUT_DIR)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(output_dir, str) or not name:
        return None
    return (Path(output_dir) / name).absolute()


def _read(path: Path) -> Any:
    from omegaconf import OmegaConf

    tree: Any = OmegaConf.load(path)
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{path}: no mapping")
    base = tree.pop("base", None)
    return tree if base is None else OmegaConf.merge(_read(path.parent / str(base)), tree)
