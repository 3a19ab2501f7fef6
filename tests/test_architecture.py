"""The import arrows of the architecture hold: launcher → mvit → data_pipeline, and each library in its own place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("launcher", "mvit", "data_pipeline")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# module prefix → what it must not import
FORBIDDEN = {
    "data_pipeline": ("mvit", "launcher", "deepspeed", "submitit"),
    "mvit": ("launcher", "submitit"),
    "mvit.model": (
        "mvit.config",
        "mvit.distributed",
        "mvit.engine",
        "mvit.tasks",
        "data_pipeline",
        "torch.distributed",
    ),
    "mvit.tasks": ("mvit.trainer", "mvit.engine"),
    "mvit.engine": ("mvit.trainer", "mvit.tasks", "mvit.config"),
    "mvit.zero": ("deepspeed", "torch"),
}
# library → the only modules that may import it
HOMES = {
    "deepspeed": ("mvit.engine",),
    "submitit": ("launcher.",),
    "webdataset": (
        "data_pipeline.naming",
        "data_pipeline.pack",
        "data_pipeline.transfer",
        "data_pipeline.benchmark_peers",
    ),
    "tensorboard": ("mvit.metrics",),
}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_follow_the_arrows(path: Path) -> None:
    module = _module(path)
    for name in _imports(path):
        for prefix, banned in FORBIDDEN.items():
            if _within(module, prefix):
                wrong = [b for b in banned if _within(name, b)]
                assert not wrong, f"{module} must not import {name}"
        for library, homes in HOMES.items():
            if _within(name, library):
                assert any(_within(module, home) for home in homes), f"{module} must not import {library}"


def test_the_model_imports_nothing_but_torch_and_the_standard_library() -> None:
    for path in (ROOT / "mvit" / "model").glob("*.py"):
        for name in _imports(path):
            top = name.split(".")[0]
            assert top == "torch" or _within(name, "mvit.model") or top in sys.stdlib_module_names, (
                f"{path.name}: {name}"
            )


def test_no_file_is_longer_than_400_lines() -> None:
    tests = (ROOT / "tests").rglob("*.py")
    long = {str(p): n for p in [*SOURCES, *tests] if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_every_file_says_what_it_is_about() -> None:
    silent = [str(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_importing_the_package_and_its_help_load_no_heavy_library() -> None:
    code = (
        "import sys, mvit, launcher.cli; launcher.cli.build_parser().format_help(); "
        "print([m for m in ('torch', 'deepspeed', 'pydantic', 'submitit', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
