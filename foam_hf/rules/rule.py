"""``Rule``: the record that describes an update rule to the rest of the package.

Each rule is one ``Rule`` in a file of its own, and ``all.py`` lists them. ``second_moment`` of a param group selects
the rule for weights that fold. Parameters that this rule does not take, as vectors, get AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor, nn

from foam_hf.tensors import places
from foam_hf.tensors.folding import Level
from foam_hf.tensors.rows import Rows
from foam_hf.tensors.step import Hyper, Member

Group = Mapping[str, Any]  # the fields of a param group

# No element moves by more than this times ``lr * scale`` in a step.
LARGEST_STEP = 16.0
# The bound that Adam and the block rule have by themselves, at the default betas: an element's own square is in its
# second moment. They need no limit.
ADAMS_LARGEST_STEP = 7.5


class StateTensor(NamedTuple):
    """Shape and dtype of a tensor of state. It starts as zeros."""

    shape: torch.Size
    dtype: torch.dtype
    lacks: int | None = None  # the dimension of the weight that this tensor does not have


class Unfinished(Protocol):
    """An update that is complete only after its sums have been added up over the ranks that share the weight."""

    @property
    def sums(self) -> Sequence[tuple[tuple[int, int], tuple[places.Group, ...], Tensor]]:
        """For each tensor to add up: a key (stream, first matrix), the process groups, and the float32 tensor."""

    def store(self, h: Hyper, left_out_at: Tensor | None = None) -> None:
        """Complete the update; ``sums`` have been added up over ranks in place."""


class Launch(Protocol):
    """A launch of a kernel that updates several members at once.

    ``make_launches(members)`` of a module of kernels returns launches, and the members that no kernel takes. A launch
    can run again while its ``PreparedStep`` holds. ``kernels.tables.AddressTable`` has all of this but ``run``.
    """

    members: list[Member]
    streams: numpy.ndarray  # of its members
    mixed: bool  # whether those with a gradient have different step counts
    changed: bool  # whether its table must be copied to the device before ``run``

    @property
    def device(self) -> torch.device: ...

    @property
    def words(self) -> int:
        """How many int64 its table has."""

    def place(self, host: numpy.ndarray, table: Tensor) -> None:
        """Keep the table at ``host``, int64 (words,), from where it is copied to ``table`` on the device."""

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> Unfinished | None:
        """Update the members; returns what is left to do, if anything is."""

    def leave_out(self, here: numpy.ndarray, steps: numpy.ndarray) -> None:
        """Let ``run`` skip members whose gradient is missing: ``here``, bool (len(streams),), is False for these.

        ``steps``, int64 (len(streams),), are their step counts.
        """

    def follow_steps(self, h: Hyper, steps: numpy.ndarray) -> None:
        """Where they are ``mixed``, take the step count of each member for the next ``run``."""

    def move_gradients(self, addresses: numpy.ndarray) -> None:
        """Read gradients of the same dtype and layout from new ``addresses``, one for each of ``streams``."""


class Update(Protocol):
    """A rule in torch operations, in float32, for every device and kind of weight. Kernels must agree with it."""

    def __call__(
        self,
        weight: Rows,
        grad: Tensor,
        state: dict[str, Tensor],
        level: Level,
        h: Hyper,
        left_out_at: Tensor | None = None,
    ) -> Unfinished | None:
        """Update a weight, or a piece of one, and its state by one step, in place.

        Args:
            weight: its rows.
            grad: in the weight's shape; any float dtype and strides.
            state: the tensors that ``Rule.state`` describes, in its order.
            level: folds the weight.
            h: the numbers of the step.
            left_out_at: as in ``tensors.finite``. None if the rule's unit is the tensor, as the caller checks it then.

        Returns:
            what must be completed after sums over ranks, or None.
        """


class Part(NamedTuple):
    """The rows of a matrix that this rank holds, perhaps none."""

    weight: Tensor  # (rows here, n), of any kind
    moment: Tensor  # the same rows of its state, (rows here, blocks)
    place: places.Place  # of these rows in the whole tensor
    matrix: int  # the number of the matrix in its tensor
    stream: int

    @property
    def whole(self) -> places.Place:
        """Where the matrix lies in the whole tensor."""
        return self.place._replace(first_row=self.matrix * self.place.rows)


class Halves(Protocol):
    """An update in two halves, of matrices of one shape whose rows ranks share: ``find`` needs whole matrices.

    The halves together have the bits of ``Rule.update``. How many matrices there are changes no bit.
    """

    dtype: torch.dtype  # of what ``find`` returns
    scaled: bool  # whether that must be multiplied by scales

    def __init__(self, parts: Sequence[Part], own: slice, level: Level) -> None:
        """``parts`` are this rank's rows of all matrices; it finds what to subtract from the ``own`` ones."""

    def find(
        self, G: Tensor, M: Tensor, h: Hyper, grad_scale: Tensor | None, left_out: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What to subtract from this rank's own matrices.

        Args:
            G: gradients (own matrices, rows, n), of any float dtype.
            M: their state (own matrices, rows, blocks), updated.
            h: the numbers of the step, for any of the streams.
            grad_scale: what to divide gradients by, float32 of one element or (own matrices,).
            left_out: which matrices the step leaves out, bool (own matrices,); None if it checks none. What is
                returned for these does not count.

        Returns:
            ``dtype`` (own matrices, rows, n), and, if ``scaled``, float32 (own matrices,).
        """

    def subtract(
        self, X: Tensor, M: Sequence[Tensor], scales: Tensor | None, h: Hyper, left_out: Tensor | None
    ) -> None:
        """Update the parts, but those of matrices that are ``left_out``, bool (parts,).

        Args:
            X: (parts, rows here, n), as found.
            M: for each part the new state, (rows here, blocks).
            scales: float32 (parts,), as found.
            h: as for ``find``.
        """


@dataclass(frozen=True)
class OnWhole:
    """How a rule that needs whole matrices updates those whose rows ranks share. It has one tensor of state.

    Attributes:
        at_a_time: how many matrices, of so many rows and columns, a rank updates at a time.
        cost: what the update of one costs, in any unit.
        halves: in torch operations.
        kernel: name of a module with a class ``Halves`` in kernels, and a function ``takes`` that says for what.
    """

    at_a_time: Callable[[int, int], int]
    cost: Callable[[int, int], int]
    halves: type[Halves]
    kernel: str


class MicroUpdate(Protocol):
    """As ``Update``, by one of several micro-batches, whose number ``h`` says. It changes no state but ``pending``."""

    def __call__(
        self,
        weight: Rows,
        grad: Tensor,
        state: dict[str, Tensor],
        pending: Sequence[Tensor],
        level: Level,
        h: Hyper,
        left_out_at: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None: ...


def has_two_dimensions(p: Tensor, group: Group) -> bool:
    return p.dim() > 1


def adam_betas(group: Group) -> tuple[float, float]:
    b1, b2 = group["betas"]
    return b1, b2


def one_group(
    model: nn.Module, names: list[str], fields: Group, config: Any
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    yield names, dict(fields)


def nothing_to_check(p: Tensor, group: Group) -> None:
    pass


def nothing_required() -> None:
    pass


def no_temporary_bytes(p: Tensor, level: Level) -> int:
    return 0


@dataclass(frozen=True)
class Rule:
    """An update rule, with everything that the rest of the package needs to know about it.

    Attributes:
        name: of the rule; for a rule that folds also the value of ``second_moment`` that selects it.
        words: what summaries call the folded weights of a group with this rule.
        state: describes the tensors of state of a parameter, by name, in the order that update and kernels expect.
        update: the rule in torch operations.
        kernel: name of the module of its Triton kernels for plain weights, with ``make_launches``; imported when used.
        update_micro: updates a weight by one of several micro-batches, without keeping its gradient; None if the rule
            cannot.
        micro_kernel: as ``kernel``, for ``update_micro``.
        largest_step: no element moves by more than this times ``lr * scale`` in a step.
        unit: what a step leaves out if a gradient is not finite: its block, or the whole tensor.
        shards: which dimensions of a matrix may be split over ranks; "rows, gathered" is for rules with ``on_whole``.
        on_whole: updates matrices whose rows are split over ranks, if the rule needs whole ones.
        asked_by: field of a group and its value that select the rule; by default ``second_moment`` and ``name``.
        takes: whether the rule updates a parameter of a group that selects it; AdamW updates the others.
        plain: whether the rule is for parameters that do not fold.
        plain_words: what summaries call the unfolded weights of a group with this rule; empty if it has none.
        betas: the decay rates of the two moments in a group.
        check: raises ValueError for a parameter that does not fit the fields of its group.
        require: raises ImportError if a package that the rule needs is missing.
        groups: splits the weights of a param group, from the model, their names, the group's fields and the config.
        table_fields: of the groups of embeddings and LM heads, if the rule is for the matrices of layers alone;
            convolutions then stay plain. None if the rule takes them all.
        temporary: bytes that a step of a parameter allocates and frees again on a GPU.
        together: whether a step holds these bytes for all parameters at once.
        squares: of a parameter that has state, the tensor of state that holds means of its gradient's squares, and of
            how many columns here each is a mean; None if the rule has no such state.
    """

    name: str
    words: str
    state: Callable[[Tensor, Level, Group], dict[str, StateTensor]]
    update: Update
    kernel: str | None = None
    update_micro: MicroUpdate | None = None
    micro_kernel: str | None = None
    largest_step: float = LARGEST_STEP
    unit: Literal["block", "tensor"] = "block"
    shards: Literal["rows and columns", "rows or columns", "rows, gathered", "nothing"] = "rows and columns"
    on_whole: OnWhole | None = None
    asked_by: tuple[str, str] | None = None
    takes: Callable[[Tensor, Group], bool] = has_two_dimensions
    plain: bool = False
    plain_words: str = ""
    betas: Callable[[Group], tuple[float, float]] = adam_betas
    check: Callable[[Tensor, Group], None] = nothing_to_check
    require: Callable[[], None] = nothing_required
    groups: Callable[[nn.Module, list[str], Group, Any], Iterator[tuple[list[str], dict[str, Any]]]] = one_group
    table_fields: Group | None = field(default=None, hash=False)
    temporary: Callable[[Tensor, Level], int] = no_temporary_bytes
    together: bool = False
    squares: Callable[[Tensor, Level], tuple[str, int]] | None = None

    @property
    def asked(self) -> tuple[str, str]:
        """The field of a group and its value that select the rule."""
        return self.asked_by or ("second_moment", self.name)

    def is_asked_by(self, group: Group) -> bool:
        field, value = self.asked
        return bool(group[field] == value)
