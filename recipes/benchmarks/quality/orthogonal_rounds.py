"""Find the coefficients of Muon's two rounds, `ROUNDS` of `foam_hf.rules.orthogonal`, and compare them with Muon's.

    python -m recipes.benchmarks.quality.orthogonal_rounds            # about two minutes; needs scipy

A round of ``STEPS`` squares is a polynomial of a fixed form. Least squares from random starts, reweighted towards the
largest errors, find a good one for a short interval. Linear programs, each of which may move the coefficients a
little, then make its largest error the smallest, while the interval grows to the one that is wanted.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, linprog

from foam_hf.rules.orthogonal import SECOND_MARGIN, SMALLEST_VALUE

STEPS = 4
TERMS = [(k, j) for k in range(1, STEPS + 1) for j in range(k)]  # of the coefficients c_kj
COUNT = len(TERMS) + 2  # with b of the last square and a; the other squares are 1 until they are scaled
EASY = 0.034  # the interval's beginning where random starts succeed
Array = NDArray[np.float64]


def levels(theta: Array, y: Array) -> tuple[list[Array], list[Array]]:
    """Y_0 to Y_4 at ``y``, and the derivatives of each with respect to the coefficients, (COUNT, len(y))."""
    Y, D = [y], [np.zeros((COUNT, len(y)))]
    for k in range(1, STEPS + 1):
        b = theta[-2] if k == STEPS else 1.0
        value, slope = b * Y[-1] ** 2, 2 * b * Y[-1] * D[-1]
        if k == STEPS:
            slope[-2] += Y[-1] ** 2
        for i, (step, j) in enumerate(TERMS):
            if step == k:
                value, slope = value + theta[i] * Y[j], slope + theta[i] * D[j]
                slope[i] += Y[j]
        Y.append(value)
        D.append(slope)
    return Y, D


def polynomial(theta: Array, x: Array) -> tuple[Array, Array]:
    """x (a + Y_4(x^2)) and its derivatives, (len(x), COUNT)."""
    Y, D = levels(theta, x * x)
    slope = D[-1]
    slope[-1] += 1
    return x * (theta[-1] + Y[-1]), (slope * x).T


def points(smallest: float, count: int) -> Array:
    """Numbers from ``smallest`` to 1, dense at both ends."""
    even = smallest + (1 - smallest) * (1 - np.cos(np.linspace(0, np.pi, count))) / 2
    return np.unique(np.concatenate([np.exp(np.linspace(np.log(smallest), 0, count)), even]))


def random_start(random: np.random.Generator, x: Array) -> Array:
    theta, u = np.zeros(COUNT), x * x
    for k in range(1, STEPS + 1):
        theta[TERMS.index((k, k - 1))] = c = -(u.max() + u.min()) * random.uniform(0.6, 1.4)
        u = u * u + c * u
    theta[-2] = 10 / np.abs(u).max() * random.uniform(0.3, 2)
    theta[TERMS.index((STEPS, STEPS - 1))] *= theta[-2]
    theta[-1] = 12
    for i, (k, j) in enumerate(TERMS):
        if j < k - 1:
            theta[i] = random.normal() * 0.05
    return theta


def by_least_squares(theta: Array, x: Array) -> tuple[float, Array]:
    weight, best = np.ones(len(x)), (np.inf, theta)

    def finite(value: Array) -> Array:
        return np.nan_to_num(value, nan=1e3, posinf=1e3, neginf=-1e3)

    for _ in range(6):
        theta = least_squares(
            lambda t, w=weight: finite((polynomial(t, x)[0] - 1) * w),
            theta,
            jac=lambda t, w=weight: finite(polynomial(t, x)[1] * w[:, None]),
            method="lm",
            x_scale="jac",
            max_nfev=200,
        ).x
        error = np.abs(polynomial(theta, x)[0] - 1)
        best = min(best, (float(error.max()), theta), key=lambda pair: pair[0])
        if error.max() > 0.9:
            break
        weight = weight * (error / error.max() + 0.03) ** 0.6
        weight /= weight.mean()
    return best


def by_linear_programs(theta: Array, x: Array, reach: float = 0.05) -> tuple[float, Array]:
    best = float(np.abs(polynomial(theta, x)[0] - 1).max())
    for _ in range(60):
        value, slope = polynomial(theta, x)
        size = np.maximum(np.abs(theta), 1e-3)
        slope, error, last = slope * size, value - 1, -np.ones((len(x), 1))
        found = linprog(
            [0.0] * COUNT + [1.0],
            A_ub=np.block([[slope, last], [-slope, last]]),
            b_ub=np.concatenate([-error, error]),
            bounds=[(-reach, reach)] * COUNT + [(0, None)],
        )
        moved = theta if found.x is None else theta + found.x[:COUNT] * size
        largest = float(np.abs(polynomial(moved, x)[0] - 1).max())
        if largest < best - 1e-9:
            best, theta, reach = largest, moved, min(2 * reach, 0.3)
        else:
            reach /= 3
            if reach < 1e-8:
                break
    return best, theta


def scaled(theta: Array) -> tuple[list[float], list[list[float]], float]:
    """b_k, c_kj and a, so that Y_1 to Y_3 are at most 1 on [0, 1]; with seven digits."""
    Y, _ = levels(theta, np.linspace(0, 1, 4001))
    size = [1.0, *(float(np.abs(y).max()) for y in Y[1:STEPS]), 1.0]
    squares = [(theta[-2] if k == STEPS else 1.0) * size[k - 1] ** 2 / size[k] for k in range(1, STEPS + 1)]
    terms = [[theta[TERMS.index((k, j))] * size[j] / size[k] for j in range(k)] for k in range(1, STEPS + 1)]
    return [_rounded(b) for b in squares], [[_rounded(c) for c in some] for some in terms], _rounded(theta[-1])


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=60)
    starts, random, x = parser.parse_args().starts, np.random.default_rng(0), points(EASY, 120)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        tried = [by_least_squares(random_start(random, x), x) for _ in range(starts)]
    start = min(tried, key=lambda pair: pair[0])[1]
    error, easy = by_linear_programs(start, points(EASY, 300), 0.1)
    print(f"from {EASY} to 1: error {error:.4f}", flush=True)
    theta = easy
    for smallest in np.geomspace(EASY, SMALLEST_VALUE, 16)[1:]:
        error, theta = by_linear_programs(theta, points(float(smallest), 300))
    print(f"first round, from {SMALLEST_VALUE} to 1: error {error:.5f}", *scaled(theta), sep="\n  ", flush=True)
    smallest = (1 - error) / ((1 + error) * SECOND_MARGIN)
    error, theta = by_linear_programs(easy, points(smallest, 700))
    print(f"second round, from {smallest:.4f} to 1: error {error:.5f}", *scaled(theta), sep="\n  ")


if __name__ == "__main__":
    main()
