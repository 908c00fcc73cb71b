"""FOAM with Muon as Triton kernels: all matrices of one shape in a launch, in batches whose buffers stay small.

A pass over gradients and momentum adds up the squares, so that the next one can update the momentum and write the
matrix to orthogonalise as float16. The last pass updates the weights. ``products_kernel`` is between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import KernelCall
from foam_hf.kernels.columns import EXP_AVG, GRADIENT, STEP, STREAM, WEIGHT, number_of, row_of
from foam_hf.kernels.parts import (
    blocks_of,
    draws_of,
    lerp,
    random_bits,
    random_bits_at,
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
    device_of,
    launches_of,
)
from foam_hf.rules.muon import element_limit, matrices_at_a_time, step_factor
from foam_hf.rules.orthogonal import SMALLEST_NORM
from foam_hf.rules.products_kernel import LANES, Orthogonalizer
from foam_hf.tensors.step import Hyper, Member

WARP_ELEMENTS = 512
MAX_ELEMENTS = 1 << 31  # of a matrix: kernels count them in int32
ROW = row_of("first_row")  # of a matrix in its tensor, for random bits
FIRST_ROW = number_of(ROW, "first_row")


@triton.jit
def _direction(
    entry, number, tile, rows, n, a1, b1, rho, grad_scale,
    G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, F: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A tile's gradient, new momentum and matrix to orthogonalise, and where they are."""
    G = tl.load(entry + GRADIENT).to(tl.pointer_type(G_DTYPE))
    M = tl.load(entry + EXP_AVG).to(tl.pointer_type(S_DTYPE))
    segment, offset, mask = segments_of(tile, rows, n, R, C, EVEN, ALIGNED)
    m_offset, m_mask, share = blocks_of(segment, rows, n, C, F, EVEN)
    G, M = G + offset, M + m_offset
    if ALIGNED:
        G = tl.multiple_of(G, (1, 16))
    g = tl.load(G, mask=mask, other=0.0).to(tl.float32)
    if SCALED > 0:
        g = g * scale_of(grad_scale, number, SCALED)
    m = tl.load(M, mask=m_mask, other=0.0).to(tl.float32)
    if F == 1:
        mean = g
    elif F == C:
        mean = tl.sum(g, 1) * share
    else:
        mean = tl.sum(tl.reshape(g, (R, C // F, F)), 2) * share
    m = lerp(m, mean, a1, b1)
    ahead = lerp(mean, m, b1, a1)
    direction = unfold(ahead, R, C, F) + rho * (g - unfold(mean, R, C, F))  # at F = 1 the latter is zero
    direction = tl.where(mask, direction, 0.0)
    return g, m, direction, segment, offset, mask, M, m_offset, m_mask


@triton.jit
def _squares_kernel(
    table, owner, sums, rows, n, b1, a1, rho, grad_scale,
    FIELDS: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Sums of squares of a tile: of the matrix to orthogonalise, and behind those of all programs, of the gradient."""
    program = tl.program_id(0)
    number = tl.load(owner + 2 * program)
    entry = table + number.to(tl.int64) * FIELDS
    g, m, direction, segment, offset, mask, M, m_offset, m_mask = _direction(
        entry, number, tl.load(owner + 2 * program + 1), rows, n, a1, b1, rho, grad_scale,
        G_DTYPE, S_DTYPE, F, R, C, EVEN, ALIGNED, SCALED,
    )  # fmt: skip
    tl.store(sums + program, tl.sum(tl.sum(direction * direction, 1), 0))
    tl.store(sums + tl.num_programs(0) + program, tl.sum(tl.sum(g * g, 1), 0))


@triton.jit(do_not_specialize=["count"])
def _totals_kernel(sums, totals, count):
    """The sum of the ``count`` sums of each matrix, in a fixed order."""
    matrix = tl.program_id(0)
    total = tl.zeros((LANES,), tl.float32)
    start = 0
    while start < count:
        at = start + tl.arange(0, LANES)
        total += tl.load(sums + matrix.to(tl.int64) * count + at, mask=at < count, other=0.0)
        start += LANES
    tl.store(totals + matrix, tl.sum(total, 0))


@triton.jit(do_not_specialize=["step", "seed", "first", "programs"])
def _direction_kernel(
    table, owner, X, factors, step, seed, first, programs, rows, n, b1, a1, rho, grad_scale, left_out_at,
    FIELDS: tl.constexpr, G_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Update the momentum and write the matrix to orthogonalise, times its factor; ``programs`` for each matrix.

    The factor of a matrix that must be left out is negative: it becomes zero, and its momentum stays.
    """
    position = tl.program_id(0) // programs
    program = first * programs + tl.program_id(0)
    number = tl.load(owner + 2 * program)
    entry = table + number.to(tl.int64) * FIELDS
    stream = tl.load(entry + STREAM).to(tl.int32)
    if MIXED:
        step = tl.load(entry + STEP).to(tl.int32)
    g, m, direction, segment, offset, mask, M, m_offset, m_mask = _direction(
        entry, number, tl.load(owner + 2 * program + 1), rows, n, a1, b1, rho, grad_scale,
        G_DTYPE, S_DTYPE, F, R, C, EVEN, ALIGNED, SCALED,
    )  # fmt: skip
    factor = tl.load(factors + first + position)
    if CHECKED:
        tl.store(left_out_at + stream, step, mask=factor < 0)
        direction = tl.where(factor < 0, 0.0, direction)
        m_mask = m_mask & (tl.zeros_like(m) + factor >= 0)  # a block, as Triton's interpreter mistakes a scalar's type
    X += position.to(tl.int64) * rows * n + offset
    if ALIGNED:
        X = tl.multiple_of(X, (1, 16))
    tl.store(X, (direction * factor).to(tl.float16), mask=mask)
    m_bits = 0
    if STOCHASTIC and S_DTYPE is tl.bfloat16:
        width = tl.cdiv(n, F)
        row = m_offset // width
        first_row = tl.load(entry + FIRST_ROW)
        m_bits = random_bits_at(seed, step, 4 * stream + 1, row + first_row, m_offset - row * width, width)
    store(M, m, m_bits, m_mask, S_DTYPE, STOCHASTIC)


@triton.jit(do_not_specialize=["step", "seed", "first", "programs"])
def _weight_kernel(
    table, owner, X, factors, scales, step, seed, first, programs, rows, n, step_size, limit, decay,
    FIELDS: tl.constexpr, W_DTYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, CHECKED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """W <- W decay - step_size X scale, where no element of X scale counts for more than ``limit``."""
    position = tl.program_id(0) // programs
    program = first * programs + tl.program_id(0)
    entry = table + tl.load(owner + 2 * program).to(tl.int64) * FIELDS
    stream = tl.load(entry + STREAM).to(tl.int32)
    if MIXED:
        step = tl.load(entry + STEP).to(tl.int32)
    segment, offset, mask = segments_of(tl.load(owner + 2 * program + 1), rows, n, R, C, EVEN, ALIGNED)
    W = tl.load(entry + WEIGHT).to(tl.pointer_type(W_DTYPE)) + offset
    X += position.to(tl.int64) * rows * n + offset
    if ALIGNED:
        W, X = tl.multiple_of(W, (1, 16)), tl.multiple_of(X, (1, 16))
    if CHECKED:
        mask = mask & (tl.zeros((R, C), tl.float32) + tl.load(factors + first + position) >= 0)
    w = tl.load(W, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(X, mask=mask, other=0.0).to(tl.float32) * tl.load(scales + position)
    w = w * decay - step_size * tl.minimum(tl.maximum(x, -limit), limit)
    bits = 0
    if STOCHASTIC and W_DTYPE is tl.bfloat16:
        draw = draws_of(segment, n, tl.load(entry + FIRST_ROW), 0, n, C, EVEN)
        bits = random_bits(seed, step, 4 * stream, draw, R, C)
    store(W, w, bits, mask, W_DTYPE, STOCHASTIC)


OfStep = tuple[dict[str, Any], dict[str, Any]]  # what ``AddressTable.of_step`` returns


def _momentum(numbers: OfStep) -> dict[str, Any]:
    return {name: numbers[0][name] for name in ("b1", "a1", "rho", "grad_scale")}


@dataclass(frozen=True)
class MatrixGeometry(Geometry):
    """What a launch is compiled for, the shape of its matrices included."""

    rows: int
    n: int

    @classmethod
    def of_matrix(cls, entry: Entry) -> MatrixGeometry | None:
        """The geometry of the matrices of ``entry``, or None if no kernel takes them."""
        rows, n = entry.weight.shape[-2:]
        # The side of a matrix may be in an element of float16, which ends at 65,504.
        if not entry.fits() or rows * n >= MAX_ELEMENTS or min(rows, n) > 1 << 15:
            return None
        return cls(**vars(Geometry.of(entry)), rows=rows, n=n)


def _matrices_of(entry: Entry) -> Iterator[Entry]:
    """An entry for each matrix of ``entry``, whose leading dimensions count them."""
    rows, n = entry.weight.shape[-2:]
    (momentum,) = entry.moments
    weights, grads = entry.weight.view(-1, rows, n), entry.grad.view(-1, rows, n)
    moments = momentum.view(-1, *momentum.shape[-2:])
    for i, (weight, grad, m) in enumerate(zip(weights, grads, moments, strict=True)):
        place = entry.place._replace(first_row=entry.place.first_row + i * rows)
        offset = entry.grad_offset + i * rows * n * grad.element_size()
        yield Entry(weight, grad, (m,), entry.level, entry.stream, place, offset)


class Launch(AddressTable):
    """The device tables of the matrices of one shape, and their update."""

    def __init__(self, geometry: MatrixGeometry, entries: list[Entry]) -> None:
        self._of_entry = [math.prod(entry.weight.shape[:-2]) for entry in entries]
        matrices = [matrix for entry in entries for matrix in _matrices_of(entry)]
        segments = max(1, TILE_ELEMENTS // geometry.columns)  # R
        self._programs = -(-geometry.rows * -(-geometry.n // geometry.columns) // segments)  # of a matrix
        own = {"first_row": [matrix.place.first_row for matrix in matrices]}
        super().__init__(geometry, matrices, ROW, own, [[self._programs] * len(matrices)])
        self._shape = {"rows": geometry.rows, "n": geometry.n}
        self._batch = matrices_at_a_time(geometry.rows, geometry.n)
        self._orthogonalize = Orthogonalizer(geometry.rows, geometry.n, geometry.device)
        warps = max(1, min(MAX_WARPS, geometry.columns * segments // WARP_ELEMENTS))
        self._add_squares, self._write_directions, self._update_weights = (
            KernelCall(kernel, self.constants(kernel, R=segments), num_warps=warps)
            for kernel in (_squares_kernel, _direction_kernel, _weight_kernel)
        )
        self._total = KernelCall(_totals_kernel, {}, num_warps=4)
        self._present = numpy.arange(len(matrices))
        self._tensors: Tensor | None = None

    def leave_out(self, here: numpy.ndarray, steps: numpy.ndarray) -> None:
        super().leave_out(here, steps)
        self._present, self._tensors = numpy.flatnonzero(here), None

    def repeat_members(self) -> None:
        """Let ``members`` be those of the matrices, as ``streams`` are."""
        self.members = [m for m, count in zip(self.members, self._of_entry, strict=True) for _ in range(count)]

    def move(self, gradients: numpy.ndarray, momenta: numpy.ndarray) -> None:
        """Read gradients and momenta of the same kind at new addresses, one for each matrix."""
        if (self._rows["gradient"] != gradients).any() or (self._rows["exp_avg"] != momenta).any():
            self._rows["exp_avg"] = momenta
            self.move_gradients(gradients)

    def run(self, h: Hyper, grad_scale: Tensor | None = None, left_out_at: Tensor | None = None) -> None:
        matrices, numbers = len(self._present), self.of_step(h, grad_scale, left_out_at)
        with device_of(self.device):
            factors, infinite = self.factors(numbers)
            if left_out_at is not None:
                bad = self._in_tensors(infinite) if len(self._of_entry) < len(self.streams) else infinite
                factors.masked_fill_(bad, -1.0)
            for first in range(0, matrices, self._batch):
                count = min(self._batch, matrices - first)
                X, scales = self.find(first, count, factors, numbers)
                self.subtract(first, X, scales, factors, numbers)
                del X  # before the next ones take theirs

    def factors(self, numbers: OfStep) -> tuple[Tensor, Tensor]:
        """What to multiply each matrix by, so that its rows (columns, if it is tall) have the mean square norm 1.

        ``numbers`` are those of ``of_step``. The second tensor says which gradients are not finite. A caller makes the
        factor negative of a matrix that must be left out.
        """
        (owner,), matrices = self.owners, len(self._present)
        sums = torch.empty(2, matrices * self._programs, dtype=torch.float32, device=self.device)
        totals = torch.empty(2, matrices, dtype=torch.float32, device=self.device)
        arguments = {"table": self.table, "owner": owner, "sums": sums, **self._shape, **_momentum(numbers)}
        self._add_squares(matrices * self._programs, arguments, {"SCALED": numbers[1]["SCALED"]})
        self._total(2 * matrices, {"sums": sums, "totals": totals, "count": self._programs}, {})
        norms = totals[0].sqrt_().clamp_(min=SMALLEST_NORM)
        infinite = (totals[1] < math.inf).logical_not_()  # NaN too
        return norms.reciprocal_().mul_(math.sqrt(min(self._shape.values()))), infinite

    def find(self, first: int, count: int, factors: Tensor, numbers: OfStep) -> tuple[Tensor, Tensor]:
        """Orthogonalise ``count`` matrices, from the ``first``, and update their momentum, with ``factors`` of all.

        Returns:
            float16 (count, rows, n), and float32 (count,), what each must be multiplied by.
        """
        arguments, constants = numbers
        X = torch.empty(count, *self._shape.values(), dtype=torch.float16, device=self.device)
        own = {"X": X, "factors": factors, **self._place(first, arguments), **_momentum(numbers)}
        own["left_out_at"] = arguments["left_out_at"]
        (owner,) = self.owners
        self._write_directions(count * self._programs, {"table": self.table, "owner": owner, **own}, constants)
        return self._orthogonalize(X)

    def subtract(
        self, first: int, X: Tensor, scales: Tensor, factors: Tensor, numbers: OfStep, rows: int | None = None
    ) -> None:
        """Subtract ``X`` (count, rows, n) times ``scales`` (count,) from the matrices from the ``first`` on.

        ``rows`` are those of a whole matrix, if these are parts.
        """
        arguments, constants = numbers
        size = step_factor(self._shape["rows"] if rows is None else rows, self._shape["n"])
        own = {"X": X, "factors": factors, "scales": scales, **self._place(first, arguments)}
        own |= {"step_size": arguments["step_size"] * size, "limit": element_limit(size), "decay": arguments["decay"]}
        rounding = {name: constants[name] for name in ("STOCHASTIC", "CHECKED", "MIXED")}
        (owner,) = self.owners
        self._update_weights(len(X) * self._programs, {"table": self.table, "owner": owner, **own}, rounding)

    def _place(self, first: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """What kernels that begin with the ``first`` matrix take, in the order of their parameters."""
        random = {name: arguments[name] for name in ("step", "seed")}
        return {**random, "first": first, "programs": self._programs, **self._shape}

    def _in_tensors(self, bad: Tensor) -> Tensor:
        """Whether any matrix of the same tensor is ``bad``."""
        if self._tensors is None:  # the number of each matrix's tensor
            _, tensors = numpy.unique(self.streams[self._present], return_inverse=True)
            self._tensors = torch.from_numpy(tensors).to(bad.device)
        found = torch.zeros(len(bad), dtype=torch.int32, device=bad.device)
        return found.index_add_(0, self._tensors, bad.int())[self._tensors] > 0


def make_launches(members: list[Member]) -> tuple[list[Launch], list[Member]]:
    """Launches for ``members``, plain weights of this rule, and the members that no kernel takes."""
    launches, unfit = launches_of(members, MatrixGeometry.of_matrix, Launch)
    for launch in launches:
        launch.repeat_members()
    return launches, unfit
