"""Makes the members of a step, from an optimizer's parameters, and the numbers of the step for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor

from foam_hf.kernels.choice import use_kernels
from foam_hf.optimizer.buckets import gradients
from foam_hf.optimizer.checks import check_gradient, check_options, check_rule
from foam_hf.optimizer.nonfinite import LeftOutReport
from foam_hf.optimizer.sharding import empty_state, follow_placements, pieces_of
from foam_hf.optimizer.state import state_problem
from foam_hf.rules.all import rule_named, rule_of
from foam_hf.tensors.places import Piece, is_sharded, local
from foam_hf.tensors.rows import visiting_layer
from foam_hf.tensors.step import Hyper, Member

Group = dict[str, Any]
Numbering = dict[int, tuple[int, int]]  # id of a parameter -> the number of its group, and its number among all


class Owned(NamedTuple):
    """The parts of an optimizer that its steps need.

    Attributes:
        groups: the param groups.
        state: a dict for each parameter, which is empty before its first step.
        left_out: what steps have left out.
    """

    groups: list[Group]
    state: MutableMapping[Tensor, dict[str, Any]]
    left_out: LeftOutReport


def parameters_of(groups: list[Group]) -> Iterator[Tensor]:
    """All parameters, in the order of their groups."""
    return itertools.chain.from_iterable(group["params"] for group in groups)


def numbering_of(groups: list[Group]) -> Numbering:
    """The numbers of each parameter. Its number among all is its random stream."""
    numbering: Numbering = {}
    for index, group in enumerate(groups):
        for p in group["params"]:
            numbering[id(p)] = index, len(numbering)
    return numbering


def members_of(owned: Owned) -> list[list[Member]]:
    """A member for every parameter with a gradient, in a list for each group; for a DTensor, one for each piece.

    Parameters without a gradient are members too if they have state and kernels run, so that the tables of the kernels
    need not be made anew when they have a gradient again. If no parameter has a gradient, there are no members.

    Raises:
        ValueError: a parameter is listed twice, or its state or gradient does not fit it.
        TypeError: a sparse or complex gradient.
        RuntimeError: the gradient of an offloaded weight.
    """
    params = list(parameters_of(owned.groups))
    if len({id(p) for p in params}) < len(params):  # a caller has changed the lists of the groups
        raise ValueError("a parameter is listed twice in the param groups; expected each parameter once")
    if all(grad is None for grad in gradients(params)):  # gradient release has updated all
        return [[] for _ in owned.groups]
    for i, p in enumerate(params):
        check_gradient(p, i)
        if p.grad is not None and visiting_layer(p) is not None:
            raise RuntimeError(
                "weights that are offloaded are updated one layer at a time, in the backward pass: got step() with "
                f"the gradient of one of shape {tuple(p.shape)}; expected gradient_release=true, or "
                "foam_hf.enable_gradient_release(model, optimizer) before the backward pass"
            )
        if p.grad is not None and is_sharded(p):
            follow_placements(p)
    stream = itertools.count()  # counts all, so that a stream does not depend on which others have gradients
    return [
        [
            member
            for p, i in zip(group["params"], stream, strict=False)
            if p.grad is not None or _waits(owned, p, group)
            for member in _pieces(owned, p, group, i)
        ]
        for group in owned.groups
    ]


def _waits(owned: Owned, p: Tensor, group: Group) -> bool:
    """Whether ``p``, without a gradient now, gets a place in the kernels' tables for a later one."""
    state = owned.state.get(p)
    if not state or is_sharded(p) or not use_kernels(p.device):
        return False
    # What does not fit matters when there is a gradient: a frozen weight may be cut, or its state be kept elsewhere.
    return not _problem(p, group, state)


def _pieces(owned: Owned, p: Tensor, group: Group, stream: int) -> list[Member]:
    if not owned.state[p]:
        owned.left_out.forget(stream, owned.groups)
    return members_of_one(owned, p, group, stream)


def members_of_one(owned: Owned, p: Tensor, group: Group, stream: int) -> list[Member]:
    """The members of one parameter: itself, or the pieces of this rank's shard. State is made if missing.

    Raises:
        ValueError: the state of ``p`` does not fit ``group``, or its shard cannot be updated.
    """
    pieces: list[Piece | None] = [None]
    if is_sharded(p):
        check_rule(p, group)  # again, as FSDP2 may have sharded it after the constructor checked it
        pieces = [*pieces_of(p, *rule_of(p, group))]
    member = member_of(owned, p, group, stream)
    owned.left_out.forget_beyond(stream, member.state["step"], owned.groups)
    return [member._replace(piece=piece) for piece in pieces]


def member_of(owned: Owned, p: Tensor, group: Group, stream: int) -> Member:
    """The member for the whole of ``p``, whose number among all parameters is ``stream``. State is made if missing.

    Raises:
        ValueError: the state of ``p`` does not fit ``group``.
    """
    rule, level = rule_of(p, group)
    state, expected = owned.state[p], rule.state(p, level, group)
    if not state:
        state["step"] = 0
        state.update({name: empty_state(p, tensor) for name, tensor in expected.items()})
    if problem := _problem(p, group, state):
        raise ValueError(problem)
    return Member(p, state, tuple(expected), level, rule.name, stream)


def _problem(p: Tensor, group: Group, state: dict[str, Any]) -> str:
    """Why ``group`` or ``p`` does not fit ``state``, or an empty string."""
    rule, level = rule_of(p, group)
    expected = rule.state(p, level, group)
    if problem := state_problem(state, expected):
        return (
            f"level={group['level']!r} and second_moment={group['second_moment']!r} do not fit the state of a "
            f"parameter of shape {tuple(p.shape)}: {problem}; expected them to stay as they were at its first step"
        )
    device = local(p).device
    for name in expected:  # kernels get addresses, which mean another place on another device
        if (found := local(state[name]).device) != device:
            return (
                f"state is not on the device of its weight: got {name} on {found} for a weight of shape "
                f"{tuple(p.shape)} on {device}; expected a model that is on its device before the first step, or "
                "state that moves with it, as optimizer.load_state_dict(optimizer.state_dict()) moves it"
            )
    return ""


class Micro(NamedTuple):
    """Which ``number`` ``of`` a step's micro-batches an update is, from 0; it stands for ``shares`` of them."""

    number: int
    of: int
    shares: int = 1


WHOLE_STEP = Micro(0, 1)


def hyper_of(group: Group, member: Member, micro: Micro | None = None) -> Hyper:
    """The numbers of the current step of ``member``, whose state has counted it already."""
    number, of, shares = micro or WHOLE_STEP
    b1, b2 = rule_named(member.rule).betas(group)
    if not (0 <= b1 < 1 and 0 <= b2 < 1):  # a schedule or a user has changed them since the last check
        check_options(group)
    t = member.state["step"]
    return Hyper(  # in the order of its fields: by their names it would take three times as long, for every launch
        float(group["lr"]),
        b1,
        b2,
        1 - b1**t,
        1 - b2**t,
        group["eps"],
        0.0 if number else group["weight_decay"],  # once a step
        group["scale"] if member.p.dim() > 1 else 1.0,
        group["residual_scale"],
        group["stochastic_rounding"] is not False,
        group["seed"],
        t,
        member.stream,
        number,
        of,
        shares,
    )
