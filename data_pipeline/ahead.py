"""Copies remote shards in the background, in the order in which they will be read, before they are.

Threads of the training process, since all they do is wait for the network and the disk. What they do not manage in time
a reader fetches itself, so they decide about speed only. They hold what is copied until it has been read: no other
process of the node can remove what is about to be read.
"""

import logging
import os
import threading
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from data_pipeline.order import Stream
from data_pipeline.remote import STREAMS
from data_pipeline.shards import ShardSet
from data_pipeline.tar_scan import ShardError

logger = logging.getLogger(__name__)

_JOIN_S = 5.0


class Need(NamedTuple):
    """A shard that some stretch of a stream reads."""

    number: int
    """Of the stretch: the same shard comes again in the next epoch."""
    shard: int
    end: int
    """The position in the stream from which on it is not needed any more."""


def training_needs(shards: ShardSet, stream: Stream, position: int) -> Iterator[Need]:
    """Yield the remote shards that training reads from `position` on, without end."""
    epoch, place = divmod(position // stream.repeats, stream.num_samples)
    for number in count(epoch):
        order = stream.new_order(number)
        for group in range(order.group(place) if number == epoch else 0, order.num_groups):
            end = (number * stream.num_samples + order.group_end(group)) * stream.repeats
            for shard in order.group_shards(group):
                if shards.remote[shard] is not None and shards.shard_sizes[shard] > 0:
                    yield Need(number, shard, end)


def evaluation_needs(shards: ShardSet) -> Iterator[Need]:
    """Yield the remote shards in the order in which evaluation reads them."""
    end = 0
    for shard, size in enumerate(shards.shard_sizes.tolist()):
        end += size
        if shards.remote[shard] is not None and size > 0:
            yield Need(0, shard, end)


class FetchAhead:
    """Fetches `needs` in the background until `close`; `advance` says how far the stream has been read.

    Holds at most `num_bytes` (though always one shard) and `num_shards` shards at a time.
    """

    def __init__(self, shards: ShardSet, needs: Iterator[Need], num_bytes: int, num_shards: int) -> None:
        assert shards.cache is not None
        self._shards, self._cache, self._needs = shards, shards.cache, needs
        self._num_bytes, self._num_shards = num_bytes, num_shards
        self._position = 0
        self._held: dict[Need, int] = {}
        """What is fetched or being fetched → the open file that holds it, -1 while it is not here."""
        self._stop = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"fetch-ahead-{number}", daemon=True) for number in range(STREAMS)
        ]
        for thread in self._threads:
            thread.start()

    def advance(self, position: int) -> None:
        """Note that all samples before `position` have been read and used; lets go of shards that only they need."""
        with self._changed:
            self._position = position
            past = [need for need in self._held if need.end <= position]
            for need in past:
                self._drop(need)
            if past:
                self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching and let all shards go."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_JOIN_S)  # one that waits for a server's answer ends with it; it is a daemon
        with self._changed:
            for need in list(self._held):
                self._drop(need)

    def _drop(self, need: Need) -> None:
        file = self._held.pop(need)
        if file >= 0:
            os.close(file)

    def _next(self) -> Need | None:
        """Wait until one more shard may be held, and return it; None when there are no more."""
        with self._changed:
            need = next(self._needs, None)
            while need is not None and not self._stop and not self._fits(need):
                self._changed.wait()
            if need is None or self._stop:
                return None
            self._held[need] = -1
            return need

    def _fits(self, need: Need) -> bool:
        held = {one.shard for one in self._held}
        taken = sum(self._shards.copy_bytes(shard) for shard in held | {need.shard})
        return not held or (len(self._held) < self._num_shards and taken <= self._num_bytes)

    def _run(self) -> None:
        while (need := self._next()) is not None:
            remote = self._shards.remote[need.shard]
            assert remote is not None
            pinned = None
            try:
                pinned = self._cache.pin(remote, lambda: self._stop, reader=False)
            except (ShardError, OSError) as error:  # the reader that needs it will meet it too, and end the run
                if not self._stop:
                    logger.warning("Fetching ahead: %s", error)
            if pinned is None:
                continue
            with self._changed:
                if need in self._held and need.end > self._position and not self._stop:
                    self._held[need] = pinned[0]
                else:  # it took so long that readers are past it
                    os.close(pinned[0])
