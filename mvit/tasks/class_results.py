"""What a classifier said of each sample of an evaluation, for a file: its most probable classes, every sample once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import ImageBatch, VideoBatch
from mvit.distributed import gather_on_main, together
from mvit.results_file import write_results_file


class ClassResults:
    """Collects the best classes of each sample on every rank; rank 0 writes them in the order of the samples.

    A row: {"sample": "shard.tar/key", "label": 3, "name": "cat", "classes": [{"label", "name", "probability"}, …]},
    with the true class first and the predicted ones best first.
    """

    def __init__(self, path: Path, names: Sequence[str], topk: int) -> None:
        self._path, self._names, self._topk = path, names, topk
        self._rows: list[tuple[int, str, int, list[int], list[float]]] = []

    def add(self, logits: Tensor, batch: ImageBatch | VideoBatch) -> None:
        """Add logits (B, K); samples of weight 0 are padding and are left out."""
        best = logits.float().softmax(dim=1).topk(self._topk, dim=1)
        facts = batch.sample_ids.tolist(), batch.keys, batch.labels.tolist()
        found = best.indices.tolist(), best.values.tolist()
        rows = zip(*facts, *found, strict=True)
        self._rows += [row for row, weight in zip(rows, batch.weights.tolist(), strict=True) if weight > 0]

    def write(self) -> None:
        """Write the file (collective); raises on every rank if rank 0 cannot."""
        shares = gather_on_main(json.dumps(self._rows).encode())

        def write() -> None:
            rows = sorted(row for share in shares or () for row in json.loads(share))
            write_results_file(self._path, [self._row(*row) for row in rows])

        if dist.is_initialized():
            together(write, f"writing {self._path}", here=shares is not None)
        else:
            write()

    def _row(
        self, sample: int, key: str, label: int, labels: Sequence[int], probabilities: Sequence[float]
    ) -> dict[str, Any]:
        del sample  # the order alone
        classes = [
            {"label": each, "name": self._names[each], "probability": probability}
            for each, probability in zip(labels, probabilities, strict=True)
        ]
        return {"sample": key, "label": label, "name": self._names[label], "classes": classes}
