"""``rules.micro_batches`` as a Triton kernel: many tensors of a micro-batch in one launch, one pass over memory.

It is the kernel of ``rules.block_kernel`` with three sums of blocks that are written in place of the moments.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import KernelCall
from foam_hf.kernels.columns import number_of, row_of
from foam_hf.kernels.parts import (
    blocks_of,
    draws_of,
    kept_finite,
    program_of,
    random_bits,
    random_bits_at,
    ratio,
    root,
    scale_of,
    segments_of,
    store,
    unfold,
)
from foam_hf.kernels.tables import (
    MAX_WARPS,
    TILE_ELEMENTS,
    AddressTable,
    Entry,
    Geometry,
    launches_of,
    tiles_of,
)
from foam_hf.rules.micro_batches import SIGNS
from foam_hf.rules.narrow_block_kernel import PLAIN_ROW, head_of, own_columns, place_of
from foam_hf.rules.rule import LARGEST_STEP
from foam_hf.tensors.rounding import MICRO_SHIFT
from foam_hf.tensors.step import Hyper, Member

WARP_ELEMENTS = 512
SUMS = ("sums", "squares", "sketches")
ROW = row_of(*PLAIN_ROW, *SUMS)
SUM, SQUARE, SKETCH = (number_of(ROW, name) for name in SUMS)
_SIGNS, _SHIFT = tl.constexpr(SIGNS), tl.constexpr(MICRO_SHIFT)


@triton.jit
def block_sum(x, R: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """The sum over each block of ``F`` columns: (R,), or (R, C // F)."""
    if F == C:
        return tl.sum(x, 1)
    elif F == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, (R, C // F, F)), 2)


@triton.jit
def add_to_sum(S, x, finite, micro, mask, CHECKED: tl.constexpr):
    """Add to a sum of blocks in memory, which the first micro-batch begins; returns the new sum."""
    old = tl.load(S, mask=mask & (micro > 0), other=0.0)
    new = tl.where(finite, old + x, old) if CHECKED else old + x
    tl.store(S, new, mask=mask)
    return new


@triton.jit
def residual_of(g, share, mask, R: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """The means of blocks, the residual, and the means of its squares."""
    mean = block_sum(g, R, C, F) * share
    residual = tl.where(mask, g - unfold(mean, R, C, F), 0.0)
    return mean, residual, block_sum(residual * residual, R, C, F) * share


@triton.jit
def micro_numbers(
    m, v, mean, q, p, squares, inv_c1, inv_c2, inv_c2_before, b1, a1, b2, a2, rho, share_of_step, so_far,
):  # fmt: skip
    """Of each block: the first moment's share of the numerator, the second moment, and what a square counts in it."""
    expected = tl.maximum(v * inv_c2_before, squares)
    own = tl.where(q > 0, expected / tl.where(q > 0, q, 1.0), 0.0)
    guess = p * so_far
    second = (v * b2 + a2 * (guess * guess + squares * so_far)) * inv_c2
    return (m * (b1 * share_of_step) + mean * a1) * inv_c1, second, own * (rho * rho * inv_c2)


@triton.jit
def limited(numerator, denominator, limit, NVIDIA: tl.constexpr):
    direction = ratio(numerator, denominator, NVIDIA)
    kept = tl.minimum(tl.maximum(direction, -limit), limit)
    return tl.where(direction == direction, kept, direction)


@triton.jit(do_not_specialize=["step", "seed", "micro"])
def _update_kernel(
    table, owner, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho, grad_scale, left_out_at,
    micro, inv_c2_before, share_of_step, so_far, limit,
    FIELDS: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    SHIFTED: tl.constexpr, NVIDIA: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not MIXED, "all tensors of a launch are at the same step")
    number, entry, tile = program_of(table, owner, FIELDS)
    W, G, M, V, rows, n, stream = head_of(entry, W_DTYPE, G_DTYPE, S_DTYPE)
    P = tl.load(entry + SUM).to(tl.pointer_type(tl.float32))
    Q = tl.load(entry + SQUARE).to(tl.pointer_type(tl.float32))
    Z = tl.load(entry + SKETCH).to(tl.pointer_type(tl.float32))
    first_row, first_column, whole_n = place_of(entry, n, True)

    segment, offset, mask = segments_of(tile, rows, n, R, C, EVEN, ALIGNED)
    m_offset, m_mask, share = blocks_of(segment, rows, n, C, F, EVEN)
    W, G, M, V = W + offset, G + offset, M + m_offset, V + m_offset
    P, Q, Z = P + m_offset, Q + m_offset, Z + m_offset
    if ALIGNED:
        # The compiler cannot see through a table of addresses that eight columns are one 16-byte access.
        W, G = tl.multiple_of(W, (1, 16)), tl.multiple_of(G, (1, 16))

    w = tl.load(W, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(G, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(M, mask=m_mask, other=0.0).to(tl.float32)
    v = tl.load(V, mask=m_mask, other=0.0).to(tl.float32)
    if SHIFTED:
        row = offset // n
        column = offset - row * n + first_column
        signs = random_bits_at(seed, step, 4 * stream + _SIGNS, row + first_row, column, whole_n)
    else:
        draw = draws_of(segment, n, first_row, first_column, whole_n, C, EVEN)
        signs = random_bits(seed, step, 4 * stream + _SIGNS, draw, R, C)
    mean, residual, q = residual_of(g, share, mask, R, C, F)
    sketch = block_sum(tl.where((signs & 1) == 1, residual, -residual), R, C, F)
    finite = m_mask
    if CHECKED:
        checked = q + mean * mean
        if SCALED > 0:
            checked = checked * scale_of(grad_scale, number, SCALED)
        finite = kept_finite(checked, left_out_at + stream, step, m_mask)
    p = add_to_sum(P, mean, finite, micro, m_mask, CHECKED)
    squares = add_to_sum(Q, q, finite, micro, m_mask, CHECKED)
    add_to_sum(Z, sketch, finite, micro, m_mask, CHECKED)
    if SCALED > 0:
        c = scale_of(grad_scale, number, SCALED)
        mean, residual, q, p, squares = mean * c, residual * c, q * c * c, p * c, squares * c * c
    part, second, own = micro_numbers(
        m, v, mean, q, p, squares, inv_c1, inv_c2, inv_c2_before, b1, a1, b2, a2, rho, share_of_step, so_far,
    )  # fmt: skip
    if CHECKED:
        second = tl.where(finite, second, float("nan"))  # so that each element of a block can see that it is kept
    numerator = unfold(part, R, C, F) + residual * (rho * inv_c1)
    denominator = root(unfold(second, R, C, F) + residual * residual * unfold(own, R, C, F), NVIDIA) + eps
    updated = w * decay - step_size * limited(numerator, denominator, limit, NVIDIA)
    w = tl.where(denominator == denominator, updated, w) if CHECKED else updated

    w_bits = 0
    first_draw = micro.to(tl.int64) << _SHIFT
    if STOCHASTIC and W_DTYPE is tl.bfloat16:
        if SHIFTED:
            w_row = offset // n
            w_column = offset - w_row * n + first_column
            w_bits = random_bits_at(seed, step, 4 * stream, w_row + first_row, w_column, whole_n, first_draw)
        else:
            w_draw = first_draw + draws_of(segment, n, first_row, first_column, whole_n, C, EVEN)
            w_bits = random_bits(seed, step, 4 * stream, w_draw, R, C)
    store(W, w, w_bits, mask, W_DTYPE, STOCHASTIC)


def micro_arguments(h: Hyper) -> dict[str, Any]:
    """What a micro-batch's kernel takes beside what every update takes."""
    before = 1 - h.b2 ** (h.step - 1)
    return {
        "micro": h.micro,
        "inv_c2_before": float(1 / before) if before else 0.0,
        "share_of_step": float(h.shares / h.micros),
        "so_far": float(h.micros / (h.micro + 1)),
        "limit": float(LARGEST_STEP * h.shares / h.micros),
    }


def sums_of(entries: list[Entry]) -> dict[str, list[int]]:
    """The columns of a table with the addresses of the three sums."""
    return {name: [entry.pending[i].data_ptr() for entry in entries] for i, name in enumerate(SUMS)}


class Launch(AddressTable):
    """The device tables of one launch, and the launch itself."""

    def __init__(self, geometry: Geometry, entries: list[Entry]) -> None:
        segments = max(1, TILE_ELEMENTS // geometry.columns)  # R
        own = {**own_columns(entries), **sums_of(entries)}
        super().__init__(geometry, entries, ROW, own, [tiles_of(geometry, entries, segments)])
        warps = max(1, min(MAX_WARPS, geometry.columns * segments // WARP_ELEMENTS))
        self._update = KernelCall(_update_kernel, self.constants(_update_kernel, R=segments), num_warps=warps)

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> None:
        self.update_by(self._update, h, grad_scale, left_out_at, micro_arguments(h))


def make_launches(members: list[Member]) -> tuple[list[Launch], list[Member]]:
    """Launches for ``members``, plain weights of the block rule, and the members that no kernel takes."""
    return launches_of(members, lambda entry: Geometry.of(entry) if entry.fits() else None, Launch)
