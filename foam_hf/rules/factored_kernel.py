"""The factored rule as Triton kernels: one pass over weights and gradients, and two small ones over the means.

``V`` of an element needs the mean of its matrix's row means first, and new row and column means afterwards. A program
of the big pass walks down a stripe of ``S`` rows of ``R`` adjacent segments of ``C`` columns, and leaves the sums of
squares of its rows and columns in buffers that the last pass adds up in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import math

import numpy
import torch
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
    TRITON_DTYPES,
    AddressTable,
    Entry,
    Geometry,
    device_of,
    launches_of,
    numbers,
)
from foam_hf.rules.factored import LARGEST_CENTER
from foam_hf.rules.rule import LARGEST_STEP
from foam_hf.tensors.places import Group
from foam_hf.tensors.step import Hyper, Member

STRIPE = 128  # S, rows of a program of the big pass
ROW_ELEMENTS = 1024  # R * C: a program reads a stretch of a row that is long enough for the memory's pages
THREAD_ELEMENTS = 8
REGISTERS = 80  # of a thread: fewer spill, more leave fewer programs to hide the latency of memory
LANES = tl.constexpr(256)  # means of a program of the small passes
_LARGEST, _CENTER_SHARE = tl.constexpr(LARGEST_STEP), tl.constexpr(1 / LARGEST_CENTER)
# weight, gradient, first moment, row means, column means; rows, columns, matrices, stream; where its row sums, column
# sums and means of row means begin in the buffers; where a shard's first row is in the whole tensor, the rows of a
# whole matrix and of all of them; where its column sums for other ranks begin; step and bias
# corrections, see ``own_numbers``
_FIELDS = tl.constexpr(19)


@triton.jit
def _mean_kernel(table, owner, means, S_DTYPE: tl.constexpr, SHARED: tl.constexpr):
    """mean(r) of one matrix; where other ranks have some of its rows, mean(c), which is the same number."""
    entry = table + tl.load(owner + 2 * tl.program_id(0)).to(tl.int64) * _FIELDS
    matrix = tl.load(owner + 2 * tl.program_id(0) + 1)
    count = tl.load(entry + 6 if SHARED else entry + 5).to(tl.int32)
    values = tl.load(entry + 4 if SHARED else entry + 3).to(tl.pointer_type(S_DTYPE)) + matrix.to(tl.int64) * count
    total = tl.zeros((LANES,), tl.float32)
    start = 0
    while start < count:  # Triton's interpreter takes no loaded value as the bound of a range
        at = start + tl.arange(0, LANES)
        total += tl.load(values + at, mask=at < count, other=0.0).to(tl.float32)
        start += LANES
    tl.store(means + tl.load(entry + 11) + matrix, tl.sum(total, 0) / count)


@triton.jit
def _sums_kernel(table, owner, column_sums, shared_sums, S: tl.constexpr):
    """The sums of ``LANES`` columns over this rank's rows, for other ranks."""
    entry = table + tl.load(owner + 2 * tl.program_id(0)).to(tl.int64) * _FIELDS
    index = tl.load(owner + 2 * tl.program_id(0) + 1)
    rows, n = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    stripes = tl.cdiv(rows, S)
    at = index.to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = at < tl.load(entry + 7) * n
    matrix = at // n
    sums = column_sums + tl.load(entry + 10) + matrix * stripes * n + at - matrix * n
    total = tl.zeros((LANES,), tl.float32)
    i = 0
    while i < stripes:
        total += tl.load(sums + i * n, mask=mask, other=0.0)
        i += 1
    tl.store(shared_sums + tl.load(entry + 15) + at, total, mask=mask)


