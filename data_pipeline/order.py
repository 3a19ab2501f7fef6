"""Which samples come when: pure functions of (seed, epoch, step), numpy only.

The training stream is endless. Position p (0, 1, 2, …) is place ``p % N`` of epoch ``p // N``, so every sample comes
exactly once an epoch, nothing is dropped, and a global batch may straddle two epochs. With R repeats (several
augmentations of a sample in one batch, arXiv 1901.09335) position p is repeat ``p % R`` of place ``p // R``. Nothing
here knows how many workers read, and the ranks only decide who computes which chunk of a global batch.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Hash integers and strings into one 63-bit seed, the same on every machine, Python and process.

    `derive_seed(seed, epoch, sample_id)` seeds a sample's augmentation, `derive_seed(seed, step, chunk)` a
    chunk's mixup.
    """
    text = "\x1f".join(f"{'i' if isinstance(part, int) else 's'}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class EpochOrder:
    """One epoch's permutation of the sample ids 0 … N-1, computed a window of shards at a time as it is asked for.

    Shards are permuted, then the samples inside each group of `window` shards: a pool of `window` shards' samples is
    shuffled fully while no more than `window` shards are open. Ids count through the shards in their given order.
    The keys are raw output of the counter-based Philox generator and the sort is stable, because numpy promises stable
    streams for bit generators only, not for `Generator.permutation`. Raises ValueError if `window` is below 1.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, epoch: int, window: int) -> None:
        if window < 1:
            raise ValueError(
                f"data.shuffle_window is {window}; it counts shards shuffled together and must be at least 1."
            )
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._key = derive_seed(seed, epoch, "epoch order")
        self._first_ids = np.concatenate([[0], np.cumsum(sizes)])
        self._window = window
        self.shards = _sorting(self._keys(0, len(sizes)))
        """The shards in the order in which the epoch reads them, `window` of them mixed with each other."""
        self._ends = np.concatenate([[0], np.cumsum(sizes[self.shards])])
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._first_ids[-1])

    def group(self, place: int) -> int:
        """Return the number of the group of shards that a place of the epoch lies in."""
        return (int(np.searchsorted(self._ends, place, side="right")) - 1) // self._window

    @property
    def num_groups(self) -> int:
        """How many groups of shards there are."""
        return -(-len(self.shards) // self._window)

    def group_end(self, group: int) -> int:
        """Return the place after the last of a group."""
        return int(self._ends[min((group + 1) * self._window, len(self.shards))])

    def group_shards(self, group: int) -> list[int]:
        """Return the shards of a group."""
        return self.shards[group * self._window : (group + 1) * self._window].tolist()

    def __getitem__(self, place: int) -> int:
        group = self.group(place)
        if group not in self._kept:
            if len(self._kept) > 1:  # a global batch rarely straddles more than two
                del self._kept[next(iter(self._kept))]
            self._kept[group] = self.ids(group)
        return int(self._kept[group][place - self._ends[group * self._window]])

    def ids(self, group: int) -> np.ndarray:
        """Return the sample ids of one group in the order of the epoch (int64)."""
        chosen = self.group_shards(group)
        ids = np.concatenate([np.arange(*self._first_ids[s : s + 2].tolist(), dtype=np.int64) for s in chosen])
        return ids[_sorting(self._keys(len(self.shards) + int(self._ends[group * self._window]), len(ids)))]

    def _keys(self, start: int, number: int) -> np.ndarray:
        """Return outputs `start` … of the epoch's generator, without drawing those before it."""
        bits = np.random.Philox(key=self._key)
        bits.advance(start // 4)
        return bits.random_raw(start % 4 + number)[start % 4 :]


def _sorting(keys: np.ndarray) -> np.ndarray:
    """Return `np.argsort(keys, kind="stable")` of random uint64 in a third of its time.

    Numpy sorts 16-bit numbers by their digits, so two passes sort by the upper 32 bits; where that leaves a pair the
    wrong way round, the last pass finds nearly all in order.
    """
    digits = keys.view("<u2").reshape(-1, 4)
    order = np.argsort(digits[:, 2], kind="stable")
    order = order[np.argsort(digits[order, 3], kind="stable")]
    ordered = keys[order]
    if (ordered[1:] < ordered[:-1]).any():
        order = order[np.argsort(ordered, kind="stable")]
    return order


def epoch_order(shard_sizes: Sequence[int] | np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """Return the whole of an `EpochOrder` (int64, shape (N,)). Raises ValueError if `window` is below 1."""
    order = EpochOrder(shard_sizes, seed, epoch, window)
    whole = np.empty(len(order), dtype=np.int64)
    start = 0
    for group in range(order.num_groups):
        ids = order.ids(group)
        whole[start : start + len(ids)] = ids
        start += len(ids)
    return whole


def chunk_positions(
    step: int,
    accumulation_index: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    accumulation_steps: int,
) -> range:
    """Return the stream positions of `rank`'s micro batch number `accumulation_index` in global step `step`.

    The global batch of step t is positions [t·G, (t+1)·G), G = micro_batch_size · accumulation_steps ·
    world_size, cut into chunks of `micro_batch_size`; the chunk's number is `accumulation_index * world_size +
    rank`. With a constant micro batch the chunks are therefore the same for every world size.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    assert 0 <= accumulation_index < accumulation_steps, (accumulation_index, accumulation_steps)
    global_batch_size = micro_batch_size * accumulation_steps * world_size
    first = step * global_batch_size + (accumulation_index * world_size + rank) * micro_batch_size
    return range(first, first + micro_batch_size)


class Stream:
    """The endless stream of one training set: position → (epoch, sample id); each sample comes `repeats` times running.

    Keeps two epochs only, because a global batch rarely straddles more, and of these the two windows last used.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, window: int, repeats: int = 1) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples == 0:
            raise ValueError("The training shards hold no sample; there is nothing to train on.")
        self.seed = seed
        self.window = window
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; every sample comes at least once: give 1 or more.")
        self.repeats = repeats
        self._orders: dict[int, EpochOrder] = {}

    def order(self, epoch: int) -> EpochOrder:
        """Return `epoch`'s permutation."""
        if epoch not in self._orders:
            kept = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders = kept | {epoch: self.new_order(epoch)}
        return self._orders[epoch]

    def new_order(self, epoch: int) -> EpochOrder:
        """Return `epoch`'s permutation anew, for another thread."""
        return EpochOrder(self.shard_sizes, self.seed, epoch, self.window)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample id) of a stream position."""
        epoch, place = divmod(position // self.repeats, self.num_samples)
        return epoch, self.order(epoch)[place]

    def following(self, position: int, tries: int) -> int:
        """Return the sample id `tries` places after a position's in the order of its epoch, which is a ring."""
        epoch, place = divmod(position // self.repeats, self.num_samples)
        return self.order(epoch)[(place + tries) % self.num_samples]

    def augmentation_seed(self, position: int, epoch: int, sample_id: int) -> int:
        """Return what seeds the augmentation of the sample that `locate` found at a position; repeats differ."""
        repeat = position % self.repeats
        return derive_seed(self.seed, epoch, sample_id, *([repeat] if repeat else []))

    def __getstate__(self) -> dict[str, object]:
        """Leave the orders behind: a worker needs them only when it meets an undecodable sample."""
        return {**self.__dict__, "_orders": {}}
