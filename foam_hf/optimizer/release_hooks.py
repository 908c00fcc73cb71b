"""The hooks of gradient release: what becomes of a gradient when it is complete."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from foam_hf.optimizer.buckets import Bucket, gradients, stream_of
from foam_hf.optimizer.checks import check_gradient
from foam_hf.optimizer.processes import Processes
from foam_hf.optimizer.release_checks import Names, too_many, unended
from foam_hf.optimizer.release_updates import Updates
from foam_hf.tensors.places import local


class Hooks:
    """Collects complete gradients in buckets, or sends them to other processes first, and has them updated.

    Attributes:
        accumulation: the most backward passes of a step that begins.
        excess: whether this step got more of them, which was an error.
    """

    def __init__(
        self,
        updates: Updates,
        processes: Processes,
        names: Names,
        *,
        released: Iterable[Tensor],
        kept: Iterable[Tensor],
        limit: int,
        accumulation: int,
    ) -> None:
        """``released`` are updated in a backward pass, ``kept`` at the end of the step. ``limit`` is a bucket's."""
        self.accumulation, self.excess = accumulation, False
        self._updates, self._processes, self._names = updates, processes, names
        self._released, self._kept = [*released], {id(p) for p in kept}
        self._limit = limit
        self._buckets: dict[tuple[torch.device, Any], Bucket] = {}  # by device and stream

    def keeps(self, p: Tensor) -> bool:
        """Whether the gradient of ``p`` is kept until the end of the step."""
        return id(p) in self._kept

    def on_gradient(self, p: Tensor) -> None:
        """The hook of each parameter: send its gradient to the other processes, or collect it if it is complete."""
        averaging = self._processes.averaging
        self._updates.gradient_came()
        if averaging is None or not averaging.averages(p):
            self._collect(p)
            return
        if not self._processes.reduces:
            raise RuntimeError(
                "gradient release averages every gradient at once, and frees it: got a backward pass inside of DDP's "
                "no_sync(); expected it outside, with one optimizer.step() for each backward pass, or "
                "enable_gradient_release(..., accumulation=N) for N of them, inside and outside"
            )
        updates = self._updates
        if not updates.taken and not averaging.began:
            self.begin()
        if id(p) not in updates.numbering:
            return  # it was removed from the optimizer
        if averaging.has(p) and updates.micros > 1:
            if averaging.bytes_on_the_way:
                raise unended(self._names.get(id(p), "a parameter"))
            self.finish()  # a backward pass whose end was not seen
        if updates.taken.get(id(p), 0) >= updates.micros or averaging.has(p):
            raise self._too_many(p)
        check_gradient(p, updates.numbering[id(p)][1])
        if averaging.is_new_task():  # its end waits for what is on the way
            ends = updates.micros > 1 and not averaging.is_nested()
            callback = self._end_pass if ends else self.update_waiting
            torch.autograd.Variable._execution_engine.queue_callback(callback)
        for params in averaging.add(p):
            self._take_averaged(params)

    def begin(self) -> None:
        """Prepare for the first gradient of a step."""
        self._updates.begin(self._released, self.accumulation)
        if self._processes.averaging is not None:
            self._processes.averaging.expect(self.accumulation)

    def finish(self) -> None:
        """As ``GradientRelease.finish``."""
        averaging = self._processes.averaging
        if averaging is not None and averaging.unfinished:
            for params in averaging.finish():
                self._take_averaged(params)

    def update_waiting(self) -> None:
        """Update what waits in buckets, and what is on the way to other processes."""
        for bucket in self._buckets.values():
            self._updates.run(bucket.wait())
        if self._processes.averaging is not None:
            for params in self._processes.averaging.land():
                self._take_averaged(params)

    def _end_pass(self) -> None:
        """The end of one of several backward passes: the next one must not be averaged together with it."""
        self.update_waiting()
        self.finish()

    def forget(self) -> None:
        """Forget the current step."""
        self.excess = False
        for bucket in self._buckets.values():
            bucket.take()
        if self._processes.averaging is not None:
            self._processes.averaging.end_step()

    def close(self) -> None:
        """Free all that is kept between steps."""
        self._buckets.clear()
        if self._processes.averaging is not None:
            self._processes.averaging.forget()

    def _take_averaged(self, params: list[Tensor]) -> None:
        """Update ``params``, whose gradients have been averaged over processes."""
        self._updates.gradient_came()
        found, known = gradients(params), self._updates.numbering
        params = [p for p, grad in zip(params, found, strict=True) if grad is not None and id(p) in known]
        for p in params:
            if id(p) in self._kept:
                _own_storage(p)
            else:
                self._updates.take_up(p)
        self._updates.run([p for p in params if id(p) not in self._kept])

    def _collect(self, p: Tensor) -> None:
        """Put ``p`` into a bucket, and update the bucket if it is full."""
        (grad,) = gradients([p])
        if grad is None:
            return  # another hook has removed it
        if id(p) in self._kept:
            _own_storage(p)
            return
        updates = self._updates
        if not updates.taken:
            self.begin()
        if id(p) not in updates.numbering:
            return  # it was removed from the optimizer
        # A launch must not read a gradient that another CUDA stream may still compute, so each stream has a bucket.
        stream = stream_of(grad)
        bucket = self._buckets.setdefault((grad.device, stream), Bucket(self._limit, stream))
        if updates.taken.get(id(p), 0) >= updates.micros:
            raise self._too_many(p)
        if updates.micros > 1 and any(p is waiting for waiting in bucket.params):
            return  # its gradient has got another part
        updates.take_up(p)
        if not bucket.params:  # the end of the backward pass updates what is left in the bucket
            torch.autograd.Variable._execution_engine.queue_callback(self.update_waiting)
        updates.run(bucket.add(p, grad))

    def _too_many(self, p: Tensor) -> RuntimeError:
        self.excess = True
        return too_many(self._names.get(id(p), "a parameter"), self._updates.micros)


def _own_storage(p: Any) -> None:
    """The hook of a parameter whose gradient is kept: FSDP2 hands out all of a module's in one storage."""
    grad = local(p.grad) if p.grad is not None else None
    if grad is not None and grad.untyped_storage().nbytes() > grad.nbytes:
        p.grad = p.grad.clone()