@triton.jit
def _load_row(base, offset, column, mask, ALIGNED: tl.constexpr):
    """Columns of the row that begins at ``offset``."""
    pointers = base + offset + column
    if ALIGNED:  # the compiler cannot see through a table of addresses that eight columns are one 16-byte access
        pointers = tl.multiple_of(pointers, (1, 16))
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["step", "seed"])
def _update_kernel(
    table, owner, row_sums, column_sums, means, step, seed, step_size, decay, b1, a1, b2, a2, inv_c1, inv_c2, eps, rho,
    grad_scale, left_out_at, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, F: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    SCALED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    number = tl.load(owner + 2 * tl.program_id(0))
    entry = table + number.to(tl.int64) * _FIELDS
    index = tl.load(owner + 2 * tl.program_id(0) + 1)
    step, inv_c1, inv_c2 = own_numbers(entry + _FIELDS - 3, step, inv_c1, inv_c2, MIXED)
    W = tl.load(entry).to(tl.pointer_type(W_DTYPE))
    G = tl.load(entry + 1).to(tl.pointer_type(G_DTYPE))
    M = tl.load(entry + 2).to(tl.pointer_type(S_DTYPE))
    row_mean = tl.load(entry + 3).to(tl.pointer_type(S_DTYPE))
    column_mean = tl.load(entry + 4).to(tl.pointer_type(S_DTYPE))
    rows, n = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    stream = tl.load(entry + 8).to(tl.int32)
    per_row, stripes = tl.cdiv(n, C), tl.cdiv(rows, S)
    parts = tl.cdiv(n, R * C)
    part = index % parts
    stripe = index // parts % stripes
    matrix = (index // (parts * stripes)).to(tl.int64)
    scale = 1.0
    if SCALED > 0:
        scale = scale_of(grad_scale, number, SCALED)

    segment = part * R + tl.arange(0, R)
    lane = tl.arange(0, C)[None, :]
    column = segment[:, None] * C + lane
    mask = column < n
    if ALIGNED:  # in units of 16 columns, so that the compiler sees that a mask never splits an access
        mask = segment[:, None] * (C // 16) + lane // 16 < n // 16
    blocks = tl.cdiv(n, F)
    block = segment if F == C else segment[:, None] * (C // F) + tl.arange(0, C // F)[None, :]
    m_mask = block < blocks
    share = 1.0 / tl.maximum(tl.minimum(n - block * F, F), 1).to(tl.float32)
    # Where no gradient has ever been, mean(r) is zero, and V must be zero, not 0/0.
    mean = tl.maximum(tl.load(means + tl.load(entry + 11) + matrix), 1.1754943508222875e-38)
    c = tl.load(column_mean + matrix * n + column, mask=mask, other=0.0).to(tl.float32) * (b2 * inv_c2)
    row_sums += tl.load(entry + 9) + segment
    total = tl.zeros((R, C), tl.float32)
    first = stripe * S
    count = tl.minimum(rows - first, S)
    row = matrix * rows + first
    first_row = tl.load(entry + 12)
    # The next row is on its way while one is computed; behind the last, that one again.
    next_w = _load_row(W, row * n, column, mask, ALIGNED)
    next_g = _load_row(G, row * n, column, mask, ALIGNED)
    next_m = tl.load(M + row * blocks + block, mask=m_mask, other=0.0)
    next_r = tl.load(row_mean + row)
    i = 0
    while i < count:  # Triton's interpreter takes no loaded value as the bound of a range
        w, g = next_w.to(tl.float32), next_g.to(tl.float32) * scale
        m, r = next_m.to(tl.float32), next_r.to(tl.float32) / mean
        following = row + tl.minimum(count - 1 - i, 1)
        next_w = _load_row(W, following * n, column, mask, ALIGNED)
        next_g = _load_row(G, following * n, column, mask, ALIGNED)
        next_m = tl.load(M + following * blocks + block, mask=m_mask, other=0.0)
        next_r = tl.load(row_mean + following)
        gg = g * g
        if F == 1:
            block_mean, square = g, gg
        elif F == C:
            block_mean, square = tl.sum(g, 1) * share, tl.sum(gg, 1)
        else:
            block_mean = tl.sum(tl.reshape(g, (R, C // F, F)), 2) * share
            square = tl.sum(tl.reshape(gg, (R, C // F, F)), 2)
        old_m = m
        m = lerp(m, block_mean, a1, b1)
        center = m * inv_c1 - rho * block_mean
        if CHECKED:
            finite = kept_finite(square, left_out_at + stream, step, m_mask)
            square, m = tl.where(finite, square, 0.0), tl.where(finite, m, old_m)
            if F != C:
                center = tl.where(finite, center, float("nan"))  # so that each element of a block can see that
        center = unfold(center, R, C, F)
        size = root(r * c + a2 * inv_c2 * gg, NVIDIA)
        numerator = center + rho * g
        limit = size * _LARGEST
        numerator = tl.where(tl.abs(numerator) > limit, tl.where(numerator > 0, limit, -limit), numerator)  # NaN stays
        denominator = tl.maximum(size, tl.abs(center) * _CENTER_SHARE) + eps
        written = mask
        w = w * decay - step_size * ratio(numerator, denominator, NVIDIA)
        if CHECKED:
            kept = finite[:, None] if F == C else center == center
            gg = tl.where(kept, gg, 0.0)
            written = mask & kept
        total += gg
        row_sum = square if F == C else tl.sum(square, 1)
        tl.store(row_sums + row * per_row, row_sum, mask=segment < per_row)

        w_bits, m_bits = 0, 0
        if STOCHASTIC and W_DTYPE is tl.bfloat16:
            w_bits = random_bits(
                seed, step, 4 * stream, (first_row + row) * tl.cdiv(n, 8) + segment[:, None] * (C // 8), R, C
            )
        if STOCHASTIC and S_DTYPE is tl.bfloat16:
            m_bits = random_bits_at(seed, step, 4 * stream + 1, first_row + row + block * 0, block, blocks)
        pointers = W + row * n + column
        if ALIGNED:
            pointers = tl.multiple_of(pointers, (1, 16))
        store(pointers, w, w_bits, written, W_DTYPE, STOCHASTIC)
        store(M + row * blocks + block, m, m_bits, m_mask, S_DTYPE, STOCHASTIC)
        row += 1
        i += 1
    tl.store(column_sums + tl.load(entry + 10) + (matrix * stripes + stripe) * n + column, total, mask=mask)


@triton.jit(do_not_specialize=["step", "seed"])
def _means_kernel(
    table, owner, row_sums, column_sums, step, seed, b2, a2, left_out_at, S_DTYPE: tl.constexpr, C: tl.constexpr,
    S: tl.constexpr, STOCHASTIC: tl.constexpr, SHARED: tl.constexpr, CHECKED: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """The new row means, or behind them the new column means, of ``LANES`` rows or columns."""
    entry = table + tl.load(owner + 2 * tl.program_id(0)).to(tl.int64) * _FIELDS
    index = tl.load(owner + 2 * tl.program_id(0) + 1)
    rows, n = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    matrices, stream = tl.load(entry + 7), tl.load(entry + 8).to(tl.int32)
    if MIXED:
        step = tl.load(entry + _FIELDS - 3).to(tl.int32)
    row_programs = tl.cdiv(matrices * rows, LANES)
    first_row, whole_rows, all_rows = tl.load(entry + 12), tl.load(entry + 13), tl.load(entry + 14)
    total = tl.zeros((LANES,), tl.float32)
    i = 0
    if index < row_programs:
        at = index.to(tl.int64) * LANES + tl.arange(0, LANES)
        mask = at < matrices * rows
        parts = tl.cdiv(n, C)
        sums = row_sums + tl.load(entry + 9) + at * parts
        while i < parts:
            total += tl.load(sums + i, mask=mask, other=0.0)
            i += 1
        target = tl.load(entry + 3).to(tl.pointer_type(S_DTYPE)) + at
        row, width, kind, total = at * 0, all_rows, 2, total / n
        column = first_row + at
    else:
        at = (index - row_programs).to(tl.int64) * LANES + tl.arange(0, LANES)
        mask = at < matrices * n
        stripes = 1 if SHARED else tl.cdiv(rows, S)
        row = at // n
        column = at - row * n
        sums = column_sums + tl.load(entry + 15 if SHARED else entry + 10) + row * stripes * n + column
        row += first_row // whole_rows
        while i < stripes:
            total += tl.load(sums + i * n, mask=mask, other=0.0)
            i += 1
        target = tl.load(entry + 4).to(tl.pointer_type(S_DTYPE)) + at
        width, kind, total = n.to(tl.int64), 3, total / whole_rows
    old = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    if CHECKED:  # blocks of finite squares whose sum is infinite
        total = tl.where(kept_finite(total, left_out_at + stream, step, mask), total, old)
    bits = 0
    if STOCHASTIC and S_DTYPE is tl.bfloat16:
        bits = random_bits_at(seed, step, 4 * stream + kind, row, column, width)
    store(target, lerp(old, total, a2, b2), bits, mask, S_DTYPE, STOCHASTIC)


class FactoredLaunch(AddressTable):
    """The tables of the factored rule for tensors of one geometry, and their three launches."""

    def __init__(self, geometry: Geometry, entries: list[Entry]) -> None:
        tallest, widest = (max(entry.weight.shape[k] for entry in entries) for k in (-2, -1))
        width = min(max(ROW_ELEMENTS, geometry.columns), triton.next_power_of_2(widest))
        self.segments = max(1, width // geometry.columns)  # R
        self.stripe = min(STRIPE, triton.next_power_of_2(max(1, tallest)))  # S
        self.shared = bool(entries[0].place.row_groups)  # other ranks have rows of these matrices
        table = numpy.empty((len(entries), _FIELDS.value), dtype=numpy.int64)
        counts: list[tuple[int, int, int, int]] = []  # programs of the passes
        sizes = numpy.zeros(4, dtype=numpy.int64)  # of the buffers
        parts_of_sums = []
        for i, entry in enumerate(entries):
            rows, n = entry.weight.shape[-2:]
            matrices, place = math.prod(entry.weight.shape[:-2]), entry.place
            segments, stripes = -(-n // geometry.columns), -(-rows // self.stripe)
            parts = -(-segments // self.segments)
            addresses = (x.data_ptr() for x in entry.tensors)
            whole = (place.first_row, place.rows, place.all_rows)
            table[i] = (*addresses, rows, n, matrices, entry.stream, *sizes[:3], *whole, sizes[3], 0, 0, 0)
            parts_of_sums.append((int(sizes[3]), matrices * n))
            shared = matrices * n if self.shared else 0
            sizes += (matrices * rows * segments, matrices * stripes * n, matrices, shared)
            lanes = LANES.value
            row_programs, column_programs = -(-matrices * rows // lanes), -(-matrices * n // lanes)
            counts.append((matrices, matrices * stripes * parts, row_programs + column_programs, column_programs))
        super().__init__(geometry, entries, table, [[count[k] for count in counts] for k in range(4)])
        self.warps = max(1, min(MAX_WARPS, self.segments * geometry.columns // (32 * THREAD_ELEMENTS)))
        # A limit that only NVIDIA's backend knows.
        limited = geometry.device.type == "cuda" and torch.version.cuda and self.warps <= 8
        self.options = {"maxnreg": REGISTERS} if limited else {}
        self.sizes = [-(-size // 4) * 4 for size in sizes.tolist()]  # so that each begins on 16 bytes
        self.buffers: list[Tensor] = []  # of a step under way alone: no memory is held between steps
        self._parts_of_sums = [
            ((entry.stream, entry.place.first_matrix), entry.place.row_groups, slice(start, start + size))
            for entry, (start, size) in zip(entries, parts_of_sums, strict=True)
        ]

    @property
    def sums(self) -> list[tuple[tuple[int, int], tuple[Group, ...], Tensor]]:
        """What other ranks add to before ``store``: whose it is, which ranks, the sums."""
        return [(whose, ranks, self.buffers[3][part]) for whose, ranks, part in self._parts_of_sums if self.shared]

    def run(
        self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None
    ) -> FactoredLaunch | None:
        """Update the weights; gives itself if the means wait for ``store``, when ``sums`` are those of all ranks."""
        g = self.geometry
        self.follow_steps(h)
        memory = torch.empty(sum(self.sizes), dtype=torch.float32, device=g.device)
        self.buffers = list(memory.split(self.sizes))
        row_sums, column_sums, means, shared_sums = self.buffers
        before, update, _, sums = self.owners
        state, stochastic = TRITON_DTYPES[g.state], h.stochastic
        (scale, scaled), place = self.scale(grad_scale), self.left_out_at(left_out_at)
        with device_of(g.device):
            self.launch(_mean_kernel, len(before), (self.table, before, means), (state, self.shared), num_warps=4)
            if len(update):  # a rank may have no rows
                self.launch(
                    _update_kernel,
                    len(update),
                    (self.table, update, row_sums, column_sums, means, h.step, h.seed, *numbers(h), scale, place),
                    (
                        *(TRITON_DTYPES[g.weight], TRITON_DTYPES[g.grad], state, g.width, self.segments, g.columns),
                        *(self.stripe, g.aligned, stochastic, scaled, left_out_at is not None),
                        *(self.mixed, self.nvidia),
                    ),
                    num_warps=self.warps,
                    **self.options,
                )
            if self.shared:
                arguments = (self.table, sums, column_sums, shared_sums)
                self.launch(_sums_kernel, len(sums), arguments, (self.stripe,), num_warps=4)
                return self
        self.store(h, left_out_at)
        return None

    def store(self, h: Hyper, left_out_at: Tensor | None = None) -> None:
        """Turn sums of squares into this step's means, and free them."""
        g, after = self.geometry, self.owners[2]
        row_sums, column_sums = self.buffers[0], self.buffers[3 if self.shared else 1]
        self.buffers = []
        with device_of(g.device):
            self.launch(
                _means_kernel,
                len(after),
                (
                    self.table,
                    after,
                    row_sums,
                    column_sums,
                    h.step,
                    h.seed,
                    float(h.b2),
                    float(1 - h.b2),
                    self.left_out_at(left_out_at),
                ),
                (
                    TRITON_DTYPES[g.state],
                    g.columns,
                    self.stripe,
                    h.stochastic,
                    self.shared,
                    left_out_at is not None,
                    self.mixed,
                ),
                num_warps=4,
            )


def make_launches(members: list[Member]) -> tuple[list[FactoredLaunch], list[Member]]:
    """Launches for ``members``, plain weights of this rule, and the members that no kernel takes."""
    return launches_of(members, _geometry_of, FactoredLaunch)


def _geometry_of(entry: Entry) -> Geometry | None:
    place = entry.place
    if place.column_groups:  # no kernel for row means of which other ranks have a part
        return None
    # A rank without rows has means of columns all the same.
    empty = bool(place.row_groups) and entry.moments[2].numel() > 0
    return Geometry.of(entry) if entry.fits(empty) else None
