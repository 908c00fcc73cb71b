"""The block rule, and AdamW, as Triton kernels: many tensors in one launch, one pass over memory, no temporaries.

A launch updates all tensors of a param group that share dtypes and geometry, see ``kernels.tables``. Learning rate,
step count and bias corrections are plain arguments, so they never recompile; those of weights that missed steps are in
the table. Nothing is read back from the device.

A program works on a tile of ``R`` segments of ``C`` adjacent columns; ``C`` holds whole blocks of ``F`` columns, so
every mean is inside a tile. Plain parameters are the block rule at ``F = 1``, where the residual is zero.
"""

from __future__ import annotations

import numpy
import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.parts import (
    kept_finite,
    lerp,
    own_numbers,
    random_bits,
    random_bits_at,
    ratio,
    root,
    scale_of,
    store,
    unfold,
)
from foam_hf.kernels.tables import (
    MAX_WARPS,
    TILE_ELEMENTS,
    TRITON_DTYPES,
    AddressTable,
    Entry,
    Geometry,
    device_of,
    launches_of,
    numbers,
)
from foam_hf.tensors.step import Hyper, Member

WARP_ELEMENTS = 512
# One row of the table: weight, gradient, first moment, second moment, rows, columns, stream; and where a shard's first
# row and column are in the whole tensor, and the columns of that; step and bias corrections, see ``own_numbers``.
_FIELDS = 13


