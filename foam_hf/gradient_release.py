"""Gradient release: a weight is updated inside the backward pass, once its gradient is whole; then that is freed.

So gradients never exist all at once. The arithmetic is that of ``FOAM.step``, and so are the bits.
"""

from __future__ import annotations

import logging
import math
import numbers
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foam_hf.launches import ParameterPlan
from foam_hf.optimizer import FOAM
from foam_hf.places import is_sharded

logger = logging.getLogger("foam_hf")

_active: weakref.WeakSet[GradientRelease] = weakref.WeakSet()  # a release lives as long as its hooks


def enable_gradient_release(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None = None
) -> GradientRelease:
    """Let ``loss.backward()`` update the weights of ``model``, each once its gradient is whole, and free the gradient.

    The training loop stays as it is, with one ``optimizer.step()`` after each backward pass: it ends the step, and
    updates what got its gradient in another way. Without clipping, the weights get the bits that they would get
    without release. The learning rate that counts is the one during the backward pass. Weights used in several places
    (tied embeddings) wait for all of them, so their gradients live longer. A model compiled as a whole returns all
    gradients at once.

    Call it when the model is on its device: ``model.to()`` drops the hooks of quantized weights.

    Args:
        model: holds every parameter of ``optimizer``; names them in messages.
        optimizer: a FOAM, or accelerate's wrapper of one.
        max_grad_norm: bounds the L2 norm of each gradient on its own, as the norm of all is known too late. ``None``
            or 0: no clipping.

    Returns:
        a handle: ``remove()`` restores the ordinary backward pass, ``grad_norm`` is the norm of all gradients of the
        last backward pass.

    Raises:
        TypeError: the optimizer is not FOAM, or ``max_grad_norm`` is not a number.
        ValueError: several processes or GPUs share the gradients, weights are sharded, a parameter of the optimizer is
            not the model's, or ``max_grad_norm`` is negative.
        RuntimeError: release is enabled for one of these parameters already.
    """
    inner: Any = optimizer
    while not isinstance(inner, FOAM) and hasattr(inner, "optimizer"):  # accelerate's wrapper
        inner = inner.optimizer
    if not isinstance(inner, FOAM):
        raise TypeError(f"gradient release updates by FOAM's rule: got {type(inner).__name__}; expected foam_hf.FOAM")
    refuse_distributed(model)
    _check_norm(max_grad_norm)
    return GradientRelease(model, inner, max_grad_norm or 0.0)


def refuse_distributed(model: nn.Module) -> None:
    """Raise ValueError if gradients have to meet those of other devices before an update."""
    wrapper = type(model).__name__
    # By name: torch.distributed may be missing.
    found = wrapper if wrapper in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel") else None
    if any(is_sharded(p) for p in model.parameters()):
        found = "weights sharded into DTensors"
    distributed = torch.distributed
    if found is None and distributed.is_available() and distributed.is_initialized():
        size = distributed.get_world_size()
        found = f"{size} processes" if size > 1 else None
    if found is not None:
        raise ValueError(
            "gradient release updates a weight before its gradient could be averaged with those of other devices: "
            f"got {found}; expected one process with one GPU, or training without gradient release"
        )


def _check_norm(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"max_grad_norm is not a number: got {value!r}; expected a number >= 0, or None")
    if math.isnan(value) or value < 0:
        raise ValueError(f"max_grad_norm is out of range: got {value!r}; expected a number >= 0, or None")


