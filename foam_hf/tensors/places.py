"""Where the tensors that a step works on lie in the whole parameter: random bits and means depend on nothing else."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

Group = Any  # a torch.distributed.ProcessGroup, which not every build of torch has


class Place(NamedTuple):
    """Where a piece of a weight begins, and the size of the whole, seen as matrices of rows of ``columns``.

    ``row_groups`` and ``column_groups`` are the groups of ranks that share the rows and the columns of one matrix.
    """

    first_row: int  # counted through all matrices
    first_column: int
    all_rows: int  # of all matrices
    rows: int  # of one matrix
    columns: int
    row_groups: tuple[Group, ...] = ()
    column_groups: tuple[Group, ...] = ()

    @property
    def first_matrix(self) -> int:
        return self.first_row // max(1, self.rows)


def whole(p: Tensor) -> Place:
    """The place of a tensor that is not split."""
    columns = p.shape[-1] if p.dim() else 1
    rows = math.prod(p.shape[:-1])
    return Place(0, 0, rows, p.shape[-2] if p.dim() > 1 else 1, columns)


class Piece(NamedTuple):
    """A part of a shard whose rows follow each other in the whole tensor too."""

    place: Place
    at: tuple[int, ...] = ()  # an index into the leading dimensions of the shard

    def of(self, x: Tensor) -> Tensor:
        """The piece of a DTensor with this rank's shard, a view; nothing is communicated."""
        x = local(x)
        return x[self.at] if self.at else x


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor; without an import of torch.distributed."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """What this rank holds of ``x``: a DTensor's local tensor, of which gradients know nothing, or ``x`` itself."""
    if not is_sharded(x):
        return x
    found: Any = x._local_tensor  # type: ignore[attr-defined]  # to_local() would record a view for autograd
    if type(found) is not Tensor and hasattr(found, "elem") and hasattr(found, "wait"):
        return found.wait()  # the result of a collective that may be under way
    return found
