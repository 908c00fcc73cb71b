"""``PreparedStep``: updates members by launches of kernels, and by the rule in torch where no kernel takes them."""

from __future__ import annotations

import importlib
import itertools
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from foam_hf.kernels.choice import use_kernels
from foam_hf.kernels.uploads import SharedTables, share_tables
from foam_hf.optimizer.gathering import Gathering
from foam_hf.optimizer.members import Micro, hyper_of
from foam_hf.optimizer.nonfinite import LeftOutReport
from foam_hf.optimizer.sharding import add_over_ranks
from foam_hf.optimizer.shared_matrices import is_shared
from foam_hf.optimizer.watched import StepCounts, Watched, WatchedGradients, here, unique
from foam_hf.rules.all import rule_named
from foam_hf.rules.rule import Launch, Unfinished
from foam_hf.tensors.finite import undo_if_nonfinite
from foam_hf.tensors.places import local
from foam_hf.tensors.rows import PLAIN, kernels_of, kind_of, weight_rows
from foam_hf.tensors.step import Hyper, Member, State


@dataclass(slots=True)
class PreparedLaunch:
    """A launch of a step, and the parameters that it updates.

    Attributes:
        group: the param group of all of them.
        launch: the launch of a kernel.
        members: the members that it updates, in its order.
        numbers: the index of each member's parameter among those of the step.
        counted: the index of each member's parameter among those with a member, whose steps are counted.
        in_order: whether it updates all parameters of the step, in their order.
        lead: a member with a gradient in this step, or None. All members have the same ``Hyper`` but for the stream.
        index: ``numbers`` as a tensor on the device, made when it is needed.
    """

    group: dict[str, Any]
    launch: Launch
    members: list[Member]
    numbers: numpy.ndarray
    counted: numpy.ndarray
    in_order: bool
    lead: Member | None = None
    index: Tensor | None = None

    def leave_out(self, present: numpy.ndarray, counts: numpy.ndarray) -> None:
        """Let the launch skip parameters without a gradient.

        ``present`` is bool, one for each parameter of the step; ``counts`` are the steps of those with a member.
        """
        mine = present[self.numbers]
        self.launch.leave_out(mine, counts[self.counted])
        first = int(mine.argmax())
        self.lead = self.members[first] if mine[first] else None

    def scales(self, grad_scale: Tensor | None) -> Tensor | None:
        """The elements of ``grad_scale`` for the members of the launch, in order; one element is for all members."""
        if grad_scale is None or grad_scale.numel() == 1 or self.in_order:
            return grad_scale
        if self.index is None:
            self.index = torch.from_numpy(self.numbers).to(grad_scale.device)
        return grad_scale[self.index]


class PlainUpdate(NamedTuple):
    """A member that no kernel takes, its param group, and the index of its parameter among those of the step."""

    group: dict[str, Any]
    member: Member
    number: int


