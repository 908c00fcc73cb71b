"""``linear`` with an INT8 weight, which is dequantized in forward and again in backward; no floating copy is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foam_hf.int8.codes import dequantize

if TYPE_CHECKING:
    from foam_hf.int8.weight import Int8Weight


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` with autocast; the weight's gradient has the weight's outer dtype.

    Args:
        x: (..., n), any floating dtype that ``torch.nn.functional.linear`` takes with the weight's.
        weight: (m, n).
        bias: (m,).

    Raises:
        RuntimeError: as ``torch.nn.functional.linear``.
    """
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # is_autocast_enabled raises for meta
    if autocast and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    else:
        dtype = weight.dtype if torch.compiler.is_compiling() else weight.outer_dtype
    if not torch.is_grad_enabled():  # for example in the first pass of a checkpointed layer
        return torch.nn.functional.linear(x, _floating(weight, dtype), bias)
    if in_backward() and weight.requires_grad and not torch.compiler.is_compiling():
        return _Linear.apply(_Kept.apply(x, weight), weight, bias, dtype, True)
    return _Linear.apply(x, weight, bias, dtype, False)


def _floating(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():
        return dequantize(weight.codes, weight.scales, dtype)
    return weight.dequantize(dtype)  # which an offloaded weight does while no other thread brings another layer


def in_backward() -> bool:
    """Whether this thread runs a backward pass: a forward pass is then the second one of a checkpointed layer."""
    return bool(torch._C._current_graph_task_id() != -1)


class _Kept(torch.autograd.Function):
    """Saves the input of a linear layer for the gradient of its weight, and returns it.

    Checkpointing ends the second forward pass of a layer when the last tensor is saved that the backward pass needs. A
    Function saves tensors after its ``forward``, so the last linear layer would have computed a product in vain.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Linear(torch.autograd.Function):
    """Keeps the weight as an attribute of ``ctx``: as a saved tensor, checkpointing would detach it and inspect it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None, dtype: torch.dtype, kept: bool
    ) -> Tensor:
        if torch.compiler.is_compiling():
            ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        else:
            ctx.keeper = x.grad_fn if kept else None  # not ctx itself: a cycle would keep its tensors alive
            if not kept:
                ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
            ctx.weight, ctx.version = weight, _version(weight)
        out = torch.nn.functional.linear(x, _floating(weight, dtype), bias)
        if not torch.compiler.is_compiling() and out._is_view():
            # autograd refuses `out += 1` for a view that a Function returns; this has the same memory and is no view
            out = torch.ops.aten._unsafe_view(out, out.shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # of a backward pass with create_graph=True
            return _gradients_once(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x: Tensor | None = None
    of_weight: Tensor | None = None
    if torch.compiler.is_compiling():
        x, weight = ctx.saved_tensors
        outer = weight.dtype
        if ctx.needs_input_grad[0]:
            of_x = grad @ dequantize_in_backward(weight.codes, weight.scales, grad)
    else:
        (x,), outer = (ctx.keeper or ctx).saved_tensors, ctx.weight.outer_dtype
        if ctx.needs_input_grad[0]:
            of_x = grad @ _unchanged(ctx, grad.dtype)
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[1]:
        of_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        of_weight = of_weight if of_weight.dtype == outer else of_weight.to(outer)
    return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


# Its context managers take the host as long as a product does, so it stands only where it is needed.
_gradients_once = torch.autograd.function.once_differentiable(_gradients)


def _version(weight: Tensor) -> int:
    """torch's count of writes to ``weight``; 0 for a weight made in inference mode, for which torch has no count."""
    with torch._C.DisableTorchFunctionSubclass():
        return 0 if weight.is_inference() else weight._version


def _unchanged(ctx: Any, dtype: torch.dtype) -> Tensor:
    """The dequantized weight of the forward pass; RuntimeError if it was written since, as for a saved tensor."""
    weight = ctx.weight
    version = _version(weight)
    if version != ctx.version:
        raise RuntimeError(
            f"an INT8 weight of shape {tuple(weight.shape)}, needed for gradient computation, has been modified by an "
            f"inplace operation: it is at version {version}; expected version {ctx.version}"
        )
    return weight.dequantize(dtype)


@torch.library.custom_op("foam_hf::dequantize_in_backward", mutates_args=())
def dequantize_in_backward(codes: Tensor, scales: Tensor, grad: Tensor) -> Tensor:
    """Dequantize in the dtype of ``grad``. The argument ``grad`` keeps a compiler from reusing forward's copy."""
    return dequantize(codes, scales, grad.dtype)


@dequantize_in_backward.register_fake
def _(codes: Tensor, scales: Tensor, grad: Tensor) -> Tensor:
    return grad.new_empty(codes.shape)
