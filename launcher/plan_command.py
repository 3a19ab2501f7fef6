"""`mvit plan`: the parser, and what it prints of a plan; no GPU, no Slurm and no data are needed."""

import argparse
import json
from argparse import Namespace
from typing import TYPE_CHECKING

from launcher.arguments import add_command, add_json, add_recipe

if TYPE_CHECKING:
    from mvit.planner import Candidate, Plan
    from mvit.planner_memory import Memory

# Named here and not read from the table: `mvit --help` must not wait for torch. A test compares the two.
GPU_NAMES = ("v100", "a100", "a100-40gb", "h100", "h100-pcie", "h200", "b200", "l40s", "rtx4090")
_GIB = 2**30


def add_plan(group: "argparse._SubParsersAction") -> None:
    """Add `plan`."""
    text = "say which ZeRO stage, checkpointing and micro-batch fit and are fastest on given GPUs, and what a run costs"
    example = "mvit plan configs/imagenet1k/mvitv2_huge.yaml --gpus 32 --gpu-memory-gib 80"
    parser = add_command(group, "plan", show_plan, text, example)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="how many GPUs, over all nodes")
    parser.add_argument("--gpu-memory-gib", type=float, required=True, metavar="G", help="memory of one GPU in GiB")
    parser.add_argument("--gpu", choices=GPU_NAMES, default="h100", help="which GPU, for times (h100)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of one node (8)")
    text = "training samples (those of the recipe's shards, or the published number of a public data set)"
    parser.add_argument("--samples", type=int, metavar="N", help=text)
    text = "of a recipe with phases: which one, from 1 (1); its hours are those of a whole run of it"
    parser.add_argument("--phase", type=int, default=1, metavar="N", help=text)
    parser.add_argument("--all", action="store_true", help="show every setting, not the best of each kind")
    add_json(parser)
    add_recipe(parser)


def show_plan(args: Namespace) -> int:
    """Plan; exit code 1 if nothing fits."""
    from launcher.recipe_folder import refuse_missing

    refuse_missing(args.recipe)
    import mvit
    from mvit.config import ConfigError
    from mvit.phases import phase_configs
    from mvit.planner import plan

    phases = phase_configs(mvit.load_config(args.recipe, args.overrides))
    if not 1 <= args.phase <= len(phases):
        raise ConfigError(
            f"--phase {args.phase}: the recipe has {len(phases)} phase(s); choose from 1 to {len(phases)}"
        )
    made = plan(
        phases[args.phase - 1],
        args.gpus,
        args.gpu_memory_gib,
        args.gpu,
        gpus_per_node=args.gpus_per_node,
        samples=args.samples,
    )
    lines = _lines(made, show_all=args.all)
    if len(phases) > 1:
        keys = "train.*" if args.phase == 1 else f"phases.{args.phase - 2}.*"
        lines.append(f"note: this is phase {args.phase} of {len(phases)}; its settings are {keys}")
    print(json.dumps(made.as_dict()) if args.json else "\n".join(lines))
    return 0 if made.chosen is not None else 1


def _lines(plan: "Plan", *, show_all: bool) -> list[str]:
    rows = plan.candidates if show_all else _best_of_each_kind(plan)
    steps = "" if plan.total_steps is None else f", {plan.total_steps} steps"
    lines = [
        f"{plan.recipe}: {plan.num_parameters / 1e6:.2f} M parameters, {plan.precision}, "
        f"{plan.global_batch_size} samples a step{steps}",
        f"{plan.gpus} x {plan.gpu} with {plan.gpu_memory_gib:g} GiB, {plan.gpus_per_node} in a node; "
        f"training samples: {_samples(plan)}",
        "",
        f"{'ZeRO':>4} {'recomputed':<12} {'micro x acc':>11} {'GiB':>6} {'s/step':>8} {'hours':>8}  verdict",
    ]
    lines += [_line(plan, one) for one in rows]
    if not show_all and len(rows) < len(plan.candidates):
        lines.append(
            f"the best micro-batch of each kind, of {len(plan.candidates)} settings compared; all: --all, --json"
        )
    for name, one in (("the recipe's own setting", plan.recipe_setting), ("chosen", plan.chosen)):
        if one is not None and not (name != "chosen" and plan.chosen == one):
            lines += ["", f"{name}:", *_details(plan, one)]
    if plan.chosen is None:
        least = min(plan.candidates, key=lambda one: one.memory.needed)
        lines += ["", f"nothing fits; the least is {least.memory.needed / _GIB:.1f} GiB: {' '.join(least.overrides)}"]
    return [*lines, "", f"one checkpoint: {plan.checkpoint_bytes / _GIB:.2f} GiB", *(f"note: {n}" for n in plan.notes)]


def _best_of_each_kind(plan: "Plan") -> list["Candidate"]:
    """Return the fastest that fits of every stage and checkpointing, else the smallest; and the recipe's own."""
    kinds: dict[tuple[int, tuple[str, ...]], Candidate] = {}
    for one in plan.candidates:  # fastest first among what fits
        kind = one.zero_stage, one.checkpointing
        if kind not in kinds or (not kinds[kind].fits and one.memory.needed < kinds[kind].memory.needed):
            kinds[kind] = one
    return [one for one in plan.candidates if one.is_recipe or one in kinds.values()]


def _line(plan: "Plan", one: "Candidate") -> str:
    hours = plan.hours(one)
    recomputed = {0: "nothing", 4: "all"}.get(len(one.checkpointing), ",".join(one.checkpointing))
    shortened = recomputed.replace("stage", "s") if len(recomputed) > 12 else recomputed
    return (
        f"{one.zero_stage:>4} {shortened:<12} {f'{one.micro_batch_size} x {one.accumulation_steps}':>11} "
        f"{one.memory.needed / _GIB:>6.1f} {one.step.total:>8.3f} {'?' if hours is None else f'{hours:.1f}':>8}  "
        f"{one.verdict}{' (the recipe)' if one.is_recipe else ''}"
    )


def _details(plan: "Plan", one: "Candidate") -> list[str]:
    step, hours = one.step, plan.hours(one)
    lines = [
        f"  {' '.join(one.overrides)}",
        f"  memory of a rank: {_parts(one.memory)}",
        f"  step: {step.total:.3f} s = forward {step.forward:.3f} + backward {step.backward:.3f} + communication that "
        f"does not hide {step.communication:.3f} + update {step.update:.3f}; MFU {plan.mfu(one):.0%}, "
        f"{plan.global_batch_size / step.total:.0f} samples/s",
        f"  network: each rank sends {step.sent_bytes / _GIB:.2f} GiB a step, "
        f"a node {step.network_bytes / _GIB:.2f} GiB to other nodes",
    ]
    if hours is not None:
        lines.append(f"  run: {hours:.1f} hours, {hours * plan.gpus:.0f} GPU-hours")
    return lines


def _parts(memory: "Memory") -> str:
    names = ("parameters", "gradients", "optimizer", "activations", "buffers")
    parts = " + ".join(f"{name} {getattr(memory, name) / _GIB:.2f}" for name in names)
    if memory.update > memory.activations + memory.buffers:
        parts += f" (the update's {memory.update / _GIB:.2f} in place of the last two)"
    return f"{parts} = {memory.peak / _GIB:.2f} GiB; with margin and runtime {memory.needed / _GIB:.2f}"


def _samples(plan: "Plan") -> str:
    return plan.samples_from if plan.samples is None else f"{plan.samples} ({plan.samples_from})"
