"""The published values that recipes are compared with: configs/published/*.yaml, read without torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "published"
_ENTRY = {"row", "result", "parameters", "samples", "groups", "values", "reasons"}
_FILE = {"ours", "groups", "recipes"}


class PublishedError(ValueError):
    """A file of published values that cannot be used; the message names file, entry and rule."""


@dataclass(frozen=True)
class PublishedValue:
    """What the sources say of one key."""

    value: Any
    """None: they are silent, or there is none."""
    source: str


@dataclass(frozen=True)
class PublishedRecipe:
    """All that is published of one recipe, and why ours differs."""

    name: str
    """The recipe's path in configs, without .yaml."""
    row: str
    result: str
    parameters_m: float | None
    """Millions of parameters, as printed."""
    samples: int | None
    """Of the training set."""
    values: Mapping[str, PublishedValue] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    ours: Mapping[str, str] = field(default_factory=dict)
    """Keys that change no result, or that each user sets, with the reason."""


def configs_folder() -> Path:
    """Return the folder of the recipes: configs beside this package, else in the working directory."""
    here = Path(__file__).parent.parent / "configs"
    folder = here if (here / FOLDER).is_dir() else Path("configs")
    if not (folder / FOLDER).is_dir():
        raise PublishedError(
            f"{folder / FOLDER}: no such folder; run from the project's folder, or name the recipes' one"
        )
    return folder


def recipe_files(configs: Path) -> dict[str, Path]:
    """Return recipe name → file of every recipe of the paper; demos are none."""
    others = {FOLDER, "cluster", "demo"}
    files = sorted(path for path in configs.rglob("*.yaml") if path.parent.name not in others)
    return {str(path.relative_to(configs).with_suffix("")): path for path in files}


def read_published(configs: Path) -> dict[str, PublishedRecipe]:
    """Read all files of published values; raises PublishedError for what does not have their form."""
    import yaml

    found: dict[str, PublishedRecipe] = {}
    for path in sorted((configs / FOLDER).glob("*.yaml")):
        tree = yaml.safe_load(path.read_text())
        _known(path, "the file", tree, _FILE)
        groups: dict[str, Any] = tree.get("groups", {})
        for name, entry in tree["recipes"].items():
            if name in found:
                raise PublishedError(f"{path}: {name} is in another file, too; keep one")
            _known(path, name, entry, _ENTRY)
            unknown = [group for group in entry.get("groups", ()) if group not in groups]
            if unknown:
                raise PublishedError(f"{path}: {name}: unknown group {unknown[0]!r}; groups: {', '.join(groups)}")
            parts = [*(groups[group] for group in entry.get("groups", ())), entry]
            found[name] = _resolved(path, name, parts, tree.get("ours", {}))
    return found


def _resolved(path: Path, name: str, parts: Iterable[Mapping[str, Any]], ours: Mapping[str, str]) -> PublishedRecipe:
    """Put the groups and the entry together, each over those before it."""
    values: dict[str, PublishedValue] = {}
    reasons: dict[str, str] = {}
    samples, entry = None, {}
    for part in parts:
        for key, pair in part.get("values", {}).items():
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str)):
                raise PublishedError(f"{path}: {name}: {key}: {pair!r} is not [value, source]")
            if key in values and key not in part.get("reasons", {}):
                reasons.pop(key, None)  # it spoke of the value that stood here before
            values[key] = PublishedValue(pair[0], pair[1])
        reasons |= part.get("reasons", {})
        samples, entry = part.get("samples", samples), part
    return PublishedRecipe(
        name, entry["row"], entry["result"], entry.get("parameters"), samples, values, reasons, dict(ours)
    )


def _known(path: Path, name: str, tree: Any, keys: set[str]) -> None:
    unknown = sorted(set(tree) - keys) if isinstance(tree, dict) else ["(no mapping)"]
    if unknown:
        raise PublishedError(f"{path}: {name}: unknown key {unknown[0]!r}; keys: {', '.join(sorted(keys))}")
