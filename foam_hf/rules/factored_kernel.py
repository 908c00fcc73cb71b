"""The factored rule as Triton kernels: one pass over weights and gradients, and two small ones over the means.

``V`` of an element needs the mean of its matrix's row means first, and new row and column means afterwards, see
``factored_means_kernel``. A program of the big pass walks down a stripe of ``S`` rows of ``R`` adjacent segments of
``C`` columns, and leaves the sums of squares of its rows and columns in buffers that the last pass adds up in a fixed
order: equal inputs give equal bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import KernelCall
from foam_hf.kernels.columns import COLUMNS, EXP_AVG, GRADIENT, STREAM, WEIGHT, count_of
from foam_hf.kernels.parts import (
    kept_finite,
    lerp,
    own_numbers,
    program_of,
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
)
from foam_hf.rules.factored import LARGEST_CENTER
from foam_hf.rules.factored_means_kernel import (
    COL_EXP_AVG_SQ,
    COLUMN_SUMS,
    FIRST_ROW,
    LANES,
    MEANS,
    ROW,
    ROW_EXP_AVG_SQ,
    ROW_SUMS,
    ROWS,
    mean_kernel,
    means_kernel,
    sums_kernel,
)
from foam_hf.rules.rule import LARGEST_STEP
from foam_hf.tensors.places import Group
from foam_hf.tensors.step import Hyper, Member

STRIPE = 128  # S, rows of a program of the big pass
ROW_ELEMENTS = 1024  # R * C: a program reads a stretch of a row that is long enough for the memory's pages
THREAD_ELEMENTS = 8
REGISTERS = 80  # of a thread: fewer spill, more leave fewer programs to hide the latency of memory
_LARGEST, _CENTER_SHARE = tl.constexpr(LARGEST_STEP), tl.constexpr(1 / LARGEST_CENTER)


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
    grad_scale, left_out_at,
    FIELDS: tl.constexpr, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr, NVIDIA: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    number, entry, index = program_of(table, owner, FIELDS)
    step, inv_c1, inv_c2 = own_numbers(entry, step, inv_c1, inv_c2, MIXED)
    W = tl.load(entry + WEIGHT).to(tl.pointer_type(W_DTYPE))
    G = tl.load(entry + GRADIENT).to(tl.pointer_type(G_DTYPE))
    M = tl.load(entry + EXP_AVG).to(tl.pointer_type(S_DTYPE))
    row_mean = tl.load(entry + ROW_EXP_AVG_SQ).to(tl.pointer_type(S_DTYPE))
    column_mean = tl.load(entry + COL_EXP_AVG_SQ).to(tl.pointer_type(S_DTYPE))
    rows, n = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLUMNS).to(tl.int32)
    stream = tl.load(entry + STREAM).to(tl.int32)
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
    mean = tl.maximum(tl.load(means + tl.load(entry + MEANS) + matrix), 1.1754943508222875e-38)
    c = tl.load(column_mean + matrix * n + column, mask=mask, other=0.0).to(tl.float32) * (b2 * inv_c2)
    row_sums += tl.load(entry + ROW_SUMS) + segment
    total = tl.zeros((R, C), tl.float32)
    first = stripe * S
    count = tl.minimum(rows - first, S)
    row = matrix * rows + first
    first_row = tl.load(entry + FIRST_ROW)
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
    tl.store(column_sums + tl.load(entry + COLUMN_SUMS) + (matrix * stripes + stripe) * n + column, total, mask=mask)


class Passes(NamedTuple):
    """A value for each pass of a step, in the order in which a launch keeps them."""

    old_means: Any  # of the row means, which the update reads
    update: Any
    new_means: Any
    column_sums: Any  # over stripes, for sums over ranks


class Extent(NamedTuple):
    """The matrices of a tensor, and how the big pass cuts them."""

    matrices: int
    rows: int  # of a matrix
    columns: int
    segments: int  # of a row
    stripes: int  # of a matrix
    parts: int  # of a stripe, each of a program

    @property
    def programs(self) -> Passes:
        """How many programs each pass has for the tensor."""
        rows, columns = (-(-self.matrices * count // LANES.value) for count in (self.rows, self.columns))
        return Passes(
            old_means=self.matrices,
            update=self.matrices * self.stripes * self.parts,
            new_means=rows + columns,
            column_sums=columns,
        )

    def elements(self, shared: bool) -> dict[str, int]:
        """How many of each buffer of the launch are the tensor's."""
        return {
            "row_sums": self.matrices * self.rows * self.segments,
            "column_sums": self.matrices * self.stripes * self.columns,
            "means": self.matrices,
            "shared_sums": self.matrices * self.columns if shared else 0,
        }


