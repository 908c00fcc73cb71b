"""The small passes of the factored rule's kernels: means before the update, and from its sums of squares the new ones.

Each program works on ``LANES`` means or columns, in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foam_hf.kernels.columns import COLUMNS, STEP, STREAM, number_of, row_of
from foam_hf.kernels.parts import kept_finite, lerp, program_of, random_bits_at, store

LANES = tl.constexpr(256)  # means of a program
MEAN_LANES = tl.constexpr(2048)  # of a matrix's mean: one program adds up all of it, so it loads many at a time
# ``rows`` are those of one of ``matrices``. Where a tensor's part of each buffer of the launch begins: ``row_sums``,
# ``column_sums``, ``means`` (of row means) and ``shared_sums`` (of columns, for other ranks). A shard begins at
# ``first_row`` of a whole tensor, whose matrices have ``whole_rows`` each, ``all_rows`` together.
ROW = row_of(
    *("row_exp_avg_sq", "col_exp_avg_sq", "rows", "matrices"),
    *("row_sums", "column_sums", "means", "shared_sums"),
    *("first_row", "whole_rows", "all_rows"),
)
ROW_EXP_AVG_SQ, COL_EXP_AVG_SQ = number_of(ROW, "row_exp_avg_sq"), number_of(ROW, "col_exp_avg_sq")
ROWS, MATRICES = number_of(ROW, "rows"), number_of(ROW, "matrices")
ROW_SUMS, COLUMN_SUMS = number_of(ROW, "row_sums"), number_of(ROW, "column_sums")
MEANS, SHARED_SUMS = number_of(ROW, "means"), number_of(ROW, "shared_sums")
FIRST_ROW, WHOLE_ROWS, ALL_ROWS = number_of(ROW, "first_row"), number_of(ROW, "whole_rows"), number_of(ROW, "all_rows")


@triton.jit
def mean_kernel(table, owner, means, FIELDS: tl.constexpr, S_DTYPE: tl.constexpr, SHARED: tl.constexpr):
    """mean(r) of one matrix; where other ranks have some of its rows, mean(c), which is the same number."""
    _, entry, matrix = program_of(table, owner, FIELDS)
    count = tl.load(entry + COLUMNS if SHARED else entry + ROWS).to(tl.int32)
    address = tl.load(entry + COL_EXP_AVG_SQ if SHARED else entry + ROW_EXP_AVG_SQ)
    values = address.to(tl.pointer_type(S_DTYPE)) + matrix.to(tl.int64) * count
    total = tl.zeros((MEAN_LANES,), tl.float32)
    start = 0
    while start < count:  # Triton's interpreter takes no loaded value as the bound of a range
        at = start + tl.arange(0, MEAN_LANES)
        total += tl.load(values + at, mask=at < count, other=0.0).to(tl.float32)
        start += MEAN_LANES
    tl.store(means + tl.load(entry + MEANS) + matrix, tl.sum(total, 0) / count)


@triton.jit
def sums_kernel(table, owner, column_sums, shared_sums, FIELDS: tl.constexpr, S: tl.constexpr):
    """The sums of ``LANES`` columns over this rank's rows, for other ranks."""
    _, entry, index = program_of(table, owner, FIELDS)
    rows, n = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLUMNS).to(tl.int32)
    stripes = tl.cdiv(rows, S)
    at = index.to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = at < tl.load(entry + MATRICES) * n
    matrix = at // n
    sums = column_sums + tl.load(entry + COLUMN_SUMS) + matrix * stripes * n + at - matrix * n
    total = tl.zeros((LANES,), tl.float32)
    i = 0
    while i < stripes:
        total += tl.load(sums + i * n, mask=mask, other=0.0)
        i += 1
    tl.store(shared_sums + tl.load(entry + SHARED_SUMS) + at, total, mask=mask)


@triton.jit(do_not_specialize=["step", "seed"])
def means_kernel(
    table, owner, row_sums, column_sums, step, seed, b2, a2, left_out_at,
    FIELDS: tl.constexpr, S_DTYPE: tl.constexpr, C: tl.constexpr, S: tl.constexpr, SHARED: tl.constexpr,
    STOCHASTIC: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """The new row means, or behind them the new column means, of ``LANES`` rows or columns."""
    _, entry, index = program_of(table, owner, FIELDS)
    rows, n = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLUMNS).to(tl.int32)
    matrices, stream = tl.load(entry + MATRICES), tl.load(entry + STREAM).to(tl.int32)
    if MIXED:
        step = tl.load(entry + STEP).to(tl.int32)
    row_programs = tl.cdiv(matrices * rows, LANES)
    first_row = tl.load(entry + FIRST_ROW)
    whole_rows, all_rows = tl.load(entry + WHOLE_ROWS), tl.load(entry + ALL_ROWS)
    total = tl.zeros((LANES,), tl.float32)
    i = 0
    if index < row_programs:
        at = index.to(tl.int64) * LANES + tl.arange(0, LANES)
        mask = at < matrices * rows
        parts = tl.cdiv(n, C)
        sums = row_sums + tl.load(entry + ROW_SUMS) + at * parts
        while i < parts:
            total += tl.load(sums + i, mask=mask, other=0.0)
            i += 1
        target = tl.load(entry + ROW_EXP_AVG_SQ).to(tl.pointer_type(S_DTYPE)) + at
        row, width, kind, total = at * 0, all_rows, 2, total / n
        column = first_row + at
    else:
        at = (index - row_programs).to(tl.int64) * LANES + tl.arange(0, LANES)
        mask = at < matrices * n
        stripes = 1 if SHARED else tl.cdiv(rows, S)
        row = at // n
        column = at - row * n
        start = tl.load(entry + SHARED_SUMS if SHARED else entry + COLUMN_SUMS)
        sums = column_sums + start + row * stripes * n + column
        row += first_row // whole_rows
        while i < stripes:
            total += tl.load(sums + i * n, mask=mask, other=0.0)
            i += 1
        target = tl.load(entry + COL_EXP_AVG_SQ).to(tl.pointer_type(S_DTYPE)) + at
        width, kind, total = n.to(tl.int64), 3, total / whole_rows
    old = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    if CHECKED:  # blocks of finite squares whose sum is infinite
        total = tl.where(kept_finite(total, left_out_at + stream, step, mask), total, old)
    bits = 0
    if STOCHASTIC and S_DTYPE is tl.bfloat16:
        bits = random_bits_at(seed, step, 4 * stream + kind, row, column, width)
    store(target, lerp(old, total, a2, b2), bits, mask, S_DTYPE, STOCHASTIC)
