"""The parameters of an optimizer as its steps see them: their numbers, their state, and the numbers of their step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foam_hf.kernels.choice import use_kernels
from foam_hf.optimizer.checks import check_gradient, check_options, check_rule
from foam_hf.optimizer.nonfinite import LeftOutReport
from foam_hf.optimizer.sharding import empty_state, follow_placements, pieces_of
from foam_hf.optimizer.state import state_problem
from foam_hf.rules.all import rule_named, rule_of
from foam_hf.tensors.places import Piece, is_sharded
from foam_hf.tensors.step import Hyper, Member

Group = dict[str, Any]
Numbering = dict[int, tuple[int, int]]  # by a parameter's id: the number of its group, and its own among all


class Owned(NamedTuple):
    """What an optimizer has of its parameters.

    Attributes:
        groups: its param groups.
        state: of each parameter, a dict, which is empty before its first step.
        left_out: what steps have left out.
    """

    groups: list[Group]
    state: MutableMapping[Tensor, dict[str, Any]]
    left_out: LeftOutReport

    def left_out_at(self, group: Group, device: torch.device) -> Tensor | None:
        """Where a step writes its number for the parameters of which it leaves out a block."""
        return self.left_out.left_out_at(group, device, sum(len(each["params"]) for each in self.groups))


def parameters_of(groups: list[Group]) -> Iterator[Tensor]:
    return itertools.chain.from_iterable(group["params"] for group in groups)


def numbering_of(groups: list[Group]) -> Numbering:
    """A parameter's number among all is its random stream."""
    numbering: Numbering = {}
    for index, group in enumerate(groups):
        for p in group["params"]:
            numbering[id(p)] = index, len(numbering)
    return numbering


def members_of(owned: Owned) -> list[list[Member]]:
    """Every parameter with a gradient, by group, with state; of DTensors, the pieces of this rank's shard.

    Where kernels run also those with state: tables that know them serve when their gradients come again. Not where
    none has a gradient, as those that were released.

    Raises:
        ValueError: a parameter is listed twice, or its state does not fit its group.
        TypeError: a sparse or complex gradient.
    """
    params = list(parameters_of(owned.groups))
    if len({id(p) for p in params}) < len(params):  # what was swapped behind our back
        raise ValueError("a parameter is listed twice in the param groups; expected each parameter once")
    for i, p in enumerate(params):
        check_gradient(p, i)
        if p.grad is not None and is_sharded(p):
            follow_placements(p)
    some = any(p.grad is not None for p in params)
    stream = itertools.count()  # a parameter keeps its random stream, whichever others have gradients
    return [
        [
            member
            for p, i in zip(group["params"], stream, strict=False)
            if p.grad is not None or (some and owned.state.get(p) and not is_sharded(p) and use_kernels(p.device))
            for member in _pieces(owned, p, group, i)
        ]
        for group in owned.groups
    ]


def _pieces(owned: Owned, p: Tensor, group: Group, stream: int) -> list[Member]:
    pieces: list[Piece | None] = [None]
    if is_sharded(p):
        check_rule(p, group)  # FSDP2 shards what the constructor saw whole
        pieces = [*pieces_of(p, *rule_of(p, group))]
    if not owned.state[p]:
        owned.left_out.forget(stream, owned.groups)
    member = member_of(owned, p, group, stream)
    return [member._replace(piece=piece) for piece in pieces]


def member_of(owned: Owned, p: Tensor, group: Group, stream: int) -> Member:
    """``p``, the parameter number ``stream`` of all, as a step sees it; it has state from now on.

    Raises:
        ValueError: the state that it has does not fit ``group``.
    """
    rule, level = rule_of(p, group)
    state, expected = owned.state[p], rule.state(p, level, group)
    if not state:
        state["step"] = 0
        state.update({name: empty_state(p, tensor) for name, tensor in expected.items()})
    problem = state_problem(state, expected)
    if problem:
        raise ValueError(
            f"level={group['level']!r} and second_moment={group['second_moment']!r} do not fit the state of a "
            f"parameter of shape {tuple(p.shape)}: {problem}; expected them to stay as they were at its first step"
        )
    return Member(p, state, tuple(expected), level, rule.name, stream)


def hyper_of(group: Group, member: Member) -> Hyper:
    """The numbers of the step that ``member`` takes; its state counts that step already."""
    b1, b2 = rule_named(member.rule).betas(group)
    if not (0 <= b1 < 1 and 0 <= b2 < 1):  # a schedule's, or a user's, since the group was checked
        check_options(group)
    t = member.state["step"]
    return Hyper(
        lr=float(group["lr"]),
        b1=b1,
        b2=b2,
        c1=1 - b1**t,
        c2=1 - b2**t,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        scale=group["scale"] if member.p.dim() > 1 else 1.0,
        rho=group["residual_scale"],
        stochastic=group["stochastic_rounding"] is not False,
        seed=group["seed"],
        step=t,
        stream=member.stream,
    )
