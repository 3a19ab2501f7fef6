"""Settings every test shares: one thread, no GPU probing noise, shards of real digits packed once."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with scikit-learn's digits packed into train/ and validation/ shards."""
    from data_pipeline.pack import pack_digits

    folder = tmp_path_factory.mktemp("digits") / "shards"
    pack_digits(folder)
    return folder