class PreparedStep:
    """The launches and updates of a step, for some parameters of an optimizer.

    It is used again as long as it ``holds``, so that kernels' tables are made only once. It keeps no gradient alive.

    Attributes:
        launches: launches of kernels.
        plain: members that are updated without kernels.

    Members whose matrices are gathered are in neither.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        params: list[Tensor],
        states: list[State],
        members: list[list[Member]],
    ) -> None:
        """``members`` has a list for each group. ``holds`` compares ``params`` and ``states`` with later ones."""
        self.launches: list[PreparedLaunch] = []
        self.plain: list[PlainUpdate] = []
        self._numbers = {id(p): i for i, p in enumerate(params)}
        every = [member for mine in members for member in mine]
        self._changed = unique(member.p for member in every)  # pieces of a parameter share its state
        self._changed_numbers = numpy.array([self._numbers[id(p)] for p in self._changed], dtype=numpy.int64)
        self._counted = {id(p): i for i, p in enumerate(self._changed)}
        self._counts = StepCounts(unique(member.state for member in every))
        shared: list[list[Member]] = []
        for group, mine in zip(groups, members, strict=True):
            gathered = list(map(is_shared, mine))
            shared.append(list(itertools.compress(mine, gathered)))
            self._add(group, list(itertools.compress(mine, map(operator.not_, gathered))))
        self._gathering = Gathering(groups, shared, self._numbers) if any(shared) else None
        self._tables: list[SharedTables] = []
        self._watched: Watched | None = None
        if self.launches or self._gathering is not None:  # without these a new PreparedStep costs nothing
            self._tables = share_tables([each.launch for each in self.launches])
            self._watched = Watched(groups, params, states, every)
            self._gradients = WatchedGradients(params, every, self._watched.sharded)
            self._follow_missing(here(self._gradients.last))
        else:
            self._follow_missing([p.grad is not None for p in params])

    def _add(self, group: dict[str, Any], members: list[Member]) -> None:
        by_kernels: dict[str, list[Member]] = {}
        for member in members:
            by_kernels.setdefault(_kernels(member) or "", []).append(member)
        unfit = by_kernels.pop("", [])
        everything = numpy.arange(len(self._numbers))
        for module, some in by_kernels.items():
            launches, more = importlib.import_module(module).make_launches(some)
            for launch in launches:
                mine = launch.members
                numbers = numpy.array([self._numbers[id(member.p)] for member in mine])
                counted = numpy.array([self._counted[id(member.p)] for member in mine])
                in_order = numpy.array_equal(numbers, everything)
                self.launches.append(PreparedLaunch(group, launch, mine, numbers, counted, in_order))
            unfit += more
        self.plain += [PlainUpdate(group, member, self._numbers[id(member.p)]) for member in unfit]

    def holds(self, groups: list[dict[str, Any]], params: list[Tensor], states: list[State]) -> bool:
        """Whether the step is still valid. If only gradients have moved, appeared or vanished, it adapts to them."""
        watched = self._watched
        if watched is None or not (self._counts.unchanged() and watched.unchanged(groups, params, states)):
            return False
        missing = self._gradients.last.missing
        if not self._gradients.follow(params):
            return False
        found, moved = self._gradients.last, self._gradients.moved
        if moved is not None:
            for each in self.launches:
                each.launch.move_gradients(moved if each.in_order else moved[each.numbers])
        if found.missing != missing:
            self._follow_missing(here(found))
        return True

    def _follow_missing(self, present: list[bool]) -> None:
        """Update only the parameters that are ``present``, one value for each of the step's."""
        flags = numpy.array(present, dtype=bool)
        mine = flags[self._changed_numbers].tolist()
        self._counts.count_only(mine)
        self._changing = list(itertools.compress(self._changed, mine))
        counts = numpy.array(self._counts.counts, dtype=numpy.int64)
        for each in self.launches:
            each.leave_out(flags, counts)

    def run(self, grad_scale: Tensor | None, left_out: LeftOutReport, size: int, micro: Micro | None = None) -> None:
        """Update all members, which have something pending if this is one of several micro-batches.

        Args:
            grad_scale: what to divide gradients by, with one element, or one for each of the step's parameters.
            left_out: takes what the step leaves out.
            size: how many parameters the optimizer has.
        """
        if micro is None or micro.number == 0:
            self._counts.advance()
        unfinished: list[tuple[Unfinished, Hyper, Tensor | None]] = []
        running = [(each, hyper_of(each.group, each.lead, micro)) for each in self.launches if each.lead is not None]
        counts: numpy.ndarray | None = None
        for each, h in running:
            if each.launch.mixed:
                counts = numpy.array(self._counts.counts, dtype=numpy.int64) if counts is None else counts
                each.launch.follow_steps(h, counts[each.counted])
        for tables in self._tables:
            tables.upload()
        for each, h in running:
            where = left_out.left_out_at(each.group, each.launch.device, size)
            left = each.launch.run(h, each.scales(grad_scale), where)
            if left is not None:
                unfinished.append((left, h, where))
        for group, member, number in self.plain:
            if member.p.grad is None:
                continue
            h, where = hyper_of(group, member, micro), left_out.left_out_at(group, member.weight.device, size)
            where = None if where is None else where[member.stream]
            scale = grad_scale
            if scale is not None and scale.numel() > 1:
                scale = scale[number]
            left = _update_plainly(member, h, scale, where)
            if left is not None:
                unfinished.append((left, h, where))
        if self._gathering is not None:
            self._gathering.run(grad_scale, left_out, size)
        # autograd does not see what kernels write, but a backward pass that needs the old values must raise an error.
        torch.autograd.graph.increment_version(self._changing)
        if unfinished:
            _finish(unfinished)


def _kernels(member: Member) -> str | None:
    """The name of the module whose kernels may take ``member``, or None."""
    if not use_kernels(local(member.p).device):
        return None
    if kind_of(member.weight) == PLAIN:
        rule = rule_named(member.rule)
        return rule.micro_kernel if member.pending else rule.kernel
    return kernels_of(member.weight).get(f"{member.rule}, micro-batches" if member.pending else member.rule)


def _update_plainly(
    member: Member, h: Hyper, grad_scale: Tensor | None, left_out_at: Tensor | None
) -> Unfinished | None:
    rule, grad, state = rule_named(member.rule), member.grad, member.moments
    weight = weight_rows(member.weight, member.place)
    if grad_scale is not None:
        grad_scale = grad_scale.to(grad.device)
    if member.pending and rule.update_micro is not None:
        rule.update_micro(weight, grad, state, member.parts_of_pending, member.level, h, left_out_at, grad_scale)
        return None
    grad = grad if grad_scale is None else grad.float() / grad_scale
    if rule.unit == "block":
        return rule.update(weight, grad, state, member.level, h, left_out_at)
    with undo_if_nonfinite(grad, [*weight.tensors, *state.values()], left_out_at, h.step) as wanted:
        return rule.update(weight, grad, state, member.level, h) if wanted else None


def _finish(unfinished: list[tuple[Unfinished, Hyper, Tensor | None]]) -> None:
    """Add up the sums of ``unfinished`` updates over ranks, and complete the updates."""
    # All ranks must use the same order, so it is that of parameters and pieces: launches may differ between ranks.
    parts = sorted((part for one, _, _ in unfinished for part in one.sums), key=operator.itemgetter(0))
    add_over_ranks([(groups, tensor) for _, groups, tensor in parts])
    for one, h, left_out_at in unfinished:
        one.store(h, left_out_at)


def refuse_capture() -> None:
    """Raise RuntimeError while a CUDA graph is captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "FOAM's update cannot be captured in a CUDA graph: its kernels take the learning rate, the weight decay, "
            "the step count and its bias corrections as numbers of the host, not as tensors on the GPU, so every "
            "replay would repeat the step of the capture; expected a capture of forward and backward only, and step() "
            "after its replay"
        )
