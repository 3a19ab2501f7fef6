"""What is looked at on request (traces, activations, attention, histograms), and what the dashboard is made of."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mvit
from mvit.config import ConfigError, RunConfig, parse_config
from mvit.dashboard import PARAMETER_STAGES, layout
from mvit.export import export_weights
from mvit.train_config import ProfileConfig
from mvit.watch import looking_at
from tests.mvit.test_training import records, tiny_config
from tests.ranks import run_distributed

STEPS = 6  # after which a stop is asked for, which comes one step later


def _train(values: dict[str, object]) -> None:
    done = 0

    def stop() -> bool:
        nonlocal done
        done += 1
        return done >= STEPS

    mvit.train(parse_config(values), stop_requested=stop, show_progress=False)


def _watched(digits: Path, folder: Path, evaluate_every: int = 0, **sections: Any) -> RunConfig:
    train = {"log_every": 2, "evaluate_every": evaluate_every, "micro_batch_size": 32, "global_batch_size": 64}
    return tiny_config(digits, folder, train=train, **sections)


@pytest.fixture(scope="module")
def watched(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A short run of two ranks with everything switched on."""
    config = _watched(
        digits,
        tmp_path_factory.mktemp("watched"),
        watch={"histograms_every": 3, "activations_every": 2},
        profile={"steps": [2, 3]},
        evaluate_every=5,
        optim={"layer_decay": 0.5, "clip_grad_norm": 0.01},
    )
    run_distributed(_train, 2, config.model_dump(mode="json"))
    return config


@pytest.fixture(scope="module")
def events(watched: RunConfig) -> EventAccumulator:
    accumulator = EventAccumulator(str(watched.run_dir / "tensorboard"), size_guidance={"histograms": 0})
    accumulator.Reload()
    return accumulator


def test_a_trace_of_the_asked_steps_opens_and_holds_their_kernels(watched: RunConfig) -> None:
    folder = watched.run_dir / "profile"
    assert sorted(file.name for file in folder.iterdir()) == ["steps_2_to_3.trace.json.gz", "steps_2_to_3.txt"]
    with gzip.open(folder / "steps_2_to_3.trace.json.gz", "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert {"step 2", "step 3"} <= names
    assert not {"step 1", "step 4"} & names
    assert any(name.startswith("aten::") for name in names)
    assert "aten::" in (folder / "steps_2_to_3.txt").read_text()


def test_activations_and_attention_are_there_for_every_block_in_the_asked_steps(events: EventAccumulator) -> None:
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("activation_", "attention_"))]
    assert len(tags) == 4 * 4, "four figures of each of the four blocks"
    for tag in tags:
        assert [point.step for point in events.Scalars(tag)] == [2, 4, 6]
        if tag.startswith("attention_entropy"):
            assert all(0 < point.value <= 1.0001 for point in events.Scalars(tag))


def test_histograms_hold_the_weights_of_all_ranks(events: EventAccumulator, watched: RunConfig) -> None:
    tags = events.Tags()["histograms"]
    assert "weights/block00" in tags
    assert "weights/head" in tags
    for tag in tags:
        points = events.Histograms(tag)
        assert [point.step for point in points] == [3, 6]
        assert 0 < points[0].histogram_value.num <= 65536 + 2


def test_records_hold_the_norms_and_rates_of_stages_and_what_was_clipped(watched: RunConfig) -> None:
    found = [record for record in records(watched.run_dir) if record["step"] % 2 == 0]
    assert [record["step"] for record in found] == [2, 4, 6]
    model = mvit.create_model("mvitv2_tiny", num_classes=10)  # only to know that every stage of a model has a norm
    assert {name.split(".")[0] for name, _ in model.named_parameters()} >= {"patch_embed", "blocks", "head"}
    for record in found:
        assert record["clip_rate"] == 1.0
        assert record["grad_norm_max"] >= record["grad_norm"] > 0.01
        norms = [record[f"weight_norm_{stage}"] for stage in PARAMETER_STAGES]
        assert all(norm > 0 for norm in norms)
        rates = [record[f"lr_{stage}"] for stage in PARAMETER_STAGES]
        assert rates == sorted(rates)
        assert rates[-1] == record["lr"]
        assert rates[0] < rates[1] < rates[2]
    assert found[-1]["log_share"] > 0


@pytest.mark.parametrize("stage", [0, 3])
def test_weight_norms_are_those_of_the_whole_model_at_any_stage_and_world_size(
    digits: Path, tmp_path: Path, stage: int
) -> None:
    config = _watched(digits, tmp_path, zero={"stage": stage})
    run_distributed(_train, 2, config.model_dump(mode="json"))
    export_weights(config.run_dir, tmp_path / "weights.safetensors", verify=False)
    total = sum(float(value.double().square().sum()) for value in load_file(tmp_path / "weights.safetensors").values())
    (last,) = records(config.run_dir)[-1:]
    norms = [last[f"weight_norm_{stage}"] for stage in PARAMETER_STAGES]
    assert math.sqrt(sum(norm**2 for norm in norms)) == pytest.approx(math.sqrt(total), rel=1e-5)


def test_no_chart_of_the_dashboard_stays_empty(watched: RunConfig, events: EventAccumulator) -> None:
    tags = events.Tags()["scalars"]
    page = layout(watched, world_size=2, mfu=False)
    assert "6. What is inside?" in page
    for section, charts in page.items():
        for chart, (kind, expressions) in charts.items():
            assert kind == "Multiline"
            filled = any(re.search(expression, tag) for expression in expressions for tag in tags)
            assert filled or section.startswith("5."), chart  # of 5 more is known only after a while
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_entropy_is_one_of_uniform_attention_and_looking_leaves_no_trace() -> None:
    model = mvit.create_model("mvitv2_tiny", num_classes=3, input_size=(64, 64)).eval()
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "rel_pos" in name:
            torch.nn.init.zeros_(parameter)  # all logits are 0
    images = torch.randn(2, 3, 64, 64)
    plain = model(images)
    with looking_at(model) as found, torch.no_grad():
        looked = model(images)
    assert torch.equal(plain, looked)
    entropies = [float(value) for tag, value in found.items() if tag.startswith("attention_entropy")]
    assert len(entropies) == 10
    assert entropies == pytest.approx([1.0] * 10)
    size = len(found)
    model(images)
    assert len(found) == size
    assert all(not module._forward_hooks for module in model.modules())


def test_settings_that_cannot_work_are_refused_and_a_trace_that_never_comes_is_told(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="the first step must be at least 1 and the last not before it"):
        ProfileConfig(steps=(5, 4))
    with pytest.raises(
        ConfigError, match=r"watch\.activations_every = 5 looks into modules.*train\.compile is inductor"
    ):
        tiny_config(digits, tmp_path, train={"compile": "inductor"}, watch={"activations_every": 5})
    config = _watched(digits, tmp_path, profile={"steps": [100000, 100001]})
    _train(config.model_dump(mode="json"))
    assert "profile.steps = [100000, 100001]: this goes on after step 0 of" in caplog.text
