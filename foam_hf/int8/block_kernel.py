"""The block rule and AdamW for INT8 weights as a Triton kernel: the arithmetic of ``int8.rows``, fused.

It is the kernel of ``rules.block_kernel`` with codes and scales in place of a weight: one launch for all tensors of a
group that share dtypes and geometry. A tile whose codes all stay inside their range, as nearly every one does, never
computes a scale. The factored rule has no kernel for INT8 weights: they are updated plainly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from foam_hf.int8.codes import MAX_CODE, MIN_SCALE
from foam_hf.int8.dequantize_kernel import fits_kernels
from foam_hf.kernels.calls import KernelCall
from foam_hf.kernels.columns import STREAM, number_of, row_of
from foam_hf.kernels.parts import (
    block_moments,
    blocks_of,
    draws_of,
    kept_finite,
    own_numbers,
    philox,
    program_of,
    ratio,
    root,
    scale_of,
    segments_of,
    store_moments,
    unfold,
)
from foam_hf.kernels.tables import (
    MAX_WARPS,
    AddressTable,
    Entry,
    Geometry,
    launches_of,
    tiles_of,
)
from foam_hf.rules.narrow_block_kernel import HEAD, head_of
from foam_hf.tensors.step import Hyper, Member

if TYPE_CHECKING:
    from foam_hf.int8.weight import Int8Weight

# Elements of a program and of a warp of it, and registers of a thread.
TILE, WARP, REGISTERS = 4096, 1024, 128
# ``rows`` are all rows of a tensor, whose weight is the codes; a shard begins at ``first_row`` of a whole one.
INT8_ROW = (*HEAD, "scales", "first_row")
ROW = row_of(*INT8_ROW)
SCALES, FIRST_ROW = number_of(ROW, "scales"), number_of(ROW, "first_row")
_MAX = tl.constexpr(MAX_CODE)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_MAGIC_BITS = tl.constexpr(0x4B400000)  # of the float32 1.5 * 2**23: a smaller number added to it loses its fraction


@triton.jit
def one_to_two(seed, step, stream, draw, R: tl.constexpr, C: tl.constexpr, NVIDIA: tl.constexpr):
    """1 plus the numbers of ``int8.rows.uniform`` for (R, C) elements; ``draw`` (R, 1) is each segment's first."""
    a, b, c, d = philox(seed, draw + tl.arange(0, C // 8)[None, :], step // 2, stream)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (R, C // 2)) ^ (0 - step % 2).to(tl.uint32)
    bits = tl.reshape(tl.join(words, (words << 16) | (words >> 16)), (R, C))
    if NVIDIA:  # (bits & a) | b in one instruction
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; mov.b32 a, 0x7FFFFE; lop3.b32 $0, $1, a, 0x3F800001, 0xEA; }",
            "=f,r", [bits], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return ((bits & 0x7FFFFE) | 0x3F800001).to(tl.float32, bitcast=True)


@triton.jit
def floor_to_int(x, NVIDIA: tl.constexpr):
    """floor(x) as int32; of what is beyond 2**22, infinite or NaN: something beyond 2**15."""
    if NVIDIA:  # one instruction, where a conversion takes as long as four
        shifted = tl.inline_asm_elementwise(
            "add.rm.f32 $0, $1, 0f4B400000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return shifted.to(tl.int32, bitcast=True) - _MAGIC_BITS
    else:
        return tl.floor(x).to(tl.int32)


@triton.jit
def block_max(x, R: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """The largest of every block of ``B`` columns: (R,) or (R, C // B), as ``unfold`` takes them."""
    if B == C:
        return tl.max(x, 1)
    else:
        return tl.max(tl.reshape(x, (R, C // B, B)), 2)


@triton.jit
def block_min(x, R: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    if B == C:
        return tl.min(x, 1)
    else:
        return tl.min(tl.reshape(x, (R, C // B, B)), 2)


@triton.jit
def new_scales(values, s, peak, R: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """Scales of blocks with the new ``values`` and largest code ``peak``, and how many bits finer the codes get."""
    bad = block_max((values != values).to(tl.int32), R, C, B)  # a maximum passes NaN by
    fresh = tl.maximum(block_max(tl.abs(values), R, C, B) / _MAX, _MIN_SCALE)
    s = tl.where(peak > _MAX, tl.where(bad > 0, float("nan"), fresh), s)
    peak = tl.minimum(peak, _MAX)
    bits = 6 - ((peak.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127)  # that bring the peak into [64, 127]
    finer = tl.where(peak > 0, s * ((127 - bits) << 23).to(tl.float32, bitcast=True), _MIN_SCALE)
    room = (peak < 64) & (finer >= _MIN_SCALE)
    return tl.where(room, finer, s), tl.where(room & (peak > 0), bits, 0)


@triton.jit
def codes_and_gradient(Q, G, mask, grad_scale, number, SCALED: tl.constexpr):
    q = tl.load(Q, mask=mask, other=0).to(tl.int32)
    g = tl.load(G, mask=mask, other=0.0).to(tl.float32)
    if SCALED > 0:
        g = g * scale_of(grad_scale, number, SCALED)
    return q, g


@triton.jit
def change_in_codes(
    q, g, mean, m, v, per_code, rho_1, rho_2, eps, decay, u,
    R: tl.constexpr, C: tl.constexpr, F: tl.constexpr, B: tl.constexpr, DECAYS: tl.constexpr, CHECKED: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """What the update adds, in codes, plus ``u``; the moments are those without bias."""
    still = u
    if F == 1:
        denominator = root(v, NVIDIA) + eps
        direction = ratio(m, denominator, NVIDIA)
    else:
        residual = g - unfold(mean, R, C, F)
        denominator = root(unfold(v, R, C, F) + residual * residual * rho_2, NVIDIA) + eps
        direction = ratio(unfold(m, R, C, F) + residual * rho_1, denominator, NVIDIA)
    if DECAYS:
        u -= decay * q.to(tl.float32)
    result = direction * unfold(per_code, R, C, B) + u
    if CHECKED:
        result = tl.where(denominator == denominator, result, still)
    return result


@triton.jit(do_not_specialize=["step", "seed"])
def _update_kernel(
    table, owner, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho, grad_scale, left_out_at,
    FIELDS: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, F: tl.constexpr, B: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, NVIDIA: tl.constexpr,
    DECAYS: tl.constexpr, STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    number, entry, tile = program_of(table, owner, FIELDS)
    step, inv_c1, inv_c2 = own_numbers(entry, step, inv_c1, inv_c2, MIXED)
    Q, G, M, V, rows, n, stream = head_of(entry, tl.int8, G_DTYPE, S_DTYPE)
    S = tl.load(entry + SCALES).to(tl.pointer_type(tl.float32))

    segment, offset, mask = segments_of(tile, rows, n, R, C, EVEN, ALIGNED)
    m_offset, m_mask, share = blocks_of(segment, rows, n, C, F, EVEN)
    s_offset, s_mask, _ = blocks_of(segment, rows, n, C, B, EVEN)
    first_row = tl.load(entry + FIRST_ROW) if STOCHASTIC else 0  # random bits belong to places in the whole tensor
    draw = draws_of(segment, n, first_row, 0, n, C, EVEN)
    Q, G, M, V, S = Q + offset, G + offset, M + m_offset, V + m_offset, S + s_offset
    if ALIGNED:
        # The compiler cannot see through a table of addresses that sixteen columns are one access.
        Q, G = tl.multiple_of(Q, (1, 16)), tl.multiple_of(G, (1, 16))
        if EVEN and C // F >= 8:
            M, V = tl.multiple_of(M, (1, 16)), tl.multiple_of(V, (1, 16))

    q, g = codes_and_gradient(Q, G, mask, grad_scale, number, SCALED)
    old_m = tl.load(M, mask=m_mask, other=0.0).to(tl.float32)
    old_v = tl.load(V, mask=m_mask, other=0.0).to(tl.float32)
    s = tl.load(S, mask=s_mask, other=1.0)
    mean, square, m, v = block_moments(g, old_m, old_v, share, b1, a1, b2, a2, R, C, F)
    if CHECKED:
        finite = kept_finite(square, left_out_at + stream, step, m_mask)
        m, v = tl.where(finite, m, old_m), tl.where(finite, v, old_v)
    store_moments(M, V, m, v, m_offset, m_mask, seed, step, stream, n, first_row, 0, n, F, S_DTYPE, STOCHASTIC)

    per_code = -step_size / s
    m, v = m * inv_c1, v * inv_c2
    if CHECKED:
        v = tl.where(finite, v, float("nan"))  # so that each element of a block can see that it is kept
    rho_1, rho_2 = rho * inv_c1, rho * rho * inv_c2
    u = one_to_two(seed, step, 4 * stream, draw, R, C, NVIDIA) if STOCHASTIC else 1.5
    x = change_in_codes(q, g, mean, m, v, per_code, rho_1, rho_2, eps, decay, u, R, C, F, B, DECAYS, CHECKED, NVIDIA)
    new = q + floor_to_int(x, NVIDIA) - 1
    peak, low = block_max(new, R, C, B), block_min(new, R, C, B)
    peak = tl.where(low < -_MAX, _MAX + 1, tl.maximum(peak, -low))  # the least int32 has no negative
    leaves = s_mask & ((peak > _MAX) | (peak < 64))
    if tl.max(tl.ravel(leaves.to(tl.int32)), 0) > 0:
        # Few blocks come here. Values are loaded and computed again, twice, so that none occupies registers before.
        q, g = codes_and_gradient(Q, G, mask, grad_scale, number, SCALED)
        d = change_in_codes(
            q, g, mean, m, v, per_code, rho_1, rho_2, eps, decay, 0.0, R, C, F, B, DECAYS, CHECKED, NVIDIA
        )
        wide = unfold(s, R, C, B)
        new_s, bits = new_scales(q.to(tl.float32) * wide + d * wide, s, peak, R, C, B)
        tl.store(S, new_s, mask=s_mask)
        q, g = codes_and_gradient(Q, G, mask, grad_scale, number, SCALED)
        stream = tl.load(entry + STREAM).to(tl.int32)
        u = one_to_two(seed, step, 4 * stream, draw, R, C, NVIDIA) if STOCHASTIC else 1.5
        x = change_in_codes(
            q, g, mean, m, v, per_code, rho_1, rho_2, eps, decay, u, R, C, F, B, DECAYS, CHECKED, NVIDIA
        )
        new = (q + floor_to_int(x, NVIDIA) - 1) << unfold(bits, R, C, B)
        new = tl.minimum(tl.maximum(new, -_MAX), _MAX)  # the compiler may have rounded another last bit than above
        d = change_in_codes(
            q, g, mean, m, v, per_code, rho_1, rho_2, eps, decay, 0.0, R, C, F, B, DECAYS, CHECKED, NVIDIA
        )
        x = (q.to(tl.float32) + d) * unfold(s / new_s, R, C, B)
        rounded = tl.where(x == x, tl.minimum(tl.maximum(floor_to_int(x + (u - 1.0), NVIDIA), -_MAX), _MAX), 0)
        tl.store(Q, tl.where(unfold(peak > _MAX, R, C, B), rounded, new).to(tl.int8), mask=mask)
    else:
        tl.store(Q, new.to(tl.int8), mask=mask)


@dataclass(frozen=True)
class Int8Geometry(Geometry):
    """What a launch is compiled for; blocks of moments and of scales are both whole in a segment."""

    block_size: int

    @classmethod
    def of(cls, entry: Entry) -> Int8Geometry:
        plain, block_size = Geometry.of(entry), int8_of(entry).block_size
        columns = max(plain.columns, block_size)
        even = entry.columns % columns == 0
        return cls(**{**vars(plain), "columns": columns, "even": even, "block_size": block_size})


class Int8Launch(AddressTable):
    """The device tables of a launch for INT8 weights, and the launch itself.

    That of micro-batches has another ``kernel``, other columns (``row``) with values of its ``own``.
    """

    kernel: ClassVar[Any] = _update_kernel
    row: ClassVar[numpy.dtype] = ROW

    def __init__(self, geometry: Int8Geometry, entries: list[Entry]) -> None:
        segments = max(1, TILE // geometry.columns)  # R
        super().__init__(geometry, entries, self.row, self.own(entries), [tiles_of(geometry, entries, segments)])
        self._weights = [int8_of(entry) for entry in entries]
        constants = self.constants(self.kernel, R=segments, B=geometry.block_size)
        warps = max(1, min(MAX_WARPS, geometry.columns * segments // WARP))
        self._update = KernelCall(self.kernel, constants, num_warps=warps, **self.options())

    def own(self, entries: list[Entry]) -> dict[str, list[int]]:
        """The columns of ``row`` that not every table has."""
        return {
            "exp_avg_sq": [entry.moments[1].data_ptr() for entry in entries],
            "rows": [entry.weight.numel() // entry.columns for entry in entries],
            "scales": [int8_of(entry).scales.data_ptr() for entry in entries],
            "first_row": [entry.place.first_row for entry in entries],
        }

    def options(self) -> dict[str, int]:
        """Options of Triton's for the kernel, beside the number of warps."""
        # Only NVIDIA's backend knows this limit. Wide segments, and the much state of level 0, need more registers.
        g = self.geometry
        light = g.width > 1 and g.aligned and g.columns <= TILE
        return {"maxnreg": REGISTERS} if self.nvidia and light and g.state == torch.float32 else {}

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> None:
        lost = {"decay": float(h.lr * h.weight_decay)}  # what a code loses, not what it keeps
        self.update_weights(h, grad_scale, left_out_at, lost, {"DECAYS": h.weight_decay != 0})

    def update_weights(
        self, h: Hyper, grad_scale: Tensor | None, left_out_at: Tensor | None, *more: Mapping[str, Any]
    ) -> None:
        """``update_by`` with ``more`` arguments and constants, which the weights hear of."""
        self.update_by(self._update, h, grad_scale, left_out_at, *more)
        for weight in self._weights:
            weight.written()


def make_launches(members: list[Member]) -> tuple[list[Int8Launch], list[Member]]:
    """Launches for ``members``, INT8 weights of the block rule, and the members that no kernel takes."""
    return launches_of(members, geometry_of, Int8Launch)


def geometry_of(entry: Entry) -> Int8Geometry | None:
    taken = fits_kernels(int8_of(entry).block_size) and entry.fits()
    return Int8Geometry.of(entry) if taken else None


def int8_of(entry: Entry) -> Int8Weight:
    return cast("Int8Weight", entry.weight)
