"""What the Triton kernels are made of: random bits, storing with rounding, folded values, the check of gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from foam_hf.tensors.rounding import PHILOX_ROUNDS

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def philox(seed, draw, step, stream):
    """The four words of each 64-bit ``draw``, as ``rounding.philox_4x32`` gives them."""
    zero = draw * 0
    low, high = draw.to(tl.uint32), (draw >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, (zero + step).to(tl.uint32), (zero + stream).to(tl.uint32), _ROUNDS)


@triton.jit
def random_bits(seed, step, stream, draw, R: tl.constexpr, C: tl.constexpr):
    """16 random bits for each of (R, C) elements; ``draw`` (R, 1) is the first of each segment."""
    a, b, c, d = philox(seed, draw + tl.arange(0, C // 8)[None, :], step, stream)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (R, C // 2))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (R, C))


@triton.jit
def random_bits_at(seed, step, stream, row, column, n):
    """The same bits, a whole draw for each element: for the few elements of a folded moment with rows of ``n``."""
    a, b, c, d = philox(seed, row.to(tl.int64) * tl.cdiv(n, 8) + column // 8, step, stream)
    lane = column % 8
    word = tl.where(lane < 4, tl.where(lane < 2, a, b), tl.where(lane < 6, c, d))
    return tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def store(pointer, x, bits, mask, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Store float32 ``x``; into bfloat16 rounded by ``bits`` as ``rounding.stochastic_round_`` does, or to nearest."""
    if DTYPE is tl.bfloat16:
        pattern = x.to(tl.uint32, bitcast=True)
        if not STOCHASTIC:  # by hand, as Triton's interpreter truncates
            bits = 0x7FFF + ((pattern >> 16) & 1)
        high = tl.where(x == x, ((pattern + bits) >> 16).to(tl.uint16), 0x7FC0)
        tl.store(pointer, high.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, x.to(DTYPE), mask=mask)


@triton.jit
def unfold(x, R: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """Block values, (R,) or (R, C // F), over their columns."""
    if F == C:
        return x[:, None]
    elif F == 1:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[:, :, None], (R, C // F, F)), (R, C))


@triton.jit
def ratio(x, y, NVIDIA: tl.constexpr):
    """``x / y`` for positive normal ``y``; without what a division does for others, which costs most of it."""
    if NVIDIA:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
        return x * inverse
    else:
        return x / y


@triton.jit
def root(x, NVIDIA: tl.constexpr):
    """The square root; of what is no normal number, below 1.2e-38, zero on NVIDIA's, where it is one instruction."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt(x)


@triton.jit
def scale_of(grad_scale, number, SCALED: tl.constexpr):
    """What to multiply a gradient by: there is one scale for all tensors of a launch, or with 2 one for each."""
    return 1.0 / tl.load(grad_scale + number if SCALED == 2 else grad_scale)


@triton.jit
def lerp(x, y, weight, rest):
    """From ``x`` to ``y`` by ``weight``, as torch.lerp does; ``rest`` is 1 - weight. As one difference, a weight of 1
    would leave zero of a ``y`` that is small beside ``x``."""
    return tl.where(weight < 0.5, x + weight * (y - x), y - (y - x) * rest)


@triton.jit
def own_numbers(entry, step, inv_c1, inv_c2, MIXED: tl.constexpr):
    """The step and the bias corrections of a tensor: those of the launch, or the last three fields of its own."""
    if MIXED:
        step = tl.load(entry).to(tl.int32)
        inv_c1 = tl.load(entry + 1).to(tl.int32).to(tl.float32, bitcast=True)
        inv_c2 = tl.load(entry + 2).to(tl.int32).to(tl.float32, bitcast=True)
    return step, inv_c1, inv_c2


@triton.jit
def kept_finite(squares, left_out_at, step, mask):
    """Where sums of squares are finite; where not ``step`` goes to ``left_out_at``, predicated off nearly always."""
    finite = squares < float("inf")  # NaN is not
    tl.store(left_out_at + finite.to(tl.int32) * 0, step, mask=mask & ~finite)
    return finite
