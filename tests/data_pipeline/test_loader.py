"""Loaders: the same stream whatever the ranks and workers, exact evaluation, bad samples replaced and counted."""

import logging
import signal
import threading
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from data_pipeline.batch import ImageBatch
from data_pipeline.helper_signals import signals_held
from data_pipeline.image import ImageConfig, ImageTransform, collate_images
from data_pipeline.loader import DataConfig, EvaluationLoader, TrainLoader
from data_pipeline.reads import BadSampleError
from data_pipeline.shards import ShardSet, open_shards
from data_pipeline.synthetic import SyntheticBatches
from tests.data_pipeline.pictures import photo_samples, write_shards

IMAGES = ImageConfig(image_size=(16, 16))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return open_shards(write_shards(tmp_path_factory.mktemp("shards"), photo_samples(29), 6))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    samples = photo_samples(12)
    samples[5]["jpg"] = samples[5]["jpg"][:400]
    return open_shards(write_shards(tmp_path_factory.mktemp("damaged"), samples, 6))


def train_loader(
    shards: ShardSet,
    rank: int = 0,
    world_size: int = 1,
    micro: int = 2,
    workers: int = 0,
    max_bad: int = 0,
    repeats: int = 1,
) -> TrainLoader:
    config = DataConfig(num_workers=workers, shuffle_window=2, max_bad_samples=max_bad, pin_memory=False)
    return TrainLoader(
        shards,
        ImageTransform(IMAGES, train=True),
        collate_images,
        config,
        seed=5,
        global_batch_size=8,
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        repeats=repeats,
    )


def same(a: ImageBatch, b: ImageBatch) -> bool:
    return a.keys == b.keys and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "labels", "weights", "sample_ids")
    )


def test_every_sample_comes_once_an_epoch_with_its_label_and_key(shards: ShardSet) -> None:
    batches = islice(train_loader(shards).start(), 3 * 29)  # 6 epochs: 174 = 87 x 2
    ids, labels, keys = [], [], []
    for batch in batches:
        ids += batch.sample_ids.tolist()
        labels += batch.labels.tolist()
        keys += batch.keys
    for epoch in range(6):
        assert sorted(ids[epoch * 29 : (epoch + 1) * 29]) == list(range(29))
    assert labels == [i % 3 for i in ids]
    assert keys == [shards.key(i) for i in ids]


def test_any_world_size_gives_the_same_chunks(shards: ShardSet) -> None:
    alone = list(islice(train_loader(shards).start(), 12))
    for world_size in (2, 4):
        ranks = [train_loader(shards, rank, world_size).start() for rank in range(world_size)]
        together = [next(ranks[chunk % world_size]) for chunk in range(12)]
        assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_resuming_at_a_step_continues_the_uninterrupted_stream(shards: ShardSet) -> None:
    uninterrupted = list(islice(train_loader(shards).start(), 4 * 9))
    loader = train_loader(shards)
    for step in (0, 1, 6, 4):
        resumed = list(islice(loader.start(step), 4 * 3))
        assert all(same(a, b) for a, b in zip(resumed, uninterrupted[4 * step :], strict=False))


def test_workers_change_nothing(shards: ShardSet) -> None:
    alone = list(islice(train_loader(shards).start(1), 10))
    loader = train_loader(shards, workers=2)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    stream = loader.start(1)
    worked = [next(stream)]
    # Slurm's warning may reach every descendant: workers, fork server and resource tracker must not die of it.
    for process in psutil.Process().children(recursive=True):
        process.send_signal(signal.SIGUSR2)
    worked += islice(stream, 9)
    assert torch.rand(1) == expected  # starting workers draws nothing from the global generator
    loader.close()
    assert all(same(a, b) for a, b in zip(alone, worked, strict=True))
    evaluation = EvaluationLoader(
        shards,
        ImageTransform(IMAGES, train=False),
        collate_images,
        DataConfig(num_workers=2, pin_memory=False),
        batch_size=4,
        rank=0,
        world_size=1,
    )
    first, again = list(evaluation), list(evaluation)
    evaluation.close()
    assert [i for batch in first for i in batch.sample_ids.tolist() if i >= 0] == list(range(29))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_with_repeats_the_stream_is_the_same_on_any_ranks_and_workers_and_after_resuming(shards: ShardSet) -> None:
    alone = list(islice(train_loader(shards, repeats=2).start(), 16))
    for world_size, workers in ((2, 0), (4, 2)):
        loaders = [train_loader(shards, rank, world_size, workers=workers, repeats=2) for rank in range(world_size)]
        ranks = [loader.start() for loader in loaders]
        assert all(same(batch, next(ranks[chunk % world_size])) for chunk, batch in enumerate(alone))
        for loader in loaders:
            loader.close()
    resumed = train_loader(shards, micro=4, repeats=2).start(2)  # 2 steps = 8 batches of two
    for one, two in zip(alone[8::2], alone[9::2], strict=True):
        both = next(resumed)
        assert both.keys == one.keys + two.keys
        assert torch.equal(both.images, torch.cat([one.images, two.images]))
    for batch in alone:
        assert batch.keys[0] == batch.keys[1]
        assert not torch.equal(batch.images[0], batch.images[1])


def test_all_repeats_of_a_bad_sample_are_replaced_by_the_same_one(damaged: ShardSet) -> None:
    batches = list(islice(train_loader(damaged, max_bad=1, repeats=2).start(), 12))
    assert all(batch.keys[0] == batch.keys[1] for batch in batches)
    assert len({key for batch in batches for key in batch.keys}) == 11


