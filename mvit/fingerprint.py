"""Fingerprints of training state that do not depend on how it is split over ranks.

The fingerprint of a flattened tensor is the sum over its elements of (bit pattern) x (weight of the position), modulo
2^64. Sums over disjoint ranges add up to the fingerprint of the whole, whatever the world size and ZeRO stage. A
value that is wrong, stands in another place or belongs to another state changes it (weights are odd, so one flipped
bit always does). Files are guarded by SHA-256; this guards what was made of them in memory.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mvit.distributed import RankInfo, sum_over_ranks
from mvit.fragments import Fragment

_BLOCK = 1 << 14
_BLOCKS_AT_ONCE = {"cpu": 4, "cuda": 512}  # on a CPU what stays in its cache: 1.3 ns an element, else 8
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _weights(first: int, count: int, device: torch.device) -> Tensor:
    """Return `count` odd pseudo-random 64-bit numbers, element i belonging to `first` + i (a splitmix64 finaliser)."""
    x = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shift_right(x, shift)) * factor
    return (x ^ _shift_right(x, 31)) | 1


@lru_cache
def _positions(device: torch.device) -> Tensor:
    return _weights(0, _BLOCK, device)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's own shift keeps the sign


def fingerprint(values: Tensor, start: int = 0) -> Tensor:
    """Return the share of a 1-D tensor that holds elements [start, start + n) in the fingerprint of the whole.

    The result is an int64 scalar on the tensor's device; nothing waits for the device.
    """
    bits = values.detach().contiguous().view(_INTEGERS[values.element_size()])
    first, inside = divmod(start, _BLOCK)
    head = min(-inside % _BLOCK, bits.numel())
    blocks = (bits.numel() - head) // _BLOCK
    position, at_once = _positions(values.device), _BLOCKS_AT_ONCE[values.device.type]
    sums = torch.zeros(blocks + 2, dtype=torch.int64, device=values.device)  # one a block, cut ones at both ends
    sums[0] = (bits[:head].long() * position[inside : inside + head]).sum()
    whole = bits[head : head + blocks * _BLOCK].view(blocks, _BLOCK)
    for at in range(0, blocks, at_once):
        rows = whole[at : at + at_once]
        sums[1 + at : 1 + at + len(rows)] = (rows.long() * position).sum(1)
    tail = bits[head + blocks * _BLOCK :]
    sums[-1] = (tail.long() * position[: len(tail)]).sum()
    # Without a cut block in front, the first whole one has the number `first`.
    return (sums * _weights(first if head else first - 1, blocks + 2, values.device)).sum()


def own_sums(fragments: Sequence[Fragment], names: Sequence[str]) -> dict[str, Tensor]:
    """Return per state an int64 tensor, one element a name: the shares of these fragments (0 where none is held)."""
    index = {name: i for i, name in enumerate(names)}
    found: dict[str, Tensor] = {}
    for fragment in fragments:
        for state, values in fragment.states.items():
            sums = found.setdefault(state, torch.zeros(len(names), dtype=torch.int64))
            sums[index[fragment.name]] += fingerprint(values, fragment.start).cpu()
    return found


def state_fingerprints(
    fragments: Sequence[Fragment], names: Sequence[str], states: Sequence[str], ranks: RankInfo
) -> dict[str, dict[str, str]]:
    """Return {state: {name: 16 hexadecimal digits}} of the whole training state (collective)."""
    own = own_sums([f.part(ranks.rank, ranks.world_size) for f in fragments], names)
    stacked = torch.stack([own.get(state, torch.zeros(len(names), dtype=torch.int64)) for state in states])
    totals = sum_over_ranks(stacked)
    return {state: to_hex(names, row) for state, row in zip(states, totals, strict=True)}


def to_hex(names: Sequence[str], sums: Tensor) -> dict[str, str]:
    """Write sums down for a manifest, modulo 2^64."""
    return {name: f"{int(value) % 2**64:016x}" for name, value in zip(names, sums, strict=True)}


def differing(wanted: Mapping[str, Mapping[str, str]], found: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """List (state, name) of every fingerprint in `wanted` that `found` lacks or has otherwise."""
    return [
        (state, name)
        for state, prints in wanted.items()
        for name, value in prints.items()
        if found.get(state, {}).get(name) != value
    ]
