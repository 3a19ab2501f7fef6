"""How long a step should take on a GPU: a roofline over every operation, and rings for what travels between GPUs.

Modelled, not measured. Every assumption is a constant here, with its reason.
"""

import math
from dataclasses import dataclass

import numpy as np

from mvit.planner_trace import Cost
from mvit.zero import Precision

MATRIX_SHARE = 0.6
"""Of the data sheet's dense matrix rate. Large bf16 products reach 0.8 of it on an H200; these are smaller."""
MEMORY_SHARE = 0.8
"""Of the data sheet's memory bandwidth, for elementwise operations, norms and pools."""
LINK_SHARE = 0.8
"""Of NVLink's and the network's rate, for large messages."""
KERNEL_SECONDS = 3e-6
"""The least a kernel takes on the device."""
LAUNCH_SECONDS = 8e-6
"""What Python and torch take on the host for an operation: an eager step is never faster than all of them."""
COMPILED_TRAFFIC, COMPILED_LAUNCH = 0.5, 0.25
"""torch.compile fuses elementwise operations: share of memory traffic and of launches that remains. timm's MViTv2
models run 2.0 to 2.5 times as fast compiled (inference, RTX 4090 and 5090)."""
NODE_LATENCY, NETWORK_LATENCY = 3e-6, 10e-6
"""Seconds for each hop of a collective within a node and between nodes."""
_PER_UPDATED_ELEMENT = 40
"""Bytes read and written for an element's update: AdamW's four fp32 numbers, gradient copies, the new weight."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it; dense rates, without sparsity."""

    matrix_tflops: float
    """bf16 and fp16 with fp32 accumulation."""
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    """To the other GPUs of the node, one direction: half of NVLink's figure, or of PCIe's."""
    network_gb_s: float
    """Of one GPU's share of the usual node's network adapters."""
    bf16: bool
    source: str


GPUS = {
    "v100": Gpu(125, 15.7, 900, 150, 12.5 / 2, False, "NVIDIA V100 SXM2 data sheet; DGX-1: 4 x 100 Gb/s for 8 GPUs"),
    "a100": Gpu(312, 19.5, 2039, 300, 25, True, "NVIDIA A100 80GB SXM data sheet; DGX A100: 8 x 200 Gb/s"),
    "a100-40gb": Gpu(312, 19.5, 1555, 300, 25, True, "NVIDIA A100 40GB SXM data sheet; DGX A100: 8 x 200 Gb/s"),
    "h100": Gpu(989, 67, 3350, 450, 50, True, "NVIDIA H100 SXM data sheet; DGX H100: 8 x 400 Gb/s"),
    "h100-pcie": Gpu(756, 51, 2000, 32, 25, True, "NVIDIA H100 PCIe data sheet, PCIe 4 rate to neighbours assumed"),
    "h200": Gpu(989, 67, 4800, 450, 50, True, "NVIDIA H200 SXM data sheet; DGX H200: 8 x 400 Gb/s"),
    "b200": Gpu(2250, 75, 8000, 900, 50, True, "NVIDIA DGX B200 data sheet, an eighth of it; 8 x 400 Gb/s"),
    "l40s": Gpu(362, 91.6, 864, 32, 25, True, "NVIDIA L40S data sheet; PCIe 4 x16"),
    "rtx4090": Gpu(165, 82.6, 1008, 32, 3.1, True, "NVIDIA Ada white paper; PCIe 4 x16; 25 Gb/s Ethernet assumed"),
}


_DEVICE_NAMES = (
    ("H200", "h200"),
    ("H100 PCIe", "h100-pcie"),
    ("H100", "h100"),
    ("B200", "b200"),
    ("A100-SXM4-40GB", "a100-40gb"),
    ("A100", "a100"),
    ("L40S", "l40s"),
    ("V100", "v100"),
    ("RTX 4090", "rtx4090"),
)


def gpu_of_device(device_name: str) -> str | None:
    """Return the key in `GPUS` of what CUDA calls a device; None for one that is not there."""
    return next((key for part, key in _DEVICE_NAMES if part in device_name and "GH200" not in device_name), None)


