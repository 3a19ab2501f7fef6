"""`make demo`, `demo-video`, `demo-detection`: the main job as a user would run it, one command after the other."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CLUSTER = "configs/cluster/local.yaml"
EXIT_STOPPED = 85


@dataclass(frozen=True)
class Demo:
    """One demo: what is packed, what is trained on it, and what it reaches on every machine it was tried on."""

    name: str
    """Of the recipe, the run and the shards' folder."""
    pack: tuple[str, ...]
    """What `mvit data pack` is given before that folder: the source and its files."""
    words: str
    goal: float
    """Of the held-out part."""
    figure: str = "top1"
    pack_options: tuple[str, ...] = ()

    @property
    def recipe(self) -> str:
        return f"configs/demo/{self.name}.yaml"

    @property
    def shards(self) -> Path:
        return Path("data") / self.name

    @property
    def run(self) -> Path:
        return Path("runs") / self.name

    @property
    def weights(self) -> Path:
        return self.run / f"{self.name}.safetensors"

    def told(self, figures: Mapping[str, float]) -> str:
        """Return what was reached in words."""
        if self.figure == "top1":
            return (
                f"held-out top-1 {figures['top1']:.2%} of {figures['samples']:.0f} samples "
                f"(always the most frequent class: {figures['majority']:.2%})"
            )
        return (
            f"held-out box AP50 {figures['box_ap50']:.1%}, box AP {figures['box_ap']:.1%}, "
            f"mask AP {figures['mask_ap']:.1%} of {figures['images']:.0f} pictures"
        )


NUCLEI_FILES = Path("../shared/data/nuclei-coco")
"""Real microscope pictures, if somebody put them there."""

DIGITS = Demo("digits", ("digits",), "scikit-learn's 1,797 handwritten digits (a stated fifth is held out)", 0.97)
CAMERA = Demo(
    "camera",
    ("camera",),
    "900 clips in which a camera moves over three real films (later parts of each are held out)",
    0.90,
)
SHAPES = Demo(
    "shapes",
    ("shapes",),
    "500 drawn pictures of shapes with exact masks (100 are held out)",
    0.50,
    figure="box_ap50",
)
NUCLEI = Demo(
    "nuclei",
    (
        "coco",
        str(NUCLEI_FILES / "train.tar"),
        str(NUCLEI_FILES / "instances_train.json"),
    ),
    "280 real microscope pictures with exact masks of their cell nuclei (60 are held out)",
    0.50,
    figure="box_ap50",
    pack_options=("--validation", str(NUCLEI_FILES / "val.tar"), str(NUCLEI_FILES / "instances_val.json")),
)


def choose(name: str) -> Demo:
    """Return the demo of a name."""
    detection = NUCLEI if NUCLEI_FILES.is_dir() else SHAPES
    return {"digits": DIGITS, "camera": CAMERA, "detection": detection}[name]


def main(arguments: Sequence[str] = ()) -> int:
    """Pack, submit, interrupt half way, resume, evaluate and export; returns 0 if the goal is reached."""
    demo = choose(arguments[0] if arguments else "digits")
    began = time.monotonic()
    shutil.rmtree(demo.shards, ignore_errors=True)
    shutil.rmtree(demo.run, ignore_errors=True)
    _say(f"1. pack {demo.words} into tar shards")
    _mvit("data", "pack", *demo.pack, str(demo.shards), *demo.pack_options)
    _mvit("data", "check", str(demo.shards / "train"))
    _say("2. submit a job of 2 ranks (one per GPU where there are GPUs) under DeepSpeed ZeRO-2, and watch it")
    _train_until_half_way(demo)
    _say("4. resume from the sharded checkpoint: same losses, same order of samples as if nothing had happened")
    _mvit("resume", str(demo.run), "--follow")
    _say("5. evaluate the newest checkpoint on the held-out part, each sample exactly once, and export plain weights")
    _mvit("export", str(demo.run), str(demo.weights))
    told = _mvit("evaluate", demo.recipe, "--weights", str(demo.weights), "--json", capture=True)
    figures = json.loads(told.splitlines()[-1])
    _say(f"{demo.told(figures)}; {time.monotonic() - began:.0f} s in all")
    _say(f"look at the run:  .venv/bin/tensorboard --logdir {demo.run}/tensorboard")
    if figures[demo.figure] < demo.goal:
        print(
            f"error: {demo.figure} is below {demo.goal:.0%}, which this demo reaches on every machine it was tried on"
        )
        return 1
    return 0


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _command(arguments: Sequence[str]) -> list[str]:
    print(f"$ mvit {' '.join(arguments)}", flush=True)
    return [sys.executable, "-m", "launcher.cli", *arguments]


def _mvit(*arguments: str, capture: bool = False) -> str:
    """Run one command of the command line; raises SystemExit with its exit code if it fails."""
    done = subprocess.run(_command(arguments), stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def _train_until_half_way(demo: Demo) -> None:
    """Submit and follow the job; ask it to stop at half of its steps, as a preemption would."""
    following = subprocess.Popen(_command(["submit", demo.recipe, "--cluster", CLUSTER, "--follow"]))
    asked = False
    while following.poll() is None:
        time.sleep(0.2)
        if not asked and _share_done(demo.run) >= 0.5:
            _say("3. half way: interrupt the job (SIGUSR2 to its ranks, as Slurm does before it takes the nodes)")
            _mvit("stop", str(demo.run))
            asked = True
    if following.returncode != EXIT_STOPPED:
        raise SystemExit(following.returncode or 1)


def _share_done(run: Path) -> float:
    """Return the part of all steps that the run has logged."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    steps = [record for line in lines if line.endswith("}") and (record := json.loads(line))["kind"] == "train"]
    return steps[-1]["step"] / steps[-1]["total_steps"] if steps else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
