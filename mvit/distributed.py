"""Rank facts, reductions, agreement between ranks, and logging from rank zero."""

import gc
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Answer = TypeVar("Answer")
logger = logging.getLogger("mvit")
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_set_here: list[str] = []  # of these, by `start` itself


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands among all ranks, and the device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(timeout_min: float = 30.0) -> RankInfo:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Without these variables this process is a world of one. NCCL carries tensors on GPUs, gloo on CPUs.
    Raises ValueError if only some of the variables are set: guessing would train a wrong number of ranks.
    """
    present = [name for name in _RANK_VARIABLES if name in os.environ]
    store = None
    if not present:
        # It listens already: nobody can take its port.
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # pyright: ignore[reportPrivateImportUsage]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(store.port)
        _set_here.extend(_RANK_VARIABLES)
    elif len(present) < len(_RANK_VARIABLES):
        missing = ", ".join(name for name in _RANK_VARIABLES if name not in os.environ)
        raise ValueError(
            f"the environment has {', '.join(present)} but not {missing}; a launcher must set all five "
            "(torchrun and `mvit submit` do), or none for a single process"
        )
    rank, world_size, local_rank = (int(os.environ[name]) for name in _RANK_VARIABLES[:3])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # the gloo half carries small objects and the stop flag without the device
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=timeout_min),
            device_id=device if device.type == "cuda" else None,
        )
    return RankInfo(rank, local_rank, world_size, device)


def shutdown() -> None:
    """Leave the process group; a world of one is forgotten, so that processes started later do not inherit it."""
    if dist.is_initialized():
        dist.destroy_process_group()
    while _set_here:
        os.environ.pop(_set_here.pop(), None)


def background_group(timeout_min: float = 30.0) -> dist.ProcessGroup:
    """Return a gloo group of all ranks for a thread, which must not use the training's own groups (collective)."""
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_min))
    assert isinstance(group, dist.ProcessGroup)
    return group


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's `value` on every rank (collective)."""
    box = [value]
    dist.broadcast_object_list(box, 0, group=group, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank (collective)."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_on_main(value: bytes) -> list[bytes] | None:
    """Return every rank's bytes, in rank order, on rank 0 and None elsewhere (collective); alone, one is rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add `values` over all ranks in place and return it (collective)."""
    dist.all_reduce(values)
    return values


def free_memory(device: torch.device) -> None:
    """Give back what nobody refers to any more, so that a model can be built where another one was."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def barrier() -> None:
    """Wait for all ranks (collective)."""
    gather_objects(None)


def raise_together(error: BaseException | None, what: str) -> None:
    """Raise on every rank if any rank failed (collective), naming each failed rank.

    A rank that raised alone would leave the others waiting in their next collective.
    """
    failures = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    told = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None]
    if error is not None:
        raise error
    if told:
        raise RuntimeError(f"{what} failed on {len(told)} of {len(failures)} ranks; {'; '.join(told)}")


def together(action: Callable[[], object], what: str, *, here: bool = True) -> None:
    """Run `action` on the ranks where `here` is true; an error on any of them is raised on all (collective)."""
    error = None
    if here:
        try:
            action()
        except Exception as caught:  # whatever it is, the others wait for this rank's word
            error = caught
    raise_together(error, what)


def on_main(action: Callable[[], Answer], what: str, ranks: RankInfo | None) -> Answer:
    """Return on every rank what `action` returns on rank 0; its error is raised on all (collective).

    Without `ranks` this process is alone and acts itself.
    """
    if ranks is None:
        return action()
    found: list[Answer] = []
    together(lambda: found.append(action()), what, here=ranks.is_main)
    return broadcast_object(found[0] if ranks.is_main else None)


class StopAgreement:
    """Lets all ranks reach the same answer to "has anyone been asked to stop?" without waiting for the device.

    Each step starts an asynchronous all-reduce of the local flag on the CPU and reads the one the step before
    started, so a request is honoured at most one step later and the step itself never waits.
    """

    def __init__(self) -> None:
        self._pending: tuple[Any, torch.Tensor] | None = None

    def ask(self, stop_here: bool) -> bool:
        """Return whether any rank had been asked to stop by the previous call (collective)."""
        answer = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor(int(stop_here), dtype=torch.int32)
        self._pending = (dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True), flag)
        return answer

    def finish(self) -> None:
        """Wait for the reduction in flight (collective)."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None


def configure_logging(rank: int, level: int = logging.INFO) -> None:
    """Log from rank zero at `level`, from other ranks warnings only; keep DeepSpeed's chatter out."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(level if rank == 0 else logging.WARNING)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


_NOISY: Sequence[str] = ("DeepSpeed", "torch.distributed.run")
