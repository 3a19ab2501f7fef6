"""What `mvit evaluate` says beside its figures: each sample counted once, class by class, and by other labels."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file

import mvit
from data_pipeline.shards import ShardSet, open_shards
from data_pipeline.source_names import source_names
from launcher.cli import main
from mvit import distributed
from mvit.certificate import certify
from mvit.class_table import class_table, confusion_matrix, draw_confusion
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.given_labels import read_labels
from mvit.tasks import create_task
from tests.data_pipeline.pictures import photo_samples, write_shards
from tests.mvit.test_training import tiny_config
from tests.ranks import run_distributed

NUM_SAMPLES = 23  # no multiple of 2 or 3 ranks, nor of the batch


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("photos"), photo_samples(NUM_SAMPLES), 10)


@pytest.fixture(scope="module")
def shards(photos: Path) -> ShardSet:
    return open_shards(photos)


@pytest.fixture(scope="module")
def config(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    data = {"train": None, "validation": str(photos)}
    return tiny_config("", tmp_path_factory.mktemp("runs"), data=data, train={"evaluation_batch_size": 4})


@pytest.fixture(scope="module")
def state(config: RunConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = create_task(config).build_model().state_dict()
    state["head.projection.weight"] *= 200  # so that the answers differ
    return state


def _evaluated(tree: dict[str, Any], state: dict[str, torch.Tensor], folder: Path, real: Path) -> dict[str, float]:
    files = {"results": "results.json", "per_class": "classes.csv", "confusion": "confusion.png"}
    places: dict[str, Any] = {option: folder / name for option, name in files.items()}
    return mvit.evaluate(parse_config(tree), state, **places, labels=real, show_progress=False)


@pytest.fixture(scope="module")
def real(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return sets of right classes in the order of the names, as ReaL has: some of one, of several, and of none."""
    rows = [[shards.label(n)] if n % 3 else [0, 5, 7] if n % 2 else [] for n in range(NUM_SAMPLES)]
    path = tmp_path_factory.mktemp("real") / "real.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def over_ranks(
    config: RunConfig, state: dict[str, torch.Tensor], real: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[dict[str, float], Path]]:
    """Evaluate on 1, 2 and 3 ranks; return the figures, which every rank has, and the folder of the files."""
    found = {}
    was_there = dist.is_initialized()
    for world_size in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        words = config.model_dump(mode="json"), state, folder, real
        # Alone in this process, as everybody is who has no launcher
        ranks = run_distributed(_evaluated, world_size, *words) if world_size > 1 else [_evaluated(*words)]
        if world_size == 1 and not was_there:
            distributed.shutdown()
        assert all(figures == ranks[0] for figures in ranks)
        found[world_size] = ranks[0], folder
    return found


def test_each_sample_counts_exactly_once_on_any_world_size(
    over_ranks: dict[int, tuple[dict[str, float], Path]],
) -> None:
    alone, folder = over_ranks[1]
    assert (alone["counted"], alone["duplicates"], alone["missing"]) == (NUM_SAMPLES, 0, 0)
    assert alone["samples"] == NUM_SAMPLES
    for world_size in (2, 3):
        figures, other = over_ranks[world_size]
        assert figures == pytest.approx(alone, rel=1e-6)
        for name in ("classes.csv", "confusion.png"):
            assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_an_id_counted_twice_or_not_at_all_has_no_certificate() -> None:
    assert str(certify(torch.tensor([1, 1, 0, 1]), 1, 2)) == (
        "certificate: 3 of 4 ids counted exactly once over 2 rank(s), duplicates 0, missing 0, undecodable 1"
    )
    with pytest.raises(RuntimeError, match="missed 1, of which 0 are undecodable, and repeated 0"):
        certify(torch.tensor([1, 0]), 0, 1)
    with pytest.raises(RuntimeError, match="missed 0, of which 0 are undecodable, and repeated 1"):
        certify(torch.tensor([1, 2]), 0, 1)


