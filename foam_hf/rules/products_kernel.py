"""Products of many matrices of one shape as a Triton kernel, and the orthogonalisation that is made of them.

A symmetric product computes the tiles on and below the diagonal and writes each of them twice, which takes two thirds
of the time of a full product of cuBLAS. The bits of a matrix do not depend on how many others there are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import KernelCall
from foam_hf.rules.orthogonal import MARGIN, ROUNDS, SHRINK, Round

TILE, DEPTH = 128, 64  # of a program: rows and columns of its tile, and the part of the sum that it loads at a time
LANES = tl.constexpr(1024)  # sums that are added up at a time
# Full products of more multiplications than this are those of cuBLAS, one matrix at a time, which are faster then.
LARGE = 1 << 31


@triton.jit
def _lower_tile(index):
    """Row and column of tile number ``index`` of those on and below the diagonal."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit(do_not_specialize=["tiles", "tile_columns"])
def _product_kernel(
    A, B, C, ladder, numbers, sums, alpha, c0, c1, c2, c3, tiles, tile_columns, slab,
    m, n, k, a_row, a_column, b_row, b_column, a_size, b_size,
    T: tl.constexpr, D: tl.constexpr,
    SYMMETRIC: tl.constexpr, TERMS: tl.constexpr, POWER: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """C = alpha s^POWER A B + c0 s Y_0 + c1 Y_1 + ..., of matrices of ``a_size`` and ``b_size`` elements.

    ``C`` (m, n) and the ``TERMS`` matrices Y of ``ladder``, ``slab`` elements apart, are contiguous. ``s`` is of
    ``numbers``, one for each matrix. ``sums`` get the sum of a tile's squares.
    """
    matrix = tl.program_id(0) // tiles
    tile = tl.program_id(0) - matrix * tiles
    wide = matrix.to(tl.int64)  # sizes have no .to: Triton makes an argument of 1 a constant
    if SYMMETRIC:
        i, j = _lower_tile(tile)
    else:
        i, j = tile // tile_columns, tile % tile_columns
    row, column, lane = i * T + tl.arange(0, T), j * T + tl.arange(0, T), tl.arange(0, D)
    a = A + wide * a_size + row[:, None] * a_row + lane[None, :] * a_column
    b = B + wide * b_size + lane[:, None] * b_row + column[None, :] * b_column
    inside_row, inside_column = (row < m)[:, None], (column < n)[None, :]
    offset = row[:, None] * n + column[None, :]
    mask = inside_row & inside_column
    scale = tl.load(numbers + matrix)
    for _ in tl.static_range(POWER):
        alpha = alpha * scale
    total = tl.zeros((T, T), tl.float32)
    for term in tl.static_range(TERMS):  # before the products, while registers are free
        earlier = tl.load(ladder + term * slab + wide * m * n + offset, mask=mask, other=0.0)
        if term == 0:
            total += c0 * scale / alpha * earlier.to(tl.float32)
        elif term == 1:
            total += c1 / alpha * earlier.to(tl.float32)
        elif term == 2:
            total += c2 / alpha * earlier.to(tl.float32)
        else:
            total += c3 / alpha * earlier.to(tl.float32)
    for start in range(0, k, D):
        x = tl.load(a, mask=inside_row & (lane < k - start)[None, :], other=0.0)
        y = tl.load(b, mask=inside_column & (lane < k - start)[:, None], other=0.0)
        total = tl.dot(x, y, total)
        a += D * a_column
        b += D * b_row
    total = total * alpha
    if SUMS:  # of the mirrored tile too
        both = tl.where(i == j, 1.0, 2.0)
        tl.store(sums + tl.program_id(0), both * tl.sum(tl.sum(tl.where(mask, total * total, 0.0), 1), 0))
    C += wide * m * n
    rounded = total.to(C.dtype.element_ty)
    tl.store(C + offset, rounded, mask=mask)
    if SYMMETRIC and i > j:
        mirrored = (column < n)[:, None] & (row < m)[None, :]
        tl.store(C + column[:, None] * n + row[None, :], tl.trans(rounded), mask=mirrored)


@triton.jit(do_not_specialize=["count", "matrices"])
def _scales_kernel(sums, numbers, count, matrices, smallest, margin, second):
    """From the sums of squares of a matrix's tiles the numbers by which the rounds multiply.

    ``numbers`` (3, matrices): the scale of R in the first round and in the second one, and that of the result.
    """
    matrix = tl.program_id(0)
    total = tl.zeros((LANES,), tl.float32)
    start = 0
    while start < count:
        at = start + tl.arange(0, LANES)
        total += tl.load(sums + matrix.to(tl.int64) * count + at, mask=at < count, other=0.0)
        start += LANES
    square = tl.maximum(tl.sqrt(tl.sum(total, 0)), smallest) * margin
    tl.store(numbers + matrix, 1.0 / square)
    tl.store(numbers + matrices + matrix, second / square)
    tl.store(numbers + 2 * matrices + matrix, 1.0 / tl.sqrt(square))


class Orthogonalizer:
    """Orthogonalises matrices of one shape, ``rows`` x ``n``, many at a time."""

    def __init__(self, rows: int, n: int, device: torch.device) -> None:
        self._rows, self._n, self._tall = rows, n, rows > n
        self._m = min(rows, n)
        self._by_library = self._m * rows * n > LARGE
        side = -(-self._m // TILE)
        self._lower = side * (side + 1) // 2  # tiles
        warps, stages = (4, 3) if _holds_three_stages(device) else (8, 2)
        self._product = KernelCall(_product_kernel, {"T": TILE, "D": DEPTH}, num_warps=warps, num_stages=stages)
        self._find_scales = KernelCall(_scales_kernel, {}, num_warps=4)

    def __call__(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Orthogonalise as ``orthogonal.orthogonalized`` does.

        Args:
            X: float16 (matrices, rows, n), contiguous, overwritten. The mean square of the norms of its rows, of
                a tall matrix of its columns, is 1.

        Returns:
            the result, float16 in the shape of ``X``, and float32 (matrices,), what each must be multiplied by.
        """
        count, m = len(X), self._m
        padded = -(-count // 4) * 4  # so that all parts of a buffer begin on 16 bytes
        floats: dict[str, Any] = {"dtype": torch.float32, "device": X.device}
        ones, scales = torch.ones(padded, **floats), torch.empty(3, padded, **floats)
        sums = torch.empty(count * self._lower, **floats)
        # R, Y_1, Y_2 and Y_3; Y_4 takes the place of R.
        ladder = torch.empty(len(ROUNDS[0].squares), -(-count * m * m // 16) * 16, dtype=X.dtype, device=X.device)
        other = torch.empty_like(X)
        self._write_gram(X, ladder, ones, sums)
        arguments = {"sums": sums, "numbers": scales, "count": self._lower, "matrices": padded}
        arguments |= {"smallest": math.sqrt(m), "margin": MARGIN, "second": SHRINK**2}
        self._find_scales(count, arguments, {})
        self._climb(ladder, count, ROUNDS[0], scales[0])
        self._multiply(X, other, ladder, ROUNDS[0], 1.0, ones)
        self._write_gram(other, ladder, scales[1], None)
        self._climb(ladder, count, ROUNDS[1], ones)
        self._multiply(other, X, ladder, ROUNDS[1], SHRINK, ones)
        return X, scales[2, :count]

    def _write_gram(self, X: Tensor, ladder: Tensor, numbers: Tensor, sums: Tensor | None) -> None:
        """R = s X X^T, of tall matrices s X^T X, and the sums of its squares by tiles."""
        n, m, size = self._n, self._m, self._rows * self._n
        across, along = (1, n) if self._tall else (n, 1)
        strides = {"a_row": across, "a_column": along, "b_row": along, "b_column": across}
        strides |= {"a_size": size, "b_size": size}
        shape = {"m": m, "n": m, "k": size // m}
        how = {"SYMMETRIC": True, "TERMS": 0, "POWER": 1, "SUMS": sums is not None}
        self._run(len(X), (X, X, ladder[0]), ladder, numbers, sums, 1.0, (), shape, strides, how)

    def _climb(self, ladder: Tensor, count: int, coefficients: Round, numbers: Tensor) -> None:
        """Y_1 to Y_4 of s R."""
        m = self._m
        strides = {"a_row": m, "a_column": 1, "b_row": 1, "b_column": m, "a_size": m * m, "b_size": m * m}
        shape = {"m": m, "n": m, "k": m}
        for step, (square, terms) in enumerate(zip(coefficients.squares, coefficients.terms, strict=True)):
            last, target = ladder[step], ladder[(step + 1) % len(ladder)]
            how = {"SYMMETRIC": True, "TERMS": step + 1, "POWER": 0 if step else 2, "SUMS": False}
            self._run(count, (last, last, target), ladder, numbers, None, square, terms, shape, strides, how)

    def _multiply(
        self, X: Tensor, out: Tensor, ladder: Tensor, coefficients: Round, scale: float, ones: Tensor
    ) -> None:
        """out = scale (a + Y_4) X, of tall matrices scale X (a + Y_4)."""
        m, linear = self._m, coefficients.linear * scale
        Y = ladder[0, : len(X) * m * m]
        if self._by_library:
            for x, y, target in zip(X, Y.view(-1, m, m), out, strict=True):
                torch.addmm(x, *((x, y) if self._tall else (y, x)), beta=linear, alpha=scale, out=target)
            return
        rows, n = self._rows, self._n
        strides = {"a_row": m, "a_column": 1, "b_row": 1 if self._tall else n, "b_column": m if self._tall else 1}
        sizes = {"a_size": rows * m, "b_size": m * n}
        operands = (X, Y, out) if self._tall else (Y, X, out)
        how = {"SYMMETRIC": False, "TERMS": 1, "POWER": 0, "SUMS": False}
        shape = {"m": rows, "n": n, "k": m}
        self._run(len(X), operands, X, ones, None, scale, (linear,), shape, strides | sizes, how)

    def _run(
        self,
        count: int,
        operands: tuple[Tensor, Tensor, Tensor],
        ladder: Tensor,
        numbers: Tensor,
        sums: Tensor | None,
        alpha: float,
        terms: tuple[float, ...],
        shape: dict[str, int],
        strides: dict[str, int],
        how: dict[str, Any],
    ) -> None:
        columns = -(-shape["n"] // TILE)
        tiles = self._lower if how["SYMMETRIC"] else -(-shape["m"] // TILE) * columns
        arguments: dict[str, Any] = dict(zip("ABC", operands, strict=True))
        arguments |= {"ladder": ladder, "numbers": numbers, "sums": numbers if sums is None else sums, "alpha": alpha}
        arguments |= dict(zip(("c0", "c1", "c2", "c3"), (*terms, 0.0, 0.0, 0.0, 0.0), strict=False))
        arguments |= {"tiles": tiles, "tile_columns": columns, "slab": ladder.stride(0), **shape, **strides}
        self._product(count * tiles, arguments, how)


def _holds_three_stages(device: torch.device) -> bool:
    """Whether three parts of two tiles fit a program's shared memory: 96 KiB."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
