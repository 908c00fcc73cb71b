"""Where a piece of a sharded weight lies in the whole weight.

Random bits and the means of the factored rule are computed from this position, so that they do not depend on how many
processes share the weight.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = Any  # a torch.distributed.ProcessGroup, which not every build of torch has


class Place(NamedTuple):
    """Where a piece begins in its whole weight, and how large that weight is.

    A weight of more than two dimensions counts as several matrices, one below the other. The rows of one matrix are
    split over the process groups ``row_groups``, and its columns over ``column_groups``.
    """

    first_row: int  # counted over all matrices
    first_column: int
    all_rows: int  # of all matrices
    rows: int  # of one matrix
    columns: int
    row_groups: tuple[Group, ...] = ()
    column_groups: tuple[Group, ...] = ()

    @property
    def first_matrix(self) -> int:
        return self.first_row // max(1, self.rows)


def whole_place(p: Tensor) -> Place:
    """The place of a tensor that is not sharded."""
    columns = p.shape[-1] if p.dim() else 1
    rows = math.prod(p.shape[:-1])
    return Place(0, 0, rows, p.shape[-2] if p.dim() > 1 else 1, columns)


class Piece(NamedTuple):
    """A part of a DTensor's shard whose rows are adjacent in the whole tensor too."""

    place: Place
    at: tuple[int, ...] = ()  # an index into the leading dimensions of the shard

    def of(self, x: Tensor) -> Tensor:
        """This piece of ``x``, a DTensor or its local tensor: a view. Nothing is communicated."""
        x = local(x)
        return x[self.at] if self.at else x


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor. torch.distributed is not imported, as it may be missing."""
    return hasattr(x, "device_mesh")


def whole(p: Tensor) -> Tensor:
    """``p``; or of a weight that DeepSpeed's ZeRO 3 has cut up, a meta tensor of the shape that it has as a whole."""
    shape = getattr(p, "ds_shape", p.shape)
    if shape == p.shape:
        return p
    return torch.empty(shape, dtype=p.dtype, device="meta", requires_grad=p.requires_grad)


def local(x: Tensor) -> Tensor:
    """The local tensor of a DTensor, without a record for autograd; any other ``x`` as it is."""
    if not is_sharded(x):
        return x
    shard: Any = x._local_tensor  # type: ignore[attr-defined]  # to_local() would record a view for autograd
    if type(shard) is not Tensor and hasattr(shard, "elem") and hasattr(shard, "wait"):
        return shard.wait()  # the result of a collective that may not have ended
    return shard
