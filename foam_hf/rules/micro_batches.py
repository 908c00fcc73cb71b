"""The block rule for a gradient that comes in ``k`` micro-batches, of which none is kept.

Each micro-batch updates the weights at once, by its share of the step. Its gradient ``g`` is that of the loss over
``k``, so that the step's gradient ``G`` is the sum of all. With ``r = g - unfold(fold(g))`` the rule is

    P <- P + fold(g)           Q <- Q + fold(r*r)           Z <- Z + sum of sign * r over the block
    E = max(v / (1 - b2**(t-1)), Q)
    U = (b1*m/k + (1-b1)*fold(g) + rho*r) / c1
        / (sqrt((b2*v + (1-b2)*((k/j * P)**2 + k/j * Q) + rho**2 * E * r*r / fold(r*r)) / c2) + eps)
    W <- W - lr*scale*U        after j of k micro-batches; U is limited to LARGEST_STEP / k

and when all have come

    m <- b1*m + (1-b1)*P       v <- b2*v + (1-b2)*(P*P + Q)

The numerators add up to exactly those of the block rule, and ``m`` is exact. A denominator cannot know an element's
whole residual ``R``. In its place stands ``E * r*r / fold(r*r)``: the squares of this micro-batch, as large as those
of the whole step are expected to be. ``Q`` is the mean of ``R*R`` if the micro-batches' residuals are independent.
``Z`` is a sketch: with random signs that are the same for all micro-batches, the mean of ``Z*Z`` over many blocks is
that of the sum of ``R*R``, whatever they are. It gives the norm of all gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foam_hf.rules.by_rows import Fraction, RowMoment, fold, in_blocks, row_moments, subtract_update_, update_rows
from foam_hf.rules.rule import LARGEST_STEP
from foam_hf.tensors.folding import Level, block_width
from foam_hf.tensors.rounding import random_bits
from foam_hf.tensors.rows import Rows
from foam_hf.tensors.step import Hyper

SIGNS = 3  # the substream of the signs


def micro_block_rule(
    G: Tensor, signs: Tensor, m: Tensor, v: Tensor, sums: tuple[Tensor, Tensor, Tensor], h: Hyper, scale: Tensor | None
) -> Fraction:
    """U of a micro-batch, and what it adds to the sums P, Q and Z, in place; ``m`` and ``v`` are not changed."""
    P, Q, Z = sums
    j, k = h.micro + 1, h.micros
    g = fold(G)
    R = G - g
    RR = R.square()
    q = fold(RR)
    P.add_(g)
    Q.add_(q)
    Z.add_((R * signs).sum(-1, keepdim=True))
    if scale is not None:
        c = 1 / scale
        g, R, RR, q, P, Q = g * c, R * c, RR * c.square(), q * c.square(), P * c, Q * c.square()
    before = 1 - h.b2 ** (h.step - 1)
    E = torch.maximum(v / before, Q) if before else Q
    own = torch.where(q > 0, E / q, 0.0)
    V = v * h.b2 + (1 - h.b2) * ((P * (k / j)).square() + Q * (k / j))
    D = torch.add(V / h.c2, RR * own, alpha=h.rho**2 / h.c2, out=RR).sqrt_().add_(h.eps)
    N = torch.add((m * (h.b1 * h.shares / k) + g * (1 - h.b1)) / h.c1, R, alpha=h.rho / h.c1, out=R)
    limit = D * (LARGEST_STEP * h.shares / k)
    return torch.minimum(torch.maximum(N, -limit, out=N), limit, out=N), D


def update_micro_block(
    weight: Rows,
    grad: Tensor,
    state: dict[str, Tensor],
    pending: Sequence[Tensor],
    level: Level,
    h: Hyper,
    left_out_at: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Update a weight by one micro-batch.

    Args:
        scale: what to divide ``grad`` by, for clipping. ``pending`` adds up gradients before this division.
        state: is read alone.
        pending: P, Q and Z, float32 in the shape of the moments. The first micro-batch does not read them.
    """
    place = weight.place
    width = block_width(level, place.columns)
    if h.micro == 0:
        for x in pending:
            x.zero_()

    def update_chunk(rows: range, G: Tensor, W: Tensor, moments: list[Tensor]) -> None:
        signs = signs_of(rows, weight, G.shape[-1], h, G.device)
        for Gi, Wi, signs_i, m, v, P, Q, Z in in_blocks(width, G, W, signs, moments=moments):
            subtract_update_(Wi, micro_block_rule(Gi, signs_i, m, v, (P, Q, Z), h, scale), h)

    if scale is not None:
        grad = grad.float() + (scale - scale)  # a scale that is not finite leaves out every block
    kept = [RowMoment(x, place, level, 1) for x in pending]
    moments = [*row_moments([*state.values()], weight, level), *kept]
    update_rows(weight, grad, moments, update_chunk, h, width=width, left_out_at=left_out_at)


def signs_of(rows: range, weight: Rows, n: int, h: Hyper, device: torch.device) -> Tensor:
    """1.0 or -1.0 for each of ``n`` columns of ``rows``, the same in all micro-batches of a step."""
    place = weight.place
    whole, columns = (
        range(first + part.start, first + part.stop)
        for first, part in ((place.first_row, rows), (place.first_column, range(n)))
    )
    stream = 4 * h.stream + SIGNS
    bits = random_bits(whole, place.columns, seed=h.seed, step=h.step, stream=stream, device=device, columns=columns)
    return bits.bitwise_and_(1).mul_(2).sub_(1).float()
