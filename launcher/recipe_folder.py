"""Which run folder a recipe will have, told in half a second: its whole config would import torch first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OUTPUT_DIR = "runs"  # RunConfig's default


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
