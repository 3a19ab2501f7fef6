"""A copy of this rank's training state in host memory, made in one go so that training can go on."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from mvit.distributed import logger
from mvit.fragments import FROZEN, MASTER, Fragment


class HostCopy:
    """One flat fp32 buffer a state, kept from save to save: touching fresh memory costs more than the copy itself.

    On a GPU the buffers are page-locked and the copies queue up on the current stream, ahead of the next update;
    `wait` returns when they have arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._reserving: threading.Thread | None = None
        self._buffers: dict[str, Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    def reserve(self, fragments: Sequence[Fragment]) -> None:
        """Get the memory in the background, before the first copy waits for it; `take` tries again where it fails."""
        self._reserving = threading.Thread(target=self._reserve, args=(_sizes(fragments),), daemon=True)
        self._reserving.start()

    def _reserve(self, sizes: Mapping[str, int]) -> None:
        with torch.cuda.device(self._device) if self._on_gpu else nullcontext():
            try:
                for key, size in sizes.items():
                    self._buffer(key, size).zero_()
            except (RuntimeError, MemoryError) as error:
                logger.warning("no host memory for copies of the state yet, saves will try again: %s", error)

    def take(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Copy the fragments and return them as views into the copy."""
        self._joined()
        sizes = _sizes(fragments)
        flats = {key: self._buffer(key, size) for key, size in sizes.items()}
        offsets, copies = dict.fromkeys(sizes, 0), []
        for fragment in fragments:
            views = {}
            for state, values in fragment.states.items():
                key = FROZEN if fragment.frozen else state
                view = flats[key].narrow(0, offsets[key], fragment.count)
                view.copy_(values.detach(), non_blocking=self._on_gpu)
                offsets[key] += fragment.count
                views[state] = view
            copies.append(replace(fragment, states=views, weights=views[MASTER]))
        if self._on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return copies

    def wait(self) -> None:
        """Return when the copy is complete."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def release(self) -> None:
        """Give the memory back."""
        self._joined()
        self._buffers = {}

    def _joined(self) -> None:
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def _buffer(self, key: str, size: int) -> Tensor:
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=torch.float32, pin_memory=self._on_gpu)
        return self._buffers[key][:size]


def _sizes(fragments: Sequence[Fragment]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for fragment in fragments:
        for state in fragment.states:
            key = FROZEN if fragment.frozen else state
            sizes[key] = sizes.get(key, 0) + fragment.count
    return sizes
