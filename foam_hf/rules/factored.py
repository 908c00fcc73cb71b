"""FOAM with a factored second moment: running means over each row and each column of a matrix, as in Adafactor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foam_hf.rules.by_rows import (
    Fraction,
    fold,
    in_blocks,
    limit_numerator_,
    row_moments,
    subtract_update_,
    update_rows,
)
from foam_hf.rules.rule import Group, Rule, StateTensor
from foam_hf.tensors import places
from foam_hf.tensors.folding import Level, block_width, num_blocks
from foam_hf.tensors.rows import Rows, store
from foam_hf.tensors.step import Hyper

# The denominator is at least the block's part of the numerator divided by this; dense gradients never reach the limit.
LARGEST_CENTER = 4.0


def factored_rule(G: Tensor, m: Tensor, V: Tensor, h: Hyper) -> Fraction:
    """U = N / (max(S, |C| / 4) + eps), where

        C = m / c1 - rho fold(G),  S = sqrt((b2 V + (1 - b2) G*G) / c2),  N = C + rho G, at most 16 S

    ``V`` is the second moment from the steps before, see ``FactoredMoment``; it is overwritten. The element's own
    square is added to it, as in Adam. ``C`` is what an element gets from its block. If the block has a gradient and
    the element has none, as behind a dead unit, S is near zero, and the limits keep U near zero too. Dense gradients
    reach neither limit.
    """
    g = fold(G)
    m.lerp_(g, 1 - h.b1)
    S = V.mul_(h.b2 / h.c2).addcmul_(G, G, value=(1 - h.b2) / h.c2).sqrt_()
    C = m / h.c1 - h.rho * g
    N = limit_numerator_(torch.add(C, G, alpha=h.rho), S)
    return N, torch.maximum(S, C.abs_().div_(LARGEST_CENTER), out=S).add_(h.eps)


class FactoredMoment:
    """The running row means ``r`` (..., rows) and column means ``c`` (..., n) of ``G*G``: V = outer(r, c) / mean(r).

    Leading dimensions count separate matrices. The gradient is read once: for each chunk of rows,
    ``load_and_accumulate`` returns the V of the steps before and adds the chunk's squares to the sums of this step.
    ``store`` then updates ``r`` and ``c`` by these sums. On shards, ``sums`` must first be added up over ranks.
    """

    def __init__(self, r: Tensor, c: Tensor, place: places.Place, stream: int) -> None:
        self.stream = stream
        self.place, self.matrices, self.rows_per_matrix = place, math.prod(c.shape[:-1]), r.shape[-1]
        self.r, self.c = r.view(self.matrices, r.shape[-1]), c.view(self.matrices, c.shape[-1])
        r32, self.columns = self.r.float(), self.c.float()
        # If other ranks hold some of the rows, the mean of all column means is used: it is the same number.
        mean = (self.columns if place.row_groups else r32).mean(-1, keepdim=True)
        # Before the first gradient mean(r) is zero, and V must be zero, not 0/0.
        self.rows = (r32 / mean.clamp_min(torch.finfo(torch.float32).tiny)).view(-1, 1)
        self.row_means = torch.zeros(r.numel(), dtype=torch.float32, device=r.device)
        self.column_sums = torch.zeros_like(self.columns)

    def load_and_accumulate(self, rows: range, G: Tensor) -> Tensor:
        """V of the steps before, for ``rows``. The squares of their gradient ``G`` are added to this step's sums."""
        GG = G.square()
        row_means = self.row_means[rows.start : rows.stop]
        torch.mean(GG, -1, out=row_means)
        if self.place.column_groups:
            row_means *= G.shape[-1] / self.place.columns
        if self.matrices == 1:
            self.column_sums += GG.sum(0)
            return self.rows[rows.start : rows.stop] * self.columns
        matrix = torch.arange(rows.start, rows.stop, device=G.device) // self.rows_per_matrix
        self.column_sums.index_add_(0, matrix, GG)
        return self.rows[rows.start : rows.stop] * self.columns[matrix]

    @property
    def sums(self) -> list[tuple[tuple[int, int], tuple[places.Group, ...], Tensor]]:
        """This rank's shares of the sums of columns and of the means of rows, for ``Unfinished``."""
        place, key = self.place, (self.stream, self.place.first_matrix)
        return [(key, place.row_groups, self.column_sums), (key, place.column_groups, self.row_means)]

    def store(self, h: Hyper, left_out_at: Tensor | None = None) -> None:
        r32, c32, place = self.r.float(), self.columns, self.place
        for x, means in ((r32, self.row_means.view_as(r32)), (c32, self.column_sums / place.rows)):
            if left_out_at is not None:  # the squares of each block are finite, but their sum may not be
                infinite = (means < math.inf).logical_not_()
                left_out_at.masked_fill_(infinite.any(), h.step)
                means = torch.where(infinite, x, means)
            x.lerp_(means, 1 - h.b2)
        store(self.r.view(1, -1), range(1), r32.view(1, -1), h, 2, 0, place.first_row, place.all_rows)
        store(self.c, range(self.matrices), c32, h, 3, place.first_matrix, place.first_column, place.columns)


