"""A run's model as a program that needs neither its code nor ours: ONNX, or torch.export's file; answers compared."""

import gc
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mvit.checkpoint import CheckpointError, read_manifest
from mvit.class_names import class_names
from mvit.config import RunConfig, parse_config
from mvit.export import exported_config, find_checkpoint, load_model, refuse_existing
from mvit.export_check import build_own
from mvit.export_formats import return_freed_memory
from mvit.tasks import create_task

ProgramFormat = Literal["onnx", "torch.export"]
TOLERANCE = 1e-4
"""Largest difference of a logit from the run's own, where the largest logit is 1; in proportion where it is larger."""

_SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch.export": ".pt2"}
_FORMS = {"onnx": "matmul", "torch.export": "fused"}  # plain products for ONNX; torch chooses its kernel by device
_MAX_ONE_FILE = 1 << 29  # bytes of weights: protobuf ends at 2 GiB, and takes twice as much memory to write
_NEEDED = ("onnx", "onnxscript")


@dataclass(frozen=True)
class Program:
    """An exported program."""

    path: Path
    files: tuple[Path, ...]
    """What belongs together: of more than 512 MiB, ONNX has the weights in a second file beside the first."""
    input_shape: tuple[int | str, ...]
    difference: float | None
    """Largest difference of a logit from the run's own, relative to the larger of 1 and the largest logit; None if it
    was not compared."""


def is_program(format: str | None, out: str | Path) -> bool:
    """Say whether a format, or a file's suffix where there is none, is a program's."""
    return format in _SUFFIXES or (format is None and Path(out).suffix in _SUFFIXES.values())


