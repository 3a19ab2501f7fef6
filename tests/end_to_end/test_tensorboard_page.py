"""TensorBoard's page, opened in a real browser, shows a run's curves by their tags."""

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
    """Serve the TensorBoard of a run that was interrupted after step 30 and continued from step 20."""
    run_dir = tmp_path_factory.mktemp("run")
    for first, last in ((0, 30), (20, 50)):
        log = RunLog(run_dir, first_step=first, total_steps=50, active=True, show_progress=False)
        log.config(CONFIG, 2)
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


def test_the_page_draws_the_curves(address: str, tmp_path: Path) -> None:
    from PIL import Image

    picture, drawn = tmp_path / "page.png", 0
    for attempt in range(5):  # cards are filled when they come into view: a picture may be taken before that
        _browse(f"{address}{FILTER}", f"--screenshot={picture}", profile=tmp_path / f"profile{attempt}")
        with Image.open(picture) as image:
            cards = image.convert("RGB").crop((320, 0, 1240, image.height))  # right of the list of runs
        drawn = sum(count for count, color in cards.getcolors(maxcolors=1 << 24) or [] if _is_curve(color))
        if drawn > 300:
            break
    assert drawn > 300, f"{drawn} pixels of the curves' colour"


def _is_curve(color: object) -> bool:
    """Say whether a pixel has the colour TensorBoard gives the first run."""
    assert isinstance(color, tuple)
    return sum(abs(a - b) for a, b in zip(color, (66, 80, 102), strict=True)) < 12
