"""Recording what operations allocate, free, compute and touch, and making the meta device behave as a GPU does."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

_FLASH_WIDTH = 256  # widest attention head that CUDA's flash kernels take
_FLASH_MULTIPLE = 8
# Autocast's rules on CUDA for what the models call: matrix products in bf16, reductions in fp32, else as the inputs are
_LOWER: frozenset[Callable[..., Any]] = frozenset(
    (
        F.linear,
        F.conv2d,
        F.conv3d,
        F.scaled_dot_product_attention,
        torch.einsum,
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
    )
)
_UPPER: frozenset[Callable[..., Any]] = frozenset((F.layer_norm, torch.softmax, Tensor.softmax, F.softmax))


@dataclass
class Stretch:
    """What happened between two marks; list entries are in the order of time."""

    held: list[int] = field(default_factory=list)
    """Change of bytes held; negative where something is freed."""
    gradients: list[int] = field(default_factory=list)
    """Change of bytes in finished gradients of parameters, at the same events."""
    flops: list[int] = field(default_factory=list)
    traffic: list[int] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Sees every operation inside the `with` block; `known` tensors, parameters say, are not counted as held."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.stretches: dict[str, Stretch] = {}
        self.peak_bytes = 0
        self._now = Stretch()
        self._held_bytes = 0
        self._held: dict[int, weakref.ref] = {}
        self._gradients: set[int] = set()
        for tensor in known:
            self._watch(tensor.untyped_storage(), counted=False)

    def mark(self, name: str) -> None:
        """Begin the stretch `name`."""
        assert name not in self.stretches, name
        self._now = self.stretches[name] = Stretch()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._now = Stretch()  # what is freed from here on is no part of the record

    def finished_gradient(self, parameter: Tensor) -> None:
        """Count the storage of a parameter's gradient as a gradient from now on."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if id(storage) not in self._gradients:
            self._gradients.add(id(storage))
            self._event(-storage.nbytes(), storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        sources = {id(tensor.untyped_storage()) for tensor in inputs}
        made = [tensor for tensor in outputs if id(tensor.untyped_storage()) not in sources]
        for tensor in made:
            self._watch(tensor.untyped_storage())
        if (made and inputs) or func._schema.is_mutable:  # else a view, or an empty tensor
            self._now.flops.append(_matrix_flops(func, args, kwargs, out))
            self._now.traffic.append(sum(map(_num_bytes, inputs)) + sum(map(_num_bytes, made)))
        return out

    def _watch(self, storage: torch.UntypedStorage, *, counted: bool = True) -> None:
        key = id(storage)  # torch keeps one Python object for a storage as long as it lives
        if key in self._held:
            return
        size = storage.nbytes() if counted else 0

        def freed(_: Any) -> None:
            del self._held[key]
            if key in self._gradients:
                self._gradients.remove(key)
                self._event(0, -size)
            elif size:
                self._event(-size, 0)

        self._held[key] = weakref.ref(storage, freed)
        if size:
            self._event(size, 0)

    def _event(self, held: int, gradients: int) -> None:
        self._now.held.append(held)
        self._now.gradients.append(gradients)
        self._held_bytes += held + gradients
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)


class AsOnCuda(TorchFunctionMode):
    """Send meta tensors the way CUDA tensors go: fused attention by the flash kernel, and autocast's types if asked."""

    def __init__(self, lower: torch.dtype | None) -> None:
        super().__init__()
        self._lower = lower
        self._cache: dict[int, Tensor] | None = {}

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function under this mode, wherever it is called from."""

        def wrapped(*args: Any) -> Any:
            with self:
                return function(*args)

        return wrapped

    def end_of_forward(self) -> None:
        """Forget the weights cast so far, and keep none from here on: autocast's memory ends with the forward pass."""
        self._cache = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._lower is not None and func in _LOWER:
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs))
        elif self._lower is not None and func in _UPPER:
            args, kwargs = tree_map_only(Tensor, _float, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _attend_as_on_cuda(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if self._cache is None or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self._lower)
        if id(tensor) not in self._cache:
            self._cache[id(tensor)] = tensor.to(self._lower)
        return self._cache[id(tensor)]


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _attend_as_on_cuda(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """The fused kernel that CUDA chooses: flash in half precision, memory-efficient in fp32; rows of 16 bytes."""
    padding = -q.shape[-1] % _FLASH_MULTIPLE
    if padding:
        q, k, v = (F.pad(tensor, (0, padding)) for tensor in (q, k, v))
    if q.dtype == torch.float32 or q.shape[-1] > _FLASH_WIDTH:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


def _num_bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _matrix_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the operations of a matrix product; 0 of depthwise convolutions, which memory bounds."""
    count = flop_registry.get(func._overloadpacket)
    if count is None:
        return 0
    if "convolution" in str(func) and _groups(func, args) > 1:
        return 0
    return int(count(*args, **kwargs, out_val=out))


def _groups(func: Any, args: Any) -> int:
    names = [argument.name for argument in func._schema.arguments]
    return int(args[names.index("groups")])
