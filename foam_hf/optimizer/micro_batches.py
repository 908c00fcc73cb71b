"""What gradient release collects of a step's micro-batches, and the end of such a step.

``rules.micro_batches`` says what is collected, and why no gradient need be kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from foam_hf.optimizer.foam import FOAM, step_some
from foam_hf.optimizer.members import (
    Micro,
    Numbering,
    hyper_of,
    member_of,
    members_of_one,
    numbering_of,
    parameters_of,
)
from foam_hf.optimizer.sharding import add_over_shards, zero_gradient
from foam_hf.rules.all import rule_of
from foam_hf.rules.by_rows import RowMoment
from foam_hf.tensors.folding import block_width
from foam_hf.tensors.places import local
from foam_hf.tensors.rounding import MAX_MICROS
from foam_hf.tensors.step import Hyper, Member

logger = logging.getLogger("foam_hf")


class Collected:
    """The sums of a step's micro-batches, of each parameter that is updated by them, and how many have come."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, ...]] = {}  # by the id of a parameter; kept between steps
        self._params: dict[int, Tensor] = {}  # those of this step
        self._come: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._params)

    def number(self, p: Tensor) -> int:
        """How many micro-batches of this step have updated ``p``."""
        return self._come.get(id(p), 0)

    def forget(self) -> None:
        self._params.clear()
        self._come.clear()

    def update(
        self, optimizer: FOAM, params: list[Tensor], numbering: Numbering, prepared: Any, scale: Any, micro: Micro
    ) -> Any:
        """As ``step_some``, by one micro-batch of ``params``, whose number is the same for all."""
        for p in params:
            self._params[id(p)] = p
            self._come[id(p)] = micro.number + micro.shares
        pending = {id(p): self._sums_of(optimizer, p, numbering) for p in params}
        return step_some(optimizer, params, numbering, prepared, scale, micro, pending)

    def _sums_of(self, optimizer: FOAM, p: Tensor, numbering: Numbering) -> tuple[Tensor, ...]:
        found, like = self._sums.get(id(p)), local(next(iter(member_of_state(optimizer, p, numbering))))
        if found is None or found[0].device != like.device or found[0].shape != like.shape:
            found = tuple(torch.zeros(like.shape, dtype=torch.float32, device=like.device) for _ in range(3))
            self._sums[id(p)] = found
        return found

    def squares(self, optimizer: FOAM) -> list[Tensor]:
        """The squared norms of the step's gradients by their sketches: of each device a tensor for its parameters."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in parameters_of(optimizer.param_groups):
            if id(p) in self._params:
                by_device.setdefault(local(p).device, []).append(p)
        levels = {id(p): group["level"] for group in optimizer.param_groups for p in group["params"]}
        return [self._squares_of(params, levels) for params in by_device.values()]

    def _squares_of(self, params: list[Tensor], levels: dict[int, Any]) -> Tensor:
        sums, sketches = ([self._sums[id(p)][i] for p in params] for i in (0, 2))
        widths = [block_width(levels[id(p)], p.shape[-1]) for p in params]
        device = sums[0].device
        folded = torch.stack(torch._foreach_norm(sums)).square_() * torch.tensor(widths).to(device)
        for i, p in enumerate(params):
            rest = local(p).shape[-1] % widths[i]
            if rest:  # the last block is shorter, and this rank holds it
                folded[i] -= sums[i][..., -1].square().sum() * (widths[i] - rest)
        return add_over_shards(params, folded + torch.stack(torch._foreach_norm(sketches)).square_())

    def complete(self, optimizer: FOAM, numbering: Numbering, count: int, scale: Tensor | None) -> None:
        """Give weights that had a gradient in only some of ``count`` micro-batches the rest of their first moment.

        ``scale`` is what the gradients are divided by, as in ``finish``; the sums were collected before that.
        """
        for p in self._params.values():
            missing = count - self.number(p)
            if missing > 0:
                p.grad, own = zero_gradient(p), None if scale is None else scale.to(local(p).device)
                self.update(optimizer, [p], numbering, None, own, Micro(self.number(p), count, missing))
                p.grad = None

    @torch.no_grad()
    def finish(self, optimizer: FOAM, scale: Tensor | None) -> None:
        """Update the moments; ``scale`` is what to divide the step's gradient by, one float32, or None for 1.

        With a scale that is not finite the moments stay as they are.
        """
        alike: dict[tuple[torch.device, float, float], list[tuple[Tensor, ...]]] = {}
        for key, (index, stream) in numbering_of(optimizer.param_groups).items():
            if key not in self._params:
                continue
            group = optimizer.param_groups[index]
            member = member_of(optimizer._owned, self._params[key], group, stream)
            h, sums = hyper_of(group, member), self._sums[key]
            m, v = (local(member.state[name]) for name in member.names)
            if m.dtype == torch.float32:
                alike.setdefault((m.device, h.b1, h.b2), []).append((m, v, *sums[:2]))
                continue
            for piece in members_of_one(optimizer._owned, self._params[key], group, stream):
                _follow_rounded(piece._replace(pending=sums), h, scale)
        for (_, b1, b2), some in alike.items():
            _follow(some, b1, b2, scale)


def _follow_rounded(member: Member, h: Hyper, scale: Tensor | None) -> None:
    """As ``_follow``, of one member whose moments are rounded."""
    moments = [*member.moments.values()]
    values = [x.float() for x in moments]
    _follow([(*values, *member.parts_of_pending[:2])], h.b1, h.b2, scale)
    for number, (x, value) in enumerate(zip(moments, values, strict=True), 1):
        moment = RowMoment(x, member.place, member.level, number)
        moment.store(range(len(moment.rows)), value.view(moment.rows.shape), h)


def _follow(moments: list[tuple[Tensor, ...]], b1: float, b2: float, scale: Tensor | None) -> None:
    """m <- b1*m + (1-b1)*P and v <- b2*v + (1-b2)*(P*P + Q), of several parameters; P and Q are overwritten."""
    ms, vs, Ps, Qs = map(list, zip(*moments, strict=True))
    share = None if scale is None else scale.to(Ps[0].device).squeeze().reciprocal()
    if share is not None:
        torch._foreach_mul_(Ps, share.nan_to_num(0.0))
        torch._foreach_mul_(Qs, share.square().nan_to_num_(0.0))
    torch._foreach_addcmul_(Qs, Ps, Ps)
    if share is not None:  # if it is not finite, P and Q are zero, and become what changes nothing
        unknown = (~share.isfinite()).float()
        torch._foreach_add_(Ps, torch._foreach_mul(ms, unknown))
        torch._foreach_add_(Qs, torch._foreach_mul(vs, unknown))
    torch._foreach_lerp_(ms, Ps, 1 - b1)
    torch._foreach_lerp_(vs, Qs, 1 - b2)


def member_of_state(optimizer: FOAM, p: Tensor, numbering: Numbering) -> Iterable[Tensor]:
    """The tensors of state of ``p``, which are made if they are missing."""
    index, stream = numbering[id(p)]
    member = member_of(optimizer._owned, p, optimizer.param_groups[index], stream)
    return [member.state[name] for name in member.names]


def bytes_between_passes(groups: list[dict[str, Any]]) -> int:
    """Bytes that a step of several backward passes keeps between them: the sums, and gradients of plain weights."""
    kept = 0
    for group in groups:
        for p in group["params"]:
            rule, level = rule_of(p, group)
            if rule.update_micro is None:
                kept += p.numel() * p.element_size()
            else:
                kept += 3 * 4 * next(iter(rule.state(p, level, group).values())).shape.numel()
    return kept


def check_accumulation(optimizer: FOAM, count: Any) -> None:
    """Raise TypeError or ValueError if ``count`` is no number of micro-batches, or a rule cannot take them.

    Weights that do not fold keep their gradients instead. Embeddings whose rule was left open, and that have no state
    yet, get the block rule.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"accumulation is not a number of micro-batches: got {count!r}; expected an integer >= 1")
    if not 1 <= count <= MAX_MICROS:
        raise ValueError(f"accumulation is out of range: got {count}; expected 1 to {MAX_MICROS} micro-batches")
    if count == 1:
        return
    groups = optimizer.param_groups
    left_open = optimizer.left_open.of(groups)
    if left_open and not any(optimizer.state.get(p) for i in left_open for p in groups[i]["params"]):
        logger.info(
            "gradient release with accumulation: embeddings and heads have the block rule, not the factored one"
        )
        for i, fields in left_open.items():
            groups[i].update(fields)
    if name := refusing_rule(groups):
        raise ValueError(
            f"gradient release adds up micro-batches by the block rule alone: got second_moment={name!r} with "
            f"accumulation={count}; expected second_moment='block' (for embeddings and heads embedding_rule='block'), "
            "accumulation=1 with a larger batch, or training without gradient release"
        )


def refusing_rule(groups: list[dict[str, Any]]) -> str | None:
    """The name of a rule of ``groups`` that folds and cannot add up micro-batches, or None."""
    rules = (rule_of(p, group)[0] for group in groups for p in group["params"])
    return next((rule.name for rule in rules if not rule.plain and rule.update_micro is None), None)
