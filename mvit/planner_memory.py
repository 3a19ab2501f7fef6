"""What one rank holds in device memory, by kind, at a ZeRO stage: from DeepSpeed 0.19's code, checked on CPUs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mvit.config import RunConfig
from mvit.optim import num_moments
from mvit.planner_trace import StepTrace, Target
from mvit.zero import uses_autocast

GIB = 2**30
MARGIN = 1.05
"""Device memory asked for over memory used: what the caching allocator rounds up and cannot reuse. Assumed."""
RUNTIME_BYTES = int(1.25 * GIB)
"""CUDA context, cuBLAS and cuDNN workspaces, NCCL's buffers. Assumed: 0.5 to 1 GiB is usual."""
_MASTER = 4  # bytes of a weight's fp32 master, of each moment, of an average
_UNSHARDED_BUCKET = 500_000_000  # elements that DeepSpeed's stage 0 flattens at once to reduce them
LIVE_ELEMENTS = 1_000_000_000
"""Stage 3: DeepSpeed keeps gathered weights up to this many elements, and those it needs again within so many
(stage3_max_live_parameters, stage3_max_reuse_distance): all of the published models, nearly all of huge."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Parts that come after one another are not added up: see `peak`."""

    parameters: int
    gradients: int
    optimizer: int
    """fp32 masters, moments, and the moving average if there is one."""
    activations: int
    """The most that forward and backward hold beside the states; gradients too where they are not sharded."""
    buffers: int
    """Buckets in which gradients travel, and weights gathered by stage 3."""
    update: int
    """What the update needs besides; no activations exist then."""
    evaluation: int = 0
    """What an evaluation's forward pass holds beside the states, weights gathered by stage 3 included."""
    setup: int = 0
    """The most while the engine is built, all in all: the fp32 model comes to the device whole, at every stage."""

    @property
    def peak(self) -> int:
        """The most that tensors take at once."""
        states = self.parameters + self.gradients + self.optimizer
        return max(self.setup, states + max(self.activations + self.buffers, self.update, self.evaluation))

    @property
    def needed(self) -> int:
        """What a GPU must have: the peak, the allocator's margin, and the runtime."""
        return int(self.peak * MARGIN) + RUNTIME_BYTES


def rank_memory(
    config: RunConfig,
    sizes: Sequence[int],
    trace: StepTrace,
    *,
    stage: int,
    recompute: Sequence[str],
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
    target: Target = "cuda",
) -> Memory:
    """Return what a rank holds; `sizes` are the elements of every parameter, `trace` the step at this precision."""
    memory = _in_training(
        config,
        sizes,
        trace,
        stage=stage,
        recompute=recompute,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        world_size=world_size,
        target=target,
    )
    total, shard = sum(sizes), -(-sum(sizes) // world_size)
    element = _element_bytes(config, stage)
    flattened = max(2 * element * total, element * total + 2 * _MASTER * shard) if stage in (1, 2) else 0
    evaluated = 0
    if config.data.validation is not None:
        evaluated = trace.evaluation_bytes(config.train.evaluation_batch_size) + (memory.buffers if stage == 3 else 0)
    return replace(memory, evaluation=evaluated, setup=max(_MASTER * total, flattened))


def _element_bytes(config: RunConfig, stage: int) -> int:
    """Return the bytes of a weight as the forward pass keeps it: under autocast that is fp32."""
    zero, precision = config.zero.model_copy(update={"stage": stage}), config.train.precision
    return 4 if uses_autocast(zero, precision) or precision == "fp32" else 2


def _in_training(
    config: RunConfig,
    sizes: Sequence[int],
    trace: StepTrace,
    *,
    stage: int,
    recompute: Sequence[str],
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
    target: Target,
) -> Memory:
    zero = config.zero.model_copy(update={"stage": stage})
    total, count = sum(sizes), world_size
    element = _element_bytes(config, stage)
    states = _MASTER * (num_moments(config.optim) + (config.optim.ema_decay is not None))
    keeps = stage == 0 or (stage == 1 and not (zero.overlap_comm and count > 1))  # until the step's last backward
    accumulates = accumulation_steps > 1
    activations = trace.peak_bytes(micro_batch_size, recompute, keep_gradients=keeps and not accumulates)
    if stage == 0:
        # On CPUs torch's AdamW goes parameter by parameter, with two temporary tensors; on GPUs it is one fused kernel
        flattened = element * min(total, _UNSHARDED_BUCKET)  # also where there is nobody to reduce them with
        temporary = 2 * _MASTER * max(sizes) if target == "cpu" else 0
        update = max(flattened, temporary) + (0 if accumulates else element * total)
        gradients = element * total if accumulates else 0
        return Memory(element * total, gradients, states * total, activations, 0, update)
    shard = -(-total // count)
    optimizer = 0 if zero.offload_optimizer else (states + _MASTER) * shard
    temporary = 2 * _MASTER * shard if target == "cpu" else 0
    if stage == 3:
        whole = sum(size for size in sizes if size < zero.persistence_threshold)
        shards = sum(-(-size // count) for size in sizes)
        gathered = element * min(total, LIVE_ELEMENTS) if count > 1 else element * total
        update = _MASTER * min(shards, zero.sub_group_size) + min(temporary, 2 * _MASTER * zero.sub_group_size)
        buffers = element * zero.bucket_size + gathered - element * whole
        parameters = (0 if zero.offload_parameters else element * shards) + element * whole
        return Memory(
            parameters, element * shards, optimizer, activations, buffers, update + element * zero.bucket_size
        )
    buckets = element * zero.bucket_size * (2 if zero.overlap_comm and count > 1 else 1)
    copied = _MASTER if element == 2 else 0  # gradients are flattened, then copied in fp32, then the first ones freed
    updating = (copied or element) * shard + temporary - element * shard
    update = 0 if zero.offload_optimizer else max((element + copied) * shard, updating)
    gradients = element * shard
    if accumulates:
        gradients += element * (total if keeps or stage == 1 else shard)
    return Memory(element * total, gradients, optimizer, activations, buckets, update)
