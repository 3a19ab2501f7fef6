"""The command line: quick, helpful about mistakes, and honest in its exit codes."""

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import build_parser, main
from launcher.commands import split_overrides
from tests.launcher.project import ROOT, Project

COMMANDS = [
    ["train"],
    ["submit"],
    ["resume"],
    ["status"],
    ["logs"],
    ["why"],
    ["stop"],
    ["cancel"],
    ["doctor"],
    ["config"],
    ["recipes"],
    ["recipes", "check"],
    ["evaluate"],
    ["export"],
    ["predict"],
    ["weights", "inspect"],
    ["plan"],
    ["checkpoint", "list"],
    ["checkpoint", "verify"],
    ["checkpoint", "prune"],
    ["checkpoint", "diff"],
    ["data", "pack"],
    ["data", "pack", "imagefolder"],
    ["data", "pack", "imagenet21k"],
    ["data", "pack", "digits"],
    ["data", "pack", "camera"],
    ["data", "pack", "kinetics"],
    ["data", "pack", "ssv2"],
    ["data", "check"],
    ["bench", "model"],
    ["bench", "plan"],
    ["bench", "data"],
    ["bench", "checkpoint"],
    ["bench", "detection"],
]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom launcher.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'submitit', 'deepspeed', 'rich', 'omegaconf', 'mvit'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "HEAVY []" in result.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_that_parses(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    example = re.search(r"example:\n  mvit (.*)", capsys.readouterr().out)
    assert example is not None
    arguments, rest = build_parser().parse_known_args(example.group(1).split())
    assert callable(arguments.handler)
    assert all("=" in word for word in rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "x.yaml"], "unknown command or value 'trian': did you mean `train`?"),
        (["data", "pakc"], "unknown command or value 'pakc': did you mean `pack`?"),
        (["config", "x.yaml", "--nodes"], "unrecognized arguments: --nodes"),
        (["config", "x.yaml", "optim.lr"], "'optim.lr' is not a setting: write key=value"),
        (["why", "runs/x", "--rank"], "see: mvit why --help"),
        (["data", "pakc"], "see: mvit data --help"),
        (["checkpoint", "list", "runs/x", "y"], "see: mvit checkpoint list --help"),
        (["logs", "runs/x", "--rank", "1", "--all"], "not allowed with argument"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_versions_are_shown_without_importing_what_they_are_of() -> None:
    program = (
        "import sys\nfrom launcher.cli import main\n"
        "try: main(['--version'])\nexcept SystemExit as end: assert end.code == 0\n"
        "print('HEAVY', sorted({'torch', 'deepspeed', 'submitit'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in result.stdout.splitlines()[:-1]] == [
        "mvit",
        "python",
        "torch",
        "deepspeed",
        "submitit",
    ]
    assert "HEAVY []" in result.stdout


@pytest.mark.parametrize("key", ["cluster.ranks_per_node", "ranks_per_node"])
def test_settings_may_stand_before_and_after_options_and_the_cluster_s_among_them(project: Project, key: str) -> None:
    options = ["--cluster", "cluster.yaml", "--dry-run"]
    result = project.mvit("submit", "recipe.yaml", "global_batch_size=12", *options, f"{key}=3")
    assert result.returncode == 0, result.stderr
    assert "4 samples x 3 ranks = 12" in result.stdout


@pytest.mark.parametrize(
    ("word", "meant"),
    [("partiton=low", "partition"), ("acount=a", "account"), ("envs.A=1", "env"), ("node=2", "nodes")],
)
@pytest.mark.parametrize("command", [("submit", "recipe.yaml"), ("resume", "runs/trial"), ("doctor", "recipe.yaml")])
def test_a_misspelt_key_of_the_cluster_file_is_met_with_the_near_miss(
    command: tuple[str, ...], word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--cluster", str(ROOT / "configs" / "cluster" / "slurm_8x8.yaml"), word]) == 1
    assert f"{word}: unknown key" in (told := capsys.readouterr().err)
    assert f"did you mean {meant} (of the cluster file)?" in told


def test_no_key_of_a_recipe_is_taken_for_a_misspelt_one_of_the_cluster_file() -> None:
    tree = ast.parse((ROOT / "mvit" / "config.py").read_text())
    (recipe,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RunConfig"]
    keys = [ast.unparse(node.target) for node in recipe.body if isinstance(node, ast.AnnAssign)]
    assert "optim" in keys
    for key in keys:
        args = argparse.Namespace(overrides=[f"{key}=1"], nodes=None)
        assert split_overrides(args) == ([f"{key}=1"], [])


def test_an_error_is_one_message_and_a_traceback_only_with_debug(project: Project) -> None:
    plain = project.mvit("status", "nowhere")
    assert plain.returncode == 1
    assert plain.stderr.startswith("error: ")
    assert "is not a run folder: it has no run.json" in plain.stderr
    assert "Traceback" not in plain.stderr
    for debug in (("--debug", "status", "nowhere"), ("status", "nowhere", "--debug")):
        assert "Traceback" in project.mvit(*debug).stderr


def test_json_is_one_object_even_for_an_error(project: Project) -> None:
    result = project.mvit("status", "nowhere", "--json")
    assert result.returncode == 1
    assert "no run.json" in json.loads(result.stdout)["error"]


def test_config_prints_what_it_can_read_again(project: Project) -> None:
    first = project.mvit("config", "recipe.yaml", "steps=7")
    assert first.returncode == 0, first.stderr
    saved = Path(project.root / "again.yaml")
    saved.write_text(first.stdout)
    assert project.mvit("config", "again.yaml").stdout == first.stdout
    assert "steps: 7" in first.stdout
