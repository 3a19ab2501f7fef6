"""What recipes say of memory and hours in their headers is what the planner says."""

from pathlib import Path

import pytest

import mvit
from tests.recipe_headers import GPU, GPU_GIB, LINE, figures, gpus_of, plan_line, planned_recipes, with_line

QUICK = ("imagenet1k/mvitv2_tiny", "imagenet21k/mvitv2_huge_in1k_512")
"""Checked always; all that have a line with `-m slow`."""
RECIPES = [
    pytest.param(path, id=label, marks=[] if label in QUICK else [pytest.mark.slow])
    for path in planned_recipes()
    for label in [f"{path.parent.name}/{path.stem}"]
    if LINE.search(path.read_text())
]


def test_a_plan_is_of_the_hardware_that_the_header_names_and_fits_it() -> None:
    assert {param.id for param in RECIPES} >= set(QUICK)
    for path in planned_recipes():
        for gpus, gpu, gib, of, *_ in LINE.findall(path.read_text()):
            assert (int(gpus), gpu, int(of)) == (gpus_of(path.read_text()), GPU, GPU_GIB)
            assert float(gib) <= GPU_GIB, f"{path} does not fit the GPUs that its header names"


@pytest.mark.parametrize("path", RECIPES)
def test_a_header_s_plan_is_the_planner_s(path: Path) -> None:
    """Within 5 %, for the model's code moves on; `python -m tests.recipe_headers` writes the lines anew."""
    text = path.read_text()
    (found,) = LINE.findall(text)
    gib, seconds, hours = figures(mvit.load_config(path), gpus_of(text))
    assert float(found[2]) == pytest.approx(gib, rel=0.05, abs=0.06)
    assert float(found[4]) == pytest.approx(seconds, rel=0.05, abs=0.0006)
    assert float(found[5]) == pytest.approx(hours, rel=0.05, abs=0.06)
    assert float(found[6]) == pytest.approx(hours * int(found[0]), rel=0.05, abs=1)


def test_a_line_is_written_below_the_hardware_and_replaced_not_doubled() -> None:
    plain = LINE.sub("", planned_recipes()[0].read_text())
    once = with_line(plain, plan_line(64, 4.2, 0.01, 0.5))
    assert once.count("# Planned:") == 1
    assert once.index("# Hardware:") < once.index("# Planned:") < once.index("# Expected:")
    again = with_line(once, plan_line(64, 5.2, 0.01, 0.5))
    assert again.count("# Planned:") == 1
    assert "5.2 of 80 GiB" in again
    assert LINE.sub("", again) == plain
