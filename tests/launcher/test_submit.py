"""Submitting: the batch script, the snapshot that jobs run, and run folders that are never taken over."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mvit
from launcher.cluster import ClusterError, parse_cluster
from launcher.recipe_folder import NoRecipeError, recipe_run_dir, refuse_missing
from launcher.run_folder import RunFolderError
from launcher.submit import refuse_taken, submit_resume
from tests.launcher import recorded
from tests.launcher.project import ROOT, Project
from tests.launcher.written import create, event, start

SLURM = {
    "executor": "slurm",
    "nodes": 2,
    "gpus_per_node": 4,
    "cpus_per_rank": 6,
    "mem": "0",
    "partition": "train",
    "account": "vision",
    "timeout_min": 120,
    "signal_delay_s": 240,
    "setup": ["module load cuda"],
    "env": {"NCCL_DEBUG": "WARN two"},
    "sbatch": {"exclusive": True, "mail-type": "END"},
}
RECIPES = sorted(
    path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in ("cluster", "published")
)
DRY_RUN = ("submit", "recipe.yaml", "--cluster", "slurm.yaml", "--dry-run")


@pytest.fixture
def slurm_project(project: Project) -> Project:
    (project.root / "slurm.yaml").write_text(yaml.safe_dump(SLURM))
    return project


def test_dry_run_prints_arithmetic_and_script_and_creates_nothing(slurm_project: Project) -> None:
    result = slurm_project.mvit(*DRY_RUN)

    assert result.returncode == 0, result.stderr
    for expected in (
        "# 1 samples x 8 ranks = 8",
        f"# run folder: {slurm_project.run_dir}",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --mem=0",
        "#SBATCH --partition=train",
        "#SBATCH --account=vision",
        "#SBATCH --time=120",
        "#SBATCH --signal=USR2@240",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --exclusive\n",
        "#SBATCH --mail-type=END",
        "#SBATCH --job-name=trial",
        "module load cuda",
        "export SRUN_CPUS_PER_TASK=6",
        "export NCCL_DEBUG='WARN two'",
        f"export PYTHONPATH={slurm_project.run_dir}/code",
        "--kill-on-bad-exit=1",
        'trap "" USR2',
        "submitit.core._submit",
        "launcher.requeue",
        "trap '' TERM",
    ):
        assert expected in result.stdout
    assert not (slurm_project.root / "runs").exists()


def test_the_batch_script_is_valid_bash(slurm_project: Project) -> None:
    script = slurm_project.mvit(*DRY_RUN).stdout
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("rank_exit", "policy", "calls"), [(85, "1", 1), (86, "1", 1), (0, "1", 0), (85, "0", 0)])
def test_the_batch_script_requeues_by_the_ranks_exit_code_and_keeps_it(
    slurm_project: Project, rank_exit: int, policy: str, calls: int
) -> None:
    script = slurm_project.mvit(*DRY_RUN, f"cluster.requeue={'true' if policy == '1' else 'false'}").stdout
    tools = slurm_project.root / "tools"
    called = slurm_project.root / "requeued"
    _tool(tools / "srun", f"exit {rank_exit}")
    _tool(tools / "sleep", "exit 0")
    _tool(tools / "module", "exit 0")
    _tool(
        tools / "scontrol",
        f'if [ "$1" = requeue ]; then echo "$2" >> {called}; else echo "JobId=7 Restarts=0"; fi',
    )
    # what a submission would have put there
    slurm_project.run_dir.mkdir(parents=True)
    (slurm_project.run_dir / "run.json").write_text('{"name": "trial"}')
    (slurm_project.run_dir / "code").symlink_to(slurm_project.tree)

    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    result = subprocess.run(
        ["bash"], input=script, env=environment, cwd=slurm_project.root, capture_output=True, text=True
    )

    assert result.returncode == rank_exit, result.stderr
    assert (called.read_text().split() if called.exists() else []) == ["7"] * calls
    assert slurm_project.events()[-1]["requeued"] is bool(calls)


def test_sbatch_gets_the_script_that_dry_run_shows(slurm_project: Project) -> None:
    shown = slurm_project.mvit(*DRY_RUN).stdout
    environment = _with_sbatch(slurm_project, 'cp "$1" submitted.sh; echo "Submitted batch job 4711"')
    result = _submit_to_slurm(slurm_project, environment)

    assert result.returncode == 0, result.stderr
    assert "slurm job 4711" in result.stdout
    script = (slurm_project.root / "submitted.sh").read_text()
    assert shown.rstrip().endswith(script.rstrip())
    assert slurm_project.events()[0]["job_id"] == "4711"


def test_a_refused_submission_leaves_no_run_folder_behind(slurm_project: Project) -> None:
    environment = _with_sbatch(slurm_project, 'echo "sbatch: error: invalid partition specified: train" >&2; exit 1')
    result = _submit_to_slurm(slurm_project, environment)

    assert result.returncode == 1
    assert "error: the submission was refused: sbatch: error: invalid partition specified" in result.stderr
    assert "Traceback" not in result.stderr
    assert not slurm_project.run_dir.exists()


def test_a_job_runs_the_snapshot_although_the_tree_has_changed_since(project: Project) -> None:
    project.submit("steps=1000", "save_every=100000")
    project.wait_for_training()
    module = project.tree / "mvit" / "__init__.py"
    module.write_text(module.read_text().replace('CODE = "as submitted"', 'CODE = "changed since"'))
    project.mvit("stop", str(project.run_dir), "--wait")
    resumed = project.mvit("resume", str(project.run_dir))
    assert resumed.returncode == 0, resumed.stderr
    project.wait_for_training(life=2)

    for facts in (*project.facts(0), *project.facts(1)):
        assert facts["code"] == "as submitted"
        assert Path(facts["file"]).is_relative_to(project.run_dir / "code")
    identity = json.loads((project.run_dir / "run.json").read_text())
    assert len(identity["code_sha256"]) == 64
    assert "submit recipe.yaml" in identity["command"]
    assert identity["versions"]["submitit"]


def test_a_job_refuses_a_snapshot_that_was_tampered_with(project: Project) -> None:
    project.submit("steps=1000", "save_every=100000")
    project.wait_for_training()
    project.mvit("stop", str(project.run_dir), "--wait")
    with (project.run_dir / "code" / "mvit" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    result = project.mvit("resume", str(project.run_dir), "--follow")

    assert result.returncode == 1
    assert "was changed after the submission" in result.stderr
    assert len(project.facts(0)) == 1  # it did not train


def test_a_run_folder_of_another_run_is_refused_and_left_alone(project: Project) -> None:
    first = project.submit(follow=True)
    assert first.returncode == 0, first.stderr
    before = sorted(path.relative_to(project.run_dir) for path in project.run_dir.rglob("*"))
    for command in (("train", "recipe.yaml"), ("submit", "recipe.yaml", "--cluster", "cluster.yaml")):
        result = project.mvit(*command)
        assert result.returncode == 1
        assert "belongs to the run 'trial'" in result.stderr
        assert f"mvit resume {project.run_dir}" in result.stderr
    assert sorted(path.relative_to(project.run_dir) for path in project.run_dir.rglob("*")) == before


def test_a_folder_that_is_no_run_is_refused_and_left_alone(project: Project) -> None:
    project.run_dir.mkdir(parents=True)
    (project.run_dir / "thesis.tex").write_text("precious")
    result = project.submit()

    assert result.returncode == 1
    assert "is not empty and not a run folder (it holds thesis.tex)" in result.stderr
    assert [path.name for path in project.run_dir.iterdir()] == ["thesis.tex"]


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_created(project: Project) -> None:
    result = project.submit("global_batch_size=7")

    assert result.returncode == 1
    assert "global_batch_size=7 does not divide by 2 ranks" in result.stderr
    assert not project.run_dir.exists()


def test_too_many_nodes_and_a_batch_that_does_not_divide_are_told_at_once(
    slurm_project: Project, tmp_path: Path
) -> None:
    recorded.install(tmp_path / "bin")
    environment = slurm_project.environment()
    environment |= {"PATH": f"{tmp_path / 'bin'}:{environment['PATH']}"}
    (slurm_project.root / "small.yaml").write_text("executor: slurm\nranks_per_node: 1\ntimeout_min: 20\n")
    command = ("submit", "recipe.yaml", "--cluster", "small.yaml", "nodes=100")
    result = slurm_project.mvit(*command, environment=environment)

    assert result.returncode == 1
    *_, first, second = result.stderr.splitlines()  # after the warning of a drained node
    assert first.startswith("error: nodes=100: partition 'low' has 4 node(s)")
    assert second == "global_batch_size=8 does not divide by 100 ranks"
    assert not slurm_project.run_dir.exists()


def test_a_folder_that_is_taken_is_refused_before_the_recipe_is_loaded_and_shards_are_looked_at(
    project: Project,
) -> None:
    project.run_dir.mkdir(parents=True)
    (project.run_dir / "thesis.tex").write_text("precious")
    (project.root / "base.yaml").write_text((project.root / "recipe.yaml").read_text())
    (project.root / "recipe.yaml").write_text("base: base.yaml\nno_such_key: 1\nshards: nowhere\n")
    for more in ([], ["--dry-run"]):
        result = project.mvit("submit", "recipe.yaml", "--cluster", "cluster.yaml", *more)
        assert "is not empty and not a run folder" in result.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_folder_told_without_torch_is_the_one_of_the_config(recipe: Path) -> None:
    for overrides in ([], ["name=other", "output_dir=elsewhere"]):
        assert recipe_run_dir(recipe, overrides) == mvit.load_config(recipe, overrides).run_dir.absolute()


def test_of_a_recipe_that_cannot_be_read_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\nname: a\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("name: [a\n")
    (tmp_path / "nameless.yaml").write_text("output_dir: runs\n")
    for name in ("loop", "list", "broken", "nameless", "absent"):
        assert recipe_run_dir(tmp_path / f"{name}.yaml") is None


def test_shards_that_do_not_exist_are_refused_before_the_job_is_queued(project: Project) -> None:
    result = project.submit("shards=nowhere")
    assert result.returncode == 1
    assert "data.train = nowhere: 1 of 1 shards" in result.stderr
    assert "submit with --no-data-check" in result.stderr
    assert not project.run_dir.exists()


def test_resume_refuses_settings_that_would_change_what_is_computed(project: Project) -> None:
    failed = project.submit("raise_at=3", "steps=9", follow=True)
    assert failed.returncode == 1
    refused = project.mvit("resume", str(project.run_dir), "steps=12")
    assert refused.returncode == 1
    assert "steps: 9 -> 12" in refused.stderr

    resumed = project.mvit("resume", str(project.run_dir), "raise_at=-1", "--follow")
    assert resumed.returncode == 0, resumed.stderr
    assert [facts["first_step"] for facts in project.facts(0)] == [0, 2]


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(3, 2), (100, 2), (1, 5)])
def test_resume_on_ranks_that_do_not_divide_the_batch_names_only_ways_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, ranks_per_node: int
) -> None:
    """The batch of a run stays, so another one is no way out of it."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # no Slurm
    config = mvit.load_config(ROOT / "configs" / "demo" / "digits.yaml", ["data.train=x"])
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    event(run, "end", 1, -50, cause="stopped", kind="user_stop", detail="stopped", requeued=False)
    settings = {"executor": "slurm", "nodes": nodes, "ranks_per_node": ranks_per_node, "timeout_min": 60}
    with pytest.raises(ClusterError) as refused:
        submit_resume(run, config, parse_cluster(settings, "test"))
    told = str(refused.value)
    assert f"global_batch_size = {config.train.global_batch_size}, which a run keeps" in told
    assert "global_batch_size=" not in told
    ways = re.search(r"\bResume it with (?:nodes=([\d|]+))?(?: or )?(?:train.micro_batch_size=([\d|]+))?", told)
    ranks = [int(n) * ranks_per_node for n in ((ways and ways[1]) or "").split("|") if n]
    sizes = [int(n) for n in ((ways and ways[2]) or "").split("|") if n]
    assert ranks or sizes or "a number of ranks (nodes x ranks_per_node) of" in told
    for count in ranks:
        config.batch_arithmetic(count)
    for size in sizes:
        assert config.train.global_batch_size % (size * nodes * ranks_per_node) == 0


