"""Clipping with gradient release: by the norm of all gradients, which is known only when most weights are updated, or
by that of each.

``ClipByAll`` divides each gradient by what the norm of all is expected to be, from the gradients that this step has
had so far. At the end of the backward pass the norm is known, and the moments are corrected: they hold the gradients
that true clipping gives. So a spike leaves no trace in them. Only the weights' own step was made with the expectation;
the rules bound it whatever the gradients are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from foam_hf.kernels.choice import use_kernels
from foam_hf.optimizer.buckets import gradients
from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.members import Group, Numbering, member_of, numbering_of
from foam_hf.optimizer.sharding import add_over_shards, norms_of
from foam_hf.optimizer.undo import Correction, Undo
from foam_hf.rules.all import rule_of
from foam_hf.tensors.places import local
from foam_hf.tensors.step import Member, State

BY_SIZE = 0.01  # of the expected shares: second moments do not foresee a gradient that was zero so far
LEAST_SEEN = 1e-4  # what little was seen says no more than this; moments are corrected by its root at most, 100 times


def divisors(norms: Tensor, largest: float) -> Tensor:
    """What to divide gradients of these ``norms`` by, 1 or more; NaN for a norm that is not finite.

    An infinite divisor would make finite elements zero.
    """
    found = norms.add(1e-6).div_(largest).clamp_min_(1.0)  # 1e-6 as in torch's clip_grad_norm_
    return found.add_(norms, alpha=0.0)


class ClipByWeight:
    """Bounds the norm of each gradient alone."""

    def __init__(self, largest: float) -> None:
        self.largest = largest
        self.norms: list[Tensor] = []

    def before(self, params: list[Tensor], grads: list[Any]) -> Tensor:
        norms = norms_of(grads)
        self.norms.append(norms)
        return divisors(norms, self.largest)

    def norm(self) -> Tensor | None:
        norms = self.norms
        return torch.linalg.vector_norm(torch.cat([norm.to(norms[0].device) for norm in norms])) if norms else None

    def end(self) -> None:
        self.norms.clear()


class ClipByAll:
    """Bounds the norm of all gradients.

    The squared norm of all is expected to be that of the gradients so far, over their share in it. The shares are
    those of the second moments and, to a hundredth or where there are none, of the numbers of elements.
    """

    def __init__(self, optimizer: FOAM, largest: float) -> None:
        self.largest = largest
        self._optimizer = optimizer
        self._released: list[Tensor] = []
        self._number: dict[int, int] = {}
        self._index: dict[tuple[int, ...], Tensor] = {}
        self._sizes = torch.empty(0)
        self._seconds: list[tuple[str, int]] | None = None  # of the released, see `_second_of`
        self._counts = self._shares = self._sizes
        self._sums: Tensor | None = None  # of the squares and the shares of the gradients that this step has had
        self._scaling: Any = None  # a ``Scaling``, of which there is none without Triton
        self._undo: list[Undo] = []
        self._members: dict[int, tuple[State, tuple[Any, ...], Member]] = {}  # by parameter, with what it depends on
        self._correction = Correction()
        self._micros = 1
        self._numbering: Numbering = {}

    def begin(self, released: list[Tensor], micros: int) -> None:
        """Called before the first gradient of a step; ``released`` are the parameters that ``before`` will get."""
        self._micros, self._numbering = micros, numbering_of(self._optimizer.param_groups)
        if [*map(id, released)] != [*self._number]:
            self._released = released
            self._number = {id(p): i for i, p in enumerate(released)}
            self._index.clear()
            self._members.clear()
            sizes = torch.tensor([float(p.numel()) for p in released])
            self._sizes = (sizes / sizes.sum()).to(local(released[0]).device if released else "cpu")
            self._seconds = None
        self.end()
        self._shares = self._expected_shares()

    def _expected_shares(self) -> Tensor:
        states = [self._optimizer.state.get(p, {}) for p in self._released]
        device = self._sizes.device
        found = [i for i, state in enumerate(states) if state]  # others had no gradient yet
        if self._seconds is None:
            groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
            self._seconds = [_second_of(p, groups[id(p)]) for p in self._released]
            self._counts = torch.tensor([float(count) for _, count in self._seconds]).to(device)
        seconds = [states[i].get(self._seconds[i][0]) for i in found]
        if not found or any(x is None or x.device != device for x in seconds):
            return self._sizes
        sums = torch.stack(torch._foreach_norm([local(x) for x in seconds], 1, dtype=torch.float32))
        at = None if len(found) == len(states) else torch.tensor(found).to(device)
        sums *= self._counts if at is None else self._counts[at]  # this rank's, so before the sum over ranks
        squares = add_over_shards([self._released[i] for i in found], sums)
        if at is not None:
            squares = torch.zeros_like(self._sizes).index_copy_(0, at, squares)
        total = squares.sum()
        shares = torch.lerp(squares / total, self._sizes, BY_SIZE)
        return torch.where((total > 0) & total.isfinite(), shares, self._sizes)

    def before(self, params: list[Tensor], grads: list[Any]) -> Tensor:
        """What to divide ``grads`` by before ``params`` are updated, one element."""
        norms, device, key = norms_of(grads), self._shares.device, tuple(map(id, params))
        if key not in self._index:
            self._index[key] = torch.tensor([self._number[i] for i in key], dtype=torch.int64).to(device)
        if self._sums is None:
            self._sums = torch.zeros(2, dtype=torch.float32, device=device)
        find = self._scale_by_kernel if norms.device == device and use_kernels(device) else self._scale
        scale = find(norms, self._index[key], self._sums)
        if self._micros == 1:
            self._undo.append(Undo(self._optimizer, [*map(self._member, params)], scale))
        return scale.to(local(grads[0]).device)

    def _scale(self, norms: Tensor, index: Tensor, sums: Tensor) -> Tensor:
        """What to divide gradients of ``norms`` by, (1,); they are added to ``sums``. ``index`` is of their shares."""
        device = sums.device
        sums += torch.stack((norms.square().sum().to(device), self._shares[index].sum()))
        squares, seen = sums.unbind()
        return divisors((squares * self._micros / seen.clamp_min(LEAST_SEEN)).sqrt_(), self.largest).reshape(1)

    def _scale_by_kernel(self, norms: Tensor, index: Tensor, sums: Tensor) -> Tensor:
        from foam_hf.optimizer.clipping_kernel import Scaling  # imported here because Triton may be missing

        if self._scaling is None:
            self._scaling = Scaling()
        found: Tensor = self._scaling.run(norms, self._shares, index, sums, self._micros, self.largest, LEAST_SEEN)
        return found

    def _member(self, p: Tensor) -> tuple[Group, Member]:
        """The group of ``p`` and its member, which is made when what it depends on has changed."""
        index, stream = self._numbering[id(p)]
        group = self._optimizer.param_groups[index]
        fields = index, stream, group["level"], group["second_moment"]
        state, known = self._optimizer.state.get(p), self._members.get(id(p))
        if known is None or known[0] is not state or known[1] != fields:
            member = member_of(self._optimizer._owned, p, group, stream)  # makes the state if it is missing
            known = self._members[id(p)] = member.state, fields, member
        return group, known[2]

    def squares(self) -> Tensor | None:
        """The sum of the squared norms of what ``before`` has got in this step."""
        return None if self._sums is None else self._sums[0]

    def end(self) -> None:
        """Forget the step."""
        self._sums = None
        self._undo.clear()

    def correct(self, scale: Tensor) -> None:
        """Let the moments hold gradients over ``scale``, not over what ``before`` has returned.

        No bit changes where that was right. If ``scale`` is not finite, the moments are those of before.
        """
        undo, self._undo = self._undo, []
        if undo:
            self._correction.run(undo, scale)


def _second_of(p: Tensor, group: Group) -> tuple[str, int]:
    """``Rule.squares`` of ``p``; "" and 1 if its rule has none."""
    rule, level = rule_of(p, group)
    return rule.squares(p, level) if rule.squares else ("", 1)


def squares_of(params: Iterable[Tensor]) -> list[Tensor]:
    """The squared norms of the gradients that ``params`` still have, one float32 for each device."""
    by_device: dict[torch.device, list[Any]] = {}
    for grad in gradients([*params]):
        if grad is not None:
            by_device.setdefault(local(grad).device, []).append(grad)
    return [norms_of(some).square_() for some in by_device.values()]
