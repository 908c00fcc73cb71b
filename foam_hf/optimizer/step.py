"""How a step updates the parameters of a group: by kernels where their rule has them, else by the rule in torch."""

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
from foam_hf.tensors.finite import leaving_out_whole
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
        launch: of kernels.
        members: of the launch, in its order.
        numbers: their places among the parameters of the step.
        in_order: it updates all parameters of the step, in their order.
        lead: a member with a gradient in this step, if there is one: its numbers are those of all.
        index: ``numbers`` on the device, once needed.
    """

    group: dict[str, Any]
    launch: Launch
    members: list[Member]
    numbers: numpy.ndarray
    in_order: bool
    lead: Member | None = None
    index: Tensor | None = None

    def leave_out(self, missing: numpy.ndarray) -> None:
        """Run nothing of parameters that are ``missing`` a gradient, bool, one for each of the step's."""
        here = ~missing[self.numbers]
        self.launch.leave_out(here)
        first = int(here.argmax())
        self.lead = self.members[first] if here[first] else None

    def scales(self, grad_scale: Tensor | None) -> Tensor | None:
        """``grad_scale`` of one element, or of those that it has for the step's parameters the launch's, in order."""
        if grad_scale is None or grad_scale.numel() == 1 or self.in_order:
            return grad_scale
        if self.index is None:
            self.index = torch.from_numpy(self.numbers).to(grad_scale.device)
        return grad_scale[self.index]


class PlainUpdate(NamedTuple):
    """A member that no kernel takes, its param group, and its parameter's place among those of the step."""

    group: dict[str, Any]
    member: Member
    number: int


class PreparedStep:
    """What a step of some parameters does. It serves again as long as it ``holds``, so tables are built only once.

    It keeps no gradient alive, and is valid only for the very tensors of state it was made with.

    Attributes:
        launches: what kernels update.
        plain: what is updated without.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        params: list[Tensor],
        states: list[State],
        members: list[list[Member]],
    ) -> None:
        """``holds`` compares ``params`` and ``states``; ``members`` are those with a gradient or state, by group."""
        self.launches: list[PreparedLaunch] = []
        self.plain: list[PlainUpdate] = []
        self._numbers = {id(p): i for i, p in enumerate(params)}
        for group, mine in zip(groups, members, strict=True):
            self._add(group, mine)
        self._members = [member for mine in members for member in mine]
        self._follow_missing(numpy.array([p.grad is None for p in params]))
        self._watched: Watched | None = None
        if self.launches:  # without tables there is nothing to keep
            self._watched = Watched(groups, params, states, self._members)
            self._gradients = WatchedGradients(params, self._members, self._watched.sharded)

    def _add(self, group: dict[str, Any], members: list[Member]) -> None:
        by_kernels: dict[str, list[Member]] = {}
        for member in members:
            by_kernels.setdefault(_kernels(member) or "", []).append(member)
        unfit = by_kernels.pop("", [])
        by_stream = {member.stream: member for member in members}  # pieces share what counts of it
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
        """Whether the step still serves: nothing has moved but gradients, come or gone, which it then follows."""
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
        """Leave out what has no gradient in this step."""
        present = [member for member in self._members if not missing[self._numbers[id(member.p)]]]
        self._stepping, self._changing = (unique(map(get, present)) for get in (_STATE, _PARAMETER))
        for each in self.launches:
            each.leave_out(missing)

    def run(self, grad_scale: Tensor | None, left_out_at: LeftOutAt) -> None:
        """Update everything; gradients are those of a loss times ``grad_scale``.

        ``grad_scale`` has one element, or one for each of ``params``. ``left_out_at`` gives, for a group and a
        device, where to write in which step a block was last left out, one element a parameter; or None.
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
        # autograd sees neither what a kernel writes nor INT8 codes, and a backward pass under way may still need them.
        torch.autograd.graph.increment_version(self._changing)
        if unfinished:
            _finish(unfinished)


def _kernels(member: Member) -> str | None:
    """The module of the kernels that may take ``member``; None if there are none."""
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
    with leaving_out_whole(grad, [*weight.tensors, *state.values()], left_out_at, h.step) as wanted:
        return rule.update(weight, grad, state, member.level, h) if wanted else None


def _finish(unfinished: list[tuple[Unfinished, Hyper, Tensor | None]]) -> None:
    """What the factored rule has left to do when the ranks of a shard know each other's sums."""
    # By parameter and piece, as which of them share a launch may differ from rank to rank.
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
