"""The updates of gradient release: launches by the gradients of some weights, during a step and at its end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foam_hf.optimizer.buckets import gradients
from foam_hf.optimizer.checks import check_gradient
from foam_hf.optimizer.clipping import ClipByAll, ClipByWeight, divisors, squares_of
from foam_hf.optimizer.foam import FOAM, step_some
from foam_hf.optimizer.members import Micro, Numbering, numbering_of, parameters_of
from foam_hf.optimizer.micro_batches import Collected
from foam_hf.optimizer.sharding import follow_placements
from foam_hf.optimizer.step import PreparedStep
from foam_hf.tensors.places import is_sharded
from foam_hf.tensors.rows import visiting_layer


class Updates:
    """What a step has updated so far, and how it goes on.

    Attributes:
        optimizer: whose parameters are updated.
        clip_all, clip_each: how gradients are clipped; one of them at most is not None.
        numbering: of all parameters in the current step, as groups may change between steps.
        micros: the most backward passes of the current step.
        taken: the id of a parameter -> how many gradients of it this step has taken up.
    """

    def __init__(self, optimizer: FOAM, largest: float, clip_by: str) -> None:
        self.optimizer = optimizer
        self.clip_all = ClipByAll(optimizer, largest) if largest and clip_by == "all" else None
        self.clip_each = ClipByWeight(largest) if largest and clip_by == "weight" else None
        self._visits = any(visiting_layer(p) is not None for p in parameters_of(optimizer.param_groups))
        self.numbering: Numbering = {}
        self.micros = 1
        self.taken: dict[int, int] = {}
        self._collected = Collected()
        self._norm: Tensor | None = None
        self._prepared: dict[int, PreparedStep] = {}  # by the first parameter of a bucket
        self._used: dict[int, PreparedStep] = {}  # those of this step; older ones may hold state that was deleted

    def begin(self, released: list[Tensor], micros: int) -> None:
        """Prepare for the first gradient of a step; ``released`` may be updated in its backward passes."""
        self.numbering = numbering_of(self.optimizer.param_groups)
        self.micros, self._norm = micros, None
        if self.clip_all is not None:
            self.clip_all.begin([p for p in released if id(p) in self.numbering], micros)

    def gradient_came(self) -> None:
        """Somebody may have asked for the norm before this gradient."""
        self._norm = None

    def norm(self) -> Tensor | None:
        """As ``GradientRelease.grad_norm``."""
        if self.clip_each is not None:
            return self.clip_each.norm()
        if self.clip_all is not None and self._norm is None:
            found = squares_of(parameters_of(self.optimizer.param_groups))
            if self.micros > 1:
                found += self._collected.squares(self.optimizer)
            if (seen := self.clip_all.squares()) is not None:
                found.append(seen.reshape(1) * (0.0 if self.micros > 1 else 1.0))  # NaN stays NaN
            self._norm = torch.cat([x.to(found[0].device) for x in found]).sum().sqrt_() if found else None
        return self._norm

    def take_up(self, p: Tensor) -> None:
        """Record that this step updates ``p``."""
        check_gradient(p, self.numbering[id(p)][1])
        if is_sharded(p):
            follow_placements(p)
        self.taken[id(p)] = self.taken.get(id(p), 0) + 1

    @torch.no_grad()
    def run(self, params: list[Tensor]) -> None:
        """Update ``params`` by their gradients in this backward pass, and free these."""
        found = gradients(params)
        params = [p for p, grad in zip(params, found, strict=True) if grad is not None]  # a hook may have removed one
        if not params:
            return
        grads, scale = [grad for grad in found if grad is not None], None
        if (clip := self.clip_all or self.clip_each) is not None:
            scale = clip.before(params, grads)
        if self.micros == 1:
            self._update_whole(params, scale)
        else:
            self._update_micro(params, scale)

    def _update_whole(self, params: list[Tensor], scale: Tensor | None) -> None:
        """Update ``params`` in one launch by what is the whole gradient of the step; visiting ones layer by layer."""
        for layer, some, numbers in self._by_layer(params):
            if layer is not None:
                layer.bring(some[0].device, aside=True)
            own = scale if scale is None or scale.numel() == 1 or numbers is None else scale[numbers]
            first = id(some[0])
            prepared = step_some(self.optimizer, some, self.numbering, self._prepared.get(first), own)
            self._prepared[first] = self._used[first] = prepared
        _free(params)

    def _by_layer(self, params: list[Tensor]) -> list[tuple[Any, list[Tensor], list[int] | None]]:
        """The layers of visiting ``params``, each with those that are its own and their numbers; None for all."""
        if not self._visits:
            return [(None, params, None)]
        found: dict[Any, list[int]] = {}
        for number, p in enumerate(params):
            found.setdefault(visiting_layer(p), []).append(number)
        return [(layer, [params[i] for i in numbers], numbers) for layer, numbers in found.items()]

    def _update_micro(self, params: list[Tensor], scale: Tensor | None) -> None:
        """Update ``params`` by the gradients of a micro-batch: those in one launch that have the same number of it."""
        alike: dict[tuple[Any, int, int], list[Tensor]] = {}
        for layer, mine, _ in self._by_layer(params):
            for p in mine:
                done, step = self._collected.number(p), self.optimizer.state.get(p, {}).get("step", 0)
                alike.setdefault((layer, done, step), []).append(p)
        for (layer, done, _), some in alike.items():
            if layer is not None:
                layer.bring(some[0].device, aside=True)
            first, micro = -id(some[0]), Micro(done, self.micros)
            prepared = self._collected.update(
                self.optimizer, some, self.numbering, self._prepared.get(first), scale, micro
            )
            self._prepared[first] = self._used[first] = prepared
            _free(some)

    def finish(self, rest: list[Tensor]) -> None:
        """Complete what micro-batches began, correct moments by the norm, and update ``rest``, which were kept."""
        for p in rest:
            self.take_up(p)
        scale = None
        if self.clip_all is not None and (norm := self.norm()) is not None:
            scale = divisors(norm.reshape(1), self.clip_all.largest)
            self.clip_all.correct(scale)
        if self._collected:
            self._collected.complete(self.optimizer, self.numbering, self.micros, scale)
            self._collected.finish(self.optimizer, scale)
        for device in {p.device for p in rest}:
            some = [p for p in rest if p.device == device]
            if self.clip_each is not None:
                scale = self.clip_each.before(some, gradients(some))
            self._update_whole(some, None if scale is None else scale.to(device))

    def end(self) -> None:
        """Keep for the next step what this one has prepared, and nothing older."""
        self._prepared, self._used = self._used, {}

    def forget(self) -> None:
        """Forget the current step."""
        self.taken.clear()
        self._collected.forget()
        self._norm = None
        for clip in (self.clip_each, self.clip_all):
            if clip is not None:
                clip.end()

    def close(self) -> None:
        """Free all that is kept between steps."""
        self._prepared.clear()
        self._used.clear()
        self._collected = Collected()


def _free(params: list[Tensor]) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        for p in params:
            p.grad = None
