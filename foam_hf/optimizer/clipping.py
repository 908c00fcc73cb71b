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

from foam_hf.kernels.choice import use_kernels
from foam_hf.optimizer.buckets import gradients
from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.members import Group, Numbering, hyper_of, member_of, members_of_one, numbering_of
from foam_hf.optimizer.sharding import add_over_shards, norms_of
from foam_hf.rules.all import rule_named
from foam_hf.rules.by_rows import RowMoment
from foam_hf.tensors.folding import block_width
from foam_hf.tensors.places import local
from foam_hf.tensors.step import Member, State

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
        self._members: dict[int, tuple[State, tuple[Any, ...], Member]] = {}  # by parameter, with what it depends on
        self._rescaling: Any = None  # a ``Rescaling``, of which there is none without Triton
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
            self._undo.append(Undo(self._optimizer, [*map(self._member, params)], scale))
        return scale.to(local(grads[0]).device)

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
        return self._squares

    def end(self) -> None:
        """Forget the step."""
        self._squares = self._seen = None
        self._undo.clear()

    def correct(self, scale: Tensor) -> None:
        """Let the moments hold gradients over ``scale``, not over what ``before`` has returned.

        No bit changes where that was right. If ``scale`` is not finite, the moments are those of before.
        """
        undo, self._undo = self._undo, []
        if not undo:
            return
        ratios = torch.cat([each.scale for each in undo]) / scale
        by_device: dict[torch.device, list[tuple[int, _Moments]]] = {}
        for number, each in enumerate(undo):
            for part in each.parts:
                by_device.setdefault(part.xs[0].device, []).append((number, part))
        plain = []
        for device, parts in by_device.items():
            if use_kernels(device) and all(x.is_contiguous() for _, part in parts for x in part.xs):
                self._rescale_together(parts, ratios.to(device))
            else:
                plain += parts
        if plain or any(each.rounded for each in undo):
            each_ratio = _ratios(ratios)
            for number, part in plain:
                _rescale(part, each_ratio[number])
            for each, ratio in zip(undo, each_ratio, strict=True):
                for one in each.rounded:
                    one.correct(ratio)

    def _rescale_together(self, parts: list[tuple[int, _Moments]], ratios: Tensor) -> None:
        """As ``_rescale`` for each of ``parts``, in one launch; a part has the number of its ratio."""
        from foam_hf.optimizer.clipping_kernel import Rescaling  # imported here because Triton may be missing

        if self._rescaling is None:
            self._rescaling = Rescaling()
        self._rescaling.run(
            [x for _, part in parts for x in part.xs],
            [x for _, part in parts for x in part.before],
            [decay for _, part in parts for decay in part.decays],
            [i >= part.firsts for _, part in parts for i in range(len(part.xs))],
            [number for number, part in parts for _ in part.xs],
            ratios,
        )


class Ratio(NamedTuple):
    """The scale that an update has used over the one that it should have used, as tensors of one element.

    Attributes:
        first: the ratio; 0 if it is not finite.
        square: of that.
        is_one: 1 if the ratio is one, else 0.
        known: 1 if the ratio is finite, else 0.
        unknown: 1 - ``known``.
    """

    first: Tensor
    square: Tensor
    is_one: Tensor
    known: Tensor
    unknown: Tensor

    def to(self, device: torch.device) -> Ratio:
        return Ratio(*(x.to(device) for x in self))


def _ratios(ratios: Tensor) -> list[Ratio]:
    """The ``Ratio`` for each of ``ratios``: all at once, as launches take the host's time."""
    known, finite = ratios.isfinite().float(), ratios.nan_to_num(0.0, posinf=0.0)
    fields = finite, finite.square(), (finite == 1).float(), known, 1 - known
    return [Ratio(*each) for each in zip(*(x.unbind() for x in fields), strict=True)]