class GradientRelease:
    """The hooks of a model's parameters; made by :func:`enable_gradient_release`."""

    def __init__(self, model: nn.Module, optimizer: FOAM, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm
        self._optimizer = optimizer
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._check(optimizer)
        self._places = _places(optimizer)
        self._plans: dict[int, ParameterPlan] = {}
        self._updated: set[int] = set()  # parameters that this step has updated
        self._norms: list[Tensor] = []
        self._warned = False
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._update)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        _active.add(self)

    def remove(self) -> None:
        """Restore the ordinary backward pass. What the last one has updated stays updated."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._plans.clear()
        _active.discard(self)

    @property
    def grad_norm(self) -> Tensor | None:
        """The L2 norm of all gradients since the last ``optimizer.step()``, before clipping, float32 of one element.

        None if there were none, or without ``max_grad_norm``: measuring costs a pass over each gradient.
        """
        norms = self._norms
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])) if norms else None

    @property
    def unfinished(self) -> int:
        """How many parameters were updated since the last ``optimizer.step()``."""
        return len(self._updated)

    def _check(self, optimizer: FOAM) -> None:
        params = list(optimizer._parameters())
        foreign = [tuple(p.shape) for p in params if id(p) not in self._names]
        if foreign:
            raise ValueError(
                f"{len(foreign)} of the optimizer's {len(params)} parameters are not the model's, the first of shape "
                f"{foreign[0]}; expected the model that the optimizer was made for, after all changes of its weights"
            )
        ours = {id(p) for p in params}
        if any(ours & {id(p) for p in other._optimizer._parameters()} for other in _active):
            raise RuntimeError(
                "gradient release is enabled for these parameters already, and would update them twice; expected "
                "remove() of the first handle before"
            )

    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        """The hook: update ``p`` and free its gradient."""
        if p.grad is None:
            return  # another hook took it
        if id(p) in self._updated:
            raise RuntimeError(
                f"{self._names.get(id(p), 'a parameter')} got a second gradient before optimizer.step(), and gradient "
                "release has updated it with the first: several backward passes cannot add up. Expected one backward "
                "pass for each optimizer.step(), also after one that failed or whose batch is skipped; and "
                "use_reentrant=False where gradient checkpointing meets a weight that several layers share"
            )
        if id(p) not in self._places:
            self._places = _places(self._optimizer)  # a group was added
        index, stream = self._places[id(p)]
        group = self._optimizer.param_groups[index]  # load_state_dict makes new ones
        scale = self._clipping(p.grad) if self.max_grad_norm else None
        self._plans[id(p)] = self._optimizer._step_alone(p, group, stream, self._plans.get(id(p)), scale)
        self._updated.add(id(p))
        p.grad = None

    def _clipping(self, grad: Tensor) -> Tensor:
        """What to divide ``grad`` by; nothing is read back from the device."""
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        self._norms.append(norm)
        scale = norm.add(1e-6).div_(self.max_grad_norm).clamp_min_(1.0)  # 1e-6 as in torch's clip_grad_norm_
        return scale.add_(norm, alpha=0.0)  # NaN where the norm is infinite: no zeros in place of the finite elements

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if hasattr(optimizer, "grad_scale"):  # which a GradScaler sets for the time of the step
            raise RuntimeError(
                "gradient release cannot be combined with a GradScaler: the weights were updated with gradients of "
                "the scaled loss; expected bfloat16 or float32 without a scaler, or training without gradient release"
            )
        closure = kwargs["closure"] if "closure" in kwargs else next(iter(args[1:]), None)
        if closure is None:
            self._update_rest()
            return None

        def evaluate() -> Any:
            loss = closure()
            self._update_rest()
            return loss

        return (args[0], evaluate), {}

    def _update_rest(self) -> None:
        """Update what has a gradient that no hook has seen."""
        rest = [p for p in self._optimizer._parameters() if p.grad is not None]
        for p in rest:
            self._update(p)
        if rest and not self._warned:
            self._warned = True
            logger.warning(
                f"gradient release: {len(rest)} gradients were kept until optimizer.step(), the first of them "
                f"{self._names.get(id(rest[0]), 'of a parameter')}, as no hook was there to free them. Weights that "
                "model.to() has moved, if quantized, and those unfrozen or added later need enable_gradient_release "
                "anew; the updates are right, but memory is not saved"
            )

    def _after_step(self, *_: Any) -> None:
        self._updated.clear()
        self._norms.clear()


def _places(optimizer: FOAM) -> dict[int, tuple[int, int]]:
    """By parameter: the number of its group, and its own among all parameters, which is its random stream."""
    places: dict[int, tuple[int, int]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            places[id(p)] = index, len(places)
    return places
