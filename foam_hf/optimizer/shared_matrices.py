"""Which matrices ranks share, and which rank owns a matrix: updates it as a whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, distributed

from foam_hf.optimizer.sharding import shared_dimension
from foam_hf.rules.all import rule_named
from foam_hf.rules.rule import OnWhole, Part
from foam_hf.tensors.places import Group, is_sharded, local, whole_place
from foam_hf.tensors.step import Member


class Sharing(NamedTuple):
    """How ranks share a matrix: its rows on each rank of ``group``, in its order. No group: this rank has all."""

    group: Group | None
    spans: tuple[range, ...]

    @property
    def me(self) -> int:
        return 0 if self.group is None else distributed.get_rank(self.group)


class Matrix(NamedTuple):
    """A matrix of a parameter: its ``number`` in the tensor, and where it is in this rank's shard: ``at``."""

    member: Member
    number: int
    at: tuple[int, ...]
    sharing: Sharing

    @property
    def on_whole(self) -> OnWhole:
        """How its rule updates it."""
        return cast(OnWhole, rule_named(self.member.rule).on_whole)

    def of(self, x: Any) -> Tensor:
        """This rank's rows of ``x``, the weight, its gradient or its state: a view."""
        return local(x)[self.at] if self.at else local(x)

    @property
    def part(self) -> Part:
        p, (name,) = self.member.p, self.member.names
        first_row = self.number * p.shape[-2] + self.sharing.spans[self.sharing.me].start
        place = whole_place(p)._replace(first_row=first_row)
        return Part(self.of(p), self.of(self.member.state[name]), place, self.number, self.member.stream)


def is_shared(member: Member) -> bool:
    """Whether ranks share the matrices of ``member``, and its rule needs whole ones."""
    if rule_named(member.rule).on_whole is None or not is_sharded(member.p):
        return False
    return shared_dimension(member.p) is not None


def matrices_of(member: Member) -> Iterator[Matrix]:
    """The matrices of a shared parameter: all if ranks share the rows of each, else those that this rank has."""
    shared, p = shared_dimension(member.p), member.p
    if shared is None:
        return
    mine = shared.spans[distributed.get_rank(shared.group)]
    whole = Sharing(None, (range(p.shape[-2]),))
    for number, at in enumerate(itertools.product(*map(range, p.shape[:-2]))):
        if shared.dim == p.dim() - 2:
            yield Matrix(member, number, at, Sharing(shared.group, shared.spans))
        elif at[shared.dim] in mine:
            here = (*at[: shared.dim], at[shared.dim] - mine.start, *at[shared.dim + 1 :])
            yield Matrix(member, number, here, whole)


def owners_of(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """The matrices that each rank owns, in their order; ``matrices`` are all of one group, the same on its ranks.

    The largest comes first, and goes to the rank with the least work so far.
    """
    ranks = len(matrices[0].sharing.spans)
    costs = [matrix.on_whole.cost(*matrix.member.p.shape[-2:]) for matrix in matrices]
    loads: list[int] = [0] * ranks
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(matrices)), key=lambda i: (-costs[i], i)):
        # Gradient release has one or two matrices at a time, so that the first rank must not be the same for all.
        turn = matrices[i].member.stream + matrices[i].number
        owner = min(range(ranks), key=lambda rank: (loads[rank], (rank - turn) % ranks))
        loads[owner] += costs[i]
        owned[owner].append(i)
    return [[matrices[i] for i in sorted(some)] for some in owned]
