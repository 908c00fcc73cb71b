"""Orthogonalisation: a matrix with its singular values replaced by numbers near 1, by products of matrices alone.

``X`` (m, n) has its shorter side as ``m``; a tall matrix is worked on from the right. Each of two rounds is

    R = X X^T,  Y_k = b_k Y_{k-1} Y_{k-1} + sum_j c_kj Y_j  for k = 1..4 and Y_0 = R,  X <- (a + Y_4) X

which applies the odd polynomial ``x (a + y_4(x^2))`` of degree 33 to the singular values of ``X``. All products but
the last are symmetric, so that half of each is enough. Five iterations of Muon's polynomial of degree 5 take 15
products of ``m x m`` for a square matrix, these take 12, of which 10 are symmetric.

The first round is for numbers from ``SMALLEST_VALUE`` to 1, the second one for what the first makes of these. The
coefficients make the largest distance from 1 as small as the form allows, as those of Polar Express do for degree 5
(arXiv 2505.16932). They are our own: ``recipes/benchmarks/quality/orthogonal_rounds.py`` finds them. Numbers from
0.0015 to 1 end between 0.8 and 1.2, and smaller ones are multiplied by up to 598. Muon's iteration leaves 0.68 to 1.2
of the former, and multiplies by 485.

What is 1 is an upper bound of the largest singular value. Muon takes the Frobenius norm of ``X``. The root of the
Frobenius norm of ``R``, which is there anyway, is closer: ``(sum of s^4)^(1/4)`` instead of ``(sum of s^2)^(1/2)``.

On GPUs matrices are float16, which has eight times finer steps than bfloat16 and is wide enough, as all is scaled.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Round(NamedTuple):
    """The coefficients of a round: ``squares[k - 1]`` is b_k, ``terms[k - 1][j]`` is c_kj, ``linear`` is a.

    ``error`` is how far from 1 the polynomial is at most.
    """

    squares: tuple[float, ...]
    terms: tuple[tuple[float, ...], ...]
    linear: float
    error: float


ROUNDS = (
    Round(
        (2.805995, 3.327033, 2.809991, 90.84277),
        (
            (-3.350221,),
            (0.2028017, 3.720393),
            (0.07491692, -0.1038238, 3.39515),
            (-0.307444, 0.6727274, 0.4088477, 131.6346),
        ),
        48.7889,
        0.92684,
    ),
    Round(
        (2.922218, 3.264264, 2.470389, 27.08069),
        (
            (-3.418899,),
            (0.154355, 3.667557),
            (0.01839755, -0.02895863, 3.15543),
            (-1.498009, 2.89728, 1.500335, 44.72333),
        ),
        23.8692,
        0.19206,
    ),
)
SMALLEST_VALUE = 0.0015
# No singular value is larger in the end, and so no element is: 1.2 and what float16 adds.
LARGEST_VALUE = 1.3
SMALLEST_NORM = 1e-7  # of a matrix that is scaled in full, as in torch.optim.Muon
# What rounding may add to a bound, before the first round and before the second: beyond 1 the polynomials grow fast.
MARGIN, SECOND_MARGIN = 1.005, 1.01
# What the second round multiplies the result of the first by, so that it is at most 1.
SHRINK = 1 / ((1 + ROUNDS[0].error) * SECOND_MARGIN)


def orthogonalized(B: Tensor) -> Tensor:
    """``B`` (rows, n), float32, nearly orthogonal: float32 on a CPU, else float16. Zero stays zero.

    A matrix whose norm is below ``SMALLEST_NORM`` becomes the smaller, the smaller it is.
    """
    tall = B.shape[0] > B.shape[1]
    X = B.mT if tall else B
    m = X.shape[0]
    norm = torch.linalg.vector_norm(X, dtype=torch.float32).clamp_(min=SMALLEST_NORM)
    X = (X * (math.sqrt(m) / norm)).to(torch.float32 if B.device.type == "cpu" else torch.float16)
    R = X @ X.mT  # its trace is m
    square = torch.linalg.vector_norm(R, dtype=torch.float32).clamp_(min=math.sqrt(m)).mul_(MARGIN)
    X = _multiplied(X, R.div_(square), ROUNDS[0], 1.0)
    R = (X @ X.mT).mul_(SHRINK**2 / square)
    X = _multiplied(X, R, ROUNDS[1], SHRINK).div_(square.sqrt())
    return X.mT if tall else X


def _multiplied(X: Tensor, R: Tensor, coefficients: Round, scale: float) -> Tensor:
    """``scale (a + Y_4) X``."""
    Y = [R]
    for square, terms in zip(coefficients.squares, coefficients.terms, strict=True):
        last = torch.addmm(Y[-1], Y[-1], Y[-1], beta=terms[-1], alpha=square)
        for y, term in zip(Y, terms[:-1], strict=False):
            last.add_(y, alpha=term)
        Y.append(last)
    return torch.addmm(X, Y[-1], X, beta=coefficients.linear * scale, alpha=scale)