def update_factored(
    weight: Rows, grad: Tensor, state: dict[str, Tensor], level: Level, h: Hyper, left_out_at: Tensor | None = None
) -> FactoredMoment | None:
    """Returns the ``FactoredMoment`` if other ranks share the weight, as it must be stored after sums are added up.

    Blocks that are left out count as zeros in the means.
    """
    place = weight.place
    shared = bool(place.row_groups or place.column_groups)
    if grad.numel() == 0 and not shared:
        return None
    width = block_width(level, place.columns)
    second = FactoredMoment(state["row_exp_avg_sq"], state["col_exp_avg_sq"], place, h.stream)

    def update_chunk(rows: range, G: Tensor, W: Tensor, moments: list[Tensor]) -> None:
        V = second.load_and_accumulate(rows, G)
        for Gi, Vi, Wi, mi in in_blocks(width, G, V, W, moments=moments):
            subtract_update_(Wi, factored_rule(Gi, mi, Vi, h), h)

    first = row_moments([state["folded_exp_avg"]], weight, level)
    update_rows(weight, grad, first, update_chunk, h, width=width, left_out_at=left_out_at)
    if shared:
        return second
    second.store(h, left_out_at)
    return None


def _state(p: Tensor, level: Level, group: Group) -> dict[str, StateTensor]:
    dtype, rows, columns = group["state_dtype"], p.dim() - 2, p.dim() - 1
    return {
        "folded_exp_avg": StateTensor(torch.Size((*p.shape[:-1], num_blocks(level, p.shape[-1]))), dtype),
        "row_exp_avg_sq": StateTensor(p.shape[:-1], dtype, lacks=columns),
        "col_exp_avg_sq": StateTensor(torch.Size((*p.shape[:-2], p.shape[-1])), dtype, lacks=rows),
    }


def _temporary_bytes(p: Tensor, level: Level) -> int:
    """Bytes of the partial sums of squares that the kernels store during a step.

    There is one sum for each row and segment of 256 columns (or one block, if it is wider), one for each column and
    128 rows, and one mean for each matrix.
    """
    *leading, rows, n = p.shape
    power = 1 << max(0, n - 1).bit_length()
    segment = max(8, 1 << max(0, block_width(level, n) - 1).bit_length(), min(256, power))
    return 4 * math.prod(leading) * (rows * -(-n // segment) + n * -(-rows // 128) + 1)


FACTORED = Rule(
    name="factored",
    words="second moment factored",
    state=_state,
    update=update_factored,
    kernel="foam_hf.rules.factored_kernel",
    shards="rows or columns",  # a rank must hold either whole rows or whole columns to compute their means
    temporary=_temporary_bytes,
    together=True,
    squares=lambda p, level: ("row_exp_avg_sq", places.local(p).shape[-1]),
)
