"""The big pass of the factored rule's kernels for blocks of 256 columns and more, in rows that begin on 16 bytes.

A program walks down a stripe of ``S`` rows, ``D`` at a time, of ``R`` adjacent blocks. A block is ``Q`` chunks of
``L`` lanes of ``V`` adjacent columns. A lane reads 16 bytes of each chunk, and every lane of a block holds its moment,
so that lanes exchange nothing but sums. Means of columns, and their new sums, stay in registers over the stripe.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foam_hf.kernels.columns import COLUMNS, EXP_AVG, GRADIENT, STREAM, WEIGHT
from foam_hf.kernels.lanes import block_sums, in_chunks, lane_sums
from foam_hf.kernels.parts import (
    float32_of,
    inverse,
    kept_finite,
    lerp,
    own_numbers,
    program_of,
    random_bits_at,
    random_words,
    root,
    scale_of,
    store,
    store_by_words,
    within,
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


@triton.jit(do_not_specialize=["step", "seed"])
def wide_kernel(
    table, owner, row_sums, column_sums, means, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho,
    grad_scale, left_out_at,
    FIELDS: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr,
    Q: tl.constexpr, L: tl.constexpr, V: tl.constexpr, R: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, NVIDIA: tl.constexpr, STOCHASTIC: tl.constexpr, SCALED: tl.constexpr,
    CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = Q * L * V
    T: tl.constexpr = L * R * D
    number, entry, index = program_of(table, owner, FIELDS)
    step, inv_c1, inv_c2 = own_numbers(entry, step, inv_c1, inv_c2, MIXED)
    W = tl.load(entry + WEIGHT).to(tl.pointer_type(W_DTYPE))
    G = tl.load(entry + GRADIENT).to(tl.pointer_type(G_DTYPE))
    M = tl.load(entry + EXP_AVG).to(tl.pointer_type(S_DTYPE))
    row_mean = tl.load(entry + ROW_EXP_AVG_SQ).to(tl.pointer_type(S_DTYPE))
    column_mean = tl.load(entry + COL_EXP_AVG_SQ).to(tl.pointer_type(S_DTYPE))
    rows, n = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLUMNS).to(tl.int32)
    stream = tl.load(entry + STREAM).to(tl.int32)
    blocks, stripes = tl.cdiv(n, F), tl.cdiv(rows, S)
    parts = tl.cdiv(blocks, R)
    part = index % parts
    stripe = index // parts % stripes
    matrix = (index // (parts * stripes)).to(tl.int64)
    scale = 1.0
    if SCALED > 0:
        scale = scale_of(grad_scale, number, SCALED)

    lane = tl.arange(0, T)
    in_block, down = lane % L * V, lane // (L * R)
    block = part * R + lane // L % R
    column = block * F + in_block
    chunk = tl.arange(0, Q * T) // T
    in_chunk = (chunk * (L * V))[:, None] + tl.arange(0, V)[None, :]
    columns = in_chunks(column, Q) + in_chunk
    exists, share = block < blocks, 1.0 / F
    there = in_chunks(exists, Q)
    if not EVEN:
        share = 1.0 / tl.maximum(tl.minimum(n - block * F, F), 1).to(tl.float32)
        # In units of 16 columns, so that the compiler sees that a mask never splits an access.
        there = there & (in_chunks(column, Q) // 16 + in_chunk // 16 < n // 16)
    # Where a lane's elements, moment and first random draw are, from the first row of D.
    offset = in_chunks(down.to(tl.int64) * n + column, Q) + in_chunk
    at = down.to(tl.int64) * blocks + block
    draws = tl.cdiv(n, 8)
    own_draw = down.to(tl.int64) * draws + column // 8

    # With k the root of (1 - b2) / c2, S of an element is k * root(g * g + r * c) if c is in units of 1 - b2. So the
    # loop has no factor for g * g if numerator and denominator are over k. Both are over the largest step too, so that
    # it has none for the limit, which is then S itself. A step of zero leaves zeros of the numerator.
    k = root(a2 * inv_c2, NVIDIA)
    per_step = 1.0 / tl.maximum(step_size * _LARGEST, 1e-37)
    per_center = tl.where(step_size > 0, 1.0 / (_LARGEST * k), 0.0)
    center_share, per_gradient, eps = _CENTER_SHARE / k, per_center * rho, eps / k * per_step
    # Where no gradient has ever been, mean(r) is zero, and V must be zero, not 0/0.
    mean = tl.maximum(tl.load(means + tl.load(entry + MEANS) + matrix), 1.1754943508222875e-38)
    c = tl.load(column_mean + matrix * n + columns, mask=there, other=0.0).to(tl.float32) * (1.0 / mean) * (b2 / a2)
    row_sums += tl.load(entry + ROW_SUMS)
    total = tl.zeros((Q * T, V), tl.float32)
    first = stripe * S
    count = tl.minimum(rows - first, S)
    row = matrix * rows + first
    first_row = tl.load(entry + FIRST_ROW)
    # Rows are on their way to shared memory while others are computed. Beyond the last there is nothing to load.
    for i in tl.range(0, S, D, num_stages=STAGES):
        inside = exists & (down < count - i)
        stores = inside & (in_block == 0)
        mask = there & in_chunks(inside, Q)
        # The compiler cannot see through a table of addresses that V columns are one 16-byte access.
        W_at = tl.multiple_of(W + row * n + offset, (1, 16))
        G_at = tl.multiple_of(G + row * n + offset, (1, 16))
        g, w = tl.load(G_at, mask=mask, other=0.0), tl.load(W_at, mask=mask, other=0.0)
        old_m = tl.load(M + row * blocks + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(row_mean + row + down, mask=inside, other=0.0).to(tl.float32)
        g = float32_of(g, NVIDIA) * scale
        block_mean, squares = lane_sums(g, Q)
        block_mean, squares = block_sums(block_mean, squares, L)
        block_mean *= share
        m = lerp(old_m, block_mean, a1, b1)
        center = m * inv_c1 - rho * block_mean
        new_total = tl.fma(g, g, total)
        if CHECKED:
            finite = kept_finite(squares, left_out_at + stream, step, stores)
            squares, m = tl.where(finite, squares, 0.0), tl.where(finite, m, old_m)
            kept = in_chunks(finite, Q)
            new_total, mask = tl.where(kept, new_total, total), mask & kept
        total = new_total
        tl.store(row_sums + row * blocks + at, squares, mask=stores)

        size = root(tl.fma(g, g, in_chunks(r, Q) * c), NVIDIA)
        numerator = tl.fma(g, per_gradient, in_chunks(center * per_center, Q))
        numerator = within(numerator, size, NVIDIA)
        denominator = tl.fma(tl.maximum(size, in_chunks(tl.abs(center) * center_share, Q)), per_step, eps)
        w = float32_of(w, NVIDIA) * decay - numerator * inverse(denominator, NVIDIA)
        if STOCHASTIC and W_DTYPE is tl.bfloat16:
            draw = tl.reshape(in_chunks((first_row + row) * draws + own_draw, Q), (Q * T,)) + chunk * (L * V // 8)
            store_by_words(W_at, w, random_words(seed, step, 4 * stream, draw), mask, NVIDIA)
        elif NVIDIA:
            tl.store(W_at, w.to(W_DTYPE), mask=mask)
        else:
            store(W_at, w, 0, mask, W_DTYPE, False)
        m_bits = 0
        if STOCHASTIC and S_DTYPE is tl.bfloat16:
            m_bits = random_bits_at(seed, step, 4 * stream + 1, first_row + row + down, block, blocks)
        store(M + row * blocks + at, m, m_bits, stores, S_DTYPE, STOCHASTIC)
        row += D
    total = tl.sum(tl.reshape(total, (Q, D, L * R, V)), 1)
    lane = tl.arange(0, L * R)[None, :, None]
    in_chunk = tl.arange(0, Q)[:, None, None] * (L * V) + tl.arange(0, V)[None, None, :]
    columns = (part * R + lane // L) * F + lane % L * V + in_chunk
    sums = column_sums + tl.load(entry + COLUMN_SUMS) + (matrix * stripes + stripe) * n
    tl.store(sums + columns, total, mask=columns < n)
