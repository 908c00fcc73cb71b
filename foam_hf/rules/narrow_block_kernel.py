"""AdamW, and the block rule where blocks are narrow, as a Triton kernel; see ``block_kernel`` for the others.

A program works on a tile of ``R`` segments of ``C`` adjacent columns; ``C`` holds whole blocks of ``F`` columns, so
every mean is inside a tile. Plain parameters are the block rule at ``F = 1``, where the residual is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import KernelCall
from foam_hf.kernels.columns import COLUMNS, EXP_AVG, GRADIENT, STREAM, WEIGHT, number_of, row_of
from foam_hf.kernels.parts import (
    block_moments,
    blocks_of,
    draws_of,
    kept_finite,
    own_numbers,
    program_of,
    random_bits,
    random_bits_at,
    ratio,
    root,
    scale_of,
    segments_of,
    store,
    store_moments,
    unfold,
)
from foam_hf.kernels.tables import (
    MAX_WARPS,
    TILE_ELEMENTS,
    AddressTable,
    Entry,
    Geometry,
    tiles_of,
)
from foam_hf.tensors.step import Hyper

WARP_ELEMENTS = 512
# ``rows`` are all rows of a tensor; a shard begins at ``first_row`` and ``first_column`` of a whole one, whose rows
# have ``whole_columns``.
HEAD = ("exp_avg_sq", "rows")  # the first own columns of every table that ``head_of`` reads
PLAIN_ROW = (*HEAD, "first_row", "first_column", "whole_columns")
ROW = row_of(*PLAIN_ROW)
EXP_AVG_SQ, ROWS = number_of(ROW, "exp_avg_sq"), number_of(ROW, "rows")
FIRST_ROW, FIRST_COLUMN = number_of(ROW, "first_row"), number_of(ROW, "first_column")
WHOLE_COLUMNS = number_of(ROW, "whole_columns")


@triton.jit
def head_of(entry, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr):
    """A tensor's weight, gradient and two moments, its rows and columns, and its random stream."""
    W = tl.load(entry + WEIGHT).to(tl.pointer_type(W_DTYPE))
    G = tl.load(entry + GRADIENT).to(tl.pointer_type(G_DTYPE))
    M = tl.load(entry + EXP_AVG).to(tl.pointer_type(S_DTYPE))
    V = tl.load(entry + EXP_AVG_SQ).to(tl.pointer_type(S_DTYPE))
    rows, n = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLUMNS).to(tl.int32)
    return W, G, M, V, rows, n, tl.load(entry + STREAM).to(tl.int32)


@triton.jit
def place_of(entry, n, STOCHASTIC: tl.constexpr):
    """Where a tensor of a ``ROW`` begins in a whole one, and the columns of that: random bits belong to its places."""
    first_row, first_column, whole_n = 0, 0, n
    if STOCHASTIC:
        first_row, first_column = tl.load(entry + FIRST_ROW), tl.load(entry + FIRST_COLUMN)
        whole_n = tl.load(entry + WHOLE_COLUMNS).to(tl.int32)
    return first_row, first_column, whole_n


@triton.jit(do_not_specialize=["step", "seed"])
def _update_kernel(
    table, owner, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho, grad_scale, left_out_at,
    FIELDS: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    SHIFTED: tl.constexpr, NVIDIA: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    number, entry, tile = program_of(table, owner, FIELDS)
    step, inv_c1, inv_c2 = own_numbers(entry, step, inv_c1, inv_c2, MIXED)
    W, G, M, V, rows, n, stream = head_of(entry, W_DTYPE, G_DTYPE, S_DTYPE)
    first_row, first_column, whole_n = place_of(entry, n, STOCHASTIC)

    segment, offset, mask = segments_of(tile, rows, n, R, C, EVEN, ALIGNED)
    m_offset, m_mask, share = blocks_of(segment, rows, n, C, F, EVEN)
    W, G, M, V = W + offset, G + offset, M + m_offset, V + m_offset
    if ALIGNED:
        # The compiler cannot see through a table of addresses that eight columns are one 16-byte access.
        W, G = tl.multiple_of(W, (1, 16)), tl.multiple_of(G, (1, 16))
        if EVEN and C // F >= 8:
            M, V = tl.multiple_of(M, (1, 16)), tl.multiple_of(V, (1, 16))

    w = tl.load(W, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(G, mask=mask, other=0.0).to(tl.float32)
    old_m = tl.load(M, mask=m_mask, other=0.0).to(tl.float32)
    old_v = tl.load(V, mask=m_mask, other=0.0).to(tl.float32)
    if SCALED > 0:
        g = g * scale_of(grad_scale, number, SCALED)
    mean, square, m, v = block_moments(g, old_m, old_v, share, b1, a1, b2, a2, R, C, F)
    unbiased = v * inv_c2
    if CHECKED:
        finite = kept_finite(square, left_out_at + stream, step, m_mask)
        m, v = tl.where(finite, m, old_m), tl.where(finite, v, old_v)
        if F == C:  # a segment is written or not
            mask = mask & finite[:, None]
        else:  # so that each element of a block can see that it is kept
            unbiased = tl.where(finite, unbiased, float("nan"))
    if F == 1:
        numerator, denominator = m * inv_c1, root(unbiased, NVIDIA) + eps
    else:
        residual = g - unfold(mean, R, C, F)
        numerator = unfold(m * inv_c1, R, C, F) + residual * (rho * inv_c1)
        denominator = root(unfold(unbiased, R, C, F) + residual * residual * (rho * rho * inv_c2), NVIDIA) + eps
    updated = w * decay - step_size * ratio(numerator, denominator, NVIDIA)
    w = tl.where(denominator == denominator, updated, w) if CHECKED and F != C else updated

    w_bits = 0
    if STOCHASTIC and W_DTYPE is tl.bfloat16:
        if SHIFTED:
            w_row = offset // n
            w_column = offset - w_row * n + first_column
            w_bits = random_bits_at(seed, step, 4 * stream, w_row + first_row, w_column, whole_n)
        else:
            draw = draws_of(segment, n, first_row, first_column, whole_n, C, EVEN)
            w_bits = random_bits(seed, step, 4 * stream, draw, R, C)
    store(W, w, w_bits, mask, W_DTYPE, STOCHASTIC)
    store_moments(
        M, V, m, v, m_offset, m_mask, seed, step, stream, n, first_row, first_column, whole_n, F, S_DTYPE, STOCHASTIC
    )


def own_columns(entries: list[Entry]) -> dict[str, list[int]]:
    """The columns of ``ROW`` that not every table has."""
    return {
        "exp_avg_sq": [entry.moments[1].data_ptr() for entry in entries],
        "rows": [entry.weight.numel() // entry.columns for entry in entries],
        "first_row": [entry.place.first_row for entry in entries],
        "first_column": [entry.place.first_column for entry in entries],
        "whole_columns": [entry.place.columns for entry in entries],
    }


class NarrowLaunch(AddressTable):
    """The device tables of one launch, and the launch itself."""

    def __init__(self, geometry: Geometry, entries: list[Entry]) -> None:
        segments = max(1, TILE_ELEMENTS // geometry.columns)  # R
        super().__init__(geometry, entries, ROW, own_columns(entries), [tiles_of(geometry, entries, segments)])
        warps = max(1, min(MAX_WARPS, geometry.columns * segments // WARP_ELEMENTS))
        self._update = KernelCall(_update_kernel, self.constants(_update_kernel, R=segments), num_warps=warps)

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> None:
        self.update_by(self._update, h, grad_scale, left_out_at)