@triton.jit(do_not_specialize=["step", "seed"])
def _update_kernel(
    table, owner, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho, grad_scale, left_out_at,
    FIELDS: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    number = tl.load(owner + 2 * tl.program_id(0))
    tile = tl.load(owner + 2 * tl.program_id(0) + 1)
    entry = table + number.to(tl.int64) * FIELDS
    w_address, g_address = tl.load(entry), tl.load(entry + 1)
    m_address, v_address = tl.load(entry + 2), tl.load(entry + 3)
    rows, n = tl.load(entry + 4).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    stream = tl.load(entry + 6).to(tl.int32)
    step, inv_c1, inv_c2 = own_numbers(entry + FIELDS - 3, step, inv_c1, inv_c2, MIXED)
    W = w_address.to(tl.pointer_type(W_DTYPE))
    G = g_address.to(tl.pointer_type(G_DTYPE))
    M = m_address.to(tl.pointer_type(S_DTYPE))
    V = v_address.to(tl.pointer_type(S_DTYPE))

    whole_n, first_row, first_column = n, 0, 0
    if STOCHASTIC:  # random bits belong to places in the whole tensor
        first_row, first_column = tl.load(entry + 7), tl.load(entry + 8)
        whole_n = tl.load(entry + 9).to(tl.int32)
    draws = tl.cdiv(whole_n, 8)
    first_draw = first_row * draws + first_column // 8

    # Where the segments of this tile are, and where the moments of their blocks.
    per_row = tl.cdiv(n, C)
    segment = tile * R + tl.arange(0, R)
    lane = tl.arange(0, C)[None, :]
    block = tl.arange(0, C // F)[None, :]
    m_segment = segment if F == C else segment[:, None]  # one block a segment, or several
    if EVEN:  # segments follow each other without a gap: no row and column need be known, and no division is made
        inside = segment < rows * per_row
        offset = segment[:, None].to(tl.int64) * C + lane
        mask = inside[:, None]
        m_offset = m_segment.to(tl.int64) if F == C else m_segment.to(tl.int64) * (C // F) + block
        m_mask = inside if F == C else mask
        draw = first_draw + segment[:, None].to(tl.int64) * (C // 8)
        share = 1.0 / F
    else:
        row = segment // per_row
        column = (segment - row * per_row) * C
        offset = row[:, None].to(tl.int64) * n + column[:, None] + lane
        if ALIGNED:  # in units of 16 columns, so that the compiler sees that a mask never splits an access
            mask = (row[:, None] < rows) & (column[:, None] // 16 + lane // 16 < n // 16)
        else:
            mask = (row[:, None] < rows) & (column[:, None] + lane < n)
        m_row = m_segment // per_row
        m_column = (m_segment - m_row * per_row) * (C // F) if F == C else column[:, None] // F + block
        m_offset = m_row.to(tl.int64) * tl.cdiv(n, F) + m_column
        m_mask = (m_row < rows) & (m_column * F < n)
        draw = first_draw + row[:, None].to(tl.int64) * draws + column[:, None] // 8
        share = 1.0 / tl.maximum(tl.minimum(n - m_column * F, F), 1).to(tl.float32)
    W, G, M, V = W + offset, G + offset, M + m_offset, V + m_offset
    if ALIGNED:
        # The compiler cannot see through a table of addresses that eight columns are one 16-byte access.
        W, G = tl.multiple_of(W, (1, 16)), tl.multiple_of(G, (1, 16))
        if EVEN and C // F >= 8:
            M, V = tl.multiple_of(M, (1, 16)), tl.multiple_of(V, (1, 16))

    w = tl.load(W, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(G, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(M, mask=m_mask, other=0.0).to(tl.float32)
    v = tl.load(V, mask=m_mask, other=0.0).to(tl.float32)
    if SCALED > 0:
        g = g * scale_of(grad_scale, number, SCALED)
    old_m, old_v = m, v
    if F == 1:
        square = g * g
        m = lerp(m, g, a1, b1)
        v = tl.fma(v, b2, a2 * g * g)  # said so: else each variant of the kernel is fused in its own way
    else:
        if F == C:
            mean, square = tl.sum(g, 1) * share, tl.sum(g * g, 1) * share
        else:
            parts = tl.reshape(g, (R, C // F, F))
            mean, square = tl.sum(parts, 2) * share, tl.sum(parts * parts, 2) * share
        m, v = lerp(m, mean, a1, b1), lerp(v, square, a2, b2)
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

    w_bits, m_bits, v_bits = 0, 0, 0
    if STOCHASTIC and W_DTYPE is tl.bfloat16:
        if SHIFTED:
            w_row = offset // n
            w_column = offset - w_row * n + first_column
            w_bits = random_bits_at(seed, step, 4 * stream, w_row + first_row, w_column, whole_n)
        else:
            w_bits = random_bits(seed, step, 4 * stream, draw, R, C)
    if STOCHASTIC and S_DTYPE is tl.bfloat16:
        width, whole_width = tl.cdiv(n, F), tl.cdiv(whole_n, F)  # a moment's row
        m_row = m_offset // width
        m_column = m_offset - m_row * width + first_column // F
        m_bits = random_bits_at(seed, step, 4 * stream + 1, m_row + first_row, m_column, whole_width)
        v_bits = random_bits_at(seed, step, 4 * stream + 2, m_row + first_row, m_column, whole_width)
    store(W, w, w_bits, mask, W_DTYPE, STOCHASTIC)
    store(M, m, m_bits, m_mask, S_DTYPE, STOCHASTIC)
    store(V, v, v_bits, m_mask, S_DTYPE, STOCHASTIC)


class Launch(AddressTable):
    """The device tables of one launch, and the launch itself."""

    def __init__(self, geometry: Geometry, entries: list[Entry]) -> None:
        self.segments = max(1, TILE_ELEMENTS // geometry.columns)  # R
        table = numpy.empty((len(entries), _FIELDS), dtype=numpy.int64)
        tiles = []
        for i, entry in enumerate(entries):
            n = entry.columns
            rows = entry.weight.numel() // n
            place = entry.place
            where = (place.first_row, place.first_column, place.columns)
            table[i] = (*(x.data_ptr() for x in entry.tensors), rows, n, entry.stream, *where, 0, 0, 0)
            tiles.append(-(-rows * -(-n // geometry.columns) // self.segments))
        super().__init__(geometry, entries, table, [tiles])

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> None:
        g = self.geometry
        self.follow_steps(h)
        state = TRITON_DTYPES[g.state]
        scale, scaled = self.scale(grad_scale)
        with device_of(g.device):
            self.launch(
                _update_kernel,
                len(self.owners[0]),
                (self.table, self.owners[0], h.step, h.seed, *numbers(h), scale, self.left_out_at(left_out_at)),
                (
                    *(_FIELDS, TRITON_DTYPES[g.weight], TRITON_DTYPES[g.grad], state, g.width, self.segments),
                    *(g.columns, g.even, g.aligned, h.stochastic, scaled, g.shifted),
                    *(left_out_at is not None, self.mixed, self.nvidia),
                ),
                num_warps=max(1, min(MAX_WARPS, g.columns * self.segments // WARP_ELEMENTS)),
            )


def make_launches(members: list[Member]) -> tuple[list[Launch], list[Member]]:
    """Launches for ``members``, plain weights of this rule, and the members that no kernel takes."""
    return launches_of(members, lambda entry: Geometry.of(entry) if entry.fits() else None, Launch)
