"""Seed the global random generators for the length of a call, for libraries that draw from them; then restore them."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_lock = threading.RLock()


@contextmanager
def seeded_python(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's global generators inside the block; outside nothing is disturbed.

    One thread at a time may be inside, so that two threads of this package cannot draw from each other's stream.
    """
    with _lock:
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Like `seeded_python`, and torch's default generator of `device` (CPU or CUDA) too."""
    generator = torch.default_generator
    if device.type == "cuda":
        torch.cuda.init()
        generator = torch.cuda.default_generators[
            device.index if device.index is not None else torch.cuda.current_device()
        ]
    with seeded_python(seed):
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            yield
        finally:
            generator.set_state(state)
