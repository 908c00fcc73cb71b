"""What the Triton kernels are made of: a program's tile, moments of blocks, random bits, storing with rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from foam_hf.kernels.columns import INV_C1, INV_C2, STEP
from foam_hf.tensors.rounding import PHILOX_A, PHILOX_B, PHILOX_KEY_A, PHILOX_KEY_B, PHILOX_ROUNDS

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_A, _B, _KEY_A, _KEY_B = (tl.constexpr(x) for x in (PHILOX_A, PHILOX_B, PHILOX_KEY_A, PHILOX_KEY_B))


@triton.jit
def philox(seed, draw, step, stream):
    """The four words of each 64-bit ``draw``, as ``rounding.philox_4x32`` gives them.

    Both halves of a product come from one instruction, and what all draws share is computed once.
    """
    c0, c1 = draw.to(tl.uint32), (draw >> 32).to(tl.uint32)
    c2, c3 = step.to(tl.uint32), stream.to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed.to(tl.int64) >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        a, b = c0.to(tl.uint64) * _A, c2.to(tl.uint64) * _B
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0, k1 = k0 + _KEY_A, k1 + _KEY_B
    return c0, c1, c2, c3


@triton.jit
def random_words(seed, step, stream, draw):
    """The four words of each draw of eight elements, in order: (..., 2, 2)."""
    a, b, c, d = philox(seed, draw, step, stream)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def random_bits(seed, step, stream, draw, R: tl.constexpr, C: tl.constexpr):
    """16 random bits for each of (R, C) elements; ``draw`` (R, 1) is the first of each segment."""
    words = tl.reshape(random_words(seed, step, stream, draw + tl.arange(0, C // 8)[None, :]), (R, C // 2))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (R, C))


@triton.jit
def random_bits_at(seed, step, stream, row, column, n, first=0):
    """The same bits, a whole draw for each element: for the few elements of a folded moment with rows of ``n``.

    ``first`` is the number of the tensor's first draw.
    """
    a, b, c, d = philox(seed, row.to(tl.int64) * tl.cdiv(n, 8) + column // 8 + first, step, stream)
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
def float32_of(x, NVIDIA: tl.constexpr):
    """float32 of ``x``. Of two bfloat16 in two instructions, where a conversion takes three."""
    if NVIDIA and x.dtype is tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def store_by_words(pointer, x, words, mask, NVIDIA: tl.constexpr):
    """Store (..., 8) float32 as bfloat16, rounded by the ``random_words`` of each eight as ``store`` does.

    On NVIDIA's GPUs two adjacent elements at a time: a sum with the lower half of a word is one instruction, as is one
    with the upper half. Where one of two is NaN, the other is cut off instead of rounded. The two are split apart
    before, because nobody promises which elements a packed instruction would get.
    """
    if NVIDIA:
        words = tl.reshape(words, (x.shape[0], x.shape[1] // 2))
        first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        pair = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, word; .reg .pred nan;
            setp.nan.f32 nan, $1, $2; selp.b32 word, 0, $3, nan;
            dp2a.lo.u32.u32 low, word, 1, $1; shr.u32 high, word, 16; add.u32 high, high, $2;
            prmt.b32 $0, low, high, 0x7632;
            }""",
            "=r,r,r,r", [first, second, words], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
        out = tl.reshape(tl.join((pair & 0xFFFF).to(tl.uint16), (pair >> 16).to(tl.uint16)), x.shape)
        tl.store(pointer, out.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), x.shape)
        store(pointer, x, bits, mask, tl.bfloat16, True)


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
def inverse(x, NVIDIA: tl.constexpr):
    """``1 / x`` for positive normal ``x``. A division spends most of its time on the cases that are left out here."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def ratio(x, y, NVIDIA: tl.constexpr):
    """``x / y`` for positive normal ``y``."""
    if NVIDIA:
        return x * inverse(y, NVIDIA)
    else:
        return x / y


@triton.jit
def within(x, limit, NVIDIA: tl.constexpr):
    """``x``, at least ``-limit`` and at most ``limit``; NaN if one of them is."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 low; neg.f32 low, $2; min.NaN.f32 $0, $1, $2; max.NaN.f32 $0, $0, low; }",
            "=&f,f,f", [x, limit], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def root(x, NVIDIA: tl.constexpr):
    """The square root. On NVIDIA's GPUs it is one instruction, which gives 0 for numbers below 1.2e-38."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt(x)


@triton.jit
def after_loads(x, y, zero, NVIDIA: tl.constexpr):
    """``x``, once ``y`` has been loaded too; both (..., V) of 16 bytes. ``zero`` is 0, which the compiler cannot know.

    NVIDIA's assembler puts off loads until their values are needed, to save registers, and then a program waits for
    memory twice. So x is made to need y: x + 0 * y, an instruction for 16 bytes.
    """
    if NVIDIA and x.dtype.primitive_bitwidth == 16 and y.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "mad.lo.u32 $0, $8, $12, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [x, y, zero], dtype=x.dtype, is_pure=True, pack=8,
        )  # fmt: skip
    elif NVIDIA and x.dtype.primitive_bitwidth == 32 and y.dtype.primitive_bitwidth == 32:
        return tl.inline_asm_elementwise(
            "mad.lo.u32 $0, $8, $12, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r", [x, y, zero], dtype=x.dtype, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return x


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
def add_pairs(a, b, c, d):
    """What ``tl.reduce`` adds two tensors up by, together."""
    return a + c, b + d


@triton.jit
def program_of(table, owner, FIELDS: tl.constexpr):
    """The number of a program's tensor, where its row of the table begins, and which of its programs it is."""
    number = tl.load(owner + 2 * tl.program_id(0))
    return number, table + number.to(tl.int64) * FIELDS, tl.load(owner + 2 * tl.program_id(0) + 1)


