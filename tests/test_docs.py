"""What README and docs tell a user to type exists: files, commands, options and config keys."""

import re
import shlex
from pathlib import Path

import pytest

from launcher.cli import parse
from mvit.config import RunConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPECTED = {
    "training",
    "watching",
    "data",
    "video",
    "detection",
    "predicting",
    "checkpoints",
    "launching",
    "planning",
    "ledger",
    "doctor",
    "debugging",
    "reproducing",
} | {
    "benchmarks",
    "decisions",
}


def _code(text: str) -> list[str]:
    return [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def test_all_pages_are_there() -> None:
    assert {page.stem for page in PAGES[1:]} == EXPECTED


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists() or link + ".md" in {p.name for p in PAGES}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page: Path) -> None:
    for line in _code(page.read_text()):
        command = re.split(r"\s+(?:#|→|\|)", line.removeprefix("$ ").strip())[0]
        if not command.startswith("mvit "):
            continue
        words = shlex.split(command)[1:]
        if "--help" not in words:
            assert callable(parse(words).handler), line  # SystemExit for a line that is no command


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_recipes_named_exist(page: Path) -> None:
    for name in re.findall(r"configs/[\w/]+\.yaml", page.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_config_keys_named_exist(page: Path) -> None:
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    for section, key in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*|: [^`]*)?`", page.read_text()):
        fields = getattr(sections.get(section), "model_fields", None)
        if fields is not None and key not in ("py", "yaml"):
            assert key in fields, f"{section}.{key}"
