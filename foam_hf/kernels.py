"""The rules of ``update`` as Triton kernels: many tensors in one launch, one pass over memory, no temporaries.

A launch updates all tensors of a param group that share dtypes and geometry. A table in device memory holds their
addresses and sizes; a second one says which tensor a program works on. Both are kept between steps: gradients that
moved get new addresses in the first, any other change gets new tables. Learning rate, step count and bias corrections
are plain arguments, so they never recompile, and nothing is read back from the device.

A program works on a tile of ``R`` segments of ``C`` adjacent columns; ``C`` holds whole blocks of ``F`` columns, so
every mean is inside a tile. Plain parameters are the block rule at ``F = 1``, where the residual is zero.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from foam_hf.folding import Level, block_width
from foam_hf.int8_weights import Int8Weight
from foam_hf.places import Place, local
from foam_hf.rounding import PHILOX_ROUNDS
from foam_hf.update import Hyper, Member, moment_names

if TYPE_CHECKING:
    from foam_hf.factored_kernels import FactoredLaunch

KERNEL_RULES = ("block", "factored")
MAX_COLUMNS = 32768  # a tile of more columns would not fit the registers of a program
TILE_ELEMENTS, WARP_ELEMENTS = 2048, 512
MAX_WARPS = 16 if torch.version.hip else 32  # of a program, 1024 threads: on AMD a warp has 64
# Since then a compiled kernel takes every argument of its function, the constants too.
DIRECT_LAUNCH = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
# One row of the table: weight, gradient, first moment, second moment, rows, columns, stream; and where a shard's first
# row and column are in the whole tensor, and the columns of that.
_FIELDS = 10
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
def kept_finite(squares, told, step, mask):
    """Where sums of squares are finite; where not, ``step`` is stored at ``told``: predicated off nearly always."""
    finite = squares < float("inf")  # NaN is not
    tl.store(told + finite.to(tl.int32) * 0, step, mask=mask & ~finite)
    return finite


@triton.jit(do_not_specialize=["step", "seed"])
def _update_kernel(
    table, owner, step, seed, step_size, decay, b1, b2, inv_c1, inv_c2, eps, rho, grad_scale, told,
    FIELDS: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, CHECKED: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    number = tl.load(owner + 2 * tl.program_id(0))
    tile = tl.load(owner + 2 * tl.program_id(0) + 1)
    entry = table + number.to(tl.int64) * FIELDS
    w_address, g_address = tl.load(entry), tl.load(entry + 1)
    m_address, v_address = tl.load(entry + 2), tl.load(entry + 3)
    rows, n = tl.load(entry + 4).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    stream = tl.load(entry + 6).to(tl.int32)
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
        m += (1 - b1) * (g - m)
        v = tl.fma(v, b2, (1 - b2) * g * g)  # said so: else each variant of the kernel is fused in its own way
    else:
        if F == C:
            mean, square = tl.sum(g, 1) * share, tl.sum(g * g, 1) * share
        else:
            parts = tl.reshape(g, (R, C // F, F))
            mean, square = tl.sum(parts, 2) * share, tl.sum(parts * parts, 2) * share
        m += (1 - b1) * (mean - m)
        v += (1 - b2) * (square - v)
    unbiased = v * inv_c2
    if CHECKED:
        finite = kept_finite(square, told + stream, step, m_mask)
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


def takes_ptx(device: torch.device) -> bool:
    """Whether PTX may stand in a kernel: not on AMD's and Intel's GPUs, nor in Triton's interpreter."""
    return device.type == "cuda" and torch.version.hip is None and isinstance(_update_kernel, triton.JITFunction)


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Entry:
    """One parameter of a step: its tensors on one device, its level, and its place in the random stream."""

    weight: Tensor
    grad: Tensor
    moments: tuple[Tensor, ...]  # as state holds them, contiguous
    level: Level
    stream: int
    place: Place
    grad_offset: int  # bytes, from where the rank's gradient of the parameter begins

    @classmethod
    def of(cls, member: Member) -> Entry:
        moments = tuple(member.moments[name] for name in moment_names(member.level, member.second_moment))
        grad = member.grad
        offset = grad.data_ptr() - local(cast(Tensor, member.p.grad)).data_ptr()
        return cls(member.weight, grad, moments, member.level, member.stream, member.place, offset)

    @property
    def columns(self) -> int:
        return self.weight.shape[-1] if self.weight.dim() else 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.grad, *self.moments

    def fits(self) -> bool:
        """Whether the kernel takes it; what does not fit goes through ``update.update_parameter``."""
        contiguous = self.weight.is_contiguous() and self.grad.is_contiguous()
        if not contiguous or not {x.dtype for x in self.tensors} <= TRITON_DTYPES.keys():
            return False
        factored = len(self.moments) == 3
        if factored and self.place.column_groups:  # no kernel for row means of which other ranks have a part
            return False
        # A rank without rows has means of columns all the same.
        if self.weight.numel() == 0 and not (factored and self.place.row_groups and self.moments[2].numel()):
            return False
        geometry = Geometry.of(self)
        segments = self.weight.numel() // self.columns * -(-self.columns // geometry.columns)
        return geometry.columns <= MAX_COLUMNS and segments + TILE_ELEMENTS < 2**31


