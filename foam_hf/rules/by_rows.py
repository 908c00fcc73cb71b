"""FOAM's update of one parameter in the paper's symbols (arXiv 2512.07112), and the loop that applies it on any
device.

A rule sees float32 parts of a weight in blocks: the gradient ``G`` is (rows, blocks, width), the folded moments ``m``
and ``v`` are (rows, blocks, 1), so ``fold`` is a mean over the last dimension and ``unfold`` is broadcasting. ``b1,
b2`` are Adam's betas, ``c1 = 1 - b1**t`` and ``c2 = 1 - b2**t`` its bias corrections, ``rho`` is the residual's scale.
A rule updates its moments in place and returns the numerator and the denominator of the direction ``U``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from foam_hf.tensors.finite import KeptBlocks, left_out_blocks
from foam_hf.tensors.folding import Level, block_width, blocked, split_moment
from foam_hf.tensors.places import Group, Place, whole
from foam_hf.tensors.rows import as_rows, chunks, load, store, weight_rows
from foam_hf.tensors.step import Hyper

Fraction = tuple[Tensor, Tensor]

# No element moves by more than this times ``lr * scale`` in a step. Adam's own bound at its default betas, and so the
# block rule's, is 7.4: what has an element's own second moment, or a block's, never gets there and is not limited.
LARGEST_STEP = 16.0
# How much larger than an element's second moment what its block adds may be, as roots; dense gradients stay below it.
LARGEST_CENTER = 4.0


def fold(X: Tensor) -> Tensor:
    if X.shape[-1] <= 4:  # torch reduces a very short dimension several times slower than it adds slices
        return reduce(torch.add, X.split(1, dim=-1)) / X.shape[-1]
    return X.mean(-1, keepdim=True)


def block_rule(G: Tensor, m: Tensor, v: Tensor, h: Hyper) -> Fraction:
    """The paper's rule.  U = ((m + rho R) / c1) / (sqrt((v + rho^2 R^2) / c2) + eps)"""
    g = fold(G)
    R = G - g
    RR = R.square()
    m.lerp_(g, 1 - h.b1)
    v.lerp_(fold(RR) + g.square(), 1 - h.b2)  # fold(G*G): R has mean zero in every block
    torch.add(v / h.c2, RR, alpha=h.rho**2 / h.c2, out=RR)
    torch.add(m / h.c1, R, alpha=h.rho / h.c1, out=R)
    return R, RR.sqrt_().add_(h.eps)


def factored_rule(G: Tensor, m: Tensor, V: Tensor, h: Hyper) -> Fraction:
    """Second moment from row and column means.  U = N / (max(S, |C| / 4) + eps), where

        C = m / c1 - rho fold(G),  S = sqrt((b2 V + (1 - b2) G*G) / c2),  N = C + rho G, at most 16 S

    ``V``, overwritten, is what the means of the steps before say, see ``FactoredMoment``. As in Adam, an element's own
    square is in its second moment. ``C`` is its block's: where the block has a gradient and the element has none, as
    behind a dead unit, S is zero or near it, and so is U. Both limits are beyond what dense gradients reach.
    """
    g = fold(G)
    m.lerp_(g, 1 - h.b1)
    S = V.mul_(h.b2 / h.c2).addcmul_(G, G, value=(1 - h.b2) / h.c2).sqrt_()
    C = m / h.c1 - h.rho * g
    N = bounded_(torch.add(C, G, alpha=h.rho), S)
    return N, torch.maximum(S, C.abs_().div_(LARGEST_CENTER), out=S).add_(h.eps)


def bounded_(N: Tensor, S: Tensor) -> Tensor:
    """``N``, an update times its root of a second moment ``S``, within what a step may be."""
    limit = S * LARGEST_STEP
    return torch.minimum(torch.maximum(N, -limit, out=N), limit, out=N)


def adam_rule(G: Tensor, m: Tensor, v: Tensor, h: Hyper) -> Fraction:
    """Adam, for what does not fold.  U = (m / c1) / (sqrt(v / c2) + eps)"""
    m.lerp_(G, 1 - h.b1)
    v.mul_(h.b2).addcmul_(G, G, value=1 - h.b2)
    return m, v.sqrt().mul_(h.c1 / h.c2**0.5).add_(h.c1 * h.eps)


def step_(W: Tensor, U: Fraction, h: Hyper) -> None:
    """W <- W - lr * scale * U, where ``W`` has decayed already."""
    W.addcdiv_(*U, value=-h.lr * h.scale)


