"""Gradient release: weights are updated inside the backward pass, and their gradients are freed at once.

So all gradients never exist at the same time. A few of them are collected in a bucket and share a launch, because a
launch for each of hundreds of weights would take the host longer than the GPU. The updates have the same bits as those
of ``FOAM.step``.
"""

from __future__ import annotations

import logging
import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foam_hf.optimizer.buckets import Bucket, gradients, stream_of, waiting_limit
from foam_hf.optimizer.checks import check_gradient
from foam_hf.optimizer.clipping import ClipByAll, ClipByWeight, divisors, squares_of
from foam_hf.optimizer.deepspeed import is_partitioned
from foam_hf.optimizer.foam import FOAM, step_some
from foam_hf.optimizer.members import Micro, Numbering, numbering_of, parameters_of
from foam_hf.optimizer.micro_batches import Collected, check_accumulation
from foam_hf.optimizer.processes import Processes
from foam_hf.optimizer.releases import active
from foam_hf.optimizer.sharding import follow_placements, largest_share
from foam_hf.optimizer.step import PreparedStep
from foam_hf.rules.all import rule_of
from foam_hf.tensors.places import is_sharded, local

logger = logging.getLogger("foam_hf")


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
            weights by its share of the step, see :mod:`foam_hf.rules.micro_batches`.
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
            negative, or micro-batches cannot be added up by a rule or in several processes.
        RuntimeError: release is enabled for one of these parameters already.
    """
    inner: Any = optimizer
    while not isinstance(inner, FOAM) and hasattr(inner, "optimizer"):  # accelerate's wrapper
        inner = inner.optimizer
    if not isinstance(inner, FOAM):
        raise TypeError(f"gradient release updates by FOAM's rule: got {type(inner).__name__}; expected foam_hf.FOAM")
    _check_norm(max_grad_norm)
    if clip_by not in ("all", "weight"):
        raise ValueError(f"clip_by is not known: got {clip_by!r}; expected 'all' or 'weight'")
    if clip_by == "weight" and max_grad_norm and accumulation != 1:
        raise ValueError(
            "clip_by='weight' bounds the gradient of a whole step, and with several backward passes there are only "
            f"parts of it: got accumulation={accumulation}; expected clip_by='all', or accumulation=1"
        )
    check_accumulation(inner, accumulation)
    clip = max_grad_norm or 0.0, clip_by
    return GradientRelease(model, inner, clip, accumulation, process_group, broadcast_buffers)


def _check_norm(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"max_grad_norm is not a number: got {value!r}; expected a number >= 0, or None")
    if math.isnan(value) or value < 0:
        raise ValueError(f"max_grad_norm is out of range: got {value!r}; expected a number >= 0, or None")


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
        own = {id(p) for p in parameters_of(optimizer.param_groups)}
        if any(is_partitioned(p) and id(p) not in own for p in model.parameters() if p.requires_grad):
            raise ValueError(
                "gradient release does not run with DeepSpeed's ZeRO, which has moved the weights of this model into "
                "flat vectors; expected no gradient release, as ZeRO 2 and 3 themselves keep a part of the gradients "
                "alone, or a model that DeepSpeed does not train"
            )
        largest, clip_by = clip
        self._optimizer = optimizer
        self._clip_all = ClipByAll(optimizer, largest) if largest and clip_by == "all" else None
        self._clip_each = ClipByWeight(largest) if largest and clip_by == "weight" else None
        self._accumulation = accumulation
        self._micros = 1  # of the current step
        self._collected = Collected()
        self._norm: Tensor | None = None
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._check(optimizer)
        params = parameters_of(optimizer.param_groups)
        self._processes = Processes(model, params, process_group, broadcast_buffers)
        self._numbering: Numbering = {}  # of the current step, as groups may change between steps
        self._limit = waiting_limit(p for p in parameters_of(optimizer.param_groups) if p.requires_grad)
        self._buckets: dict[tuple[torch.device, Any], Bucket] = {}  # by device and stream
        self._prepared: dict[int, PreparedStep] = {}  # by the first parameter of a bucket
        self._used: dict[int, PreparedStep] = {}  # those of this step; older ones may hold state that was deleted
        if self._processes.averaging is not None and accumulation > 1:
            self._processes.close()
            raise _one_process_alone(accumulation)
        self._updated: dict[int, int] = {}  # id of a parameter -> how many gradients of it this step has taken up
        self._warned = False
        # Small weights, whose gradients are cheaper to keep than what another way would take.
        self._keeps = accumulation > 1 or self._clip_all is not None
        trained = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._released = [p for p, group in trained if not (self._keeps and rule_of(p, group)[0].plain)]
        released = {*map(id, self._released)}
        self._kept = {id(p) for p, _ in trained} - released
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._average) for p, _ in trained
        ]
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_pre_hook(self._warn_of_unfinished),
            optimizer.register_load_state_dict_post_hook(lambda _: self._forget()),
        ]
        active.add(self)
        self._warn_of_kept([p for p, _ in trained if id(p) in self._kept])

    def remove(self) -> None:
        """Restore the ordinary backward pass. Weights that the last one has updated stay updated."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._buckets.clear()
        self._prepared.clear()
        self._used.clear()
        self._collected = Collected()
        if self._processes.averaging is not None:
            self._processes.averaging.forget()
        self._processes.close()
        active.discard(self)

    @property
    def accumulation(self) -> int:
        """How many backward passes the next step has, at most; it can be set between steps."""
        return self._accumulation

    @accumulation.setter
    def accumulation(self, count: int) -> None:
        check_accumulation(self._optimizer, count)
        if count > 1 and self._processes.averaging is not None:
            raise _one_process_alone(count)
        if count > 1 and not self._keeps:
            raise ValueError(
                f"gradient release was enabled for one backward pass a step: got accumulation={count}; expected "
                "enable_gradient_release(..., accumulation=N) with the largest N there will be"
            )
        if self._updated:
            raise RuntimeError("accumulation cannot change between the first backward pass of a step and its end")
        self._accumulation = count

    @property
    def grad_norm(self) -> Tensor | None:
        """The L2 norm of all gradients since the last ``optimizer.step()``, before clipping, float32 of one element.

        None if there were none, or without ``max_grad_norm``, because the norm costs a pass over each gradient. With
        ``accumulation`` it is an estimate, whose relative error is about the root of two over the number of blocks of
        all weights.
        """
        if self._clip_each is not None:
            return self._clip_each.norm()
        if self._clip_all is not None and self._norm is None:
            found = squares_of(parameters_of(self._optimizer.param_groups))
            if self._micros > 1:
                found += self._collected.squares(self._optimizer)
            if (seen := self._clip_all.squares()) is not None:
                found.append(seen.reshape(1) * (0.0 if self._micros > 1 else 1.0))  # NaN stays NaN
            self._norm = torch.cat([x.to(found[0].device) for x in found]).sum().sqrt_() if found else None
        return self._norm

    @property
    def unfinished(self) -> int:
        """How many parameters were updated since the last ``optimizer.step()``."""
        return len(self._updated)

    def finish(self) -> None:
        """End a backward pass before ``optimizer.step()``, which does it otherwise. All ranks must call it.

        It updates weights whose gradient this rank lacks and others have.
        """
        averaging = self._processes.averaging
        if averaging is not None and averaging.unfinished:
            for params in averaging.finish():
                self._take_averaged(params)

    def _check(self, optimizer: FOAM) -> None:
        params = list(parameters_of(optimizer.param_groups))
        foreign = [tuple(p.shape) for p in params if id(p) not in self._names]
        if foreign:
            raise ValueError(
                f"{len(foreign)} of the optimizer's {len(params)} parameters are not the model's, the first of shape "
                f"{foreign[0]}; expected the model that the optimizer was made for, after all changes of its weights"
            )
        ours = {id(p) for p in params}
        if any(ours & {id(p) for p in parameters_of(other._optimizer.param_groups)} for other in active):
            raise RuntimeError(
                "gradient release is enabled for these parameters already, and would update them twice; expected "
                "remove() of the first handle before"
            )

    def _average(self, p: Tensor) -> None:
        """The hook of each parameter: send its gradient to the other processes, or collect it if it is complete."""
        averaging = self._processes.averaging
        self._norm = None  # somebody may have asked for it before this gradient
        if averaging is None or not averaging.averages(p):
            self._collect(p)
            return
        if not self._processes.reduces:
            raise RuntimeError(
                "gradient release averages every gradient at once, and frees it: got a backward pass inside of DDP's "
                "no_sync(); expected it outside, with one optimizer.step() for each backward pass"
            )
        if not self._updated and not averaging.began:
            self._begin()
        if id(p) not in self._numbering:
            return  # it was removed from the optimizer
        if id(p) in self._updated or averaging.has(p):
            raise RuntimeError(self._too_many(p))
        check_gradient(p, self._numbering[id(p)][1])
        if averaging.is_new_task():  # its end waits for what is on the way
            torch.autograd.Variable._execution_engine.queue_callback(self._update_waiting)
        for params in averaging.add(p):
            self._take_averaged(params)

    def _take_averaged(self, params: list[Tensor]) -> None:
        """Update ``params``, whose gradients have been averaged over processes."""
        self._norm = None
        found = gradients(params)
        params = [p for p, grad in zip(params, found, strict=True) if grad is not None]
        for p in params:
            if id(p) in self._kept:
                _own_storage(p)
            else:
                self._take_up(p)
        self._update([p for p in params if id(p) not in self._kept])

    def _too_many(self, p: Tensor) -> str:
        name = self._names.get(id(p), "a parameter")
        if self._micros > 1:
            return (
                f"{name} got more gradients before optimizer.step() than gradient release was told of: got "
                f"{self._micros + 1}; expected at most accumulation={self._micros} backward passes for each step, "
                "those that failed or whose batch is skipped included"
            )
        return (
            f"{name} got a second gradient before optimizer.step(), and gradient release has updated it with the "
            "first. Expected one backward pass for each optimizer.step(), also after one that failed or whose batch "
            "is skipped, or enable_gradient_release(..., accumulation=N) for N of them; and use_reentrant=False where "
            "gradient checkpointing meets a weight that several layers share"
        )

    def _collect(self, p: Tensor) -> None:
        """Put ``p`` into a bucket, and update the bucket if it is full."""
        (grad,) = gradients([p])
        if grad is None:
            return  # another hook has removed it
        if id(p) in self._kept:
            _own_storage(p)
            return
        if not self._updated:
            self._begin()
        if id(p) not in self._numbering:
            return  # it was removed from the optimizer
        # A launch must not read a gradient that another CUDA stream may still compute, so each stream has a bucket.
        stream = stream_of(grad)
        bucket = self._buckets.setdefault((grad.device, stream), Bucket(self._limit, stream))
        if self._updated.get(id(p), 0) >= self._micros:
            raise RuntimeError(self._too_many(p))
        if self._micros > 1 and any(p is waiting for waiting in bucket.params):
            return  # its gradient has got another part
        self._take_up(p)
        if not bucket.params:  # the end of the backward pass updates what is left in the bucket
            torch.autograd.Variable._execution_engine.queue_callback(self._update_waiting)
        self._update(bucket.add(p, grad))

    def _begin(self) -> None:
        """Prepare for the first gradient of a step."""
        self._numbering = numbering_of(self._optimizer.param_groups)
        self._micros, self._norm = self._accumulation, None
        if self._clip_all is not None:
            self._clip_all.begin([p for p in self._released if id(p) in self._numbering], self._micros)

    def _take_up(self, p: Tensor) -> None:
        """Record that this step updates ``p``."""
        check_gradient(p, self._numbering[id(p)][1])
        if is_sharded(p):
            follow_placements(p)
        self._updated[id(p)] = self._updated.get(id(p), 0) + 1

    def _update_waiting(self) -> None:
        for bucket in self._buckets.values():
            self._update(bucket.wait())
        if self._processes.averaging is not None:
            for params in self._processes.averaging.land():
                self._take_averaged(params)

    @torch.no_grad()
    def _update(self, params: list[Tensor]) -> None:
        """Update ``params`` by their gradients in this backward pass, and free these."""
        found = gradients(params)
        params = [p for p, grad in zip(params, found, strict=True) if grad is not None]  # a hook may have removed one
        if not params:
            return
        grads, scale = [grad for grad in found if grad is not None], None
        if (clip := self._clip_all or self._clip_each) is not None:
            scale = clip.before(params, grads)
        if self._micros == 1:
            self._update_whole(params, scale)
        else:
            self._update_micro(params, scale)

    def _update_whole(self, params: list[Tensor], scale: Tensor | None) -> None:
        """Update ``params`` in one launch by what is the whole gradient of the step."""
        first = id(params[0])
        prepared = step_some(self._optimizer, params, self._numbering, self._prepared.get(first), scale)
        self._prepared[first] = self._used[first] = prepared
        _free(params)

    def _update_micro(self, params: list[Tensor], scale: Tensor | None) -> None:
        """Update ``params`` by the gradients of a micro-batch: those in one launch that have the same number of it."""
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            done, step = self._collected.number(p), self._optimizer.state.get(p, {}).get("step", 0)
            alike.setdefault((done, step), []).append(p)
        for (done, _), some in alike.items():
            first, micro = -id(some[0]), Micro(done, self._micros)
            prepared = self._collected.update(
                self._optimizer, some, self._numbering, self._prepared.get(first), scale, micro
            )
            self._prepared[first] = self._used[first] = prepared
            _free(some)

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

    def _end(self) -> None:
        """Update what is left. The next backward pass can begin a new step even if this raises an error."""
        try:
            self._update_rest()
            self._processes.send_buffers()
        finally:
            self._prepared, self._used = self._used, {}
            self._forget()

    def _forget(self) -> None:
        """Forget the current step, so that the next backward pass begins a new one."""
        for bucket in self._buckets.values():
            bucket.take()
        if self._processes.averaging is not None:
            self._processes.averaging.forget()
        self._updated.clear()
        self._collected.forget()
        self._norm = None
        if self._clip_each is not None:
            self._clip_each.end()
        if self._clip_all is not None:
            self._clip_all.end()

    @torch.no_grad()
    def _update_rest(self) -> None:
        """Update parameters whose gradient was kept, and complete what micro-batches have begun."""
        self._update_waiting()  # a backward pass that failed leaves gradients in buckets
        averaging = self._processes.averaging
        if not self._updated and not (averaging is not None and averaging.began):
            self._begin()
        self.finish()
        if self._collected:
            self._collected.complete(self._optimizer, self._numbering, self._micros)
        rest = [p for p in parameters_of(self._optimizer.param_groups) if p.grad is not None]
        unkept = [p for p in rest if id(p) not in self._kept]
        if unkept:
            self._processes.refuse_rest(unkept, self._names)
            self._refuse_again(unkept)
        for p in rest:
            self._take_up(p)
        scale = None
        if self._clip_all is not None and (norm := self.grad_norm) is not None:
            scale = divisors(norm.reshape(1), self._clip_all.largest)
            self._clip_all.correct(scale)
        if self._collected:
            self._collected.finish(self._optimizer, scale)
        for device in {p.device for p in rest}:
            some = [p for p in rest if p.device == device]
            if self._clip_each is not None:
                scale = self._clip_each.before(some, gradients(some))
            self._update_whole(some, None if scale is None else scale.to(device))
        self._warn_of(unkept)

    def _warn_of_unfinished(self, _: Any) -> None:
        if self._updated and (self._micros > 1 or self._clip_all is not None):
            logger.warning(
                f"gradient release: a checkpoint in the middle of a step holds neither old nor new moments of the "
                f"{len(self._updated)} parameters that the step has updated so far, and a run that is resumed from it "
                "differs from this one; expected state_dict() after optimizer.step()"
            )

    def _warn_of_kept(self, kept: list[Tensor]) -> None:
        size = sum(map(largest_share, kept))
        if size > self._limit:
            logger.warning(
                f"gradient release: the gradients of {len(kept)} parameters, {size / 2**20:.1f} MiB, are kept until "
                "optimizer.step(), as clipping and accumulation need them where weights do not fold. Folded "
                "embeddings and heads, a level above 0, or no clipping (max_grad_norm=0) and one backward pass a step "
                "save this memory"
            )

    def _warn_of(self, kept: list[Tensor]) -> None:
        moves = any(float(group["lr"]) for group in self._optimizer.param_groups)
        if kept and moves and not self._warned:  # torch.distributed.checkpoint makes a step at a rate of 0
            self._warned = True
            logger.warning(
                f"gradient release: {len(kept)} gradients were kept until optimizer.step(), the first of them "
                f"{self._names.get(id(kept[0]), 'of a parameter')}, as no hook was there to free them. Weights that "
                "model.to() has moved, if quantized, and those unfrozen or added later need enable_gradient_release "
                "anew; the updates are right, but memory is not saved"
            )

    def _refuse_again(self, rest: list[Tensor]) -> None:
        again = [p for p in rest if id(p) in self._updated]
        if again:
            raise RuntimeError(
                f"{self._names.get(id(again[0]), 'a parameter')} and {len(again) - 1} more have a gradient again "
                "after their update, as DistributedDataParallel copies its buckets back; expected the DDP wrapper "
                "itself as the model of enable_gradient_release, or nothing that writes gradients after the backward "
                "pass"
            )


def _one_process_alone(count: int) -> ValueError:
    return ValueError(
        "gradient release adds up micro-batches in one process alone: got several processes with "
        f"accumulation={count}; expected accumulation=1, or training without gradient release"
    )


def _own_storage(p: Any) -> None:
    """The hook of a parameter whose gradient is kept: FSDP2 hands out all of a module's in one storage."""
    grad = local(p.grad) if p.grad is not None else None
    if grad is not None and grad.untyped_storage().nbytes() > grad.nbytes:
        p.grad = p.grad.clone()


def _free(params: list[Tensor]) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        for p in params:
            p.grad = None
