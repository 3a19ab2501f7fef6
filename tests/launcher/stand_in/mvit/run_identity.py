"""Stands in for the real module: which settings may not change within a run."""

from dataclasses import asdict


def differences(saved: object, new: object) -> list[str]:
    before, after = asdict(saved), asdict(new)
    free = ("raise_at", "step_s", "num_workers")
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key] and key not in free]
