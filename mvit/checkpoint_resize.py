"""A checkpoint as if it had been saved at another resolution: position tables and their moments resized."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from mvit.checkpoint import CheckpointError, Manifest
from mvit.checkpoint_load import whole_states
from mvit.fingerprint import fingerprint, to_hex
from mvit.fragments import MASTER
from mvit.model.convert import fit_tensor


def resized(
    manifest: Manifest, shapes: Mapping[str, Sequence[int]], grid: Sequence[int], class_tokens: int
) -> Manifest:
    """Return the manifest of the same state for a model whose position tables have other sizes.

    Weights, moments and moving average of a table are interpolated alike, the moments' positive numbers stay positive;
    they are held in memory, which takes a few MB for the largest model. `grid` and `class_tokens` are the model's.
    Raises CheckpointError if parameters differ in more than resolution.
    """
    changed = {name for name, shape in shapes.items() if manifest.shapes.get(name, list(shape)) != list(shape)}
    prints = {state: dict(of_names) for state, of_names in manifest.fingerprints.items()}
    held: dict[tuple[str, str], Tensor] = {}
    for state in dict.fromkeys((MASTER, *prints)):
        for name, saved in whole_states(manifest, state, changed & manifest.shapes.keys()):
            fitted = fit_tensor(name, saved, shapes[name], grid, class_tokens)
            if fitted is None:
                raise CheckpointError(
                    f"{manifest.path}: {name} is {list(saved.shape)} there and {list(shapes[name])} in the model, "
                    "which differ in more than resolution; resume with the run's own config"
                )
            held[name, state] = fitted[0].reshape(-1).contiguous()
            if name in prints.get(state, {}):
                prints[state] |= to_hex([name], fingerprint(held[name, state]).reshape(1))
    new_shapes = {name: list(shapes.get(name, shape)) for name, shape in manifest.shapes.items()}
    return replace(manifest, shapes=new_shapes, fingerprints=prints, held=held)
