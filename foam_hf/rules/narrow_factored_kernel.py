"""The big pass of the factored rule's kernels for blocks of fewer than 256 columns, or of more than lanes can share.

A program walks down a stripe of ``S`` rows of ``R`` adjacent segments of ``C`` columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foam_hf.kernels.columns import COLUMNS, EXP_AVG, GRADIENT, STREAM, WEIGHT
from foam_hf.kernels.parts import (
    kept_finite,
    lerp,
    own_numbers,
    program_of,
    random_bits,
    random_bits_at,
    ratio,
    root,
    scale_of,
    store,
    unfold,
)
from foam_hf.rules.factored import LARGEST_CENTER
from foam_hf.rules.factored_means_kernel import (
    COL_EXP_AVG_SQ,
    COLUMN_SUMS,
    FIRST_ROW,
    MEANS,
    ROW_EXP_AVG_SQ,
    ROW_SUMS,
    ROWS,
)
from foam_hf.rules.rule import LARGEST_STEP

_LARGEST, _CENTER_SHARE = tl.constexpr(LARGEST_STEP), tl.constexpr(1 / LARGEST_CENTER)


@triton.jit
def _load_row(base, offset, column, mask, ALIGNED: tl.constexpr):
    """Columns of the row that begins at ``offset``."""
    pointers = base + offset + column
    if ALIGNED:  # the compiler cannot see through a table of addresses that eight columns are one 16-byte access
        pointers = tl.multiple_of(pointers, (1, 16))
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["step", "seed"])
def narrow_kernel(
    table, owner, row_sums, column_sums, means, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho,
    grad_scale, left_out_at,
    FIELDS: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr, NVIDIA: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    number, entry, index = program_of(table, owner, FIELDS)
    step, inv_c1, inv_c2 = own_numbers(entry, step, inv_c1, inv_c2, MIXED)
    W = tl.load(entry + WEIGHT).to(tl.pointer_type(W_DTYPE))
    G = tl.load(entry + GRADIENT).to(tl.pointer_type(G_DTYPE))
    M = tl.load(entry + EXP_AVG).to(tl.pointer_type(S_DTYPE))
    row_mean = tl.load(entry + ROW_EXP_AVG_SQ).to(tl.pointer_type(S_DTYPE))
    column_mean = tl.load(entry + COL_EXP_AVG_SQ).to(tl.pointer_type(S_DTYPE))
    rows, n = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLUMNS).to(tl.int32)
    stream = tl.load(entry + STREAM).to(tl.int32)
    per_row, stripes = tl.cdiv(n, C), tl.cdiv(rows, S)
    parts = tl.cdiv(n, R * C)
    part = index % parts
    stripe = index // parts % stripes
    matrix = (index // (parts * stripes)).to(tl.int64)
    scale = 1.0
    if SCALED > 0:
        scale = scale_of(grad_scale, number, SCALED)

    segment = part * R + tl.arange(0, R)
    lane = tl.arange(0, C)[None, :]
    column = segment[:, None] * C + lane
    mask = column < n
    if ALIGNED:  # in units of 16 columns, so that the compiler sees that a mask never splits an access
        mask = segment[:, None] * (C // 16) + lane // 16 < n // 16
    blocks = tl.cdiv(n, F)
    block = segment if F == C else segment[:, None] * (C // F) + tl.arange(0, C // F)[None, :]
    m_mask = block < blocks
    share = 1.0 / tl.maximum(tl.minimum(n - block * F, F), 1).to(tl.float32)
    # Where no gradient has ever been, mean(r) is zero, and V must be zero, not 0/0.
    mean = tl.maximum(tl.load(means + tl.load(entry + MEANS) + matrix), 1.1754943508222875e-38)
    c = tl.load(column_mean + matrix * n + column, mask=mask, other=0.0).to(tl.float32) * (b2 * inv_c2)
    row_sums += tl.load(entry + ROW_SUMS) + segment
    total = tl.zeros((R, C), tl.float32)
    first = stripe * S
    count = tl.minimum(rows - first, S)
    row = matrix * rows + first
    first_row = tl.load(entry + FIRST_ROW)
    # The next row is on its way while one is computed; behind the last, that one again.
    next_w = _load_row(W, row * n, column, mask, ALIGNED)
    next_g = _load_row(G, row * n, column, mask, ALIGNED)
    next_m = tl.load(M + row * blocks + block, mask=m_mask, other=0.0)
    next_r = tl.load(row_mean + row)
    i = 0
    while i < count:  # Triton's interpreter takes no loaded value as the bound of a range
        w, g = next_w.to(tl.float32), next_g.to(tl.float32) * scale
        m, r = next_m.to(tl.float32), next_r.to(tl.float32) / mean
        following = row + tl.minimum(count - 1 - i, 1)
        next_w = _load_row(W, following * n, column, mask, ALIGNED)
        next_g = _load_row(G, following * n, column, mask, ALIGNED)
        next_m = tl.load(M + following * blocks + block, mask=m_mask, other=0.0)
        next_r = tl.load(row_mean + following)
        gg = g * g
        if F == 1:
            block_mean, square = g, gg
        elif F == C:
            block_mean, square = tl.sum(g, 1) * share, tl.sum(gg, 1)
        else:
            block_mean = tl.sum(tl.reshape(g, (R, C // F, F)), 2) * share
            square = tl.sum(tl.reshape(gg, (R, C // F, F)), 2)
        old_m = m
        m = lerp(m, block_mean, a1, b1)
        center = m * inv_c1 - rho * block_mean
        if CHECKED:
            finite = kept_finite(square, left_out_at + stream, step, m_mask)
            square, m = tl.where(finite, square, 0.0), tl.where(finite, m, old_m)
            if F != C:
                center = tl.where(finite, center, float("nan"))  # so that each element of a block can see that
        center = unfold(center, R, C, F)
        size = root(r * c + a2 * inv_c2 * gg, NVIDIA)
        numerator = center + rho * g
        limit = size * _LARGEST
        numerator = tl.where(tl.abs(numerator) > limit, tl.where(numerator > 0, limit, -limit), numerator)  # NaN stays
        denominator = tl.maximum(size, tl.abs(center) * _CENTER_SHARE) + eps
        written = mask
        w = w * decay - step_size * ratio(numerator, denominator, NVIDIA)
        if CHECKED:
            kept = finite[:, None] if F == C else center == center
            gg = tl.where(kept, gg, 0.0)
            written = mask & kept
        total += gg
        row_sum = square if F == C else tl.sum(square, 1)
        tl.store(row_sums + row * per_row, row_sum, mask=segment < per_row)

        w_bits, m_bits = 0, 0
        if STOCHASTIC and W_DTYPE is tl.bfloat16:
            w_bits = random_bits(
                seed, step, 4 * stream, (first_row + row) * tl.cdiv(n, 8) + segment[:, None] * (C // 8), R, C
            )
        if STOCHASTIC and S_DTYPE is tl.bfloat16:
            m_bits = random_bits_at(seed, step, 4 * stream + 1, first_row + row + block * 0, block, blocks)
        pointers = W + row * n + column
        if ALIGNED:
            pointers = tl.multiple_of(pointers, (1, 16))
        store(pointers, w, w_bits, written, W_DTYPE, STOCHASTIC)
        store(M + row * blocks + block, m, m_bits, m_mask, S_DTYPE, STOCHASTIC)
        row += 1
        i += 1
    tl.store(column_sums + tl.load(entry + COLUMN_SUMS) + (matrix * stripes + stripe) * n + column, total, mask=mask)