class FactoredLaunch(AddressTable):
    """The tables of the factored rule for tensors of one geometry, and their three launches."""

    def __init__(self, geometry: Geometry, entries: list[Entry]) -> None:
        self.shared = bool(entries[0].place.row_groups)  # other ranks have rows of these matrices
        tallest, widest = (max(entry.weight.shape[k] for entry in entries) for k in (-2, -1))
        width = min(max(ROW_ELEMENTS, geometry.columns), triton.next_power_of_2(widest))
        segments = max(1, width // geometry.columns)  # R
        stripe = min(STRIPE, triton.next_power_of_2(max(1, tallest)))  # S
        extents = [_extent(entry.weight, geometry.columns, segments, stripe) for entry in entries]
        parts = [extent.elements(self.shared) for extent in extents]
        counts = {name: numpy.array([part[name] for part in parts]) for name in parts[0]}
        starts = {name: (count.cumsum() - count).tolist() for name, count in counts.items()}
        own = {
            "row_exp_avg_sq": [entry.moments[1].data_ptr() for entry in entries],
            "col_exp_avg_sq": [entry.moments[2].data_ptr() for entry in entries],
            "rows": [extent.rows for extent in extents],
            "matrices": [extent.matrices for extent in extents],
            **starts,
            "first_row": [entry.place.first_row for entry in entries],
            "whole_rows": [entry.place.rows for entry in entries],
            "all_rows": [entry.place.all_rows for entry in entries],
        }
        super().__init__(
            geometry, entries, ROW, own, Passes(*zip(*(extent.programs for extent in extents), strict=True))
        )
        # Elements, so that each begins on 16 bytes.
        self.sizes = {name: -(-int(count.sum()) // 4) * 4 for name, count in counts.items()}
        self.buffers: dict[str, Tensor] = {}  # of a step under way alone: no memory is held between steps
        self._parts_of_sums = [
            (
                (entry.stream, entry.place.first_matrix),
                entry.place.row_groups,
                slice(start, start + part["shared_sums"]),
            )
            for entry, start, part in zip(entries, starts["shared_sums"], parts, strict=True)
            if self.shared
        ]
        self._make_calls(segments, stripe)

    def _make_calls(self, segments: int, stripe: int) -> None:
        g = self.geometry
        warps = max(1, min(MAX_WARPS, segments * g.columns // (32 * THREAD_ELEMENTS)))
        # A limit that only NVIDIA's backend knows.
        limited = g.device.type == "cuda" and torch.version.cuda and warps <= 8
        update = {
            "FIELDS": count_of(ROW),
            "W_DTYPE": TRITON_DTYPES[g.weight],
            "G_DTYPE": TRITON_DTYPES[g.grad],
            "S_DTYPE": TRITON_DTYPES[g.state],
            "F": g.width,
            "R": segments,
            "C": g.columns,
            "S": stripe,
            "ALIGNED": g.aligned,
            "NVIDIA": self.nvidia,
        }
        self._update = KernelCall(
            _update_kernel, update, num_warps=warps, **({"maxnreg": REGISTERS} if limited else {})
        )
        mean = {**_some(update, "FIELDS", "S_DTYPE"), "SHARED": self.shared}
        self._mean = KernelCall(mean_kernel, mean, num_warps=4)
        self._sums = KernelCall(sums_kernel, _some(update, "FIELDS", "S"), num_warps=4)
        means = {**_some(update, "FIELDS", "S_DTYPE", "C", "S"), "SHARED": self.shared}
        self._means = KernelCall(means_kernel, means, num_warps=4)

    @property
    def sums(self) -> list[tuple[tuple[int, int], tuple[Group, ...], Tensor]]:
        """What other ranks add to before ``store``: whose it is, which ranks, the sums."""
        return [(whose, ranks, self.buffers["shared_sums"][part]) for whose, ranks, part in self._parts_of_sums]

    def run(
        self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None
    ) -> FactoredLaunch | None:
        """Update the weights; gives itself if the means wait for ``store``, when ``sums`` are those of all ranks."""
        sizes = [*self.sizes.values()]
        memory = torch.empty(sum(sizes), dtype=torch.float32, device=self.device)
        self.buffers = dict(zip(self.sizes, memory.split(sizes), strict=True))
        row_sums, column_sums, means, shared_sums = self.buffers.values()
        owners = Passes(*self.owners)
        with device_of(self.device):
            arguments = {"table": self.table, "owner": owners.old_means, "means": means}
            self._mean(len(owners.old_means), arguments, {})
            if len(owners.update):  # a rank may have no rows
                changing, constants = self.of_step(h, grad_scale, left_out_at)
                arguments = {"table": self.table, "owner": owners.update, "row_sums": row_sums}
                arguments |= {"column_sums": column_sums, "means": means}
                self._update(len(owners.update), {**arguments, **changing}, constants)
            if self.shared:
                arguments = {"table": self.table, "owner": owners.column_sums, "column_sums": column_sums}
                self._sums(len(owners.column_sums), {**arguments, "shared_sums": shared_sums}, {})
                return self
        self.store(h, left_out_at)
        return None

    def store(self, h: Hyper, left_out_at: Tensor | None = None) -> None:
        """Turn sums of squares into this step's means, and free them."""
        buffers, self.buffers = self.buffers, {}
        owner = Passes(*self.owners).new_means
        arguments = {
            "table": self.table,
            "owner": owner,
            "row_sums": buffers["row_sums"],
            "column_sums": buffers["shared_sums" if self.shared else "column_sums"],
            "step": h.step,
            "seed": h.seed,
            "b2": float(h.b2),
            "a2": float(1 - h.b2),
            "left_out_at": self.left_out_at(left_out_at),
        }
        constants = {"STOCHASTIC": h.stochastic, "CHECKED": left_out_at is not None, "MIXED": self.mixed}
        with device_of(self.device):
            self._means(len(owner), arguments, constants)


def make_launches(members: list[Member]) -> tuple[list[FactoredLaunch], list[Member]]:
    """Launches for ``members``, plain weights of this rule, and the members that no kernel takes."""
    return launches_of(members, _geometry_of, FactoredLaunch)


def _some(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _extent(weight: Tensor, columns: int, segments: int, stripe: int) -> Extent:
    """``weight`` in stripes of ``stripe`` rows of ``segments`` segments of ``columns`` columns."""
    rows, n = weight.shape[-2:]
    count = -(-n // columns)
    return Extent(math.prod(weight.shape[:-2]), rows, n, count, -(-rows // stripe), -(-count // segments))


def _geometry_of(entry: Entry) -> Geometry | None:
    place = entry.place
    if place.column_groups:  # no kernel for row means of which other ranks have a part
        return None
    # A rank without rows has means of columns all the same.
    empty = bool(place.row_groups) and entry.moments[2].numel() > 0
    return Geometry.of(entry) if entry.fits(empty) else None
