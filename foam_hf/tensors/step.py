"""What a rule needs to update one parameter: the numbers of the step (``Hyper``) and the tensors (``Member``)."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple, cast

from torch import Tensor

from foam_hf.tensors.folding import Level
from foam_hf.tensors.places import Piece, Place, whole_place

State = MutableMapping[str, Any]


class Hyper(NamedTuple):
    """The numbers of one parameter's step, named as in the paper.

    ``b1, b2`` are the betas, ``c1, c2`` the bias corrections ``1 - b**step``, and ``rho`` is the residual's scale.
    Random bits depend on ``seed``, ``step``, ``stream`` and ``micro``; ``stochastic`` says whether to round by them.
    ``micro`` counts the micro-batches of the step from 0, ``micros`` is how many there are, and ``shares`` how many of
    them an update stands for. A step whose gradient comes at once has one.
    """

    lr: float
    b1: float
    b2: float
    c1: float
    c2: float
    eps: float
    weight_decay: float
    scale: float
    rho: float
    stochastic: bool
    seed: int
    step: int
    stream: int
    micro: int = 0
    micros: int = 1
    shares: int = 1


class Member(NamedTuple):
    """A parameter, or one piece of a sharded one, with all that a step needs of it; its gradient may be missing."""

    p: Tensor
    state: State
    names: tuple[str, ...]  # of the tensors in ``state``, in the order that the rule and its kernels expect
    level: Level
    rule: str
    stream: int
    piece: Piece | None = None  # only of a DTensor
    pending: tuple[Tensor, ...] = ()  # what a step has collected of its micro-batches, see ``rules.micro_batches``

    @property
    def parts_of_pending(self) -> tuple[Tensor, ...]:
        """``pending``; of a DTensor, this piece of each."""
        return self.pending if self.piece is None else tuple(map(self.piece.of, self.pending))

    @property
    def weight(self) -> Tensor:
        return self.p if self.piece is None else self.piece.of(self.p)

    @property
    def grad(self) -> Tensor:
        grad = cast(Tensor, self.p.grad)
        return grad if self.piece is None else self.piece.of(grad)

    @property
    def place(self) -> Place:
        return whole_place(self.p) if self.piece is None else self.piece.place

    @property
    def moments(self) -> dict[str, Tensor]:
        """The tensors of state by name, in the order of ``names``; of a DTensor, this piece of each."""
        piece, state = self.piece, self.state
        return {name: state[name] if piece is None else piece.of(state[name]) for name in self.names}
