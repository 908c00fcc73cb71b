"""Packs of gradients: those of several parameters in one tensor, which processes add up."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_ALIGNMENT = 16  # elements; kernels read aligned addresses faster


def bytes_of(p: Tensor) -> int:
    return p.numel() * p.element_size()


def flat_gradients(params: list[Tensor], references: int) -> tuple[Tensor, list[Tensor]]:
    """The gradients of ``params``, which lose them, in one tensor of their dtype, and each one's part of it.

    A missing gradient is zeros. The gradient of a single parameter is not copied if it is contiguous, and if its
    storage has no more than so many ``references``: autograd hands out views, and may still read what is behind them.
    """
    with torch._C.DisableTorchFunctionSubclass():  # or tensor subclasses would run Python code
        grads = [p.grad for p in params]
        own = len(params) == 1 and grads[0] is not None and _references_of(grads[0]) <= references
        for p in params:
            p.grad = None
    dtype, device = params[0].dtype, params[0].device
    if own and grads[0] is not None and grads[0].dtype == dtype and grads[0].is_contiguous():
        return grads[0].view(-1), [grads[0]]
    sizes = [-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in params]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
    parts = [part[: p.numel()].view(p.shape) for part, p in zip(flat.split(sizes), params, strict=True)]
    pairs = [(part, grad) for part, grad in zip(parts, grads, strict=True) if grad is not None]
    if pairs:
        torch._foreach_copy_([part for part, _ in pairs], [grad for _, grad in pairs])
    return flat, parts


@functools.cache
def references() -> tuple[int, int]:
    """How many references the storage of a gradient has that is nobody else's: later on, and in its own hook.

    In the hook of a parameter autograd may hold the gradient too, which depends on the version of torch.
    """
    found: list[int] = []
    with torch.inference_mode(False), torch.enable_grad():
        p = torch.ones(2, 2, requires_grad=True)
        p.register_post_accumulate_grad_hook(lambda p: found.append(_references_of(p.grad)))
        torch.nn.functional.linear(torch.ones(2, 2), p).sum().backward()
    return _references_of(p.grad), found[0]


def _references_of(x: Tensor | None) -> int:
    """How many tensors and other objects refer to the storage of ``x``."""
    return 0 if x is None else int(torch._C._storage_Use_Count(x.untyped_storage()._cdata))
