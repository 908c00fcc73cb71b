"""``PreparedStep``: updates members by launches of kernels, and by the rule in torch where no kernel takes them."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from foam_hf.kernels.choice import use_kernels
from foam_hf.optimizer.members import hyper_of
from foam_hf.optimizer.sharding import add_over_ranks
from foam_hf.optimizer.watched import Watched, WatchedGradients, gradients_of, unique
from foam_hf.rules.all import rule_named
from foam_hf.rules.rule import Launch, Unfinished
from foam_hf.tensors.finite import undo_if_nonfinite
from foam_hf.tensors.places import local
from foam_hf.tensors.rows import PLAIN, kernels_of, kind_of, weight_rows
from foam_hf.tensors.step import Hyper, Member, State

_PARAMETER, _STATE = operator.attrgetter("p"), operator.attrgetter("state")
LeftOutAt = Callable[[dict[str, Any], torch.device], Tensor | None]


@dataclass(slots=True)
class PreparedLaunch:
    """A launch of a step, and the parameters that it updates.

    Attributes:
        group: the param group of all of them.
        launch: the launch of a kernel.
        members: the members that it updates, in its order.
        numbers: the index of each member's parameter among those of the step.
        in_order: whether it updates all parameters of the step, in their order.
        lead: a member with a gradient in this step, or None. All members have the same ``Hyper`` but for the stream.
        index: ``numbers`` as a tensor on the device, made when it is needed.
    """

    group: dict[str, Any]
    launch: Launch
    members: list[Member]
    numbers: numpy.ndarray
    in_order: bool
    lead: Member | None = None
    index: Tensor | None = None

    def leave_out(self, missing: numpy.ndarray) -> None:
        """Let the launch skip the parameters without a gradient: ``missing``, bool, one for each of the step."""
        here = ~missing[self.numbers]
        self.launch.leave_out(here)
        first = int(here.argmax())
        self.lead = self.members[first] if here[first] else None

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
        for group, mine in zip(groups, members, strict=True):
            self._add(group, mine)
        self._members = [member for mine in members for member in mine]
        self._follow_missing(numpy.array([p.grad is None for p in params]))
        self._watched: Watched | None = None
        if self.launches:  # without tables a new PreparedStep costs nothing
            self._watched = Watched(groups, params, states, self._members)
            self._gradients = WatchedGradients(params, self._members, self._watched.sharded)

    def _add(self, group: dict[str, Any], members: list[Member]) -> None:
        by_kernels: dict[str, list[Member]] = {}
        for member in members:
            by_kernels.setdefault(_kernels(member) or "", []).append(member)
        unfit = by_kernels.pop("", [])
        by_stream = {member.stream: member for member in members}  # pieces of a parameter share its state
        everything = numpy.arange(len(self._numbers))
        for module, some in by_kernels.items():
            launches, more = importlib.import_module(module).make_launches(some)
            for launch in launches:
                mine = [by_stream[stream] for stream in launch.streams.tolist()]
                numbers = numpy.array([self._numbers[id(member.p)] for member in mine])
                in_order = numpy.array_equal(numbers, everything)
                self.launches.append(PreparedLaunch(group, launch, mine, numbers, in_order))
            unfit += more
        self.plain += [PlainUpdate(group, member, self._numbers[id(member.p)]) for member in unfit]

    def holds(self, groups: list[dict[str, Any]], params: list[Tensor], states: list[State]) -> bool:
        """Whether the step is still valid. If only gradients have moved, appeared or vanished, it adapts to them."""
        if self._watched is None or not self._watched.unchanged(groups, params, states):
            return False
        found, last = gradients_of(params, self._watched.sharded), self._gradients.last
        moved = not numpy.array_equal(found.addresses, last.addresses)
        if not self._gradients.fit(found, moved):
            return False
        self._gradients.last = found
        if moved:
            for each in self.launches:
                each.launch.move_gradients(found.addresses[each.numbers])
        if not numpy.array_equal(found.missing, last.missing):
            self._follow_missing(found.missing)
        return True

    def _follow_missing(self, missing: numpy.ndarray) -> None:
        """Skip parameters without a gradient in this step."""
        present = [member for member in self._members if not missing[self._numbers[id(member.p)]]]
        self._stepping, self._changing = (unique(map(get, present)) for get in (_STATE, _PARAMETER))
        for each in self.launches:
            each.leave_out(missing)

    def run(self, grad_scale: Tensor | None, left_out_at: LeftOutAt) -> None:
        """Update all members.

        Args:
            grad_scale: what to divide gradients by, with one element, or one for each of the step's parameters.
            left_out_at: from a group and a device, the tensor with an element for each parameter where the step
                records what it leaves out, or None.
        """
        for state in self._stepping:
            state["step"] += 1
        if self._watched is not None:
            self._watched.follow_steps()
        unfinished: list[tuple[Unfinished, Hyper, Tensor | None]] = []
        for each in self.launches:
            if each.lead is None:
                continue
            h, where = hyper_of(each.group, each.lead), left_out_at(each.group, each.launch.device)
            left = each.launch.run(h, each.scales(grad_scale), where)
            if left is not None:
                unfinished.append((left, h, where))
        for group, member, number in self.plain:
            if member.p.grad is None:
                continue
            h, where = hyper_of(group, member), left_out_at(group, member.weight.device)
            where = None if where is None else where[member.stream]
            scale = grad_scale
            if scale is not None and scale.numel() > 1:
                scale = scale[number]
            left = _update_plainly(member, h, scale, where)
            if left is not None:
                unfinished.append((left, h, where))
        # autograd does not see what kernels write, but a backward pass that needs the old values must raise an error.
        torch.autograd.graph.increment_version(self._changing)
        if unfinished:
            _finish(unfinished)


def _kernels(member: Member) -> str | None:
    """The name of the module whose kernels may take ``member``, or None."""
    if not use_kernels(local(member.p).device):
        return None
    if kind_of(member.weight) == PLAIN:
        return rule_named(member.rule).kernel
    return kernels_of(member.weight).get(member.rule)


def _update_plainly(
    member: Member, h: Hyper, grad_scale: Tensor | None, left_out_at: Tensor | None
) -> Unfinished | None:
    rule, grad, state = rule_named(member.rule), member.grad, member.moments
    grad = grad if grad_scale is None else grad.float() / grad_scale.to(grad.device)
    weight = weight_rows(member.weight, member.place)
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
            "FOAM's update cannot be captured in a CUDA graph: the learning rate and the step count it was captured "
            "with would never change; expected a capture of forward and backward only, and step() after its replay"
        )