class Undo:
    """The moments of some parameters before an update by gradients over ``scale`` (1,), so that it can be corrected.

    Every moment is ``b`` times the old one plus a part that is linear in the gradient or in its squares.
    """

    def __init__(self, optimizer: FOAM, members: list[tuple[Group, Member]], scale: Tensor) -> None:
        self.scale = scale
        self.rounded: list[_Rounded] = []
        moments: dict[tuple[torch.device, bool], tuple[list[Tensor], list[float]]] = {}
        for group, member in members:
            b1, b2 = rule_named(member.rule).betas(group)
            for number, name in enumerate(member.names, 1):
                squared = name.endswith("_sq")
                x, decay = local(member.state[name]), b2 if squared else b1
                if x.dtype == torch.float32:
                    xs, decays = moments.setdefault((x.device, squared), ([], []))
                    xs.append(x)
                    decays.append(decay)
                    continue
                for piece in members_of_one(optimizer._owned, member.p, group, member.stream):
                    before = piece.moments[name].float().clone()
                    self.rounded.append(_Rounded(group, piece, name, number, decay, squared, before))
        self.parts: list[_Moments] = []
        for device in {device for device, _ in moments}:
            (first, b1s), (second, b2s) = (moments.get((device, squared), ([], [])) for squared in (False, True))
            xs = first + second
            clones = torch._foreach_mul(xs, 1.0)  # in one launch
            self.parts.append(_Moments(xs, [*clones], b1s + b2s, len(first)))


class _Moments(NamedTuple):
    """Moments in float32 on one device, what they were ``before``, and by what an update has multiplied that.

    The first ``firsts`` are linear in the gradient, the others in its square.
    """

    xs: list[Tensor]
    before: list[Tensor]
    decays: list[float]
    firsts: int


class _Rounded(NamedTuple):
    """A moment that is not float32: the ``number``-th of ``member``, and its value before the update."""

    group: Group
    member: Member
    name: str
    number: int
    decay: float
    squared: bool
    before: Tensor

    def correct(self, ratio: Ratio) -> None:
        """Scale what the update has added by ``ratio``."""
        x = self.member.moments[self.name]
        value = x.float()
        _rescale(_Moments([value], [self.before], [self.decay], int(not self.squared)), ratio)
        self._store(x, value)

    def _store(self, x: Tensor, value: Tensor) -> None:
        member = self.member
        if not self.name.startswith("folded_"):
            x.copy_(value)
            return
        h = hyper_of(self.group, member)._replace(micro=1)  # not the random bits that the update has used
        moment = RowMoment(x, member.place, member.level, self.number)
        moment.store(range(len(moment.rows)), value.view(moment.rows.shape), h)


def _rescale(moments: _Moments, ratio: Ratio) -> None:
    """Let each moment be its decay times ``before`` plus ``ratio``, or its square, times the rest, in place.

    A small ratio must not cancel, and a square must not get below zero. With a ratio of 1 no bit changes. With one
    that is not finite, the moments become ``before``, which is overwritten.
    """
    xs, before = moments.xs, moments.before
    ratio = ratio.to(xs[0].device)
    decayed = [*torch._foreach_mul(before, moments.decays)]
    change = torch._foreach_sub(xs, decayed)
    first, second = change[: moments.firsts], change[moments.firsts :]
    if second:
        torch._foreach_clamp_min_(second, 0.0)  # rounding may leave less than ``decayed``
    lost = torch._foreach_sub(xs, torch._foreach_add(decayed, change))
    for some, factor in ((first, ratio.first), (second, ratio.square), (lost, ratio.is_one)):
        if some:
            torch._foreach_mul_(some, factor)
    torch._foreach_add_(decayed, change)
    torch._foreach_add_(decayed, lost)
    torch._foreach_mul_(decayed, ratio.known)
    torch._foreach_mul_(before, ratio.unknown)
    torch._foreach_add_(decayed, before)
    torch._foreach_copy_(xs, decayed)


def squares_of(params: Iterable[Tensor]) -> list[Tensor]:
    """The squared norms of the gradients that ``params`` still have, one float32 for each device."""
    by_device: dict[torch.device, list[Any]] = {}
    for grad in gradients([*params]):
        if grad is not None:
            by_device.setdefault(local(grad).device, []).append(grad)
    return [norms_of(some).square_() for some in by_device.values()]
