"""Clipping by the norm of all gradients as Triton kernels, where a dozen small operations take the host's time.

One finds what a bucket's gradients are divided by, the other corrects the moments of all parameters afterwards.
"""

from __future__ import annotations

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import KernelCall
from foam_hf.kernels.tables import device_of, owner_table
from foam_hf.kernels.uploads import PINNED

ELEMENTS = 4096  # of a program
NORMS = 128  # at a time
_FIELDS = 5  # of a row of the table: where a moment is, and its value before; its elements, decay, and ratio's number


@triton.jit
def _rescale_kernel(table, owner, ratios, FIELDS: tl.constexpr, C: tl.constexpr):
    row = table + tl.load(owner + 2 * tl.program_id(0)).to(tl.int64) * FIELDS
    index = tl.load(owner + 2 * tl.program_id(0) + 1).to(tl.int64)
    X = tl.load(row).to(tl.pointer_type(tl.float32))
    before_at = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    decay = tl.load(row + 3).to(tl.int32).to(tl.float32, bitcast=True)
    number = tl.load(row + 4)
    ratio = tl.load(ratios + (number >> 1))
    squared = number % 2 == 1
    at = index * C + tl.arange(0, C)
    mask = at < tl.load(row + 2)
    x, before = tl.load(X + at, mask=mask, other=0.0), tl.load(before_at + at, mask=mask, other=0.0)
    change = x - before * decay
    change = tl.where(squared & (change < 0), 0.0, change)  # rounding may leave less
    factor = tl.where(squared, ratio * ratio, ratio)
    new = tl.fma(before, decay, change * factor)
    new = tl.where(tl.abs(ratio) < float("inf"), new, before)  # NaN is not less either
    tl.store(X + at, tl.where(ratio == 1.0, x, new), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(norms, shares, index, sums, scale, count, micros, largest, least, C: tl.constexpr):
    squares, seen = tl.load(sums), tl.load(sums + 1)
    start = 0
    while start < count:
        at = start + tl.arange(0, C)
        norm = tl.load(norms + at, mask=at < count, other=0.0)
        share = tl.load(shares + tl.load(index + at, mask=at < count, other=0), mask=at < count, other=0.0)
        squares += tl.sum(norm * norm, 0)
        seen += tl.sum(share, 0)
        start += C
    tl.store(sums, squares)
    tl.store(sums + 1, seen)
    expected = tl.sqrt(squares * micros / tl.maximum(seen, least))
    tl.store(scale, tl.maximum((expected + 1e-6) / largest, 1.0) + expected * 0.0)  # NaN if it is not finite


class Scaling:
    """Launches the kernel that adds a bucket's gradients to the sums of a step, and finds their scale."""

    def __init__(self) -> None:
        self._call = KernelCall(_scale_kernel, {"C": NORMS}, num_warps=1)

    def run(
        self, norms: Tensor, shares: Tensor, index: Tensor, sums: Tensor, micros: int, largest: float, least: float
    ) -> Tensor:
        """What to divide the gradients by, float32 (1,), as ``ClipByAll.before``; all tensors are on one device.

        Args:
            norms: of the gradients, float32 (n,).
            shares: float32, of all parameters; ``index``, int64 (n,), has the numbers of these.
            sums: float32 (2,), of the squares and shares of the step so far, to which those of these are added.
            micros: how many micro-batches the step has.
            largest: the norm that is allowed.
            least: the least share that the step counts as seen.
        """
        scale = torch.empty(1, dtype=torch.float32, device=sums.device)
        tensors = {"norms": norms, "shares": shares, "index": index, "sums": sums, "scale": scale}
        numbers = {"count": len(norms), "micros": float(micros), "largest": float(largest), "least": float(least)}
        with device_of(sums.device):
            self._call(1, {**tensors, **numbers}, {})
        return scale


class Rescaling:
    """Launches the kernel; which program works on what is kept from step to step."""

    def __init__(self) -> None:
        self._call = KernelCall(_rescale_kernel, {"FIELDS": _FIELDS, "C": ELEMENTS}, num_warps=4)
        self._sizes: list[int] = []
        self._owner = torch.empty(0)

    def run(
        self,
        xs: list[Tensor],
        before: list[Tensor],
        decays: list[float],
        squared: list[bool],
        numbers: list[int],
        ratios: Tensor,
    ) -> None:
        """Let each of ``xs`` be its decay times ``before`` plus a ratio, or its square, times the rest, in place.

        With a ratio of 1 no bit changes. With one that is not finite, the moment becomes ``before``.

        Args:
            xs: float32, contiguous, on one device.
            before: as ``xs``.
            decays: by what an update has multiplied each.
            squared: whether a moment is linear in squares of the gradient.
            numbers: of each moment's ratio.
            ratios: float32, one-dimensional, on that device.
        """
        sizes, device = [x.numel() for x in xs], ratios.device
        if sizes != self._sizes or self._owner.device != device:
            programs = -(-numpy.array(sizes, dtype=numpy.int64) // ELEMENTS)
            self._sizes, self._owner = sizes, owner_table(programs, programs > 0, device)
        table = numpy.empty((len(sizes), _FIELDS), dtype=numpy.int64)
        table[:, 0] = [x.data_ptr() for x in xs]
        table[:, 1] = [x.data_ptr() for x in before]
        table[:, 2] = sizes
        table[:, 3] = numpy.array(decays, dtype=numpy.float32).view(numpy.int32)
        table[:, 4] = 2 * numpy.array(numbers) + numpy.array(squared)
        rows = torch.from_numpy(table)
        if device.type == "cuda" and table.nbytes >= PINNED:
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        if len(self._owner):
            with device_of(device):
                self._call(len(self._owner), {"table": rows, "owner": self._owner, "ratios": ratios}, {})
