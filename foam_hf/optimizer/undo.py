"""Moments as they were before an update, so that a later scale of the update's gradients can be made good."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from foam_hf.kernels.choice import use_kernels
from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.members import Group, hyper_of, members_of_one
from foam_hf.rules.all import rule_named
from foam_hf.rules.by_rows import RowMoment
from foam_hf.tensors.places import local
from foam_hf.tensors.step import Member


class Correction:
    """Corrects moments by what ``Undo`` has kept of them."""

    def __init__(self) -> None:
        self._rescaling: Any = None  # a ``Rescaling``, of which there is none without Triton

    def run(self, undo: list[Undo], scale: Tensor) -> None:
        """Let the moments of all ``undo`` hold gradients over ``scale`` (1,), not over what each was updated with.

        No bit changes where that was right. If ``scale`` is not finite, the moments are those of before.
        """
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
