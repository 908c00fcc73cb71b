"""``rules.micro_batches`` for INT8 weights as a Triton kernel: that of ``int8.block_kernel`` with other moments."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foam_hf.int8.block_kernel import (
    INT8_ROW,
    Int8Launch,
    block_max,
    block_min,
    codes_and_gradient,
    floor_to_int,
    geometry_of,
    new_scales,
    one_to_two,
)
from foam_hf.int8.codes import MAX_CODE
from foam_hf.kernels.columns import number_of, row_of
from foam_hf.kernels.parts import (
    blocks_of,
    draws_of,
    kept_finite,
    program_of,
    random_bits,
    root,
    scale_of,
    segments_of,
    unfold,
)
from foam_hf.kernels.tables import Entry, launches_of
from foam_hf.rules.micro_batches import SIGNS
from foam_hf.rules.micro_batches_kernel import (
    SUMS,
    add_to_sum,
    block_sum,
    limited,
    micro_arguments,
    micro_numbers,
    residual_of,
    sums_of,
)
from foam_hf.rules.narrow_block_kernel import head_of
from foam_hf.tensors.rounding import MICRO_SHIFT
from foam_hf.tensors.step import Hyper, Member

ROW = row_of(*INT8_ROW, *SUMS)
SCALES, FIRST_ROW = number_of(ROW, "scales"), number_of(ROW, "first_row")
SUM, SQUARE, SKETCH = (number_of(ROW, name) for name in SUMS)
_SIGNS, _SHIFT = tl.constexpr(SIGNS), tl.constexpr(MICRO_SHIFT)
_MAX = tl.constexpr(MAX_CODE)


@triton.jit
def change_in_codes(
    q, g, mean, part, second, own, per_code, rho_1, eps, decay, limit, u,
    R: tl.constexpr, C: tl.constexpr, F: tl.constexpr, B: tl.constexpr, CHECKED: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """What the update adds, in codes, plus ``u``."""
    residual = g - unfold(mean, R, C, F)
    denominator = root(unfold(second, R, C, F) + residual * residual * unfold(own, R, C, F), NVIDIA) + eps
    direction = limited(unfold(part, R, C, F) + residual * rho_1, denominator, limit, NVIDIA)
    result = direction * unfold(per_code, R, C, B) + (u - decay * q.to(tl.float32))
    if CHECKED:
        result = tl.where(denominator == denominator, result, u)
    return result


@triton.jit(do_not_specialize=["step", "seed", "micro"])
def _update_kernel(
    table, owner, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho, grad_scale, left_out_at,
    micro, inv_c2_before, share_of_step, so_far, limit,
    FIELDS: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, F: tl.constexpr, B: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, NVIDIA: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not MIXED, "all tensors of a launch are at the same step")
    number, entry, tile = program_of(table, owner, FIELDS)
    Q, G, M, V, rows, n, stream = head_of(entry, tl.int8, G_DTYPE, S_DTYPE)
    S = tl.load(entry + SCALES).to(tl.pointer_type(tl.float32))
    sums = tl.load(entry + SUM).to(tl.pointer_type(tl.float32))
    square_sums = tl.load(entry + SQUARE).to(tl.pointer_type(tl.float32))
    sketches = tl.load(entry + SKETCH).to(tl.pointer_type(tl.float32))

    segment, offset, mask = segments_of(tile, rows, n, R, C, EVEN, ALIGNED)
    m_offset, m_mask, share = blocks_of(segment, rows, n, C, F, EVEN)
    s_offset, s_mask, _ = blocks_of(segment, rows, n, C, B, EVEN)
    draw = draws_of(segment, n, tl.load(entry + FIRST_ROW), 0, n, C, EVEN)
    u_draw = draw + (micro.to(tl.int64) << _SHIFT)
    Q, G, S = Q + offset, G + offset, S + s_offset
    if ALIGNED:
        # The compiler cannot see through a table of addresses that sixteen columns are one access.
        Q, G = tl.multiple_of(Q, (1, 16)), tl.multiple_of(G, (1, 16))

    q, g = codes_and_gradient(Q, G, mask, grad_scale, number, 0)
    m = tl.load(M + m_offset, mask=m_mask, other=0.0).to(tl.float32)
    v = tl.load(V + m_offset, mask=m_mask, other=0.0).to(tl.float32)
    s = tl.load(S, mask=s_mask, other=1.0)
    signs = random_bits(seed, step, 4 * stream + _SIGNS, draw, R, C)
    mean, residual, squares = residual_of(g, share, mask, R, C, F)
    sketch = block_sum(tl.where((signs & 1) == 1, residual, -residual), R, C, F)
    finite = m_mask
    if CHECKED:
        checked = squares + mean * mean
        if SCALED > 0:
            checked = checked * scale_of(grad_scale, number, SCALED)
        finite = kept_finite(checked, left_out_at + stream, step, m_mask)
    p = add_to_sum(sums + m_offset, mean, finite, micro, m_mask, CHECKED)
    all_squares = add_to_sum(square_sums + m_offset, squares, finite, micro, m_mask, CHECKED)
    add_to_sum(sketches + m_offset, sketch, finite, micro, m_mask, CHECKED)
    if SCALED > 0:
        c = scale_of(grad_scale, number, SCALED)
        g, mean, squares, p, all_squares = g * c, mean * c, squares * c * c, p * c, all_squares * c * c
    part, second, own = micro_numbers(
        m, v, mean, squares, p, all_squares, inv_c1, inv_c2, inv_c2_before, b1, a1, b2, a2, rho, share_of_step, so_far,
    )  # fmt: skip
    if CHECKED:
        second = tl.where(finite, second, float("nan"))  # so that each element of a block can see that it is kept

    per_code, rho_1 = -step_size / s, rho * inv_c1
    u = one_to_two(seed, step, 4 * stream, u_draw, R, C, NVIDIA) if STOCHASTIC else 1.5
    x = change_in_codes(
        q, g, mean, part, second, own, per_code, rho_1, eps, decay, limit, u, R, C, F, B, CHECKED, NVIDIA
    )
    new = q + floor_to_int(x, NVIDIA) - 1
    peak, low = block_max(new, R, C, B), block_min(new, R, C, B)
    peak = tl.where(low < -_MAX, _MAX + 1, tl.maximum(peak, -low))  # the least int32 has no negative
    leaves = s_mask & ((peak > _MAX) | (peak < 64))
    if tl.max(tl.ravel(leaves.to(tl.int32)), 0) > 0:
        # Few blocks come here, see int8.block_kernel.
        q, g = codes_and_gradient(Q, G, mask, grad_scale, number, SCALED)
        d = change_in_codes(
            q, g, mean, part, second, own, per_code, rho_1, eps, decay, limit, 0.0, R, C, F, B, CHECKED, NVIDIA
        )
        wide = unfold(s, R, C, B)
        new_s, bits = new_scales(q.to(tl.float32) * wide + d * wide, s, peak, R, C, B)
        tl.store(S, new_s, mask=s_mask)
        new = new << unfold(bits, R, C, B)
        new = tl.minimum(tl.maximum(new, -_MAX), _MAX)  # the compiler may have rounded another last bit than above
        x = (q.to(tl.float32) + d) * unfold(s / new_s, R, C, B)
        rounded = tl.where(x == x, tl.minimum(tl.maximum(floor_to_int(x + (u - 1.0), NVIDIA), -_MAX), _MAX), 0)
        tl.store(Q, tl.where(unfold(peak > _MAX, R, C, B), rounded, new).to(tl.int8), mask=mask)
    else:
        tl.store(Q, new.to(tl.int8), mask=mask)


class MicroInt8Launch(Int8Launch):
    """The same of one of a step's micro-batches."""

    kernel, row = _update_kernel, ROW

    def own(self, entries: list[Entry]) -> dict[str, list[int]]:
        return {**super().own(entries), **sums_of(entries)}

    def options(self) -> dict[str, int]:
        return {}

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> None:
        arguments = {"decay": float(h.lr * h.weight_decay), **micro_arguments(h)}  # what a code loses
        self.update_weights(h, grad_scale, left_out_at, arguments)


def make_launches(members: list[Member]) -> tuple[list[MicroInt8Launch], list[Member]]:
    """Launches for ``members``, INT8 weights of the block rule, and the members that no kernel takes."""
    return launches_of(members, geometry_of, MicroInt8Launch)
