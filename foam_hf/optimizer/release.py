"""Gradient release: weights are updated inside the backward pass, and their gradients are freed at once.

So all gradients never exist at the same time. A few of them are collected in a bucket and share a launch, because a
launch for each of hundreds of weights would take the host longer than the GPU. The updates have the same bits as those
of ``FOAM.step``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foam_hf.optimizer.buckets import gradients, waiting_limit
from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.members import parameters_of
from foam_hf.optimizer.micro_batches import check_accumulation
from foam_hf.optimizer.processes import Processes
from foam_hf.optimizer.release_checks import (
    check_clip,
    check_model,
    refuse_again,
    warn_of_hookless,
    warn_of_kept,
    warn_of_unfinished,
)
from foam_hf.optimizer.release_hooks import Hooks
from foam_hf.optimizer.release_updates import Updates
from foam_hf.optimizer.releases import active
from foam_hf.rules.all import rule_of


def enable_gradient_release(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float | None = None,
    clip_by: str = "all",
    accumulation: int = 1,
    process_group: Any = None,
    broadcast_buffers: bool = True,
) -> GradientRelease:
    """Let ``loss.backward()`` update the weights of ``model`` and free each gradient after its update.

    The training loop stays as it is, with one ``optimizer.step()`` after each backward pass, or after as many as
    ``accumulation``. That call ends the step, and updates parameters whose gradient was kept. Gradients are collected
    until together they take as many bytes as the largest of them alone (256 MiB at most), so no more than twice that
    is alive. Without clipping and accumulation, the weights have the same bits as without release. The learning rate
    is the one during the backward pass. A weight that is used in several places (tied embeddings) is updated after the
    last of its gradients. A model compiled as a whole returns all gradients at once.

    In several processes gradients are averaged before an update. FSDP2 does that itself. From a
    ``DistributedDataParallel`` this function takes it over, and frees its buckets, which hold all gradients;
    ``remove()`` gives it back. They never exist if the model is not wrapped and ``process_group`` is given.

    Call it when the model is on its device: ``model.to()`` drops the hooks of quantized weights.

    Args:
        model: has every parameter of ``optimizer``; messages use its names.
        optimizer: a FOAM, or accelerate's wrapper of one.
        max_grad_norm: the largest L2 norm, of all gradients together. ``None`` or 0 turns clipping off. The norm is
            known only when most weights are updated: :mod:`foam_hf.optimizer.clipping` says what they are updated by.
        clip_by: ``"all"``, or ``"weight"`` to bound the norm of each gradient alone.
        accumulation: the most backward passes before an ``optimizer.step()``, whose gradients add up. Each updates the
            weights by its share of the step, see :mod:`foam_hf.rules.micro_batches`. In several processes each is
            averaged at once, also inside of DDP's ``no_sync`` and after FSDP2's ``set_requires_gradient_sync(False)``,
            and all ranks must make as many. Set the handle's ``accumulation`` before a step that has fewer: otherwise
            its denominators are those of a step with as many as told.
        process_group: average gradients over it, as DDP does, for a model that nothing has wrapped. Weights and
            buffers are first overwritten by those of its first rank. All ranks must call the function, and ``step``.
        broadcast_buffers: with ``process_group``: overwrite buffers again after each step, as DDP does.

    Returns:
        a handle. ``remove()`` restores the ordinary backward pass, and ``grad_norm`` is the norm of all gradients of
        the last backward pass.

    Raises:
        TypeError: the optimizer is not FOAM, or ``max_grad_norm`` or ``accumulation`` is not a number.
        ValueError: nothing averages the gradients of several processes, DDP was told to do more than to average,
            DeepSpeed's ZeRO holds the weights, a parameter of the optimizer is not the model's, ``max_grad_norm`` is
            negative, or micro-batches cannot be added up by a rule.
        RuntimeError: release is enabled for one of these parameters already.
    """
    inner: Any = optimizer
    while not isinstance(inner, FOAM) and hasattr(inner, "optimizer"):  # accelerate's wrapper
        inner = inner.optimizer
    if not isinstance(inner, FOAM):
        raise TypeError(f"gradient release updates by FOAM's rule: got {type(inner).__name__}; expected foam_hf.FOAM")
    check_clip(max_grad_norm, clip_by, accumulation)
    clip = max_grad_norm or 0.0, clip_by
    return GradientRelease(model, inner, clip, accumulation, process_group, broadcast_buffers)


class GradientRelease:
    """The hooks of a model's parameters; made by :func:`enable_gradient_release`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: FOAM,
        clip: tuple[float, str] = (0.0, "all"),
        accumulation: int = 1,
        process_group: Any = None,
        broadcast_buffers: bool = True,
    ) -> None:
        self._optimizer = optimizer
        self._names = {id(p): name for name, p in model.named_parameters()}
        check_model(model, optimizer, self._names)
        check_accumulation(optimizer, accumulation)
        self._updates = Updates(optimizer, *clip)
        params = parameters_of(optimizer.param_groups)
        self._processes = Processes(model, params, process_group, broadcast_buffers, accumulation > 1)
        self._warned = False
        # Small weights, whose gradients are cheaper to keep than what another way would take.
        self._keeps = accumulation > 1 or self._updates.clip_all is not None
        trained = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        released = [p for p, group in trained if not (self._keeps and rule_of(p, group)[0].plain)]
        ids = {*map(id, released)}
        kept, limit = [p for p, _ in trained if id(p) not in ids], waiting_limit(p for p, _ in trained)
        self._hooks = Hooks(
            self._updates,
            self._processes,
            self._names,
            released=released,
            kept=kept,
            limit=limit,
            accumulation=accumulation,
        )
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._hooks.on_gradient) for p, _ in trained
        ]
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_pre_hook(self._before_state_dict),
            optimizer.register_load_state_dict_post_hook(lambda _: self._forget()),
        ]
        active.add(self)
        warn_of_kept(kept, limit)

    def remove(self) -> None:
        """Restore the ordinary backward pass. Weights that the last one has updated stay updated."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooks.close()
        self._updates.close()
        self._processes.close()
        active.discard(self)

    @property
    def accumulation(self) -> int:
        """How many backward passes the next step has, at most; it can be set between steps."""
        return self._hooks.accumulation

    @accumulation.setter
    def accumulation(self, count: int) -> None:
        check_accumulation(self._optimizer, count)
        if count > 1 and not self._keeps:
            raise ValueError(
                f"gradient release was enabled for one backward pass a step: got accumulation={count}; expected "
                "enable_gradient_release(..., accumulation=N) with the largest N there will be"
            )
        if self._updates.taken:
            raise RuntimeError("accumulation cannot change between the first backward pass of a step and its end")
        self._hooks.accumulation = count

    @property
    def grad_norm(self) -> Tensor | None:
        """The L2 norm of all gradients since the last ``optimizer.step()``, before clipping, float32 of one element.

        None if there were none, or without ``max_grad_norm``, because the norm costs a pass over each gradient. With
        ``accumulation`` it is an estimate, whose relative error is about the root of two over the number of blocks of
        the weights that make it up.
        """
        return self._updates.norm()

    @property
    def unfinished(self) -> int:
        """How many parameters were updated since the last ``optimizer.step()``."""
        return len(self._updates.taken)

    def finish(self) -> None:
        """End a backward pass before ``optimizer.step()``, which does it otherwise. All ranks must call it.

        It updates weights whose gradient this rank lacks and others have. With several backward passes a step, call it
        after one that raised an error, if the training goes on.
        """
        self._hooks.finish()

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if hasattr(optimizer, "grad_scale"):  # a GradScaler sets it during the step
            raise RuntimeError(
                "gradient release cannot be combined with a GradScaler: the weights were updated with gradients of "
                "the scaled loss; expected bfloat16 or float32 without a scaler, or training without gradient release"
            )
        closure = kwargs["closure"] if "closure" in kwargs else next(iter(args[1:]), None)
        if closure is None:
            self._end()
            return None

        def evaluate() -> Any:
            try:
                loss = closure()
            except BaseException:
                self._forget()
                raise
            self._end()
            return loss

        return (args[0], evaluate), {}

    def _before_state_dict(self, _: Any) -> None:
        if self._updates.taken and (self._updates.micros > 1 or self._updates.clip_all is not None):
            warn_of_unfinished(len(self._updates.taken))

    def _end(self) -> None:
        """Update what is left. The next backward pass can begin a new step even if this raises an error."""
        try:
            self._update_rest()
            self._processes.send_buffers()
        finally:
            self._updates.end()
            self._forget()

    def _forget(self) -> None:
        """Forget the current step, so that the next backward pass begins a new one."""
        self._hooks.forget()
        self._updates.forget()

    @torch.no_grad()
    def _update_rest(self) -> None:
        """Update parameters whose gradient was kept, and complete what micro-batches have begun."""
        self._hooks.update_waiting()  # a backward pass that failed leaves gradients in buckets
        averaging = self._processes.averaging
        if not self._updates.taken and not (averaging is not None and averaging.began):
            self._hooks.begin()
        self._hooks.finish()
        params = [*parameters_of(self._optimizer.param_groups)]
        rest = [p for p, grad in zip(params, gradients(params), strict=True) if grad is not None]
        unkept = [p for p in rest if not self._hooks.keeps(p)]
        if unkept:
            refuse_again(unkept, self._updates.taken, self._names, self._hooks.excess)
            self._processes.refuse_rest(unkept, self._names)
        self._updates.finish(rest)
        moves = any(float(group["lr"]) for group in self._optimizer.param_groups)
        if unkept and moves and not self._warned:  # torch.distributed.checkpoint makes a step at a rate of 0
            self._warned = True
            warn_of_hookless(unkept, self._names)
