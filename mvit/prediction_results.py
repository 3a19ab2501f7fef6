"""What is said about a picture or a video: its classes or its objects, in Python, in words and as JSON."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Guess:
    """A class, and how probable it is."""

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class Classified:
    """The most probable classes of a picture or a video, best first."""

    path: Path
    guesses: tuple[Guess, ...]

    def __str__(self) -> str:
        return f"{self.path}: " + ", ".join(f"{guess.name} {guess.probability:.1%}" for guess in self.guesses)

    def as_dict(self) -> dict[str, Any]:
        guesses = [{"label": g.label, "name": g.name, "probability": g.probability} for g in self.guesses]
        return {"file_name": str(self.path), "classes": guesses}


@dataclass(frozen=True)
class FoundObject:
    """An object in a picture."""

    label: int
    name: str
    category_id: int
    score: float
    box: tuple[float, float, float, float]
    """XYXY in pixels of the picture as it is stored."""
    mask: dict[str, Any] | None
    """COCO's run-length code, None if the detector has no masks."""


@dataclass(frozen=True)
class Detected:
    """The objects of a picture, best first."""

    path: Path
    image_id: int
    """The picture's place among those asked for, from 1."""
    size: tuple[int, int]
    """Height and width."""
    objects: tuple[FoundObject, ...]
    drawn: Path | None
    """Where the copy with the objects drawn on it lies."""
    unwritten: str | None = None
    """Why there is no copy although one was asked for."""

    def __str__(self) -> str:
        counts = Counter(found.name for found in self.objects)
        what = ", ".join(f"{number} x {name}" for name, number in counts.most_common()) or "nothing found"
        where = "" if self.drawn is None else f" -> {self.drawn}"
        return f"{self.path}: {what}{where}" + ("" if self.unwritten is None else f" ({self.unwritten})")

    def as_dict(self) -> dict[str, Any]:
        facts = {"file_name": str(self.path), "image_id": self.image_id, "height": self.size[0], "width": self.size[1]}
        if self.unwritten is not None:
            facts["error"] = self.unwritten
        return facts | {"drawn": None if self.drawn is None else str(self.drawn), "objects": self.coco_results()}

    def coco_results(self) -> list[dict[str, Any]]:
        """Return the objects in COCO's results format, which lets further keys stand: the file, and the name."""
        return [
            {
                "image_id": self.image_id,
                "category_id": found.category_id,
                "bbox": [found.box[0], found.box[1], found.box[2] - found.box[0], found.box[3] - found.box[1]],
                "score": found.score,
                **({} if found.mask is None else {"segmentation": found.mask}),
                "name": found.name,
                "file_name": str(self.path),
            }
            for found in self.objects
        ]


@dataclass(frozen=True)
class Unreadable:
    """A file of which nothing can be said."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        return {"file_name": str(self.path), "error": self.reason}


Result = Classified | Detected | Unreadable


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write what was found as one JSON list: of a detector in COCO's results format. Raises OSError."""
    rows: list[dict[str, Any]] = []
    for result in results:
        if isinstance(result, Detected):
            rows += result.coco_results()
        elif isinstance(result, Classified):
            rows.append(result.as_dict())
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_text(json.dumps(rows))
    part.replace(path)
