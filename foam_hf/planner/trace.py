"""Follows the memory of one training step without computing it: the model's own code, run on the meta device.

Every operation of PyTorch passes by, forward and backward, so every tensor is counted from its making to its end, as
the caching allocator of CUDA would: what autograd keeps, what checkpointing drops, what only lives inside a layer.
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

from foam_hf.optimizer.release import Bucket, waiting_limit
from foam_hf.planner.cuda_rules import CudaRules, autocast_on_meta

_ALIGNMENT = 512  # the caching allocator rounds up to it
_LARGEST_VALUE = 2**20  # elements


@dataclass(frozen=True)
class StepTrace:
    """Memory of one step on top of weights, buffers and optimizer state, in bytes.

    Attributes:
        levels: what is alive after each allocation, in their order: activations, temporary tensors, gradients.
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
    """Run forward and backward of `model`, which is on the meta device, and is left with its gradients at None.

    Args:
        model: returns a mapping with "loss".
        inputs: keyword arguments of its forward pass, made by `with_value`.
        autocast: as Trainer's `bf16` and `fp16` run it over float32 weights; outputs are raised to float32.
        releases_gradients: each is freed as soon as it is complete.
        keeps_gradients: those of an earlier micro-batch are there from the start.

    Raises:
        DataDependentError: the model's code asks for a value that follows from its weights.
    """
    ledger = _Ledger([*model.parameters(), *model.buffers()])
    rules = CudaRules(autocast)
    releasing = _released(model) if releases_gradients else contextlib.nullcontext()
    with ledger, rules, autocast_on_meta(), releasing:
        ledger.count(inputs.values())
        if keeps_gradients:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        loss = _loss(model, inputs, rules)
        _backward(loss)
        del loss
    for parameter in model.parameters():
        parameter.grad = None
    return StepTrace(ledger.levels)


class DataDependentError(RuntimeError):
    """The code of the model depends on a value that the meta device does not have."""


def _loss(model: nn.Module, inputs: dict[str, Tensor], rules: CudaRules) -> Tensor:
    with rules.forward_pass():
        outputs = model(**inputs)
    if rules.autocast is not None:  # as accelerate does
        outputs = {name: _raised(value) for name, value in outputs.items()}
    return outputs["loss"]


def _backward(loss: Tensor) -> None:
    """`loss.backward()`, which is a function to torch, so that `rules` would not be in force inside it."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def _released(model: nn.Module) -> Iterator[None]:
    """Free gradients when `GradientRelease` does."""
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


class _Ledger(TorchDispatchMode):
    """Counts each storage on the meta device from the operation that makes it to its end; `known` ones not at all.

    Small tensors that follow from the inputs alone (positions, masks) are computed on the CPU as well: code that
    branches on their values goes the way it goes in training.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.levels = [0]
        self._live = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, Any] = {}
        for tensor in _plain(known):
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(hasattr(cls, "__tensor_flatten__") for cls in types):
            return NotImplemented  # a subclass takes it apart, and its parts come back here
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return _value(args[0]).item()
        result = _run(func, args, kwargs)
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self._live += (extra := _workspace(func, args))
        self.levels.append(self._live)
        self._live -= extra
        _follow(func, args, kwargs, result)
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        for tensor in _plain(tensors):
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
    """`value` on the meta device, remembered there."""
    tensor = torch.empty_like(value, device="meta")
    tensor._foam_value = value  # type: ignore[attr-defined]
    return tensor


def _value(tensor: Tensor) -> Tensor:
    value = tensor if not tensor.is_meta else getattr(tensor, "_foam_value", None)
    if value is None:
        raise DataDependentError("its code asks for a value that only the weights can tell")
    return value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func` on the meta device; where the shape of its result depends on values, as on a device that has them."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        return tree_map_only(Tensor, with_value, _on_cpu(func, args, kwargs))


def _follow(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
    """Compute on the CPU as well what `func` did, if it is small and all that it is made of is known."""
    if not isinstance(result, Tensor) or not result.is_meta or result.numel() > _LARGEST_VALUE:
        return
    try:
        result._foam_value = _on_cpu(func, args, kwargs)  # type: ignore[attr-defined]
    except DataDependentError:
        if hasattr(result, "_foam_value"):  # overwritten in place
            del result._foam_value


def _on_cpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(Tensor, _value, (args, kwargs))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return func(*args, **kwargs)


def _plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that have storages: subclasses in parts."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _plain(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _workspace(func: Any, args: Any) -> int:
    """What a kernel allocates inside itself: attention sums the gradient of the query in float32."""
    if "attention_backward" not in func.name():
        return 0
    query = args[1]
    return _rounded(4 * query.numel())