class FactoredMoment:
    """The running row means ``r`` (..., rows) and column means ``c`` (..., n) of ``G*G``: V = outer(r, c) / mean(r).

    Leading dimensions are separate matrices. One pass serves: chunks read the V of the steps before, and add their own
    squares to the sums that ``store`` turns into this step's means, once ``sums`` are those of whole matrices.
    """

    def __init__(self, r: Tensor, c: Tensor, place: Place, stream: int) -> None:
        self.stream = stream
        self.place, self.matrices, self.rows_per_matrix = place, math.prod(c.shape[:-1]), r.shape[-1]
        self.r, self.c = r.view(self.matrices, r.shape[-1]), c.view(self.matrices, c.shape[-1])
        r32, self.columns = self.r.float(), self.c.float()
        # Where other ranks have some of the rows, the mean of all column means is the same number.
        mean = (self.columns if place.row_groups else r32).mean(-1, keepdim=True)
        # Where no gradient has ever been, mean(r) is zero, and V must be zero, not 0/0.
        self.rows = (r32 / mean.clamp_min(torch.finfo(torch.float32).tiny)).view(-1, 1)
        self.row_means = torch.zeros(r.numel(), dtype=torch.float32, device=r.device)
        self.column_sums = torch.zeros_like(self.columns)

    def chunk(self, rows: range, G: Tensor) -> Tensor:
        """V of the steps before for ``rows``, whose gradient ``G`` is added to this step's means."""
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
    def sums(self) -> list[tuple[tuple[int, int], tuple[Group, ...], Tensor]]:
        """What has to be added up over other ranks before ``store``: whose it is, over which ranks, the sums."""
        place, key = self.place, (self.stream, self.place.first_matrix)
        return [(key, place.row_groups, self.column_sums), (key, place.column_groups, self.row_means)]

    def store(self, h: Hyper, told: Tensor | None) -> None:
        r32, c32, place = self.r.float(), self.columns, self.place
        for x, means in ((r32, self.row_means.view_as(r32)), (c32, self.column_sums / place.rows)):
            if told is not None:  # blocks of finite squares whose sum is infinite
                infinite = (means < math.inf).logical_not_()
                told.masked_fill_(infinite.any(), h.step)
                means = torch.where(infinite, x, means)
            x.lerp_(means, 1 - h.b2)
        store(self.r.view(1, -1), range(1), r32.view(1, -1), h, 2, 0, place.first_row, place.all_rows)
        store(self.c, range(self.matrices), c32, h, 3, place.first_matrix, place.first_column, place.columns)


def update_parameter(
    p: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    level: Level,
    second_moment: str,
    h: Hyper,
    place: Place | None = None,
    told: Tensor | None = None,
) -> FactoredMoment | None:
    """Advance one parameter and its state by one step, a bounded chunk of rows at a time.

    ``p``, of any kind, and ``grad`` have one shape, any float dtypes and strides; ``state`` holds the tensors
    ``foam_hf.FOAM`` describes, in that order. All arithmetic is float32. Rows do not mix (the factored rule's column
    means excepted), so chunks change nothing. ``place`` says where in a whole tensor they lie, if they are a piece of
    one.

    With ``told``, an integer tensor of one element, blocks whose gradient is not finite keep their weights and
    moments, and ``told`` becomes this step; to the means of the factored rule they are zeros.

    Returns:
        what is left to ``store`` when its ``sums`` have been added up over other ranks; None if all is done.
    """
    place = whole(p) if place is None else place
    shared = second_moment == "factored" and bool(place.row_groups or place.column_groups)
    if p.numel() == 0 and not shared:
        return None
    n = p.shape[-1] if p.dim() else 1
    width = block_width(level, place.columns)
    weight = weight_rows(p, place)
    gradient = as_rows(grad, n)
    tensors = list(state.values())
    factored = FactoredMoment(tensors.pop(1), tensors.pop(1), place, h.stream) if second_moment == "factored" else None
    moments = [as_rows(x, -(-n // width)) for x in tensors]
    blocks = -(-place.columns // width)
    for rows in chunks(len(weight) if n else 0, n, p.device):
        G, kept = load(gradient, rows), None
        loaded = [load(moment, rows) for moment in moments]
        if told is not None and (mask := left_out_blocks(G, width)) is not None:
            told.masked_fill_(mask.any(), h.step)
            kept = KeptBlocks(mask, G, weight.unchanged(rows), loaded, width)
            G = kept.gradient
        W = weight.load(rows, h)
        m = loaded[0]
        if factored is not None:
            V = blocked(factored.chunk(rows, G), width)
            for Gi, mi, Vi, Wi in zip(blocked(G, width), split_moment(m, width, n), V, blocked(W, width), strict=True):
                step_(Wi, factored_rule(Gi, mi, Vi, h), h)
        elif level == 0:
            step_(W, adam_rule(G, m, loaded[1], h), h)
        else:
            v = split_moment(loaded[1], width, n)
            for Gi, mi, vi, Wi in zip(blocked(G, width), split_moment(m, width, n), v, blocked(W, width), strict=True):
                step_(Wi, block_rule(Gi, mi, vi, h), h)
        if kept is not None:
            kept.restore(W, loaded)
        weight.store(rows, W, h)
        for kind, (moment, value) in enumerate(zip(moments, loaded, strict=True), start=1):
            store(moment, rows, value, h, kind, place.first_row, place.first_column // width, blocks)
    weight.finish()
    if factored is None or shared:
        return factored
    factored.store(h, told)
    return None
