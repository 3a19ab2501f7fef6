"""TensorBoard's page, opened in a real browser, shows a run's curves by their tags."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.processes import free_port
from mvit.config import parse_config
from mvit.metrics import RunLog

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]
RECORD = {
    "loss": 2.0,
    "lr": 1e-3,
    "grad_norm": 1.5,
    "samples_per_s": 100.0,
    "data_wait": 0.1,
    "memory_gib": 1.0,
    "bad_samples": 0.0,
    "mfu": 0.4,
}
CONFIG = parse_config({"name": "shown", "data": {"train": "nowhere"}})
TAGS = ["train/loss", "train/learning_rate", "train/grad_norm", "validation/top1", "validation/top5"]
# TensorBoard folds groups away; a filter shows what it matches, 12 cards a page.
FILTER = "?tagFilter=%5E(train|validation|speed|memory|inputs)#timeseries"
TAGS += ["speed/samples_per_second", "speed/data_wait_share", "speed/mfu", "memory/peak_gib", "inputs/augmented"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the TensorBoard of a run that was interrupted three times and continued from ten steps before."""
    run_dir = tmp_path_factory.mktemp("run")
    for first, last in ((0, 20), (10, 30), (20, 40), (30, 50)):
        log = RunLog(run_dir, first_step=first, total_steps=50, active=True, show_progress=False)
        log.config(CONFIG, world_size=2, mfu=True)
        log.images(torch.zeros(4, 3, 32, 32), 1)
        for step in range(first + 1, last + 1):
            log.train(step, RECORD | {"loss": 2.0 / step})
        log.validation(last, {"top1": 0.5, "top5": 0.9, "loss": 1.0})
        log.close()
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir / "tensorboard"), "--port", str(port)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(f"{url}data/runs") as answer:
                if answer.read() != b"[]":
                    break
        except OSError:
            assert server.poll() is None, "TensorBoard ended"
        assert time.monotonic() < deadline, "TensorBoard shows no run"
        time.sleep(0.3)
    yield url
    server.send_signal(signal.SIGTERM)
    server.wait(10)


def _browse(url: str, *options: str, profile: Path) -> str:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--run-all-compositor-stages-before-draw",
        f"--user-data-dir={profile}",
        "--window-size=1500,2600",
    ]
    command = [CHROMIUM, *flags, "--virtual-time-budget=30000", *options, url]
    environment = {**os.environ, "HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_page_shows_the_run_s_tags(address: str, tmp_path: Path) -> None:
    missing = TAGS
    for attempt in range(3):  # on a busy machine the page may be printed before its data have come
        page = _browse(f"{address}{FILTER}", "--dump-dom", profile=tmp_path / f"profile{attempt}")
        text = re.sub(r"<[^>]*>", " ", page)
        text = re.sub(r"\s*/\s*", "/", text)  # a tag's group and its name stand in elements of their own
        missing = [tag for tag in TAGS if tag not in text]
        if not missing:
            break
    assert not missing, f"the page does not show {missing}"


def test_curves_are_one_line_after_three_restarts(address: str) -> None:
    with urllib.request.urlopen(f"{address}data/plugin/scalars/scalars?run=.&tag=train%2Floss") as answer:
        steps = [step for _, step, _ in json.load(answer)]
    assert steps == list(range(1, 51))


def test_the_dashboard_s_page_groups_the_curves_and_draws_them(address: str, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{address}data/plugin/custom_scalars/layout") as answer:
        page = {section["title"]: section["chart"] for section in json.load(answer)["category"]}
    assert len(page) == 5
    assert [chart["title"] for chart in page["2. How fast is it?"]][-1] == "model FLOPs utilisation"
    assert _drawn(f"{address}#custom_scalars", (255, 112, 67), tmp_path) > 1000


def test_the_page_draws_the_curves(address: str, tmp_path: Path) -> None:
    assert _drawn(f"{address}{FILTER}", (66, 80, 102), tmp_path) > 300


def _drawn(url: str, color: tuple[int, int, int], folder: Path) -> int:
    """Count the pixels of about the colour that TensorBoard gives the first run, right of the list of runs."""
    from PIL import Image

    picture, drawn = folder / "page.png", 0
    for attempt in range(5):  # cards are filled when they come into view: a picture may be taken before that
        _browse(url, f"--screenshot={picture}", profile=folder / f"profile{attempt}")
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB").crop((370, 80, 1240, image.height))).astype(int)
        drawn = int((np.abs(pixels - color).sum(axis=-1) < 12).sum())
        if drawn > 300:
            break
    return drawn
