"""Writes what the planner says into recipes' headers: `python -m tests.recipe_headers [RECIPE …]`, all without."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import mvit
from mvit.config import RunConfig
from mvit.planner import PUBLISHED_SAMPLES, foresee
from mvit.planner_memory import GIB

ROOT = Path(__file__).parent.parent
GPU = "h100"
GPU_GIB = 80
LINE = re.compile(
    r"^# Planned:    (\d+) x (\w+): ([\d.]+) of (\d+) GiB each, ([\d.]+) s a step, ([\d.]+) hours, (\d+) GPU-hours.*\n",
    re.MULTILINE,
)
_HARDWARE = re.compile(r"^# Hardware:\D*(\d+)(?: or \d+)? GPUs x .*\n(?:#             .*\n)*", re.MULTILINE)


def planned_recipes() -> list[Path]:
    """Return the recipes that have a plan: classifiers of public data sets whose header names a number of GPUs."""
    recipes = sorted((ROOT / "configs").glob("*/mvitv2_*.yaml"))
    return [recipe for recipe in recipes if _HARDWARE.search(recipe.read_text())]


def figures(config: RunConfig, gpus: int) -> tuple[float, float, float]:
    """Return GiB a GPU, seconds a step and hours of the run."""
    found = foresee(config, gpus, GPU)
    data_set = next(name for name in PUBLISHED_SAMPLES if name in str(config.data.train).split("/"))
    hours = found.step.total * config.total_steps(PUBLISHED_SAMPLES[data_set]) / 3600
    return found.memory.needed / GIB, found.step.total, hours


def gpus_of(text: str) -> int:
    """Return the number of GPUs that a recipe's header names."""
    found = _HARDWARE.search(text)
    assert found is not None
    return int(found.group(1))


def plan_line(gpus: int, gib: float, seconds: float, hours: float) -> str:
    """Return the line of a header."""
    return (
        f"# Planned:    {gpus} x {GPU}: {gib:.1f} of {GPU_GIB} GiB each, {seconds:.3f} s a step, {hours:.1f} hours, "
        f"{hours * gpus:.0f} GPU-hours; modelled, not measured\n"
    )


def with_line(text: str, line: str) -> str:
    """Return a recipe with the line below its hardware, in place of an older one."""
    return _HARDWARE.sub(lambda found: found.group() + line, LINE.sub("", text), count=1)


def main(arguments: Sequence[str]) -> None:
    """Write the named recipes' lines, or all."""
    for recipe in [Path(word) for word in arguments] or planned_recipes():
        text = recipe.read_text()
        line = plan_line(gpus_of(text), *figures(mvit.load_config(recipe), gpus_of(text)))
        recipe.write_text(with_line(text, line))
        print(recipe, line, sep="\n  ", end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