def test_the_folder_of_a_run_that_lives_is_refused_without_the_advice_to_resume_it(tmp_path: Path) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    with pytest.raises(RunFolderError) as refused:
        refuse_taken(run)
    assert "belongs to the run 'trial', which is running (attempt 1, local job 7)" in str(refused.value)
    assert f"mvit stop {run.path}" in str(refused.value)
    assert "resume" not in str(refused.value)


def test_a_recipe_that_is_not_there_is_told_by_its_neighbours_but_no_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text("executor: local\n")
    (tmp_path / "nofiles.yaml").write_text("name: a\n")
    with pytest.raises(NoRecipeError, match=r"toyy\.yaml: no such recipe") as refused:
        refuse_missing(tmp_path / "toyy.yaml")
    assert "'toy.yaml'" not in str(refused.value)
    with pytest.raises(NoRecipeError, match=r"no such recipe; did you mean 'nofiles\.yaml'\?"):
        refuse_missing(tmp_path / "nofile.yaml")


def test_refusals_that_need_no_tensors_do_not_wait_for_torch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    (tmp_path / "cluster.yaml").write_text("executor: local\n")
    (tmp_path / "a.yaml").write_text(f"name: a\noutput_dir: {tmp_path}\n")
    program = (
        "import sys; from launcher.cli import main\n"
        f"for command in (['resume', {str(run.path)!r}], ['submit', 'nofile.yaml', '--cluster', 'cluster.yaml'],\n"
        "    ['submit', 'a.yaml', '--cluster', 'cluster.yaml', '--then', 'a.yaml']): assert main(command) == 1\n"
        "print('HEAVY', sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    shown = capfd.readouterr()
    assert "HEAVY []" in shown.out
    assert "trial is running (attempt 1" in shown.err
    assert "nofile.yaml: no such recipe" in shown.err
    assert "would have the same run folder" in shown.err


def _tool(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def _with_sbatch(project: Project, body: str) -> dict[str, str]:
    """Return an environment in which Slurm seems to be installed."""
    tools = project.root / "tools"
    _tool(tools / "sbatch", body)
    _tool(tools / "srun", "exit 0")
    environment = project.environment()
    return environment | {"PATH": f"{tools}:{environment['PATH']}"}


def _submit_to_slurm(project: Project, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return project.mvit("submit", "recipe.yaml", "--cluster", "slurm.yaml", environment=environment)
