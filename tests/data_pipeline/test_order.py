"""Order: exactly once an epoch, independent of ranks, resumable anywhere."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import EpochOrder, Stream, _sorting, chunk_positions, derive_seed, epoch_order

ROOT = Path(__file__).parents[2]
shard_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(shard_sizes, st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 15))
def test_every_sample_comes_exactly_once_an_epoch(sizes: list[int], seed: int, epoch: int, window: int) -> None:
    order = epoch_order(sizes, seed, epoch, window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


@given(shard_sizes, st.integers(0, 99), st.integers(1, 5))
def test_no_more_than_a_window_of_shards_is_read_at_a_time(sizes: list[int], seed: int, window: int) -> None:
    order = epoch_order(sizes, seed, 0, window)
    shard_of = np.searchsorted(np.cumsum(sizes), order, side="right")
    last = {int(shard): place for place, shard in enumerate(shard_of)}
    first = {int(shard): place for place, shard in reversed(list(enumerate(shard_of)))}
    for place in range(len(order)):
        assert sum(first[s] <= place <= last[s] for s in first) <= window


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = [tuple(epoch_order([50, 50], seed, epoch, 2)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_the_order_is_the_one_published_runs_have_used() -> None:
    assert epoch_order([3, 4, 5], 0, 0, 2).tolist() == [8, 5, 7, 6, 4, 3, 9, 11, 10, 1, 2, 0]
    assert derive_seed(1, 2, "x") == 1986601700160316026


def drawn_at_once(sizes: list[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """The order as it was first published: one generator, drawn from beginning to end, and numpy's stable sort."""
    first_ids = np.concatenate([[0], np.cumsum(sizes)])
    bits = np.random.Philox(key=derive_seed(seed, epoch, "epoch order"))
    shards = np.argsort(bits.random_raw(len(sizes)), kind="stable")
    parts = []
    for group in range(0, len(shards), window):
        ids = np.concatenate([np.arange(*first_ids[s : s + 2]) for s in shards[group : group + window]])
        parts.append(ids[np.argsort(bits.random_raw(len(ids)), kind="stable")])
    return np.concatenate(parts)


@given(shard_sizes, st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 15))
def test_a_window_computed_alone_is_the_one_of_the_whole_order(
    sizes: list[int], seed: int, epoch: int, window: int
) -> None:
    expected = drawn_at_once(sizes, seed, epoch, window).tolist()
    assert epoch_order(sizes, seed, epoch, window).tolist() == expected
    order = EpochOrder(sizes, seed, epoch, window)
    assert [order[place] for place in reversed(range(len(order)))] == expected[::-1]


def test_keys_that_differ_in_their_low_bits_alone_are_sorted_too() -> None:
    keys = np.array([7, 6, 5, 6, 1 << 60, 4], dtype=np.uint64)
    assert _sorting(keys).tolist() == [5, 2, 1, 3, 0, 4]


def test_the_order_of_14_million_samples_costs_less_than_a_second_and_200_mb() -> None:
    code = (
        "import resource, time; from data_pipeline.order import Stream, epoch_order\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "stream = Stream([1281] * 10_930, 0, 32); [stream.locate(p) for p in range(0, 28_000_000, 700_000)]\n"
        "first = time.process_time() - start; epoch_order([1281] * 10_930, 0, 0, 32)\n"
        "print(first, time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    first, whole, kib = map(float, out.stdout.split())
    assert first < 0.5
    assert whole < 1.5, "0.5 s where nothing else runs"
    assert kib < 200e6 / 1024


def test_seeds_are_the_same_in_another_process() -> None:
    code = "from data_pipeline.order import derive_seed; print(derive_seed(7, 'mixup', 3))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": "."}
    )
    assert int(out.stdout) == derive_seed(7, "mixup", 3)


def test_seeds_tell_numbers_from_strings_and_places() -> None:
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed("1", 23), derive_seed(1, 23, 0)}) == 4
    assert all(0 <= derive_seed(i) < 2**63 for i in range(100))


def rank_chunks(step: int, world_size: int, micro: int, global_batch: int) -> list[list[range]]:
    """Return, by rank, the chunks of one step."""
    steps = global_batch // (micro * world_size)
    return [
        [chunk_positions(step, a, rank, world_size, micro, steps) for a in range(steps)] for rank in range(world_size)
    ]


@given(st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 10**9))
def test_any_world_size_computes_the_same_chunks_in_the_same_accumulation_order(
    micro: int, world: int, step: int
) -> None:
    global_batch = 12 * micro
    by_rank = rank_chunks(step, world, micro, global_batch)
    in_order = [by_rank[rank][a] for a in range(12 // world) for rank in range(world)]
    assert in_order == rank_chunks(step, 1, micro, global_batch)[0]
    assert [p for chunk in in_order for p in chunk] == list(range(step * global_batch, (step + 1) * global_batch))


@settings(deadline=None)
@given(shard_sizes, st.integers(0, 5), st.integers(1, 20), st.integers(0, 60))
def test_a_stream_resumed_anywhere_continues_the_uninterrupted_one(
    sizes: list[int], seed: int, global_batch: int, step: int
) -> None:
    uninterrupted = Stream(sizes, seed, 3)
    positions = range((step + 3) * global_batch)
    everything = [uninterrupted.locate(position) for position in positions]
    resumed = Stream(sizes, seed, 3)
    assert [resumed.locate(p) for p in positions[step * global_batch :]] == everything[step * global_batch :]


def test_a_stream_goes_through_epochs_without_dropping_or_repeating() -> None:
    stream = Stream([7, 4], seed=3, window=2)
    drawn = [stream.locate(position) for position in range(33)]
    for epoch in range(3):
        assert sorted(sample for e, sample in drawn if e == epoch) == list(range(11))


def test_an_empty_set_and_a_window_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        Stream([0, 0], 0, 1)
    with pytest.raises(ValueError, match=r"shuffle_window is 0"):
        epoch_order([3], 0, 0, 0)


def test_repeats_come_one_after_the_other_with_seeds_of_their_own() -> None:
    plain, doubled = Stream([5, 3], seed=3, window=1), Stream([5, 3], seed=3, window=1, repeats=3)
    assert [doubled.locate(p) for p in range(60)] == [plain.locate(p // 3) for p in range(60)]
    seeds = [doubled.augmentation_seed(p, *doubled.locate(p)) for p in range(60)]
    assert len(set(seeds)) == 60
    # The first repeat is what a stream without repeats sees.
    assert seeds[::3] == [plain.augmentation_seed(p, *plain.locate(p)) for p in range(20)]
    assert seeds[::3] == [derive_seed(3, *plain.locate(p)) for p in range(20)]
    assert [doubled.following(4, tries) for tries in range(8)] == [plain.locate((1 + t) % 8)[1] for t in range(8)]
    with pytest.raises(ValueError, match="repeats is 0"):
        Stream([1], 0, 1, repeats=0)
