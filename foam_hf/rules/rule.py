"""What an update rule states about itself. Each is one ``Rule``, in a file of its own; ``all`` has the tuple of them.

A rule that folds is what ``second_moment`` of a param group asks for; what it does not take, as vectors, gets AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor, nn

from foam_hf.tensors import places
from foam_hf.tensors.folding import Level
from foam_hf.tensors.rows import Rows
from foam_hf.tensors.step import Hyper

Group = Mapping[str, Any]  # the fields of a param group

# No element moves by more than this times ``lr * scale`` in a step.
LARGEST_STEP = 16.0
# Adam's own bound at its default betas, and so the block rule's: no second moment of one's own lets an element get to
# LARGEST_STEP, and nothing is limited.
ADAMS_LARGEST_STEP = 7.5


class StateTensor(NamedTuple):
    """A tensor of state, as it is made: of zeros."""

    shape: torch.Size
    dtype: torch.dtype
    lacks: int | None = None  # the dimension of the weight that it does not have; shards are cut by it


class Unfinished(Protocol):
    """What a step has left to do when the ranks that share a weight know each other's sums."""

    @property
    def sums(self) -> Sequence[tuple[tuple[int, int], tuple[places.Group, ...], Tensor]]:
        """What to add up over ranks: whose it is (stream, first matrix), the groups of ranks, float32 sums."""

    def store(self, h: Hyper, left_out_at: Tensor | None = None) -> None:
        """Finish: ``sums`` are those of all ranks."""


class Launch(Protocol):
    """What ``make_launches(members)`` of a module of kernels gives, with the members that none of them takes.

    It serves as long as a ``StepPlan`` holds; ``kernels.tables.AddressTable`` is all of it but ``run``.
    """

    streams: numpy.ndarray  # of its members

    @property
    def device(self) -> torch.device: ...

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> Unfinished | None:
        """Update its members; gives what is left to do, if anything is."""

    def leave_out(self, here: numpy.ndarray) -> None:
        """Run nothing of a member that is not ``here``, bool, one for each of ``streams``."""

    def move_gradients(self, addresses: numpy.ndarray) -> None:
        """Gradients of the same kind are elsewhere now; ``addresses`` has one for each of ``streams``."""


class Update(Protocol):
    """A rule in torch: for every device and kind of weight, in float32. Kernels are held to it."""

    def __call__(
        self,
        weight: Rows,
        grad: Tensor,
        state: dict[str, Tensor],
        level: Level,
        h: Hyper,
        left_out_at: Tensor | None = None,
    ) -> Unfinished | None:
        """Advance a weight, or a piece of one, and its state by one step.

        ``grad`` has the weight's shape, any float dtype and strides; ``state`` has what the rule states, in order.
        ``left_out_at`` is as in ``tensors.finite``; where the rule's unit is the tensor the caller sees to it.
        """


def two_dimensions(p: Tensor, group: Group) -> bool:
    return p.dim() > 1


def adam_betas(group: Group) -> tuple[float, float]:
    b1, b2 = group["betas"]
    return b1, b2


def as_they_are(
    model: nn.Module, names: list[str], fields: Group, config: Any
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    yield names, dict(fields)


def nothing_to_check(p: Tensor, group: Group) -> None:
    pass


def nothing_required() -> None:
    pass


def no_bytes(p: Tensor, level: Level) -> int:
    return 0


@dataclass(frozen=True)
class Rule:
    """An update rule, all that is known of it.

    Attributes:
        name: of the rule; of one that folds, the ``second_moment`` that asks for it.
        words: how summaries name what folds by it.
        state: the tensors of state of a parameter, by name, in the order that the update and the kernels take them.
        update: the rule in torch.
        kernel: the module of its Triton kernels for plain weights, which has ``make_launches``; imported when used.
        largest_step: no element moves by more than this times ``lr * scale`` in a step.
        unit: what is left out where a gradient is not finite: its block, or the whole tensor.
        shards: what of a matrix may be split over ranks.
        asked_by: the field of a group and its value that ask for the rule; by default ``second_moment`` and ``name``.
        takes: which parameters of a group that asks for it; the others get AdamW.
        plain: it is what a parameter gets that does not fold.
        plain_words: how summaries name what does not fold, where it is the rule of that; else empty.
        betas: the decay rates of the two moments.
        check: raises ValueError for a parameter that does not fit the fields of its group.
        require: raises ImportError where a package is missing.
        groups: splits the weights of a group, given their names, its fields and the model's config.
        matrices_only: convolutions do not fold; embeddings and heads do, by the factored rule.
        temporary: the bytes that the step of a parameter allocates and frees again on a GPU.
        together: those bytes are held for all parameters at once.
    """

    name: str
    words: str
    state: Callable[[Tensor, Level, Group], dict[str, StateTensor]]
    update: Update
    kernel: str | None = None
    largest_step: float = LARGEST_STEP
    unit: Literal["block", "tensor"] = "block"
    shards: Literal["rows and columns", "rows or columns", "nothing"] = "rows and columns"
    asked_by: tuple[str, str] | None = None
    takes: Callable[[Tensor, Group], bool] = two_dimensions
    plain: bool = False
    plain_words: str = ""
    betas: Callable[[Group], tuple[float, float]] = adam_betas
    check: Callable[[Tensor, Group], None] = nothing_to_check
    require: Callable[[], None] = nothing_required
    groups: Callable[[nn.Module, list[str], Group, Any], Iterator[tuple[list[str], dict[str, Any]]]] = as_they_are
    matrices_only: bool = False
    temporary: Callable[[Tensor, Level], int] = no_bytes
    together: bool = False

    @property
    def asked(self) -> tuple[str, str]:
        """The field of a group and its value that ask for the rule."""
        return self.asked_by or ("second_moment", self.name)

    def is_asked_by(self, group: Group) -> bool:
        field, value = self.asked
        return bool(group[field] == value)