@triton.jit
def own_numbers(entry, step, inv_c1, inv_c2, MIXED: tl.constexpr):
    """The step and the bias corrections of a tensor: those of the launch, or where they differ those of its row."""
    if MIXED:
        step = tl.load(entry + STEP).to(tl.int32)
        inv_c1 = tl.load(entry + INV_C1).to(tl.int32).to(tl.float32, bitcast=True)
        inv_c2 = tl.load(entry + INV_C2).to(tl.int32).to(tl.float32, bitcast=True)
    return step, inv_c1, inv_c2


@triton.jit
def segments_of(tile, rows, n, R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    """The ``R`` segments of a tile, (R,); where their elements are, (R, C), and which of them there are.

    With ``EVEN``, segments follow each other without a gap: no row and column need be known, no division is made.
    """
    per_row = tl.cdiv(n, C)
    segment = tile * R + tl.arange(0, R)
    lane = tl.arange(0, C)[None, :]
    if EVEN:
        offset = segment[:, None].to(tl.int64) * C + lane
        mask = (segment < rows * per_row)[:, None]
    else:
        row = segment // per_row
        column = (segment - row * per_row) * C
        offset = row[:, None].to(tl.int64) * n + column[:, None] + lane
        if ALIGNED:  # in units of 16 columns, so that the compiler sees that a mask never splits an access
            mask = (row[:, None] < rows) & (column[:, None] // 16 + lane // 16 < n // 16)
        else:
            mask = (row[:, None] < rows) & (column[:, None] + lane < n)
    return segment, offset, mask


@triton.jit
def blocks_of(segment, rows, n, C: tl.constexpr, F: tl.constexpr, EVEN: tl.constexpr):
    """Where the values of the segments' blocks of ``F`` columns are, a mask, and what turns their sums into means."""
    per_row = tl.cdiv(n, C)
    block = tl.arange(0, C // F)[None, :]
    if EVEN:
        inside = segment < rows * per_row
        offset = segment.to(tl.int64) if F == C else segment[:, None].to(tl.int64) * (C // F) + block
        mask = inside if F == C else inside[:, None]
        share = 1.0 / F
    else:
        row = segment // per_row
        place = segment - row * per_row  # the number of a block in its row: of one a segment, or of several
        if F != C:
            row, place = row[:, None], place[:, None] * (C // F) + block
        offset = row.to(tl.int64) * tl.cdiv(n, F) + place
        mask = (row < rows) & (place * F < n)
        share = 1.0 / tl.maximum(tl.minimum(n - place * F, F), 1).to(tl.float32)
    return offset, mask, share


@triton.jit
def draws_of(segment, n, first_row, first_column, whole_n, C: tl.constexpr, EVEN: tl.constexpr):
    """The first random draw of each segment, (R, 1), of a tensor that begins there in a whole one."""
    draws = tl.cdiv(whole_n, 8)
    first = first_row * draws + first_column // 8
    if EVEN:
        draw = first + segment[:, None].to(tl.int64) * (C // 8)
    else:
        row = segment // tl.cdiv(n, C)
        column = (segment - row * tl.cdiv(n, C)) * C
        draw = first + row[:, None].to(tl.int64) * draws + column[:, None] // 8
    return draw


@triton.jit
def block_moments(g, m, v, share, b1, a1, b2, a2, R: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """Block means of the gradient and of its square, and the moments of the block rule that follow ``m`` and ``v``."""
    if F == 1:
        mean, square = g, g * g
        m = lerp(m, g, a1, b1)
        v = tl.fma(v, b2, a2 * g * g)  # explicit: else the compiler may fuse each variant in another way
    else:
        if F == C:
            mean, square = tl.sum(g, 1) * share, tl.sum(g * g, 1) * share
        else:
            parts = tl.reshape(g, (R, C // F, F))
            mean, square = tl.sum(parts, 2) * share, tl.sum(parts * parts, 2) * share
        m, v = lerp(m, mean, a1, b1), lerp(v, square, a2, b2)
    return mean, square, m, v


@triton.jit
def store_moments(
    M, V, m, v, offset, mask, seed, step, stream, n, first_row, first_column, whole_n,
    F: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Store both moments at ``offset`` behind where those of the tensor begin, as ``blocks_of`` gives it."""
    m_bits, v_bits = 0, 0
    if STOCHASTIC and DTYPE is tl.bfloat16:
        width, whole_width = tl.cdiv(n, F), tl.cdiv(whole_n, F)  # a moment's row
        row = offset // width
        column = offset - row * width + first_column // F
        m_bits = random_bits_at(seed, step, 4 * stream + 1, row + first_row, column, whole_width)
        v_bits = random_bits_at(seed, step, 4 * stream + 2, row + first_row, column, whole_width)
    store(M, m, m_bits, mask, DTYPE, STOCHASTIC)
    store(V, v, v_bits, mask, DTYPE, STOCHASTIC)


@triton.jit
def kept_finite(squares, left_out_at, step, mask):
    """Where sums of squares are finite; where not ``step`` goes to ``left_out_at``, predicated off nearly always."""
    finite = squares < float("inf")  # NaN is not
    tl.store(left_out_at + finite.to(tl.int32) * 0, step, mask=mask & ~finite)
    return finite