def test_a_cursor_knows_its_repeats(shards: ShardSet) -> None:
    old = train_loader(shards).state_dict(7)
    del old["repeats"]  # of a run before there were any
    train_loader(shards).check_state(old)
    with pytest.raises(ValueError, match="repeats was 1, is 2"):
        train_loader(shards, repeats=2).check_state(old)
    with pytest.raises(ValueError, match="repeats was 2, is 1"):
        train_loader(shards).check_state(train_loader(shards, repeats=2).state_dict(7))


def test_a_warning_signal_while_workers_start_is_delivered_afterwards() -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: received.append(number))
    try:
        with signals_held():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # this thread alone holds it back
            assert received == []
        assert received == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, previous)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_evaluation_sees_every_sample_exactly_once_in_equally_many_batches(shards: ShardSet, world_size: int) -> None:
    seen, lengths = [], set()
    for rank in range(world_size):
        loader = EvaluationLoader(
            shards,
            ImageTransform(IMAGES, train=False),
            collate_images,
            DataConfig(num_workers=0),
            batch_size=4,
            rank=rank,
            world_size=world_size,
        )
        batches = list(loader)
        lengths.add(len(batches))
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch.images.shape == (4, 3, 16, 16)
            assert ((batch.sample_ids >= 0) == (batch.weights == 1)).all()
            seen += batch.sample_ids[batch.weights > 0].tolist()
    assert sorted(seen) == list(range(29))
    assert len(lengths) == 1


def test_an_undecodable_sample_is_replaced_by_the_next_in_order_and_counted(
    damaged: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    loader = train_loader(damaged, max_bad=1)
    with caplog.at_level(logging.WARNING):
        drawn = [i for batch in islice(loader.start(), 12) for i in batch.sample_ids.tolist()]
    expected = [loader.stream.locate(position)[1] for position in range(25)]
    replaced = [expected[p] if expected[p] != 5 else int(loader.stream.order(p // 12)[(p + 1) % 12]) for p in range(24)]
    assert drawn == replaced
    assert loader.num_bad == 1
    assert caplog.text.count("Undecodable sample shard-000000.tar/000005: cannot decode 400 bytes") == 1
    again = train_loader(damaged, max_bad=1)
    batches = zip(islice(loader.start(), 12), islice(again.start(), 12), strict=True)
    assert all(same(a, b) for a, b in batches)


def test_beyond_the_limit_the_bad_sample_is_named(damaged: ShardSet) -> None:
    with pytest.raises(BadSampleError, match=r"max_bad_samples allows 0: shard-000000.tar/000005: cannot decode"):
        list(islice(train_loader(damaged).start(), 12))


def test_with_workers_the_error_is_the_same(damaged: ShardSet) -> None:
    loader = train_loader(damaged, workers=1)
    with pytest.raises(BadSampleError, match=r"max_bad_samples allows 0: shard-000000.tar/000005: cannot decode"):
        list(islice(loader.start(), 12))
    loader.close()


def test_evaluation_leaves_a_bad_sample_out_and_counts_it_or_stops(damaged: ShardSet) -> None:
    def loader(limit: int) -> EvaluationLoader:
        return EvaluationLoader(
            damaged,
            ImageTransform(IMAGES, train=False),
            collate_images,
            DataConfig(num_workers=0, max_bad_samples=limit),
            batch_size=4,
            rank=0,
            world_size=1,
        )

    lenient = loader(1)
    assert sum(batch.weights.sum().item() for batch in lenient) == 11
    assert lenient.num_bad == 1
    with pytest.raises(BadSampleError, match="000005"):
        list(loader(0))


def test_a_set_of_nothing_but_bad_samples_fails(tmp_path: Path) -> None:
    shards = open_shards(write_shards(tmp_path, [{"jpg": b"x", "cls": b"0"}] * 3, 3))
    with pytest.raises(BadSampleError, match="None of the 3 training samples"):
        next(train_loader(shards, max_bad=100).start())


def test_a_cursor_is_accepted_by_its_own_stream_only(shards: ShardSet, damaged: ShardSet) -> None:
    state = train_loader(shards).state_dict(7)
    assert state["step"] == 7
    assert state["samples_seen"] == 56
    train_loader(shards, rank=1, world_size=4).check_state(state)
    with pytest.raises(ValueError, match=r"num_samples was 29, is 12; fingerprint was .*Resume with the data"):
        train_loader(damaged).check_state(state)
    with pytest.raises(ValueError, match=r"seed was 6, is 5"):
        train_loader(shards).check_state({**state, "seed": 6})
    with pytest.raises(ValueError, match=r"shuffle_window was not saved, is 2"):
        train_loader(shards).check_state({k: v for k, v in state.items() if k != "shuffle_window"})


def test_batch_sizes_that_do_not_divide_are_refused(shards: ShardSet) -> None:
    with pytest.raises(
        ValueError, match=r"global_batch_size 8 is not a multiple of micro_batch_size 3 x world_size 2 = 6"
    ):
        train_loader(shards, world_size=2, micro=3)


def test_synthetic_batches_are_of_the_training_type_and_repeatable() -> None:
    assert next(SyntheticBatches((4, 8, 10), 5, 3).start()).clips.shape == (3, 3, 4, 8, 10)
    first, again = SyntheticBatches((8, 10), 5, 3).start(), SyntheticBatches((8, 10), 5, 3).start(1)
    one, two = next(first), next(first)
    assert one.images.shape == (3, 3, 8, 10)
    assert one.images.dtype == torch.uint8
    assert one.images.is_contiguous(memory_format=torch.channels_last)
    assert same(two, next(again))
    assert not same(one, two)
