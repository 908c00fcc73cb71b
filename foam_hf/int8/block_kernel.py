"""INT8 weights as Triton kernels: the fused update of ``int8.rows``' arithmetic, and dequantization.

The update is that of ``rules.block_kernel`` with codes and scales for a weight: one launch for all tensors of a
group that share dtypes and geometry. A tile whose codes all stay inside their range, as nearly every one does, never
computes a scale. The other rules have no kernel for INT8 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from foam_hf.int8.codes import MAX_CODE, MIN_SCALE
from foam_hf.int8.weight import Int8Weight
from foam_hf.kernels.parts import (
    kept_finite,
    lerp,
    own_numbers,
    philox,
    random_bits_at,
    ratio,
    root,
    scale_of,
    store,
    unfold,
)
from foam_hf.kernels.tables import (
    DIRECT_LAUNCH,
    MAX_COLUMNS,
    MAX_WARPS,
    TRITON_DTYPES,
    AddressTable,
    Entry,
    Geometry,
    device_of,
    launches_of,
    numbers,
    takes_ptx,
)
from foam_hf.tensors.step import Hyper, Member

# Elements of a program of the update and of a warp of it, and registers of a thread.
TILE, WARP, REGISTERS = 4096, 1024, 128
DEQUANTIZED = 2048  # elements of half a program of the dequantization, eight for each of its threads
# codes, gradient, first moment, second moment, rows, columns, stream, scales; step and bias corrections
_FIELDS = tl.constexpr(11)
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


@triton.jit(do_not_specialize=["step", "seed"])
def _update_kernel(
    table, owner, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho, grad_scale, left_out_at,
    G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, F: tl.constexpr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, DECAYS: tl.constexpr, STOCHASTIC: tl.constexpr, SCALED: tl.constexpr,
    CHECKED: tl.constexpr, MIXED: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    number = tl.load(owner + 2 * tl.program_id(0))
    tile = tl.load(owner + 2 * tl.program_id(0) + 1)
    entry = table + number.to(tl.int64) * _FIELDS
    step, inv_c1, inv_c2 = own_numbers(entry + _FIELDS - 3, step, inv_c1, inv_c2, MIXED)
    Q = tl.load(entry).to(tl.pointer_type(tl.int8))
    G = tl.load(entry + 1).to(tl.pointer_type(G_DTYPE))
    M = tl.load(entry + 2).to(tl.pointer_type(S_DTYPE))
    V = tl.load(entry + 3).to(tl.pointer_type(S_DTYPE))
    rows, n = tl.load(entry + 4).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    stream = tl.load(entry + 6).to(tl.int32)
    S = tl.load(entry + 7).to(tl.pointer_type(tl.float32))

    per_row = tl.cdiv(n, C)
    segment = tile * R + tl.arange(0, R)
    lane = tl.arange(0, C)[None, :]
    row = segment // per_row
    column = (segment - row * per_row) * C
    if EVEN:  # segments follow each other without a gap: the divisions above are not made
        inside = segment < rows * per_row
        offset = segment[:, None].to(tl.int64) * C + lane
        mask = inside[:, None]
        draw = segment[:, None].to(tl.int64) * (C // 8)
    else:
        offset = row[:, None].to(tl.int64) * n + column[:, None] + lane
        if ALIGNED:  # in units of 16 columns, so that the compiler sees that a mask never splits an access
            mask = (row[:, None] < rows) & (column[:, None] // 16 + lane // 16 < n // 16)
        else:
            mask = (row[:, None] < rows) & (column[:, None] + lane < n)
        draw = row[:, None].to(tl.int64) * tl.cdiv(n, 8) + column[:, None] // 8
    m_offset, m_mask, share = blocks_of(segment, row, column, rows, n, per_row, C, F, EVEN)
    s_offset, s_mask, _ = blocks_of(segment, row, column, rows, n, per_row, C, B, EVEN)
    Q, G, M, V, S = Q + offset, G + offset, M + m_offset, V + m_offset, S + s_offset
    if ALIGNED:
        # The compiler cannot see through a table of addresses that sixteen columns are one access.
        Q, G = tl.multiple_of(Q, (1, 16)), tl.multiple_of(G, (1, 16))
        if EVEN and C // F >= 8:
            M, V = tl.multiple_of(M, (1, 16)), tl.multiple_of(V, (1, 16))

    q, g = codes_and_gradient(Q, G, mask, grad_scale, number, SCALED)
    m = tl.load(M, mask=m_mask, other=0.0).to(tl.float32)
    v = tl.load(V, mask=m_mask, other=0.0).to(tl.float32)
    s = tl.load(S, mask=s_mask, other=1.0)
    mean, old_m, old_v = 0.0, m, v
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
    if CHECKED:
        finite = kept_finite(square, left_out_at + stream, step, m_mask)
        m, v = tl.where(finite, m, old_m), tl.where(finite, v, old_v)
    m_bits, v_bits = 0, 0
    if STOCHASTIC and S_DTYPE is tl.bfloat16:
        width = tl.cdiv(n, F)  # a moment's row
        m_row = m_offset // width
        m_bits = random_bits_at(seed, step, 4 * stream + 1, m_row, m_offset - m_row * width, width)
        v_bits = random_bits_at(seed, step, 4 * stream + 2, m_row, m_offset - m_row * width, width)
    store(M, m, m_bits, m_mask, S_DTYPE, STOCHASTIC)
    store(V, v, v_bits, m_mask, S_DTYPE, STOCHASTIC)

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
        # All again, loads included, and twice: what is needed here alone must not fill the registers there.
        q, g = codes_and_gradient(Q, G, mask, grad_scale, number, SCALED)
        d = change_in_codes(
            q, g, mean, m, v, per_code, rho_1, rho_2, eps, decay, 0.0, R, C, F, B, DECAYS, CHECKED, NVIDIA
        )
        wide = unfold(s, R, C, B)
        new_s, bits = new_scales(q.to(tl.float32) * wide + d * wide, s, peak, R, C, B)
        tl.store(S, new_s, mask=s_mask)
        q, g = codes_and_gradient(Q, G, mask, grad_scale, number, SCALED)
        stream = tl.load(entry + 6).to(tl.int32)
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


@triton.jit
def blocks_of(segment, row, column, rows, n, per_row, C: tl.constexpr, F: tl.constexpr, EVEN: tl.constexpr):
    """Where the values of blocks of ``F`` columns are, a mask, and what turns their sums into means."""
    at = segment if F == C else segment[:, None]  # one block a segment, or several
    block = tl.arange(0, C // F)[None, :]
    if EVEN:
        inside = segment < rows * per_row
        offset = at.to(tl.int64) if F == C else at.to(tl.int64) * (C // F) + block
        return offset, inside if F == C else inside[:, None], 1.0 / F
    else:
        first = row if F == C else row[:, None]
        place = column // F if F == C else column[:, None] // F + block
        offset = first.to(tl.int64) * tl.cdiv(n, F) + place
        share = 1.0 / tl.maximum(tl.minimum(n - place * F, F), 1).to(tl.float32)
        return offset, (first < rows) & (place * F < n), share


@triton.jit
def _dequantize_kernel(
    codes, scales, out, numel, B: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr
):
    # Two stretches: a thread reads eight codes of each, as many as it can write at a time, and both before it writes.
    first = tl.program_id(0).to(tl.int64) * (2 * C)
    q, s = codes_and_scales(codes, scales, first, numel, B, C)
    next_q, next_s = codes_and_scales(codes, scales, first + C, numel, B, C)
    store_values(out, first, numel, q, s, B, C, DTYPE, NVIDIA)
    store_values(out, first + C, numel, next_q, next_s, B, C, DTYPE, NVIDIA)


@triton.jit
def codes_and_scales(codes, scales, start, numel, B: tl.constexpr, C: tl.constexpr):
    at, block = start + tl.arange(0, C), start // B + tl.arange(0, C // B)
    return tl.load(codes + at, mask=at < numel, other=0), tl.load(scales + block, mask=block * B < numel, other=0.0)


@triton.jit
def store_values(out, start, numel, q, s, B: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr):
    at = start + tl.arange(0, C)
    x = q.to(tl.float32) * tl.reshape(tl.broadcast_to(s[:, None], (C // B, B)), (C,))
    if NVIDIA:
        tl.store(out + at, x.to(DTYPE), mask=at < numel)
    else:
        store(out + at, x, 0, at < numel, DTYPE, False)


_compiled: dict[Any, Any] = {}


def dequantize_into(out: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """``out`` (of any dtype a weight has) becomes ``codes * scales``; all are contiguous.

    False, and nothing is done, if no kernel takes blocks of this size.
    """
    numel = codes.numel()
    block = numel // scales.numel()
    if not fits_kernels(block):
        return False
    columns = max(DEQUANTIZED, block)
    grid = -(-numel // (2 * columns)), 1, 1
    device = codes.device
    constants = block, columns, TRITON_DTYPES[out.dtype], takes_ptx(device)
    # As in AddressTable.launch: what Triton compiled is called directly wherever it would find the same again.
    places = codes.data_ptr(), scales.data_ptr(), out.data_ptr()
    whole = numel % 16 == 0 and numel < 2**31 and (places[0] | places[1] | places[2]) % 16 == 0
    key = device, *constants
    with device_of(device):
        if whole and key in _compiled:
            _compiled[key][grid](*places, numel, *constants)  # of a tensor it would ask the driver where that is
            return True
        compiled = _dequantize_kernel[grid](codes, scales, out, numel, *constants, num_warps=8)
    if DIRECT_LAUNCH and whole and compiled is not None:  # None from Triton's interpreter
        _compiled[key] = compiled
    return True


def fits_kernels(block_size: int) -> bool:
    """Whether the kernels take blocks of this many columns."""
    return block_size & (block_size - 1) == 0 and block_size <= MAX_COLUMNS


@dataclass(frozen=True)
class Int8Geometry(Geometry):
    """What a launch is compiled for; blocks of moments and of scales are both whole in a segment."""

    block_size: int

    @classmethod
    def of(cls, entry: Entry) -> Int8Geometry:
        plain, block_size = Geometry.of(entry), cast(Int8Weight, entry.weight).block_size
        columns = max(plain.columns, block_size)
        even = entry.columns % columns == 0
        return cls(**{**vars(plain), "columns": columns, "even": even, "block_size": block_size})


class Int8Launch(AddressTable):
    """The device tables of a launch for INT8 weights, and the launch itself."""

    def __init__(self, geometry: Int8Geometry, entries: list[Entry]) -> None:
        self.segments = max(1, TILE // geometry.columns)  # R
        table = numpy.empty((len(entries), _FIELDS.value), dtype=numpy.int64)
        tiles = []
        for i, entry in enumerate(entries):
            rows, n = entry.weight.numel() // entry.columns, entry.columns
            scales = cast(Int8Weight, entry.weight).scales.data_ptr()
            table[i] = (*(x.data_ptr() for x in entry.tensors), rows, n, entry.stream, scales, 0, 0, 0)
            tiles.append(-(-rows * -(-n // geometry.columns) // self.segments))
        super().__init__(geometry, entries, table, [tiles])
        # A limit that only NVIDIA's backend knows; what has wide segments or much state needs more than it.
        light = geometry.width > 1 and geometry.aligned and geometry.columns <= TILE
        self.options = {"maxnreg": REGISTERS} if self.nvidia and light and geometry.state == torch.float32 else {}

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> None:
        g = cast(Int8Geometry, self.geometry)
        self.follow_steps(h)
        step_size, _, *others = numbers(h)
        scale, scaled = self.scale(grad_scale)
        with device_of(g.device):
            self.launch(
                _update_kernel,
                len(self.owners[0]),
                (
                    *(self.table, self.owners[0], h.step, h.seed, step_size, float(h.lr * h.weight_decay), *others),
                    *(scale, self.left_out_at(left_out_at)),
                ),
                (
                    *(TRITON_DTYPES[g.grad], TRITON_DTYPES[g.state], g.width, g.block_size, self.segments, g.columns),
                    *(g.even, g.aligned, h.weight_decay != 0, h.stochastic, scaled),
                    *(left_out_at is not None, self.mixed, self.nvidia),
                ),
                num_warps=max(1, min(MAX_WARPS, g.columns * self.segments // WARP)),
                **self.options,
            )


def make_launches(members: list[Member]) -> tuple[list[Int8Launch], list[Member]]:
    """Launches for ``members``, INT8 weights of the block rule, and the members that no kernel takes."""
    return launches_of(members, _geometry_of, Int8Launch)


def _geometry_of(entry: Entry) -> Int8Geometry | None:
    taken = fits_kernels(cast(Int8Weight, entry.weight).block_size) and entry.fits()
    return Int8Geometry.of(entry) if taken else None
