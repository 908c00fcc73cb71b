"""The factored rule as Triton kernels: one pass over weights and gradients, and two small ones over the means.

``V`` of an element needs the mean of its matrix's row means first, and new row and column means afterwards, see
``factored_means_kernel``. A program of the big pass (``wide_factored_kernel``, ``narrow_factored_kernel``) walks down
a stripe of ``S`` rows of ``R`` adjacent segments of ``C`` columns, and leaves the sums of squares of its rows and
columns in buffers that the last pass adds up in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy
import torch
import triton
from torch import Tensor

from foam_hf.kernels.calls import KernelCall
from foam_hf.kernels.columns import count_of
from foam_hf.kernels.tables import (
    MAX_WARPS,
    TRITON_DTYPES,
    AddressTable,
    Entry,
    Geometry,
    device_of,
    launches_of,
)
from foam_hf.rules.factored_means_kernel import LANES, ROW, mean_kernel, means_kernel, sums_kernel
from foam_hf.rules.narrow_factored_kernel import narrow_kernel
from foam_hf.rules.wide_factored_kernel import wide_kernel
from foam_hf.tensors.places import Group
from foam_hf.tensors.step import Hyper, Member

STRIPE = 128  # S, rows of a program of the big pass
ROW_ELEMENTS = 1024  # R * C: a program reads a stretch of a row that is long enough for the memory's pages
# Of the narrow kernel. Fewer registers of a thread would spill, more leave fewer programs to hide memory's latency.
THREAD_ELEMENTS, REGISTERS = 8, 80
# Of the wide kernel: the columns that a block may have, lanes of a program, or all of a block if it has more.
LEAST_COLUMNS, MOST_COLUMNS, LANES_OF_PROGRAM, CHUNKS = 256, 4096, 64, 2
STAGES, STAGED = 4, 24 << 10  # of rows that are on their way, and bytes of them in shared memory at most


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
        common = {
            "FIELDS": count_of(ROW),
            "W_DTYPE": TRITON_DTYPES[g.weight],
            "G_DTYPE": TRITON_DTYPES[g.grad],
            "S_DTYPE": TRITON_DTYPES[g.state],
        }
        self._update = (_wide_call if _is_wide(g) else _narrow_call)(g, common, segments, stripe, self.nvidia)
        mean = {**_some(common, "FIELDS", "S_DTYPE"), "SHARED": self.shared}
        self._mean = KernelCall(mean_kernel, mean, num_warps=8)
        self._sums = KernelCall(sums_kernel, {**_some(common, "FIELDS"), "S": stripe}, num_warps=4)
        means = {**_some(common, "FIELDS", "S_DTYPE"), "C": g.columns, "S": stripe, "SHARED": self.shared}
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


def _is_wide(g: Geometry) -> bool:
    """Whether the wide kernel takes it: blocks are whole segments, neither narrow nor very wide, and aligned."""
    return g.aligned and g.width == g.columns and LEAST_COLUMNS <= g.width <= MOST_COLUMNS


def _wide_call(g: Geometry, common: dict[str, Any], segments: int, stripe: int, nvidia: bool) -> KernelCall:
    vector = 16 // max(2, min(4, g.weight.itemsize))
    lanes = g.columns // (CHUNKS * vector)
    rows = max(1, LANES_OF_PROGRAM // (lanes * segments))
    stage = segments * rows * g.columns * (g.weight.itemsize + g.grad.itemsize)
    wide = {"Q": CHUNKS, "L": lanes, "V": vector, "R": segments, "D": rows, "S": stripe}
    wide |= {"STAGES": min(STAGES, 1 + STAGED // stage), "EVEN": g.even, "NVIDIA": nvidia}
    return KernelCall(wide_kernel, {**common, **wide}, num_warps=lanes * segments * rows // 32)


def _narrow_call(g: Geometry, common: dict[str, Any], segments: int, stripe: int, nvidia: bool) -> KernelCall:
    warps = max(1, min(MAX_WARPS, segments * g.columns // (32 * THREAD_ELEMENTS)))
    # A limit that only NVIDIA's backend knows.
    limited = g.device.type == "cuda" and torch.version.cuda and warps <= 8
    narrow = {"F": g.width, "R": segments, "C": g.columns, "S": stripe, "ALIGNED": g.aligned, "NVIDIA": nvidia}
    return KernelCall(
        narrow_kernel, {**common, **narrow}, num_warps=warps, **({"maxnreg": REGISTERS} if limited else {})
    )


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
