"""What a classifier said of each sample of an evaluation, for files: its most probable classes, every sample once."""

import json
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import ImageBatch, VideoBatch
from mvit.class_table import class_table, confusion_matrix, draw_confusion
from mvit.distributed import gather_on_main, together
from mvit.results_file import Reports, write_results_file, write_whole

_Row = tuple[int, str, int, list[int], list[float]]  # sample, key, class, best classes and their probabilities


class ClassResults:
    """Collects the best classes of each sample on every rank; rank 0 writes the files in the order of the samples.

    A row of `results`: {"sample": "shard.tar/key", "label": 3, "name": "cat", "classes": [{"label", "name",
    "probability"}, …]}, with the true class first and the predicted ones best first.
    """

    def __init__(self, reports: Reports, names: Sequence[str], topk: int) -> None:
        self._reports, self._names, self._topk = reports, names, topk
        self._rows: list[_Row] = []

    def add(self, logits: Tensor, labels: Tensor, batch: ImageBatch | VideoBatch) -> None:
        """Add logits (B, K) of samples of the classes `labels`; those of weight 0 are padding and are left out."""
        best = logits.float().softmax(dim=1).topk(self._topk, dim=1)
        facts = batch.sample_ids.tolist(), batch.keys, labels.tolist()
        found = best.indices.tolist(), best.values.tolist()
        rows = zip(*facts, *found, strict=True)
        self._rows += [row for row, weight in zip(rows, batch.weights.tolist(), strict=True) if weight > 0]

    def write(self) -> None:
        """Write the files (collective); raises on every rank if rank 0 cannot."""
        shares = gather_on_main(json.dumps(self._rows).encode())

        def write() -> None:
            self._write(sorted(row for share in shares or () for row in json.loads(share)))

        if dist.is_initialized():
            told = ", ".join(map(str, self._reports.files().values()))
            together(write, f"writing {told}", here=shares is not None)
        else:
            write()

    def _write(self, rows: Sequence[_Row]) -> None:
        if self._reports.results is not None:
            write_results_file(self._reports.results, [self._as_dict(*row) for row in rows])
        if self._reports.per_class is None and self._reports.confusion is None:
            return
        labels = [label for _, _, label, _, _ in rows]
        matrix = confusion_matrix(labels, [best[0] for _, _, _, best, _ in rows], len(self._names))
        if self._reports.per_class is not None:
            within = ((label, label in best) for _, _, label, best, _ in rows)
            write_whole(self._reports.per_class, class_table(matrix, within, self._names, self._topk).encode())
        if self._reports.confusion is not None:
            write_whole(self._reports.confusion, draw_confusion(matrix, self._names))

    def _as_dict(
        self, sample: int, key: str, label: int, labels: Sequence[int], probabilities: Sequence[float]
    ) -> dict[str, Any]:
        del sample  # the order alone
        classes = [
            {"label": each, "name": self._names[each], "probability": probability}
            for each, probability in zip(labels, probabilities, strict=True)
        ]
        return {"sample": key, "label": label, "name": self._names[label], "classes": classes}
