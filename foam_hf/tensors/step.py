"""What one step does to one parameter: its numbers, and its tensors as the step sees them."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor

from foam_hf.tensors.folding import Level
from foam_hf.tensors.places import Piece, Place, whole

State = MutableMapping[str, Any]


@dataclass(frozen=True)
class Hyper:
    """The numbers of one parameter's step; ``seed``, ``step`` and ``stream`` say where its random bits come from."""

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


class Member(NamedTuple):
    """A parameter that has or may have a gradient, or a piece of its shard, as a step sees it."""

    p: Tensor
    state: State
    names: tuple[str, ...]  # of the tensors in ``state``, in the order in which its rule and the kernels take them
    level: Level
    rule: str
    stream: int
    piece: Piece | None = None  # of a DTensor

    @property
    def weight(self) -> Tensor:
        return self.p if self.piece is None else self.piece.of(self.p)

    @property
    def grad(self) -> Tensor:
        grad = cast(Tensor, self.p.grad)
        return grad if self.piece is None else self.piece.of(grad)

    @property
    def place(self) -> Place:
        return whole(self.p) if self.piece is None else self.piece.place

    @property
    def moments(self) -> dict[str, Tensor]:
        """The tensors of state in order, of this piece."""
        piece, state = self.piece, self.state
        return {name: state[name] if piece is None else piece.of(state[name]) for name in self.names}
