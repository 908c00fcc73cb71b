"""The block rule as a Triton kernel: many tensors in one launch, one pass over memory, no temporaries.

A launch updates all tensors of a param group that share dtypes and geometry, see ``kernels.tables``. Learning rate,
step count and bias corrections are plain arguments, so they never recompile; those of weights that missed steps are in
the table. Nothing is read back from the device.

A program works on ``R`` blocks. A block is ``Q`` chunks of ``L`` lanes of ``V`` adjacent columns, and ``Q2`` chunks
more if it is a whole row, as a tensor's sides are powers of two. A lane reads 16 bytes of each chunk, so that the
sums of a block are nearly done before lanes exchange anything, and every lane of a block holds its moments. Narrower
blocks, and AdamW, are in ``narrow_block_kernel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import KernelCall
from foam_hf.kernels.lanes import block_sums, in_chunks, lane_sums
from foam_hf.kernels.parts import (
    after_loads,
    float32_of,
    kept_finite,
    lerp,
    own_numbers,
    program_of,
    random_bits_at,
    random_words,
    ratio,
    root,
    scale_of,
    store,
    store_by_words,
    store_moments,
)
from foam_hf.kernels.tables import (
    AddressTable,
    Entry,
    Geometry,
    launches_of,
    power_of_two,
)
from foam_hf.rules.narrow_block_kernel import (
    ROW,
    NarrowLaunch,
    head_of,
    own_columns,
    place_of,
)
from foam_hf.tensors.step import Hyper, Member

NARROWEST = 32  # columns of a block: a lane's 16 bytes twice or more often
LANES = 128  # of a program, or all of a block if it has more
MOST_LANES = 512
CHUNKS = 4  # of a block of many columns
ROW_CHUNKS = 6  # of a row at most, while there are lanes


@triton.jit
def _chunks(
    start, column, inside, n, draw, first: tl.constexpr, count: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Of ``count`` chunks from the ``first`` on: where their elements are, which there are, and their random draws.

    A chunk of all lanes follows another, (count * T, V): with two dimensions the compiler has no choice of layout.
    """
    T: tl.constexpr = start.shape[0]
    chunk = first + tl.arange(0, count * T) // T
    within = (chunk * (L * V))[:, None] + tl.arange(0, V)[None, :]
    offset, mask = in_chunks(start, count) + within, in_chunks(inside, count)
    if not EVEN:
        if ALIGNED:  # in units of 16 columns, so that the compiler sees that a mask never splits an access
            mask = mask & (in_chunks(column, count) // 16 + within // 16 < n // 16)
        else:
            mask = mask & (in_chunks(column, count) + within < n)
    draw = tl.reshape(in_chunks(draw, count), (count * T,)) + chunk * (L * V // 8)
    return offset, mask, draw


@triton.jit
def _gradient(g, grad_scale, number, SCALED: tl.constexpr, NVIDIA: tl.constexpr):
    g = float32_of(g, NVIDIA)
    if SCALED > 0:
        g = g * scale_of(grad_scale, number, SCALED)
    return g


@triton.jit
def _update(
    W, w, g, offset, mask, draw, base, spread, per_residual, direction, per_gradient, eps, decay,
    seed, step, stream, n, first_row, first_column, whole_n, count: tl.constexpr,
    W_DTYPE: tl.constexpr, SHIFTED: tl.constexpr, NVIDIA: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Store the new weights; what is of a block is multiplied by all that its elements share."""
    residual = tl.fma(g, per_residual, in_chunks(base, count))
    denominator = root(tl.fma(residual, residual, in_chunks(spread, count)), NVIDIA) + eps
    numerator = tl.fma(g, per_gradient, in_chunks(direction, count))
    w = float32_of(w, NVIDIA) * decay - ratio(numerator, denominator, NVIDIA)
    if STOCHASTIC and W_DTYPE is tl.bfloat16:
        if SHIFTED:
            row = offset // n
            column = offset - row * n + first_column
            bits = random_bits_at(seed, step, 4 * stream, row + first_row, column, whole_n)
            store(W, w, bits, mask, W_DTYPE, STOCHASTIC)
        else:
            store_by_words(W, w, random_words(seed, step, 4 * stream, draw), mask, NVIDIA)
    elif NVIDIA:
        tl.store(W, w.to(W_DTYPE), mask=mask)
    else:
        store(W, w, 0, mask, W_DTYPE, False)


@triton.jit(do_not_specialize=["step", "seed"])
def _update_kernel(
    table, owner, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho, grad_scale, left_out_at,
    FIELDS: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, F: tl.constexpr,
    Q: tl.constexpr, Q2: tl.constexpr, R: tl.constexpr, L: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE_ROWS: tl.constexpr, SHIFTED: tl.constexpr, NVIDIA: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = (Q + Q2) * L * V
    number, entry, index = program_of(table, owner, FIELDS)
    step, inv_c1, inv_c2 = own_numbers(entry, step, inv_c1, inv_c2, MIXED)
    W, G, M, M2, rows, n, stream = head_of(entry, W_DTYPE, G_DTYPE, S_DTYPE)
    first_row, first_column, whole_n = place_of(entry, n, STOCHASTIC)
    draws = tl.cdiv(whole_n, 8)
    first_draw = first_row * draws + first_column // 8

    lane = tl.arange(0, R * L)  # of all blocks
    r, in_block = lane // L, lane % L * V
    if EVEN:  # blocks follow each other without a gap: no row need be known, no division is made
        first = index.to(tl.int64) * (R * C)
        W, G = W + first, G + first
        start = r * C + in_block
        column, share = in_block, 1.0 / C
        inside = r < rows * (n // C) - index * R
        draw = first_draw + first // 8 + start // 8
    else:
        first = index.to(tl.int64) * 0
        block = index * R + r
        row, column, share = block, in_block, 1.0 / n
        if not WHOLE_ROWS:
            per_row = tl.cdiv(n, C)
            row = block // per_row
            place = (block - row * per_row) * C
            column = place + in_block
            share = 1.0 / tl.maximum(tl.minimum(n - place, C), 1).to(tl.float32)
        start = row.to(tl.int64) * n + column
        inside = row < rows
        draw = first_draw + row.to(tl.int64) * draws + column // 8
    at = index.to(tl.int64) * R + r
    M, M2 = M + at, M2 + at  # every lane of a block holds its moments, and one stores them
    stores = inside & (in_block == 0)

    offset, mask, draw_1 = _chunks(start, column, inside, n, draw, 0, Q, L, V, EVEN, ALIGNED)
    W_1, G_1 = W + offset, G + offset
    if ALIGNED:
        # The compiler cannot see through a table of addresses that V columns are one 16-byte access.
        W_1, G_1 = tl.multiple_of(W_1, (1, 16)), tl.multiple_of(G_1, (1, 16))
    g, w = tl.load(G_1, mask=mask, other=0.0), tl.load(W_1, mask=mask, other=0.0)
    if Q2 > 0:
        offset_2, mask_2, draw_2 = _chunks(start, column, inside, n, draw, Q, Q2, L, V, EVEN, ALIGNED)
        W_2, G_2 = W + offset_2, G + offset_2
        if ALIGNED:
            W_2, G_2 = tl.multiple_of(W_2, (1, 16)), tl.multiple_of(G_2, (1, 16))
        g_2, w_2 = tl.load(G_2, mask=mask_2, other=0.0), tl.load(W_2, mask=mask_2, other=0.0)
    old_m = tl.load(M, mask=inside, other=0.0).to(tl.float32)
    old_v = tl.load(M2, mask=inside, other=0.0).to(tl.float32)
    zero = rows >> 31
    g = _gradient(after_loads(g, w, zero, NVIDIA), grad_scale, number, SCALED, NVIDIA)
    mean, square = lane_sums(g, Q)
    if Q2 > 0:
        g_2 = _gradient(after_loads(g_2, w_2, zero, NVIDIA), grad_scale, number, SCALED, NVIDIA)
        more, more_squares = lane_sums(g_2, Q2)
        mean, square = mean + more, square + more_squares

    mean, square = block_sums(mean, square, L)
    mean, square = mean * share, square * share
    m, v = lerp(old_m, mean, a1, b1), lerp(old_v, square, a2, b2)
    if CHECKED:
        finite = kept_finite(square, left_out_at + stream, step, stores)
        m, v = tl.where(finite, m, old_m), tl.where(finite, v, old_v)
        mask = mask & in_chunks(finite, Q)
    per_residual, per_gradient = rho * root(inv_c2, NVIDIA), step_size * inv_c1 * rho
    base, spread = 0.0 - mean * per_residual, v * inv_c2
    direction = m * (step_size * inv_c1) - mean * per_gradient
    _update(
        W_1, w, g, first + offset, mask, draw_1, base, spread, per_residual, direction, per_gradient, eps, decay,
        seed, step, stream, n, first_row, first_column, whole_n, Q, W_DTYPE, SHIFTED, NVIDIA, STOCHASTIC,
    )  # fmt: skip
    if Q2 > 0:
        if CHECKED:
            mask_2 = mask_2 & in_chunks(finite, Q2)
        _update(
            W_2, w_2, g_2, first + offset_2, mask_2, draw_2, base, spread, per_residual, direction, per_gradient, eps,
            decay, seed, step, stream, n, first_row, first_column, whole_n, Q2, W_DTYPE, SHIFTED, NVIDIA, STOCHASTIC,
        )  # fmt: skip
    store_moments(
        M, M2, m, v, at, stores, seed, step, stream, n, first_row, first_column, whole_n, F, S_DTYPE, STOCHASTIC
    )


@dataclass(frozen=True)
class WideGeometry(Geometry):
    """What a launch for wide blocks is compiled for; of blocks that are whole rows, their length in chunks too."""

    whole_rows: bool  # a row is one block
    vector: int  # V
    lanes: int  # L
    chunks: int  # Q
    more_chunks: int  # Q2

    @classmethod
    def of_wide(cls, entry: Entry) -> WideGeometry | None:
        """Of an ``entry`` that fits; None if its blocks are too narrow, or too many."""
        plain, n = Geometry.of(entry), entry.columns
        vector = 16 // max(2, min(4, entry.weight.element_size()))
        whole_rows = plain.width >= n
        if plain.width < NARROWEST:
            return None
        if whole_rows:
            lanes = min(MOST_LANES, max(4, power_of_two(-(-n // (vector * ROW_CHUNKS)))))
            count = -(-n // (lanes * vector))
            chunks = power_of_two(count + 1) // 2  # the largest power of two up to it
            more = power_of_two(count - chunks) if count > chunks else 0
        else:
            chunks, more = min(CHUNKS, plain.width // (4 * vector)), 0
            lanes = plain.width // (chunks * vector)
            if lanes > MOST_LANES:
                chunks, lanes = plain.width // (MOST_LANES * vector), MOST_LANES
        columns = (chunks + more) * lanes * vector
        if entry.weight.numel() // n * -(-n // columns) + LANES >= 2**31:  # a kernel counts blocks in int32
            return None
        even = n % columns == 0 and (n == entry.place.columns or entry.weight.numel() == n)
        fields: dict[str, Any] = {**vars(plain), "columns": columns, "even": even, "whole_rows": whole_rows}
        return cls(**fields, vector=vector, lanes=lanes, chunks=chunks, more_chunks=more)

    @property
    def blocks(self) -> int:
        """How many a program works on: R."""
        return max(1, LANES // self.lanes)


class BlockLaunch(AddressTable):
    """The device tables of one launch for wide blocks, and the launch itself."""

    def __init__(self, geometry: WideGeometry, entries: list[Entry]) -> None:
        g = geometry
        counts = [
            -(-(entry.weight.numel() // entry.columns * -(-entry.columns // g.columns)) // g.blocks)
            for entry in entries
        ]
        super().__init__(g, entries, ROW, own_columns(entries), [counts])
        constants = self.constants(
            _update_kernel,
            Q=g.chunks,
            Q2=g.more_chunks,
            R=g.blocks,
            L=g.lanes,
            V=g.vector,
            WHOLE_ROWS=g.whole_rows,
        )
        self._update = KernelCall(_update_kernel, constants, num_warps=g.blocks * g.lanes // 32)

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> None:
        self.update_by(self._update, h, grad_scale, left_out_at)


def make_launches(members: list[Member]) -> tuple[list[BlockLaunch | NarrowLaunch], list[Member]]:
    """Launches for ``members``, plain weights of this rule or AdamW, and the members that no kernel takes."""
    return launches_of(members, _geometry_of, _launch)


def _geometry_of(entry: Entry) -> Geometry | None:
    if not entry.fits():
        return None
    return WideGeometry.of_wide(entry) or Geometry.of(entry)


def _launch(geometry: Geometry, entries: list[Entry]) -> BlockLaunch | NarrowLaunch:
    if isinstance(geometry, WideGeometry):
        return BlockLaunch(geometry, entries)
    return NarrowLaunch(geometry, entries)