def export_program(
    source: str | Path,
    out: str | Path,
    *,
    format: ProgramFormat | None = None,
    batch: int | None = None,
    ema: bool = False,
    step: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Program:
    """Write the classifier of a run, a checkpoint, or a .safetensors file that `mvit export` wrote, as a program.

    Its input, "images" or "clips", is a batch of normalised floats of the recipe's size, (B, 3, [T,] H, W), its output
    "logits" (B, K). `batch` fixes B; None leaves it open. What preprocessing needs lies in the file: ONNX's
    metadata_props, torch.export's extra file mvit.json. `verify` compares the logits of the file, computed by
    onnxruntime or torch, with the run's own before the file gets its name.

    Raises ValueError for a detector, a file that exists without `overwrite`, and packages that are not installed,
    CheckpointError if there is nothing to export or the answers differ by more than TOLERANCE.
    """
    source, out = Path(source), Path(out)
    format = _checked_format(format, out)
    if batch is not None and batch < 1:
        raise ValueError(f"batch = {batch}: a fixed batch has at least one input; leave it out for batches of any size")
    refuse_existing(out, overwrite)
    if format == "onnx":
        check_installed(verify)
    config, model, facts = _read(source, step, ema)
    shape: tuple[int | str, ...] = ("B" if batch is None else batch, 3, *config.input_size)
    batches = (1, 3) if batch is None else (batch,)
    inputs = [torch.randn(n, 3, *config.input_size, generator=torch.Generator().manual_seed(n)) for n in batches]
    model.requires_grad_(False)
    with torch.no_grad():
        expected = [model(x) for x in inputs] if verify else []
    model.set_attention_form(_FORMS[format])
    program = _trace(model, inputs[-1] if batch != 1 else inputs[0], dynamic=batch is None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        part = Path(scratch) / out.name
        write = _write_onnx if format == "onnx" else _write_torch
        write(part, program, inputs[-1], _input_name(config), {**facts, "input_shape": list(shape)})
        del program, model
        gc.collect()
        return_freed_memory()
        difference = _compare(part, format, _input_name(config), inputs, expected) if verify else None
        refuse_existing(out, overwrite)
        files = sorted(Path(scratch).iterdir(), key=lambda file: file == part)  # weights first
        for file in files:
            os.replace(file, out.parent / file.name)
    return Program(out, tuple(out.parent / file.name for file in reversed(files)), shape, difference)


def check_installed(verify: bool) -> None:
    """Raise ValueError if what writes ONNX, and with `verify` runs it, is not installed."""
    lost = [name for name in (*_NEEDED, *(("onnxruntime",) if verify else ())) if find_spec(name) is None]
    if lost:
        raise ValueError(
            f"format 'onnx' needs {', '.join(lost)}; pip install {' '.join(lost)}"
            + ("" if set(lost) & set(_NEEDED) else ", or leave out the verification (verify=False, --no-verify)")
        )


def _checked_format(format: str | None, out: Path) -> ProgramFormat:
    for known in get_args(ProgramFormat):
        if format == known or (format is None and out.suffix == _SUFFIXES[known]):
            if out.suffix != _SUFFIXES[known]:
                raise ValueError(f"{out}: format {known!r} goes with {_SUFFIXES[known]}, not with {out.suffix!r}")
            return known
    raise ValueError(f"{out}: format {format!r} is no program's; choose from {', '.join(_SUFFIXES)}")


def _read(source: Path, step: int | None, ema: bool) -> tuple[RunConfig, Any, dict[str, Any]]:
    """Return the recipe, its model with weights in evaluation mode, and what is told of them."""
    if source.is_file():
        if ema or step is not None:
            raise ValueError(f"{source}: a file has neither steps nor an average beside it; leave the options out")
        config = exported_config(source)
        _refuse_detector(config)
        model, found = load_model(source), None
    else:
        manifest = read_manifest(find_checkpoint(source, step))
        config, found = parse_config(manifest.state["config"], source=str(manifest.path)), manifest.step
        _refuse_detector(config)
        if ema and not manifest.has_ema:
            raise CheckpointError(f"{manifest.path}: holds no moving average; leave the option out")
        model = build_own(create_task(config), manifest, ema)
    inputs = config.inputs
    facts = {
        "name": config.name,
        "step": found,
        "ema": ema,
        "task": config.task,
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "softmax": "not applied",
        "class_names": list(class_names(config).names),
        "recipe": config.model_dump(mode="json"),
    }
    return config, model.eval(), facts


def _refuse_detector(config: RunConfig) -> None:
    if config.task == "detection":
        raise ValueError(
            f"{config.name} is a detector, which is no program of fixed shape: how many boxes it finds depends on the "
            "picture. Export it as safetensors, and load it with mvit.load_model, or use `mvit predict`"
        )


def _input_name(config: RunConfig) -> str:
    return "clips" if config.task == "video_classification" else "images"


def _trace(model: nn.Module, example: Tensor, *, dynamic: bool) -> torch.export.ExportedProgram:
    """Record the model's operations; position tables become constants of the input size, which is fixed."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)


def _write_onnx(part: Path, program: Any, example: Tensor, name: str, facts: dict[str, Any]) -> None:
    written = torch.onnx.export(
        program, (example,), dynamo=True, input_names=[name], output_names=["logits"], verbose=False
    )
    assert written is not None
    properties = written.model.metadata_props
    properties.update({key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()})
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    written.save(part, external_data=size > _MAX_ONE_FILE)


def _write_torch(part: Path, program: Any, example: Tensor, name: str, facts: dict[str, Any]) -> None:
    del example
    torch.export.save(program, part, extra_files={"mvit.json": json.dumps({"input": name, **facts})})


def _compare(part: Path, format: str, name: str, inputs: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative difference of the file's answers; raise CheckpointError if it is too large."""
    answer = _onnx_answer(part, name) if format == "onnx" else _torch_answer(part)
    worst = 0.0
    for x, own in zip(inputs, expected, strict=True):
        found = answer(x)
        if found.shape != own.shape:
            raise CheckpointError(f"{part.name}: answers {list(found.shape)} where the run's model {list(own.shape)}")
        worst = max(worst, float((found - own).abs().max() / own.abs().max().clamp(min=1)))
    if not worst <= TOLERANCE:
        raise CheckpointError(
            f"{part.name}: its logits differ from the run's by {worst:.1e} of the largest, more than {TOLERANCE:.0e}; "
            "nothing was exported"
        )
    return worst


def _onnx_answer(part: Path, name: str) -> Callable[[Tensor], Tensor]:
    onnxruntime = import_module("onnxruntime")  # an extra, which may be missing where types are checked
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(part), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {name: x.numpy()})[0])


def _torch_answer(part: Path) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(part).module()

    def answer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return module(x)

    return answer
