"""Updates matrices whose rows ranks share by a rule that needs whole ones: each is gathered on one rank in turn.

A *pack* has some matrices of one shape for each rank. A rank sends its rows of the pack's gradients and state to the
owners, finds what to subtract from its own matrices as one process would, and sends that back by rows. Each rank then
updates its rows. While a rank works on a pack, the next one is on its way here, and the one before on its way back.

So the buffers do not grow with the model. A rank owns at most ``OnWhole.at_a_time`` matrices of a pack, and its rows
of those of all ranks are about as many elements. At most two packs are on their way, and each is there as it was sent
and as it is received. ``gathering_bytes`` counts them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from foam_hf.kernels.choice import use_kernels
from foam_hf.optimizer.members import hyper_of
from foam_hf.optimizer.messages import Exchange, Kind, Layout
from foam_hf.optimizer.nonfinite import LeftOutReport
from foam_hf.optimizer.sharding import norms_of
from foam_hf.optimizer.shared_matrices import Matrix, matrices_of, owners_of
from foam_hf.rules.all import rule_of
from foam_hf.rules.rule import Halves, Part
from foam_hf.tensors.places import local
from foam_hf.tensors.rows import PLAIN, kind_of
from foam_hf.tensors.step import Hyper, Member


class Pack:
    """Matrices that travel together: of one shape and kind, some for each rank."""

    def __init__(self, group: dict[str, Any], owned: Sequence[Sequence[Matrix]]) -> None:
        """``group`` is the param group of all, ``owned`` are the matrices of each rank."""
        self.group, self.matrices = group, [matrix for some in owned for matrix in some]
        self.member, self._sharing = self.matrices[0].member, self.matrices[0].sharing
        me, counts = self._sharing.me, [len(some) for some in owned]
        self.own = slice(sum(counts[:me]), sum(counts[: me + 1]))
        parts = [matrix.part for matrix in self.matrices]
        self._device, moment = parts[0].moment.device, parts[0].moment
        (self._rows, n), blocks = self.member.p.shape[-2:], moment.shape[-1]
        self._gradient, self._state = (n, _grad(self.member).dtype), (blocks, moment.dtype)
        self._halves = self._choose(parts)
        self._counts, self._mine = counts, [counts[me]] * len(counts)
        self._held = [len(span) for span in self._sharing.spans]
        self._here = [self._held[me]] * len(counts)

    def _choose(self, parts: list[Part]) -> Halves:
        """The halves of the rule's update: in kernels where one takes such matrices, on all ranks."""
        on_whole, level = self.matrices[0].on_whole, self.member.level
        if use_kernels(self._device) and kind_of(parts[0].weight) == PLAIN:
            kernels = importlib.import_module(on_whole.kernel)
            G, m = (torch.empty(self._rows, n, dtype=t, device="meta") for n, t in (self._gradient, self._state))
            if kernels.takes(parts[0].weight.dtype, G, m, level):
                found: Halves = kernels.Halves(parts, self.own, level)
                return found
        return on_whole.halves(parts, self.own, level)

    def _layout(self, counts: list[int], rows: list[int], result: bool) -> Layout:
        """Of so many matrices for each rank, with so many rows: gradients and state, or ``result`` and state."""
        first = (self._gradient[0], self._halves.dtype) if result else self._gradient
        each: list[list[Kind]] = [
            [((count, of, columns), dtype) for columns, dtype in (first, self._state)]
            for count, of in zip(counts, rows, strict=True)
        ]
        if result and self._halves.scaled:
            each = [[*kinds, ((count,), torch.float32)] for kinds, count in zip(each, counts, strict=True)]
        return Layout(each)

    def send(self) -> Exchange:
        """Send this rank's rows of all gradients and their state to the owners."""
        out = self._layout(self._counts, self._here, result=False)
        coming = self._layout(self._mine, self._held, result=False)
        buffer = out.empty(self._device)
        views = out.views(buffer)
        grads, moments = (list(itertools.chain.from_iterable(view[i].unbind() for view in views)) for i in (0, 1))
        (name,) = self.member.names
        torch._foreach_copy_(grads, [matrix.of(_grad(matrix.member)) for matrix in self.matrices])
        torch._foreach_copy_(moments, [matrix.of(matrix.member.state[name]) for matrix in self.matrices])
        return Exchange(buffer, out, coming, self._sharing.group)

    def answer(self, sent: Exchange, h: Hyper, grad_scale: Tensor | None, left_out: Tensor | None) -> Exchange:
        """Find what to subtract from this rank's own matrices, and send it to the ranks that hold their rows."""
        received = sent.take()
        out = self._layout(self._mine, self._held, result=True)
        coming = self._layout(self._counts, self._here, result=True)
        buffer = out.empty(self._device)
        if self._mine[0]:
            G, M = (self._whole([view[i] for view in received]) for i in (0, 1))
            del received
            X, scales = self._halves.find(G, M, h, grad_scale, left_out)
            for span, (x, m, *more) in zip(self._sharing.spans, out.views(buffer), strict=True):
                x.copy_(X[:, span.start : span.stop])
                m.copy_(M[:, span.start : span.stop])
                if scales is not None:
                    more[0].copy_(scales)
        return Exchange(buffer, out, coming, self._sharing.group)

    def _whole(self, parts: list[Tensor]) -> Tensor:
        """Matrices (count, rows, columns) from the rows of each rank; each begins on 16 bytes."""
        count, _, columns = parts[0].shape
        size = self._rows * columns
        padded = torch.empty(count, -(-size // 16) * 16, dtype=parts[0].dtype, device=self._device)
        whole = padded[:, :size].unflatten(1, (self._rows, columns))
        for span, part in zip(self._sharing.spans, parts, strict=True):
            whole[:, span.start : span.stop] = part
        return whole

    def subtract(self, answers: Exchange, h: Hyper, left_out: Tensor | None) -> None:
        """Update this rank's rows of all matrices."""
        received = answers.take()
        X, M = torch.cat([view[0] for view in received]), [m for view in received for m in view[1].unbind()]
        scales = torch.cat([view[2] for view in received]) if self._halves.scaled else None
        self._halves.subtract(X, M, scales, h, left_out)


class Gathering:
    """The update of all matrices of a step that ranks share."""

    def __init__(self, groups: list[dict[str, Any]], members: list[list[Member]], numbers: dict[int, int]) -> None:
        """``members``, at least one, are in a list for each group; ``numbers`` are those of a step's parameters."""
        self._groups = [(group, mine) for group, mine in zip(groups, members, strict=True) if mine]
        self._members = [member for mine in members for member in mine]
        self._numbers = [numbers[id(member.p)] for member in self._members]
        self._device = local(self._members[0].p).device
        place = {id(member.p): i for i, member in enumerate(self._members)}
        self._lines = _packs_of(self._groups)
        self._index = {
            id(pack): self._on_device([place[id(matrix.member.p)] for matrix in pack.matrices])
            for pack in itertools.chain.from_iterable(self._lines)
        }

    def _on_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def run(self, grad_scale: Tensor | None, left_out: LeftOutReport, size: int) -> None:
        """Update all members. Arguments are as in ``PreparedStep.run``. All ranks of a matrix must call it."""
        if grad_scale is not None:
            grad_scale = grad_scale.to(self._device)
            grad_scale = grad_scale[self._numbers] if grad_scale.numel() > 1 else grad_scale
        bad = self._report(grad_scale, left_out, size)
        for packs in self._lines:
            self._run(packs, grad_scale, bad)

    def _run(self, packs: list[Pack], grad_scale: Tensor | None, bad: Tensor | None) -> None:
        """Update the matrices of one process group, whose ranks communicate in this order."""
        sent = packs[0].send()
        last: Callable[[], None] | None = None
        for i, pack in enumerate(packs):
            index, arriving = self._index[id(pack)], sent
            left_out = None if bad is None or pack.group["nonfinite"] == "ignore" else bad[index]
            scale = grad_scale if grad_scale is None or grad_scale.numel() == 1 else grad_scale[index][pack.own]
            h = hyper_of(pack.group, pack.member)
            if i + 1 < len(packs):
                sent = packs[i + 1].send()
            answers = pack.answer(arriving, h, scale, None if left_out is None else left_out[pack.own])
            if last is not None:
                last()
            last = functools.partial(pack.subtract, answers, h, left_out)
        if last is not None:
            last()

    def _report(self, grad_scale: Tensor | None, left_out: LeftOutReport, size: int) -> Tensor | None:
        """Which members have a gradient that is not finite on any rank, bool (members,), which all ranks report.

        None if no group checks its gradients.
        """
        if all(group["nonfinite"] == "ignore" for group, _ in self._groups):
            return None
        norms = norms_of([*map(_grad, self._members)])
        norms = norms if grad_scale is None else norms / grad_scale
        bad = (norms.square() < math.inf).logical_not_()  # NaN too
        start = 0
        for group, mine in self._groups:
            some, start = bad[start : start + len(mine)], start + len(mine)
            where = left_out.left_out_at(group, self._device, size)
            if where is not None:
                streams = self._on_device([member.stream for member in mine])
                steps = torch.tensor([member.state["step"] for member in mine], dtype=where.dtype, device=self._device)
                where[streams] = torch.where(some, steps, where[streams])
        return bad


def gathering_bytes(p: Tensor, group: Mapping[str, Any], ranks: int) -> int:
    """The most bytes of buffers on a GPU for ``p``, a whole weight that ``ranks`` share, beside those of the rule."""
    rule, level = rule_of(p, group)
    if rule.on_whole is None:
        return 0
    rows, n = p.shape[-2:]
    (state,) = rule.state(p, level, group).values()
    matrices, held = rule.on_whole.at_a_time(rows, n), ranks * -(-rows // ranks)
    gradients, answers = held * n * p.element_size(), held * n * 2
    states = held * state.shape[-1] * state.dtype.itemsize
    # A pack is whole, the next one sent and received; an answer is made, that of the pack before sent and received.
    # One more pack of gradients: NCCL holds what it has sent until its stream is done.
    return matrices * (4 * gradients + 3 * states + 3 * (answers + states))


def _grad(member: Member) -> Tensor:
    """The gradient of a member, a DTensor; all members here have one."""
    return cast(Tensor, member.p.grad)


def _packs_of(groups: list[tuple[dict[str, Any], list[Member]]]) -> list[list[Pack]]:
    """The packs of each process group, in an order that all of its ranks agree upon."""
    by_group: dict[Any, list[tuple[dict[str, Any], Matrix]]] = {}
    for group, members in groups:
        for matrix in itertools.chain.from_iterable(map(matrices_of, members)):
            by_group.setdefault(matrix.sharing.group, []).append((group, matrix))
    return [_packs_of_ranks(some) for some in by_group.values()]


def _packs_of_ranks(found: list[tuple[dict[str, Any], Matrix]]) -> list[Pack]:
    group_of = {id(matrix.member.p): group for group, matrix in found}
    owned = owners_of([matrix for _, matrix in found])
    kinds: dict[Any, list[list[Matrix]]] = {}
    for _, matrix in found:
        kinds.setdefault(_kind(group_of, matrix), [[] for _ in owned])
    for rank, some in enumerate(owned):
        for matrix in some:
            kinds[_kind(group_of, matrix)][rank].append(matrix)
    packs = []
    for of_ranks in kinds.values():
        matrix = next(itertools.chain.from_iterable(of_ranks))
        size = matrix.on_whole.at_a_time(*matrix.member.p.shape[-2:])
        for first in range(0, max(map(len, of_ranks)), size):
            packs.append(Pack(group_of[id(matrix.member.p)], [some[first : first + size] for some in of_ranks]))
    return packs


def _kind(group_of: dict[int, dict[str, Any]], matrix: Matrix) -> tuple[Any, ...]:
    """What the matrices of a pack agree in, the same on all ranks."""
    p, member = matrix.member.p, matrix.member
    dtypes = local(p).dtype, kind_of(p), _grad(member).dtype, local(member.state[member.names[0]]).dtype
    same = id(group_of[id(p)]), member.rule, member.level, member.state["step"]
    return *same, *p.shape[-2:], matrix.sharing.spans, *dtypes