@dataclass(frozen=True)
class Ranks:
    """How many GPUs there are and how they are placed."""

    count: int
    per_node: int
    gpu: Gpu

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)

    def seconds(self, sent_bytes: float, calls: float) -> float:
        """Return the time for a ring collective in which every rank sends `sent_bytes` altogether in `calls` calls.

        Between nodes one ring per network adapter runs at once, so a node's adapters together bound the rate of a
        rank; within a node its NVLink does. A call's latency is a hop per neighbour in the node and a tree's depth
        between nodes, there and back.
        """
        if self.count == 1:
            return 0.0
        local = min(self.count, self.per_node)
        rate = self.gpu.link_gb_s if self.nodes == 1 else min(self.gpu.link_gb_s, local * self.gpu.network_gb_s)
        hops = NODE_LATENCY * (local - 1) + NETWORK_LATENCY * 2 * math.ceil(math.log2(self.nodes))
        return sent_bytes / (rate * 1e9 * LINK_SHARE) + calls * hops


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what every rank sends in it."""

    forward: float
    backward: float
    communication: float
    """What does not hide behind computing."""
    update: float
    sent_bytes: int
    network_bytes: int
    """Of `sent_bytes` of all of a node's ranks, what leaves the node."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.communication + self.update


def pass_seconds(cost: Cost, gpu: Gpu, precision: Precision, *, compiled: bool) -> float:
    """Return the time of a forward or backward pass: each operation's on the device, at least the host's of all."""
    matrix = (gpu.fp32_tflops if precision == "fp32" else gpu.matrix_tflops) * 1e12 * MATRIX_SHARE
    traffic = np.where(cost.flops > 0, cost.traffic, cost.traffic * (COMPILED_TRAFFIC if compiled else 1.0))
    operations = np.maximum(cost.flops / matrix, traffic / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE))
    launches = COMPILED_LAUNCH if compiled else 1.0
    device = float((np.maximum(operations, KERNEL_SECONDS * launches) * cost.times).sum())
    return max(device, float(cost.times.sum()) * LAUNCH_SECONDS * launches)


def step_seconds(
    *,
    forward: float,
    backward: float,
    accumulation_steps: int,
    ranks: Ranks,
    stage: int,
    num_parameters: int,
    num_tensors: int,
    gradient_bytes: int,
    bucket_size: int,
    overlap: bool,
    live_elements: int,
) -> StepTime:
    """Put a step together; `forward` and `backward` are one micro-batch's seconds.

    Stage 0 reduces gradients after the last backward pass. Stages 1 and 2 reduce them in buckets beside the backward
    pass (1: the last one, 2: every one), by all-reduce as DeepSpeed does, and gather the new weights. Stage 3 gathers
    weights beside the forward pass, and in the backward pass those it had to drop, and scatters gradients every time.
    What travels beside a pass counts where it takes longer, the last bucket always.
    """
    total = num_parameters * gradient_bytes
    part = (ranks.count - 1) / ranks.count
    calls = max(1, math.ceil(num_parameters / bucket_size))
    sent, exposed = 0.0, 0.0

    def beside(seconds: float, computing: float, pieces: int) -> float:
        return max(seconds - computing, seconds / pieces) if overlap else seconds

    reductions = {0: 1, 1: 1, 2: accumulation_steps, 3: accumulation_steps}[stage]
    volume = part * total * (1 if stage == 3 else 2)
    seconds = ranks.seconds(volume, calls)
    exposed += reductions * (seconds if stage == 0 else beside(seconds, backward, calls))
    sent += reductions * volume
    if stage in (1, 2):
        sent += part * total
        exposed += ranks.seconds(part * total, calls)
    if stage == 3:
        dropped = max(0, num_parameters - live_elements // 2)
        for elements, computing in ((num_parameters, forward), (dropped, backward)):
            gathered = part * elements * gradient_bytes
            fetches = max(1, round(num_tensors * elements / num_parameters))  # about one for each module's weights
            exposed += accumulation_steps * beside(ranks.seconds(gathered, fetches), computing, fetches)
            sent += accumulation_steps * gathered
    shard = num_parameters / (ranks.count if stage else 1)
    update = shard * _PER_UPDATED_ELEMENT / (ranks.gpu.memory_gb_s * 1e9 * MEMORY_SHARE)
    leaving = int(sent) if ranks.nodes > 1 else 0  # of a ring over all ranks one rank of a node sends to the next node
    return StepTime(forward * accumulation_steps, backward * accumulation_steps, exposed, update, int(sent), leaving)
