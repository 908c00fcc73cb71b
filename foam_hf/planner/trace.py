"""Traces the memory of one training step by running the model's own code on the meta device.

Every operation of PyTorch is intercepted, forward and backward. So each tensor is counted from its allocation to its
end, as CUDA's caching allocator does: tensors that autograd keeps, that checkpointing frees, and temporary ones.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from foam_hf.optimizer.buckets import Bucket, waiting_limit
from foam_hf.planner.cuda_rules import GROUPED_PRODUCT, CudaRules, autocast_on_meta, grouped_product

_ALIGNMENT = 512  # bytes; the caching allocator rounds sizes up to a multiple of it
_LARGEST_VALUE = 2**20  # elements; larger tensors are not computed on the CPU


@dataclass(frozen=True)
class StepTrace:
    """The memory of one step beyond weights, buffers and optimizer state, in bytes.

    Attributes:
        levels: bytes alive after each allocation, in order: activations, temporary tensors and gradients.
    """

    levels: list[int]

    @property
    def peak(self) -> int:
        return max(self.levels)


def trace_step(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    autocast: torch.dtype | None = None,
    releases_gradients: bool = False,
    keeps_gradients: bool = False,
) -> StepTrace:
    """Run forward and backward of `model` and count its allocations. Afterwards its gradients are None.

    Args:
        model: on the meta device; returns a mapping with "loss".
        inputs: keyword arguments of its forward pass, made by `with_value`.
        autocast: the dtype of Trainer's `bf16` or `fp16` over float32 weights; outputs are cast to float32.
        releases_gradients: each gradient is freed as soon as it is complete.
        keeps_gradients: gradients of an earlier micro-batch exist from the start.

    Raises:
        DataDependentError: the model's code needs a value that depends on its weights.
    """
    counter = _AllocationCounter([*model.parameters(), *model.buffers()])
    rules = CudaRules(autocast)
    releasing = _releasing_gradients(model) if releases_gradients else contextlib.nullcontext()
    with counter, rules, autocast_on_meta(), releasing:
        counter.count(inputs.values())
        if keeps_gradients:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        loss = _forward_loss(model, inputs, rules)
        _backward(loss)
        del loss
    for parameter in model.parameters():
        parameter.grad = None
    return StepTrace(counter.levels)


class DataDependentError(RuntimeError):
    """The code of the model needs a value, and tensors on the meta device have none."""


def _forward_loss(model: nn.Module, inputs: dict[str, Tensor], rules: CudaRules) -> Tensor:
    with rules.forward_pass():
        outputs = model(**inputs)
    if rules.autocast is not None:  # accelerate casts the outputs too
        outputs = {name: _to_float32(value) for name, value in outputs.items()}
    return outputs["loss"]


def _backward(loss: Tensor) -> None:
    """Run the engine behind `loss.backward()`: inside of `loss.backward()` itself torch disables `CudaRules`."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def _releasing_gradients(model: nn.Module) -> Iterator[None]:
    """Free each gradient at the moment when `GradientRelease` frees it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    bucket = Bucket(waiting_limit(trained))

    def release(parameter: Tensor) -> None:
        if parameter.grad is not None:
            for each in bucket.add(parameter, parameter.grad):
                each.grad = None

    hooks = [p.register_post_accumulate_grad_hook(release) for p in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _AllocationCounter(TorchDispatchMode):
    """Counts the bytes of all storages on the meta device that are alive, except those of the `known` tensors.

    Small tensors that depend on the inputs alone (positions, masks) are computed on the CPU as well. So code that
    branches on their values takes the same branch as in training.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.levels = [0]
        self._live = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, Any] = {}
        for tensor in _tensors_with_storage(known):
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(hasattr(cls, "__tensor_flatten__") for cls in types):
            return NotImplemented  # the subclass calls the operation on its inner tensors, which comes here again
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return _known_value(args[0]).item()
        result = _run_on_meta(func, args, kwargs)
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self._live += (extra := _workspace(func, args))
        self.levels.append(self._live)
        self._live -= extra
        _remember_value(func, args, kwargs, result)
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        for tensor in _tensors_with_storage(tensors):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.is_meta and key not in self._sizes:
                self._sizes[key] = _rounded(storage.nbytes())
                self._watched[key] = weakref.ref(storage, functools.partial(self._forget, key))
                self._live += self._sizes[key]

    def _forget(self, key: int, _: Any) -> None:
        self._live -= self._sizes.pop(key)
        self._watched.pop(key)


def with_value(value: Tensor) -> Tensor:
    """A tensor on the meta device, like `value`, that remembers `value`."""
    tensor = torch.empty_like(value, device="meta")
    tensor._foam_value = value  # type: ignore[attr-defined]
    return tensor


def _known_value(tensor: Tensor) -> Tensor:
    value = tensor if not tensor.is_meta else getattr(tensor, "_foam_value", None)
    if value is None:
        raise DataDependentError("its code asks for a value that depends on the weights")
    return value


def _run_on_meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call `func` on the meta device, or on the CPU with remembered values if the result's shape depends on values."""
    if func is GROUPED_PRODUCT and args[0].is_meta:
        return grouped_product(*args, **kwargs)
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        return tree_map_only(Tensor, with_value, _on_cpu(func, args, kwargs))


def _remember_value(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
    """Compute a small `result` on the CPU as well, if the values of all its inputs are known."""
    if not isinstance(result, Tensor) or not result.is_meta or result.numel() > _LARGEST_VALUE:
        return
    try:
        result._foam_value = _on_cpu(func, args, kwargs)  # type: ignore[attr-defined]
    except DataDependentError:
        if hasattr(result, "_foam_value"):  # an operation in place has overwritten it
            del result._foam_value


def _on_cpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(Tensor, _known_value, (args, kwargs))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return func(*args, **kwargs)


def _tensors_with_storage(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors themselves, or for a subclass its inner tensors."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _tensors_with_storage(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _workspace(func: Any, args: Any) -> int:
    """The bytes that a kernel allocates for itself: attention's backward sums the query's gradient in float32."""
    if "attention_backward" not in func.name():
        return 0
    query = args[1]
    return _rounded(4 * query.numel())
