"""Recipes are as published or say why not, and a dry run tells what a job of 64 GPUs would do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mvit
from launcher.cli import main
from mvit.config import ConfigError
from mvit.dry_run import count_samples, dry_run
from mvit.published import PublishedError, PublishedValue, configs_folder, read_published, recipe_files
from mvit.recipe_check import Comparison, check_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = "imagenet1k/mvitv2_tiny"


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def unexplained(path: Path, **changes: Any) -> list[Comparison]:
    published = replace(read_published(CONFIGS)[TINY], **changes)
    return [row for row in check_recipe(path, published, count=False) if row.status == "UNEXPLAINED"]


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = (CONFIGS / f"{TINY}.yaml").read_text()
    assert old in text
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace(old, new))
    return path


def test_no_recipe_differs_from_what_is_published_without_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "recipes", "check")
    assert found["ok"]
    assert len(found["recipes"]) == len(recipe_files(CONFIGS)) >= 60
    large = {row["key"]: row for row in found["recipes"]["imagenet1k/mvitv2_large_384"]}
    assert (large["peak_lr"]["published"], large["peak_lr"]["ours"]) == (4e-3, pytest.approx(4e-4))
    assert large["peak_lr"]["status"] == "explained"
    assert "misprint" in large["peak_lr"]["reason"]
    assert large["parameters"] == {
        "key": "parameters",
        "published": 218,
        "ours": 218,
        "source": "in millions, as printed",
        "status": "same",
        "reason": "",
    }


def test_a_changed_value_a_new_key_and_a_needless_reason_are_unexplained(tmp_path: Path) -> None:
    [lr] = unexplained(changed(tmp_path, "lr: 2.5e-4", "lr: 5.0e-4"))
    assert (lr.key, lr.published, lr.ours) == ("peak_lr", 2e-3, 4e-3)
    [average, momentum] = unexplained(changed(tmp_path, "  clip_grad_norm: 1.0", "  ema_decay: 0.999\n  momentum: 0.8"))
    assert (average.key, average.ours) == ("optim.ema_decay", 0.999)
    assert (momentum.key, momentum.reason) == ("optim.momentum", "no published value, no reason")
    recipe, entry = CONFIGS / f"{TINY}.yaml", read_published(CONFIGS)[TINY]
    assert unexplained(recipe) == []
    [needless] = unexplained(recipe, reasons={**entry.reasons, "peak_lr": "because"})
    assert (needless.key, needless.reason) == ("peak_lr", "a reason that nothing needs")
    silent = {**entry.values, "optim.weight_decay": PublishedValue(None, "silent")}
    assert [row.key for row in unexplained(recipe, values=silent)] == ["optim.weight_decay"]
    [missing] = check_recipe(recipe, None)
    assert missing.status == "UNEXPLAINED"


def test_one_recipe_is_shown_whole_by_name_or_file(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (TINY, str(CONFIGS / f"{TINY}.yaml")):
        assert main(["recipes", "check", given, "--no-parameters"]) == 0
        text = capsys.readouterr().out
        assert "same        peak_lr                      0.002 | 0.002 | P B.2: 2.5e-4 per 256" in text
        assert "explained   train.precision              fp32 | bf16" in text
    assert main(["recipes", "check", "imagenet1k/mvitv2_tiney"]) == 1
    assert "did you mean 'imagenet1k/mvitv2_tiny'?" in capsys.readouterr().err


def test_recipes_are_listed_with_row_and_result(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in told(capsys, "recipes")}
    assert rows.keys() == recipe_files(configs_folder()).keys() == read_published(CONFIGS).keys()
    base = rows["imagenet1k/mvitv2_base"]
    assert (base["row"], base["result"], base["parameters_m"]) == ("Table 2, B", "84.4 % top-1", 52)
    for name, row in rows.items():  # the header of the recipe names the same row and the same figures
        header = (CONFIGS / f"{name}.yaml").read_text().split("\nname:")[0]
        for figure in row["result"].replace(",", "").split():
            assert not figure[0].isdigit() or figure in header, f"{name}: {figure}"


def test_a_dry_run_of_huge_tells_everything_without_data_or_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    run = told(capsys, "config", str(CONFIGS / "imagenet1k" / "mvitv2_huge.yaml"), "--dry-run", "--gpus", "64")
    assert run["batch"] == {
        "micro_batch_size": 32,
        "accumulation_steps": 1,
        "world_size": 64,
        "global_batch_size": 2048,
    }
    assert (run["total_steps"], run["warmup_steps"], run["evaluations"]) == (187_670, 43_789, 31)
    assert len(run["rates"]) == 301
    assert run["rates"][0] == {"epoch": 0, "step": 1, "lr": pytest.approx(8e-8)}
    assert max(rate["lr"] for rate in run["rates"]) == run["rates"][70]["lr"] == pytest.approx(2e-3)
    no_decay, decay = run["groups"]
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0, 0.1)
    assert no_decay["elements"] + decay["elements"] == run["num_parameters"] == 666_879_720
    saved = run["checkpoints"]
    assert saved["bytes_each"] >= 12 * 666_879_720  # master and two moments, fp32
    assert saved["bytes_per_rank"] == saved["bytes_each"] / 64


def test_a_dry_run_counts_what_is_given_and_says_what_it_lacks(
    capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path
) -> None:
    config = mvit.load_config(
        CONFIGS / "demo" / "digits.yaml",
        ["optim.layer_decay=0.5", "train.save_every=100", "optim.ema_decay=0.9", f"data.train={digits}/train"],
    )
    assert count_samples(config, None, {}) == (1442, f"counted in {digits}/train")
    run = dry_run(config, 1, 1442, "counted")
    assert len({group.lr_scale for group in run.groups}) > 3
    assert run.checkpoints.number == -(-run.total_steps // 100)
    assert "checkpoints" in str(run)
    recipe = str(CONFIGS / "demo" / "digits.yaml")
    assert main(["config", recipe, "--dry-run", "--gpus", "7", "--samples", "1000"]) == 1
    assert "is not micro_batch_size x ranks x a whole number" in capsys.readouterr().err
    assert main(["config", recipe, "--dry-run", "--gpus", "1", f"data.train={tmp_path}"]) == 1
    assert "give their number with --samples N" in capsys.readouterr().err
    assert main(["config", recipe, "--gpus", "1"]) == 1
    assert "belong to --dry-run" in capsys.readouterr().err


def test_known_training_sets_have_the_sizes_that_are_published(capsys: pytest.CaptureFixture[str]) -> None:
    from launcher.recipe_commands import known_samples

    sizes = known_samples()
    for name, entry in read_published(CONFIGS).items():
        config = mvit.load_config(CONFIGS / f"{name}.yaml")
        try:
            assert count_samples(config, None, sizes)[0] == entry.samples, name
        except ConfigError:
            pytest.fail(name)


def test_a_file_of_published_values_without_its_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    file = tmp_path / "published" / "x.yaml"
    entry = "recipes: {a/b: {row: r, result: s"
    for text, words in (
        (entry + ", sorce: t}}", "unknown key 'sorce'"),
        (entry + ", groups: [g]}}", "unknown group 'g'"),
        (entry + ", values: {seed: 0}}}", r"seed: 0 is not \[value, source\]"),
    ):
        file.write_text(text)
        with pytest.raises(PublishedError, match=words):
            read_published(tmp_path)
