"""How a run trains and what is watched of it: batch sizes, numerics, how often what happens."""

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field, field_validator

from data_pipeline.settings import Settings
from mvit.zero import Precision

StageName = Literal["stage1", "stage2", "stage3", "stage4"]


class TrainConfig(Settings):
    """Batch sizes, numerics and what happens how often; all intervals are in steps (optimizer updates)."""

    global_batch_size: int = Field(default=2048, gt=0)
    """Samples per step over all ranks; with `video.repeats`, clips."""
    micro_batch_size: int = Field(default=32, gt=0)
    """Samples one rank computes at once; accumulation makes up the rest of the global batch."""
    precision: Precision = "bf16"
    activation_checkpointing: Literal["off", "all"] | tuple[StageName, ...] = "off"
    """Recompute activations in the backward pass: off, all blocks, or the blocks of the named stages."""
    compile: Literal["off", "inductor", "aot_eager"] = "off"
    """Compile the model with torch.compile and this backend."""
    log_every: int = Field(default=20, gt=0)
    evaluate_every: int = Field(default=0, ge=0)
    """0 evaluates at the end only."""
    evaluation_batch_size: int = Field(default=64, gt=0)
    """Images or clips per rank that are computed at once in evaluation; a video's views are that many clips."""
    save_every: int | None = Field(default=None, gt=0)
    """null derives it while training: the optimum of what saves and failures cost (mvit/save_interval.py)."""
    node_mttf_h: float = Field(default=1000.0, gt=0)
    """Hours until one node fails, for `save_every: null` until the run itself has seen three failures. Published for
    nodes of 8 GPUs: 1,011 h (7.9 h at 1,024 GPUs, arXiv 2410.21680), 6,300 h (419 in 54 days of 16,384, Llama 3)."""
    keep_last: int = Field(default=2, gt=0)
    """Newest checkpoints kept."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this step are kept for ever; 0 keeps none of them."""
    keep_best: int = Field(default=0, ge=0)
    """Best evaluated checkpoints kept (by top1, the average's if there is one); a new best is saved at once."""
    async_save: bool = True
    """Write checkpoints beside training, from a copy in host memory as large as this rank's share of the state."""
    log_images: int = Field(default=8, ge=0)
    """Augmented inputs shown in TensorBoard at the first step."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak rate of one device in TFLOP/s for MFU; null takes the data sheet's figure where the device is known."""

    @field_validator("activation_checkpointing", "compile", mode="before")
    @classmethod
    def _yaml_takes_off_for_false(cls, value: object) -> object:
        return "off" if value is False else value

    @property
    def checkpointed_stages(self) -> tuple[StageName, ...]:
        """The stages whose activations are recomputed."""
        if isinstance(self.activation_checkpointing, tuple):
            return self.activation_checkpointing
        return () if self.activation_checkpointing == "off" else get_args(StageName)


class ProfileConfig(Settings):
    """A trace of a few steps, by torch.profiler."""

    steps: tuple[int, int] | None = None
    """First and last step that are traced, on rank 0; null traces none."""
    memory: bool = False
    """Also who allocated what; slower."""

    @field_validator("steps")
    @classmethod
    def _in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError("the first step must be at least 1 and the last not before it; steps count from 1")
        return value


class WatchConfig(Settings):
    """What is looked at now and then; intervals in steps, 0 = never."""

    histograms_every: int = Field(default=0, ge=0)
    """Spread of each block's weights, from at most 65,536 of them."""
    activations_every: int = Field(default=0, ge=0)
    """Size of each block's output, entropy and largest logit of its attention, on rank 0's first chunk of the step."""


@dataclass(frozen=True)
class BatchArithmetic:
    """How the global batch is put together from micro-batches."""

    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    global_batch_size: int

    def __str__(self) -> str:
        return (
            f"{self.micro_batch_size} samples/micro-batch x {self.accumulation_steps} accumulation steps"
            f" x {self.world_size} ranks = {self.global_batch_size} samples/step"
        )
