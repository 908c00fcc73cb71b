"""Clipping with gradient release: by the norm of all gradients, which is known only when most weights are updated, or
by that of each.

``ClipByAll`` divides each gradient by what the norm of all is expected to be, from the gradients that this step has
had so far. At the end of the backward pass the norm is known, and the moments are corrected: they hold the gradients
that true clipping gives. So a spike leaves no trace in them. Only the weights' own step was made with the expectation;
the rules bound it whatever the gradients are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.members import Group, Numbering, hyper_of, member_of, members_of_one, numbering_of
from foam_hf.optimizer.sharding import add_over_shards, norms_of
from foam_hf.rules.all import rule_named
from foam_hf.rules.by_rows import RowMoment
from foam_hf.tensors.folding import block_width
from foam_hf.tensors.places import local
from foam_hf.tensors.step import Member

SECOND = "folded_exp_avg_sq"  # the second moment of the block rule, a mean of squares
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
        self._widths: Tensor | None = None
        self._shares = self._sizes
        self._squares: Tensor | None = None
        self._seen: Tensor | None = None
        self._undo: list[Undo] = []
        self._micros = 1
        self._numbering: Numbering = {}

    def begin(self, released: list[Tensor], micros: int) -> None:
        """Called before the first gradient of a step; ``released`` are the parameters that ``before`` will get."""
        self._micros, self._numbering = micros, numbering_of(self._optimizer.param_groups)
        if [*map(id, released)] != [*self._number]:
            self._released = released
            self._number = {id(p): i for i, p in enumerate(released)}
            self._index.clear()
            sizes = torch.tensor([float(p.numel()) for p in released])
            self._sizes = (sizes / sizes.sum()).to(local(released[0]).device if released else "cpu")
            self._widths = None
        self.end()
        self._shares = self._expected_shares()

    def _expected_shares(self) -> Tensor:
        states = [self._optimizer.state.get(p, {}) for p in self._released]
        device = self._sizes.device
        found = [i for i, state in enumerate(states) if state]  # others had no gradient yet
        if not found or not all(SECOND in states[i] and states[i][SECOND].device == device for i in found):
            return self._sizes
        if self._widths is None:
            groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
            widths = [float(block_width(groups[id(p)]["level"], p.shape[-1])) for p in self._released]
            self._widths = torch.tensor(widths).to(device)
        sums = torch._foreach_norm([local(states[i][SECOND]) for i in found], 1, dtype=torch.float32)
        summed = add_over_shards([self._released[i] for i in found], torch.stack(sums))
        if len(found) < len(states):
            summed = torch.zeros_like(self._sizes).index_copy_(0, torch.tensor(found).to(device), summed)
        squares = summed * self._widths
        total = squares.sum()
        shares = torch.lerp(squares / total, self._sizes, BY_SIZE)
        return torch.where((total > 0) & total.isfinite(), shares, self._sizes)

    def before(self, params: list[Tensor], grads: list[Any]) -> Tensor:
        """What to divide ``grads`` by before ``params`` are updated, one element."""
        device = self._shares.device
        squares = norms_of(grads).square_().sum().to(device)
        key = tuple(map(id, params))
        if key not in self._index:
            self._index[key] = torch.tensor([self._number[i] for i in key], dtype=torch.int64).to(device)
        seen = self._shares[self._index[key]].sum()
        self._squares = squares if self._squares is None else self._squares + squares
        self._seen = seen if self._seen is None else self._seen + seen
        expected = self._squares * self._micros / self._seen.clamp_min(LEAST_SEEN)
        scale = divisors(expected.sqrt_(), self.largest).reshape(1)
        if self._micros == 1:
            self._undo.append(Undo(self._optimizer, params, scale, self._numbering))
        return scale.to(local(grads[0]).device)

    def squares(self) -> Tensor | None:
        """The sum of the squared norms of what ``before`` has got in this step."""
        return self._squares

    def end(self) -> None:
        """Forget the step."""
        self._squares = self._seen = None
        self._undo.clear()

    def correct(self, scale: Tensor) -> None:
        """Let the moments hold gradients over ``scale``, not over what ``before`` has returned."""
        for each in self._undo:
            each.correct(scale)
        self._undo.clear()


class Undo:
    """The moments of some parameters before an update by gradients over ``scale``, which can be corrected.

    Every moment is ``b`` times the old one plus a part that is linear in the gradient or in its squares.
    """

    def __init__(self, optimizer: FOAM, params: list[Tensor], scale: Tensor, numbering: Numbering) -> None:
        self._scale = scale
        self._rounded: list[_Rounded] = []
        moments: dict[tuple[float, int, torch.device], list[Tensor]] = {}
        for p in params:
            index, stream = numbering[id(p)]
            group = optimizer.param_groups[index]
            member = member_of(optimizer._owned, p, group, stream)  # makes the state if it is missing
            b1, b2 = rule_named(member.rule).betas(group)
            for number, name in enumerate(member.names, 1):
                decay, power = (b2, 2) if name.endswith("_sq") else (b1, 1)
                x = local(member.state[name])
                if x.dtype == torch.float32:
                    moments.setdefault((decay, power, x.device), []).append(x)
                    continue
                for piece in members_of_one(optimizer._owned, p, group, stream):
                    before = piece.moments[name].float().clone()
                    self._rounded.append(_Rounded(group, piece, name, number, decay, power, before))
        self._parts = [(decay, power, xs, [x.clone() for x in xs]) for (decay, power, _), xs in moments.items()]

    def correct(self, scale: Tensor) -> None:
        """Scale what the update has added; no bit changes where ``scale`` was right.

        If it is not finite, the moments are those of before.
        """
        ratio = (self._scale / scale).squeeze()
        for decay, power, xs, before in self._parts:
            _rescale(xs, before, decay, ratio, power)
        for each in self._rounded:
            x = each.member.moments[each.name]
            value = x.float()
            _rescale([value], [each.before], each.decay, ratio, each.power)
            each.store(x, value)


class _Rounded(NamedTuple):
    """A moment that is not float32: the ``number``-th of ``member``, and its value before the update."""

    group: Group
    member: Member
    name: str
    number: int
    decay: float
    power: int
    before: Tensor

    def store(self, x: Tensor, value: Tensor) -> None:
        member = self.member
        if not self.name.startswith("folded_"):
            x.copy_(value)
            return
        h = hyper_of(self.group, member)._replace(micro=1)  # not the random bits that the update has used
        moment = RowMoment(x, member.place, member.level, self.number)
        moment.store(range(len(moment.rows)), value.view(moment.rows.shape), h)


def _rescale(xs: list[Tensor], before: list[Tensor], decay: float, ratio: Tensor, power: int) -> None:
    """Let each of ``xs`` be ``decay * before`` plus ``ratio ** power`` times the rest, in place.

    A small ratio must not cancel, and a square must not get below zero. With a ratio of 1 no bit changes. With one
    that is not finite, ``xs`` become ``before``, which is overwritten.
    """
    known = ratio.isfinite().float().to(xs[0].device)
    ratio = ratio.nan_to_num(0.0, posinf=0.0)
    decayed = torch._foreach_mul(before, decay)
    change = torch._foreach_sub(xs, decayed)
    if power == 2:
        torch._foreach_clamp_min_(change, 0.0)  # rounding may leave less than ``decayed``
    lost = torch._foreach_sub(xs, torch._foreach_add(decayed, change))
    device = xs[0].device
    torch._foreach_mul_(change, (ratio**power).to(device))
    torch._foreach_mul_(lost, (ratio == 1).float().to(device))
    torch._foreach_add_(decayed, change)
    torch._foreach_add_(decayed, lost)
    torch._foreach_mul_(decayed, known)
    torch._foreach_mul_(before, 1 - known)
    torch._foreach_add_(decayed, before)
    torch._foreach_copy_(xs, decayed)


def squares_of(params: Iterable[Tensor]) -> list[Tensor]:
    """The squared norms of the gradients that ``params`` still have, one float32 for each device."""
    by_device: dict[torch.device, list[Any]] = {}
    for p in params:
        if p.grad is not None:
            by_device.setdefault(local(p).device, []).append(p.grad)
    return [norms_of(some).square_() for some in by_device.values()]