def test_the_table_and_the_image_agree_with_the_answers(over_ranks: dict[int, tuple[dict[str, float], Path]]) -> None:
    figures, folder = over_ranks[1]
    answers = json.loads((folder / "results.json").read_text())
    table = list(csv.DictReader((folder / "classes.csv").read_text().splitlines()))
    assert [int(row["label"]) for row in table] == list(range(10))
    for row in table:
        label = int(row["label"])
        own = [answer for answer in answers if answer["label"] == label]
        best = [answer["classes"][0]["label"] for answer in own]
        taken = [answer for answer in answers if answer["classes"][0]["label"] == label]
        assert int(row["samples"]) == len(own)
        assert int(row["predicted"]) == len(taken)
        assert row["top1"] == (f"{best.count(label) / len(own):.4f}" if own else "")
        right = [answer["label"] == label for answer in taken]
        assert row["precision"] == (f"{sum(right) / len(taken):.4f}" if taken else "")
        others = [guess for guess in best if guess != label]
        most = max(map(others.count, others), default=0)
        assert int(row["taken_for_samples"]) == most
        assert not most or others.count(int(row["taken_for"])) == most
    share = sum(float(row["top5"] or 0) * int(row["samples"]) for row in table) / NUM_SAMPLES
    assert share == pytest.approx(figures["top5"], abs=1e-4)
    with Image.open(folder / "confusion.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 10 * 30


def test_sets_of_right_classes_are_judged_as_realised_labels_are(
    over_ranks: dict[int, tuple[dict[str, float], Path]], real: Path
) -> None:
    figures, folder = over_ranks[1]
    answers = json.loads((folder / "results.json").read_text())
    sets = json.loads(real.read_text())
    guesses = [[guess["label"] for guess in answer["classes"]] for answer in answers]
    judged = [(guess, right) for guess, right in zip(guesses, sets, strict=True) if right]
    assert 0 < len(judged) < NUM_SAMPLES
    assert figures["given_samples"] == len(judged)
    assert figures["given_top1"] == pytest.approx(sum(guess[0] in right for guess, right in judged) / len(judged))
    assert figures["given_top5"] == pytest.approx(
        sum(not set(right).isdisjoint(guess) for guess, right in judged) / len(judged)
    )
    plain = sum(guess[0] == answer["label"] for guess, answer in zip(guesses, answers, strict=True)) / NUM_SAMPLES
    assert figures["top1"] == pytest.approx(plain)  # the shards' own labels keep their figures


def test_another_numbering_of_the_classes_stands_for_the_shards_labels(
    config: RunConfig, state: dict[str, torch.Tensor], tmp_path: Path, shards: ShardSet
) -> None:
    """Folders named 0 … 999 sort otherwise than numbers: ImageNet-V2's classes need their own mapping."""
    mapping = {"0": 4, "1": 7, "2": 1}
    (tmp_path / "v2.json").write_text(json.dumps(mapping))
    (tmp_path / "by_file.json").write_text(
        json.dumps({f"{number:06d}": mapping[str(shards.label(number))] for number in range(NUM_SAMPLES)})
    )
    was_there = dist.is_initialized()
    found = []
    for name in ("v2", "by_file"):
        table, results = tmp_path / f"{name}.csv", tmp_path / f"{name}_results.json"
        figures = mvit.evaluate(
            config, state, labels=tmp_path / f"{name}.json", per_class=table, results=results, show_progress=False
        )
        answers = json.loads(results.read_text())
        right = [answer["label"] == answer["classes"][0]["label"] for answer in answers]
        assert figures["top1"] == pytest.approx(sum(right) / NUM_SAMPLES)
        assert "given_top1" not in figures
        rows = list(csv.DictReader(table.read_text().splitlines()))
        assert {int(row["label"]) for row in rows if int(row["samples"])} == {1, 4, 7}
        found.append((figures, table.read_text(), answers))
    assert found[0] == found[1]
    if not was_there:
        distributed.shutdown()


def test_imagenet_s_validation_numbers_find_their_entries_even_if_pictures_are_missing(tmp_path: Path) -> None:
    names = {4: 2, 1: 0, 7: 1}  # number in the validation set → class
    shards = tmp_path / "shard-000000.tar"
    with tarfile.open(shards, "w") as tar:
        for number, label in names.items():
            for extension, content in (("jpg", photo_samples(1)[0]["jpg"]), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"ILSVRC2012_val_{number:08d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "real.json").write_text(json.dumps([[number] for number in range(8)]))
    given = read_labels(tmp_path / "real.json", open_shards(shards), 10)
    assert given.accepted.tolist() == [[number - 1] for number in names]


def test_packed_shards_remember_the_names_of_their_files(digits: Path) -> None:
    names = source_names(open_shards(digits / "validation"))
    rows = [json.loads(line) for line in (digits / "validation" / "sources.jsonl").read_text().splitlines()]
    assert names == [source.rsplit("/", 1)[-1] for _, _, source in rows]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2", "not JSON"),
        ("3", "a int; expected a list or an object"),
        ("[[0]]", "has 1 entries for 23 samples"),
        ("{}", "neither all 3 classes of the shards, by name or number, nor all files: 23 of 23"),
        (json.dumps([10] * NUM_SAMPLES), "10 is no class of the model, whose are 0 to 9"),
        (json.dumps([[True]] * NUM_SAMPLES), "True is no class of the model"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, shards: ShardSet, content: str, words: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_labels(tmp_path / "labels.json", shards, 10)


@pytest.mark.parametrize(
    ("option", "name", "suffix"),
    [("per_class", "table.txt", r"\.csv"), ("confusion", "weights.safetensors", r"\.png")],
)
def test_files_of_another_kind_are_not_replaced(
    config: RunConfig, tmp_path: Path, option: str, name: str, suffix: str
) -> None:
    files: dict[str, Any] = {option: tmp_path / name}
    with pytest.raises(ConfigError, match=f"{option} file .*must end in {suffix}"):
        mvit.evaluate(config, tmp_path / "none", **files, show_progress=False)


@pytest.mark.parametrize(("classes", "side"), [(2, 80), (60, 1300), (1000, 1000), (3000, 1000)])
def test_the_image_is_legible_for_few_classes_and_small_for_many(classes: int, side: int) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, 500)
    matrix = confusion_matrix(labels, (labels + 1) % classes, classes)  # type: ignore[arg-type]
    assert matrix.sum() == 500
    png = draw_confusion(matrix, [f"class {number}" for number in range(classes)])
    with Image.open(io.BytesIO(png)) as image:
        assert side <= max(image.size) <= 1700


def test_a_table_has_a_row_for_classes_without_samples() -> None:
    matrix = confusion_matrix([0, 0, 2], [0, 1, 1], 3)
    rows = class_table(matrix, [(0, True), (0, False), (2, True)], ["a", "b", "c"], 5).splitlines()
    assert rows == [
        "label,name,samples,top1,top5,predicted,precision,taken_for,taken_for_samples",
        "0,a,2,0.5000,0.5000,1,1.0000,b,1",
        "1,b,0,,,2,0.0000,,0",
        "2,c,1,0.0000,1.0000,0,,b,1",
    ]


def test_the_command_prints_the_certificate_and_names_its_files(
    config: RunConfig, state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, weights, table = tmp_path / "recipe.yaml", tmp_path / "weights.safetensors", tmp_path / "table.csv"
    recipe.write_text(config.to_yaml())
    save_file(state, weights)
    words = ["evaluate", str(recipe), "--weights", str(weights), "--per-class", str(table)]
    was_there = dist.is_initialized()
    assert main(words) == 0
    printed = capsys.readouterr().out
    line = "certificate: 23 of 23 ids counted exactly once over 1 rank(s), duplicates 0, missing 0, undecodable 0"
    assert line in printed
    assert f"wrote {table}" in printed
    assert main([*words, "--json", "image.full_resize=true"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["certificate"] == {
        "ids": 23, "counted": 23, "duplicates": 0, "missing": 0, "undecodable": 0, "world_size": 1,
    }  # fmt: skip
    if not was_there:
        distributed.shutdown()
