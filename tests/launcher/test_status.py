"""`mvit status`: what one run does and where its time went, many runs at a glance, and files that are not whole."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.judgement import judge
from launcher.run_folder import write_json
from launcher.slurm_queue import SlurmQueue, reason_in_words
from launcher.status import newest_records, run_state
from tests.launcher import written
from tests.launcher.project import ROOT, wait_until
from tests.launcher.written import FakeSlurm, create, event, figures, in_slurm, printed, start

slurm = written.slurm


def _trained(path: Path) -> None:
    """Write a run that failed once, lost steps, and trains again."""
    run = create(path)
    event(run, "submit", 1, -1000, executor="local", job_id="7", world_size=2)
    start(run, 1, -900)
    event(run, "restored", 1, -890, step=0, seconds=1.0)
    event(run, "first_step", 1, -880, step=1)
    event(run, "progress", 1, -680, step=20, train_s=200.0, stall_s=10.0, evaluate_s=5.0, data_wait_s=1.0)
    event(run, "saved", 1, -700, step=10, seconds=4.0, stall_s=10.0, bytes=100)
    detail = "rank 1 on node1 (pid 101) died: killed by SIGKILL"
    facts = {"cause": "failed", "kind": "killed", "detail": detail, "reason": "crash 1 of 3"}
    event(run, "end", 1, -600, **facts, requeued=True, checkpoint_step=10, blamed=["node1"])
    event(run, "exclude", 1, -600, hosts=["node3"], until=time.time() + 3600, why={"node3": "life 1: node"})
    event(run, "exclude", 1, -600, hosts=["node4"], until=time.time() - 1, why={"node4": "long ago"})
    start(run, 2, -500, hosts=("node1", "node2"), checkpoint_step=10)
    event(run, "restored", 2, -480, step=10, seconds=3.0)
    event(run, "first_step", 2, -470, step=11)
    event(run, "progress", 2, -10, step=60, train_s=450.0, stall_s=0.0, evaluate_s=0.0, data_wait_s=1.0)
    figures(run, "evaluate", 50, -100, top1=0.75)
    figures(run, "evaluate_ema", 50, -99, top1=0.8)
    split = {"step_seconds": 0.5, "forward_seconds": 0.15, "backward_seconds": 0.3, "data_seconds": 0.05}
    late = {"slowest_rank": 1.0, "slowest_excess": 0.25}
    figures(run, "train", 60, -10, loss=1.25, lr=1e-3, samples_per_s=99.5, eta_s=110.0, **split, **late)


def test_status_shows_progress_evaluations_and_where_the_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _trained(tmp_path / "trial")
    assert main(["status", str(tmp_path / "trial")]) == 0
    text = capsys.readouterr().out
    for expected in (
        "trial: running",
        "attempt 2, local, job 7 on node1, node2",
        "step 60 of 400 (15%), no checkpoint yet, ETA 1:",  # 110 s from a record that is 10 s old
        "loss 1.25",
        "samples_per_s 99.5",
        "time of a step: 0.5 s: backward 60%, forward 30%, data 10%; slowest rank 1, 25% above the median",
        "evaluation in training at step 50: top1 0.75",
        "evaluation in training at step 50, averaged weights: top1 0.8",
        "goodput (ETTR)",
        "1 killed",
        "attempt 1 ended: killed: rank 1 on node1 (pid 101) died: killed by SIGKILL",
        "node3 (life 1: node)",
    ):
        assert expected in text
    assert "node4" not in text  # its exclusion is over

    state = run_state(tmp_path / "trial")
    assert (state.samples_per_s, state.loss) == (99.5, 1.25)
    assert 95 < (state.eta_s or 0) <= 100
    assert state.ledger["ends"] == {"killed": 1}
    assert 0 < state.ledger["ettr"] < 1
    assert state.ledger["lost_gpu_hours"] > 0
    assert [node["host"] for node in state.excluded] == ["node3"]


def test_the_result_of_the_chain_s_evaluation_is_told_from_those_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _trained(tmp_path / "trial")
    assert run_state(tmp_path / "trial").evaluation_job == {}
    result = {"step": 400, "weights": "averaged", "figures": {"top1": 0.9, "samples": 360}, "time": time.time()}
    write_json(tmp_path / "trial" / "evaluation.json", result | {"checkpoint": "runs/trial/checkpoints/step_00000400"})
    assert main(["status", str(tmp_path / "trial")]) == 0
    text = capsys.readouterr().out
    assert "evaluation in training at step 50, averaged weights: top1 0.8\n" in text
    assert "evaluation by a job of its own at step 400, averaged weights: top1 0.9  samples 360\n" in text
    assert main(["status", str(tmp_path / "trial"), "--json"]) == 0
    assert printed(capsys.readouterr().out)["evaluation_job"]["figures"]["top1"] == 0.9


@pytest.mark.parametrize(
    ("checkpoint", "done", "doing"),
    [
        (40, [], "imports, process group, model, data, checkpoint of step 40"),
        (0, [], "imports, process group, model, data"),
        (40, ["restored"], "its first step"),
        (40, ["restored", "first_step"], "training, nothing logged yet"),
    ],
)
def test_a_run_that_has_not_logged_yet_says_what_it_does_and_for_how_long(
    tmp_path: Path, checkpoint: int, done: list[str], doing: str
) -> None:
    run = create(tmp_path / "trial")
    figures(run, "train", 44, -100, loss=1.0, eta_s=9.0)  # of the life before
    start(run, 1, -42, checkpoint_step=checkpoint)
    for name in done:
        event(run, name, 1, -20, step=40, seconds=1.0)
    state = run_state(run.path)
    assert state.activity.startswith("starting for 4")
    assert state.activity.endswith(f" s: {doing}")
    assert state.eta_s is None
    figures(run, "train", 41, -1, loss=1.0, eta_s=9.0)
    assert run_state(run.path).activity == ""


def test_a_failed_run_prints_its_failure_once_and_names_the_rank_that_failed_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "trial")
    start(run, 1, -60)
    written.error(run, 1, 1, "the fault")
    written.rank(run, 1, 0, signal="SIGKILL", ended_because="rank 1 failed")
    headline = "rank 1 (pid 101) raised ArithmeticError: the fault"
    event(run, "end", 1, 0, cause="failed", kind="error", detail=headline, requeued=False, rank=1)
    assert main(["status", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"trial: failed ({headline})")
    assert text.count("raised ArithmeticError") == 1
    assert text.count("Traceback (most recent call last)") == 1
    assert f"mvit why {run.path}" in text


def test_several_runs_are_one_line_each_with_one_question_to_slurm(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    _trained(tmp_path / "runs" / "sweep" / "a")
    for name in ("b", "b/evaluation"):  # a chain's last job has a folder of its own in its run's
        in_slurm(create(tmp_path / "runs" / name))
    create(tmp_path / "runs" / "b" / "code")  # whatever else lies in a run is none
    slurm.jobs("7|PENDING|Resources|N/A|")
    assert main(["status", "--runs", str(tmp_path / "runs")]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "attempt", "step", "%", "samples/s", "loss", "ETA", "goodput", "job"]
    cells = [row.split() for row in rows]
    assert [(Path(row[0]).name, row[1]) for row in cells] == [
        ("a", "running"),
        ("b", "pending"),
        ("evaluation", "pending"),
    ]
    assert cells[0][3:7] == ["60/400", "15%", "99.5", "1.2500"]
    assert len(slurm.calls("squeue")) == 1
    assert main(["status", "--runs", str(tmp_path / "runs"), "--json"]) == 0
    assert [record["state"] for record in printed(capsys.readouterr().out)] == ["running", "pending", "pending"]


def test_a_run_folder_that_is_none_is_named_and_the_others_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _trained(tmp_path / "trial")
    assert main(["status", str(tmp_path / "trial"), str(tmp_path / "gone")]) == 1
    shown = capsys.readouterr().out
    assert "60/400" in shown
    assert f"error: {tmp_path}/gone is not a run folder" in shown
    (tmp_path / "empty").mkdir()
    for folder, what in (("empty", "holds no run folder"), ("nowhere", "does not exist")):
        assert main(["status", "--runs", str(tmp_path / folder)]) == 1
        assert f"{folder} {what}" in capsys.readouterr().err
    (tmp_path / "trial" / "run.json").write_text('{"name": "tri')
    assert main(["status", str(tmp_path / "trial")]) == 1
    assert f"{tmp_path}/trial/run.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["why"], ["logs"], ["logs", "--follow"], ["status"], ["status", "--follow"], ["stop"], ["cancel"], ["resume"]],
    ids=" ".join,
)
def test_the_folder_of_runs_given_for_a_run_is_answered_with_the_runs_in_it(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c", "sweep/d", "sweep/e", "sweep/f", "sweep/g"):
        create(tmp_path / "runs" / name)
    assert main([*command, str(tmp_path / "runs")]) == 1
    told = capsys.readouterr().err
    assert "is not a run folder" in told
    assert told.endswith(" Runs in it: a, b, c, sweep/d, sweep/e and 2 more.\n")
    assert main([*command, str(tmp_path / "nowhere")]) == 1
    assert "Runs in it" not in capsys.readouterr().err


def test_watch_refreshes_until_nothing_can_change_and_spares_slurm(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run)
    slurm.jobs("7|PENDING|Priority|N/A|")
    command = [sys.executable, "-m", "launcher.cli", "status", str(run.path), "--watch"]
    watching = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: slurm.calls("squeue"))
    time.sleep(4.5)  # two more refreshes
    event(run, "end", 1, 0, cause="stopped", detail="done with it", requeued=False)
    output, _ = watching.communicate(timeout=30)
    assert watching.returncode == 0
    assert output.count("trial: pending (Slurm says PENDING (Priority)") >= 2
    assert "trial: stopped (done with it)" in output
    assert len(slurm.calls("squeue")) == 1


def test_files_of_older_versions_and_half_written_ones_are_read(tmp_path: Path) -> None:
    run = create(tmp_path / "trial")
    event(run, "submit", 1, -100, executor="slurm", job_id="7")
    event(run, "start", 1, -90, executor="slurm", job_id="7", world_size=2)
    written.rank(run, 1, 0, exit_code=86)
    (run.attempt_dir(1) / "rank_0001.json").touch()  # a node lost its power while it wrote
    event(run, "end", 1, -50, cause="failed", exit_code=86, detail="exit code 86", requeued=False)
    figures(run, "train", 3, -60, loss=2.0)
    for path in (run.attempts_file, run.metrics_file):
        with path.open("a") as file:
            file.write('[1, 2]\n{"event": "end", "ki')
    state = run_state(run.path)
    assert (state.state, state.detail, state.step, state.loss) == ("failed", "exit code 86", 3, 2.0)
    assert state.where_time_went == "lives: 1 error"
    assert str(state)
    assert main(["status", str(run.path)]) == 0
    assert main(["why", str(run.path)]) == 0


def test_a_long_record_is_read_from_its_end(tmp_path: Path) -> None:
    run = create(tmp_path / "trial")
    line = '{"kind": "train", "step": 1, "loss": 1.0, "filler": "' + 100 * "x" + '"}\n'
    with run.metrics_file.open("w") as file:
        file.write('{"kind": "evaluate", "step": 1, "top1": 0.1}\n')
        file.writelines([line] * 100_000)
        file.write('{"kind": "evaluate", "step": 2, "top1": 0.2}\n{"kind": "train", "step": 3}\n{"kind": "tra')
    began = time.perf_counter()
    found = newest_records(run.metrics_file)
    assert time.perf_counter() - began < 0.2
    assert (found["evaluate"]["step"], found["train"]["step"]) == (2, 3)
    assert newest_records(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize(
    ("squeue", "ended", "state", "detail"),
    [
        ("7|PENDING|Resources|2030-01-01T08:00:00|", "", "pending", "waits for free nodes, GPUs or memory; expected"),
        ("7|RUNNING|None|2030-01-01T08:00:00|node1", "", "running", "Slurm says RUNNING"),
        ("", "CANCELLED", "stopped", "cancelled in Slurm (scancel), not by `mvit cancel`; not saved"),
        ("", "CANCELLED Reason=DependencyNeverSatisfied", "stopped", "the job it depends on did not end as required"),
        ("", "TIMEOUT", "failed", "at its time limit before it had saved"),
        ("", "", "failed", "Slurm no longer knows the job; it left no final record"),
    ],
)
def test_a_slurm_job_without_an_end_on_record_is_judged_by_what_slurm_says(
    tmp_path: Path, slurm: FakeSlurm, squeue: str, ended: str, state: str, detail: str
) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run)
    slurm.jobs(*([squeue] if squeue else []))
    if ended:
        slurm.ended(ended)
    found = judge(run)
    assert found.state == state
    assert detail in found.detail


def test_a_requeued_run_is_pending_until_it_starts_again_or_leaves_the_queue(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run, at=-100)
    event(run, "start", 1, -90, executor="slurm", job_id="7", world_size=2)
    event(run, "end", 1, -5, cause="stopped", kind="signalled", detail="told to stop", requeued=True)

    def at(seconds: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))

    slurm.jobs(f"7|COMPLETING|None|{at(-90)}|node1")
    assert judge(run).detail == "requeued: told to stop; it is on its way into the queue"
    slurm.jobs(f"7|PENDING|BeginTime|{at(120)}|")
    assert judge(run).state == "pending"
    assert "cred_expire" in judge(run).detail
    slurm.jobs(f"7|RUNNING|None|{at(1)}|node1")
    assert judge(run).state == "running"
    assert "the life after attempt 1 is starting" in judge(run).detail
    slurm.jobs()
    slurm.ended("CANCELLED")
    assert judge(run).state == "stopped"


def test_without_squeue_the_records_speak(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run)
    written.tool(slurm.folder / "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert judge(run).state == "pending"
    event(run, "start", 1, -5, executor="slurm", job_id="7", world_size=2)
    found = judge(run)
    assert (found.state, found.detail) == ("running", "squeue is not available here: by the run's own records")


def test_the_queue_is_asked_at_most_every_ten_seconds_and_at_once_about_new_jobs(slurm: FakeSlurm) -> None:
    slurm.jobs("7|PENDING|Priority|N/A|", "8|RUNNING|None|N/A|node1")
    queue = SlurmQueue()
    for _ in range(3):
        job = queue.job("7")
        assert job is not None
        assert job.waits
    assert len(slurm.calls("squeue")) == 1
    other = queue.job("8")
    assert other is not None
    assert other.state == "RUNNING"
    assert len(slurm.calls("squeue")) == 2


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "other jobs stand before it"),
        ("PartitionConfig", "will never start as it is"),
        ("DependencyNeverSatisfied", "did not end as required"),
        ("(ReqNodeNotAvail, UnavailableNodes:node[1-2])", "down, drained or reserved (node[1-2]"),
        ("Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved", "down, drained or reserved"),
        ("QOSMaxJobsPerUserLimit", "a limit of its QOS"),
        ("AssocGrpGRES", "a limit of its account"),
        ("launch failed requeued held", "scontrol release 7"),
        ("Unheard", "scontrol show job 7"),
    ],
)
def test_the_reason_for_waiting_is_said_in_plain_words(reason: str, words: str) -> None:
    assert words in reason_in_words(reason, "7", first_life=False)


@pytest.mark.parametrize(
    ("lives", "told"),
    [
        ([], "the begin time that it was submitted with (sbatch's `begin`) has not come; expected to start at 2030"),
        (["start"], "after a requeue Slurm waits"),  # Slurm requeued it by itself: nobody wrote an end
        (["start", "end"], "after a requeue Slurm waits"),
    ],
    ids=str,
)
def test_the_begin_time_of_a_first_life_is_its_own_and_after_a_requeue_slurm_s(
    tmp_path: Path, slurm: FakeSlurm, lives: list[str], told: str
) -> None:
    run = create(tmp_path / "trial")
    in_slurm(run, at=-100)
    for name in lives:
        facts = {"requeued": True, "detail": "told to stop", "cause": "stopped"} if name == "end" else {}
        event(run, name, 1, -50, executor="slurm", job_id="7", **facts)
    slurm.jobs("7|PENDING|BeginTime|2030-01-01T08:00:00|")
    found = judge(run)
    assert found.state == "pending"
    assert told in found.detail
    assert ("cred_expire" in found.detail) is bool(lives)


def test_status_does_not_wait_for_torch(tmp_path: Path) -> None:
    _trained(tmp_path / "trial")
    program = (
        "import sys; from launcher.cli import main\n"
        f"for command in ('status', 'why'): assert main([command, {str(tmp_path / 'trial')!r}]) == 0\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'pydantic', 'submitit', 'deepspeed'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "HEAVY []" in result.stdout