@dataclass(frozen=True)
class Geometry:
    """What a launch is compiled for; tensors that agree in it share one."""

    device: torch.device
    weight: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    width: int  # F
    columns: int  # C, a power of two
    even: bool  # every row is whole segments
    aligned: bool  # every row starts on 16 bytes
    shifted: bool  # columns begin inside of a random draw of eight

    @classmethod
    def of(cls, entry: Entry) -> Geometry:
        n = entry.columns
        width = 1 if entry.level == 0 else _power_of_two(block_width(entry.level, entry.place.columns))
        # Narrow blocks share a segment with their neighbours; eight columns are one random draw.
        columns = max(8, width, min(256, _power_of_two(n)))
        aligned = n % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in entry.tensors)
        dtypes = (entry.weight.dtype, entry.grad.dtype, entry.moments[0].dtype)
        even = n % columns == 0 and (n == entry.place.columns or entry.weight.numel() == n)
        shifted = entry.place.first_column % 8 != 0 and entry.weight.dtype == torch.bfloat16
        return cls(entry.weight.device, *dtypes, width, columns, even, aligned, shifted)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class AddressTable:
    """Where the tensors of a launch are, on the host and on the device; a gradient's address is in column 1."""

    def __init__(self, geometry: Geometry, entries: list[Entry], table: numpy.ndarray) -> None:
        self.geometry = geometry
        self.streams = numpy.array([entry.stream for entry in entries])
        self.grad_offsets = numpy.array([entry.grad_offset for entry in entries])
        self._host = torch.from_numpy(table)
        self.table = self._host.to(geometry.device)
        self.nvidia = takes_ptx(geometry.device)
        self._compiled: dict[Any, Any] = {}

    def move_gradients(self, addresses: numpy.ndarray) -> None:
        """Point to gradients of the same kind elsewhere; ``addresses`` has one for each of ``streams``."""
        self._host[:, 1] = torch.from_numpy(addresses + self.grad_offsets)
        # The driver has read pageable memory when the call returns: no buffer to keep, and nothing waits for the GPU.
        self.table.copy_(self._host, non_blocking=True)

    def launch(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], **options: int
    ) -> None:
        """Launch ``kernel``, whose parameters are ``arguments`` (tensors, integers, floats) and ``constants``.

        Triton inspects all of them to find what it has compiled, which takes the host as long as the GPU takes for a
        small model. After the first time that is left out: nothing that it looks at changes from step to step.
        """
        sizes = tuple(x.bit_length() // 32 for x in arguments if type(x) is int)  # seeds are int32, int64 or uint64
        key = (kernel, constants, sizes)
        if key in self._compiled:
            self._compiled[key][programs, 1, 1](*arguments, *constants)
            return
        compiled = kernel[programs, 1, 1](*arguments, *constants, **options)
        if DIRECT_LAUNCH and compiled is not None:  # None from Triton's interpreter
            self._compiled[key] = compiled

    def told(self, told: Tensor | None) -> Tensor:
        """Where a kernel tells what it leaves out; where nothing is checked any tensor: it stays unwritten."""
        return self.table if told is None else told

    def scale(self, grad_scale: Tensor | None) -> tuple[Tensor, int]:
        """The scales as a kernel takes them, and its ``SCALED``: 0 for none, 1 for one for all, 2 for one each."""
        if grad_scale is None:
            return self.table, 0  # any tensor: it is unread
        aligned = grad_scale.clone() if grad_scale.data_ptr() % 16 else grad_scale  # as a tensor of its own is
        return aligned, 1 if grad_scale.numel() == 1 else 2


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
            table[i] = (*(x.data_ptr() for x in entry.tensors), rows, n, entry.stream, *where)
            tiles.append(-(-rows * -(-n // geometry.columns) // self.segments))
        self.programs = sum(tiles)
        self.owner = upload(owner_table(tiles), geometry.device)
        super().__init__(geometry, entries, table)

    def run(self, h: Hyper, grad_scale: Tensor | None = None, told: Tensor | None = None) -> None:
        g = self.geometry
        state = TRITON_DTYPES[g.state]
        scale, scaled = self.scale(grad_scale)
        with device_of(g.device):
            self.launch(
                _update_kernel,
                self.programs,
                (self.table, self.owner, h.step, h.seed, *numbers(h), scale, self.told(told)),
                (
                    *(_FIELDS, TRITON_DTYPES[g.weight], TRITON_DTYPES[g.grad], state, g.width, self.segments),
                    *(g.columns, g.even, g.aligned, h.stochastic, scaled, g.shifted),
                    *(told is not None, self.nvidia),
                ),
                num_warps=max(1, min(MAX_WARPS, g.columns * self.segments // WARP_ELEMENTS)),
            )


def numbers(h: Hyper) -> tuple[float, ...]:
    """A step's hyperparameters as the kernels take them, all of them floats whatever the user wrote."""
    step_size, decay = h.lr * h.scale, 1 - h.lr * h.weight_decay
    return tuple(map(float, (step_size, decay, h.b1, h.b2, 1 / h.c1, 1 / h.c2, h.eps, h.rho)))


def make_launches(members: list[Member]) -> tuple[list[tuple[Member, Launch | FactoredLaunch]], list[Member]]:
    """Launches for ``members``, each with one of its members, and the members that no kernel takes."""
    from foam_hf.factored_kernels import FactoredLaunch
    from foam_hf.int8_kernels import make_int8_launches

    without = [member for member in members if member.second_moment not in KERNEL_RULES]
    members = [member for member in members if member.second_moment in KERNEL_RULES]
    int8_launches, unfit = make_int8_launches([member for member in members if isinstance(member.p, Int8Weight)])
    unfit += without
    buckets: dict[tuple[str, Geometry, int, bool, bool], list[tuple[Member, Entry]]] = {}
    for member in members:
        if isinstance(member.p, Int8Weight):
            continue
        entry = Entry.of(member)
        if entry.fits():
            # Parameters that missed steps have bias corrections of their own, vectors a scale of their own.
            shared = bool(entry.place.row_groups)
            key = (member.second_moment, Geometry.of(entry), member.state["step"], member.p.dim() > 1, shared)
            buckets.setdefault(key, []).append((member, entry))
        else:
            unfit.append(member)
    kinds: dict[str, type[Launch] | type[FactoredLaunch]] = {"block": Launch, "factored": FactoredLaunch}
    launches = [
        (bucket[0][0], kinds[rule](geometry, [entry for _, entry in bucket]))
        for (rule, geometry, *_), bucket in buckets.items()
    ]
    return [*int8_launches, *launches], unfit


def owner_table(counts: list[int]) -> numpy.ndarray:
    """For each program: its tensor, and its number among that tensor's programs."""
    tensor = numpy.repeat(numpy.arange(len(counts), dtype=numpy.int32), counts)
    number = numpy.concatenate([numpy.arange(count, dtype=numpy.int32) for count in counts])
    return numpy.stack((tensor, number), axis=1)


def device_of(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(x: numpy.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(x).to(device)
