"""FOAM's rules as slow, readable float64 arithmetic, one row and one block at a time.

It shares no code with foam_hf, only the coefficients of Muon's polynomials.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foam_hf.rules.orthogonal import ROUNDS, Round

FLOAT32_MAX = torch.finfo(torch.float32).max


def block_bounds(n: int, level: int | str) -> list[tuple[int, int]]:
    width = max(n, 1) if level == "row" else 2**level
    return [(start, min(start + width, n)) for start in range(0, n, width)]


def _scale(given: float | None, level, second_moment: str) -> float:
    """The default as the docs state it: that of the rule, and 1 if nothing folds."""
    own = {"block": 6.0, "factored": 1.0, "muon": 1.0, "adam_mini": 6.0}[second_moment]
    return given if given is not None else 1.0 if level == 0 else own


class Reference:
    """The block rule, the factored rule or AdamW, for one parameter. ``step`` returns the new weight, float64.

    A block is left out if the sum of its gradient's squares is not finite in float32. It counts as zeros in the means
    over rows and columns.
    """

    def __init__(self, weight: Tensor, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, level=8, scale=None,
                 second_moment="block", residual_scale=1.0):  # fmt: skip
        self.weight = weight.detach().double().clone()
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        plain = weight.dim() < 2
        self.level = 0 if plain else level
        self.scale = 1.0 if plain else _scale(scale, level, second_moment)
        self.factored = second_moment == "factored" and not plain
        self.rho, self.t = residual_scale, 0
        self.m: dict[tuple[int, int], float] = {}
        self.v: dict[tuple[int, int], float] = {}
        self.row: Tensor | None = None
        self.column: Tensor | None = None

    def step(self, grad: Tensor) -> Tensor:
        self.t += 1
        b1, b2 = self.betas
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        n = self.weight.shape[-1] if self.weight.dim() else 1
        G = grad.detach().double().reshape(-1, n).clone()
        kept = torch.zeros(G.shape, dtype=torch.bool)
        for i in range(G.shape[0]):
            for start, stop in block_bounds(n, self.level):
                if not math.fsum(x * x for x in G[i, start:stop].tolist()) < FLOAT32_MAX:
                    kept[i, start:stop] = True
        G[kept] = 0.0
        V = self._factored_second_moment(G.reshape(grad.shape), b2, c2).reshape(-1, n) if self.factored else None
        U = torch.zeros_like(G)
        for i in range(G.shape[0]):
            for block, (start, stop) in enumerate(block_bounds(n, self.level)):
                if kept[i, start]:
                    continue
                g = [G[i, j].item() for j in range(start, stop)]
                mean = math.fsum(g) / len(g)
                square = math.fsum(x * x for x in g) / len(g)
                m = self.m[i, block] = b1 * self.m.get((i, block), 0.0) + (1 - b1) * mean
                v = self.v[i, block] = b2 * self.v.get((i, block), 0.0) + (1 - b2) * square
                for j in range(start, stop):
                    R = G[i, j].item() - mean
                    if V is None:
                        denominator = math.sqrt((v + self.rho**2 * R * R) / c2) + self.eps
                        U[i, j] = (m + self.rho * R) / c1 / denominator
                    else:
                        root = math.sqrt(V[i, j].item())
                        numerator = max(-16 * root, min(m / c1 + self.rho * R, 16 * root))
                        U[i, j] = numerator / (max(root, abs(m / c1 - self.rho * mean) / 4) + self.eps)
        self.weight *= torch.where(kept, 1.0, 1 - self.lr * self.decay).reshape(self.weight.shape)
        self.weight -= self.lr * self.scale * U.reshape(self.weight.shape)
        return self.weight

    def _factored_second_moment(self, G: Tensor, b2: float, c2: float) -> Tensor:
        GG = G * G
        row = self.row if self.row is not None else torch.zeros(G.shape[:-1], dtype=torch.float64)
        column = self.column if self.column is not None else torch.zeros(GG.mean(-2).shape, dtype=torch.float64)
        before = row.unsqueeze(-1) * column.unsqueeze(-2) / row.mean(-1)[..., None, None]
        self.row = b2 * row + (1 - b2) * GG.mean(-1)
        self.column = b2 * column + (1 - b2) * GG.mean(-2)
        return (b2 * torch.nan_to_num(before) + (1 - b2) * GG) / c2  # 0/0 before the first gradient


class MuonReference:
    """FOAM with Muon, one matrix and one block at a time; singular values are replaced by way of a decomposition."""

    def __init__(
        self, weight: Tensor, *, lr, weight_decay=0.0, momentum=0.95, level=8, scale=None, residual_scale=1.0
    ):
        self.weight = weight.detach().double().clone()
        self.lr, self.decay, self.mu, self.level = lr, weight_decay, momentum, level
        self.scale, self.rho = _scale(scale, level, "muon"), residual_scale
        self.bounds = block_bounds(weight.shape[-1], level)
        self.momentum = torch.zeros(*weight.shape[:-1], len(self.bounds), dtype=torch.float64)

    def step(self, grad: Tensor) -> Tensor:
        rows, n = self.weight.shape[-2:]
        G, m = grad.double().reshape(-1, rows, n), self.momentum.view(-1, rows, len(self.bounds))
        U = torch.empty_like(G)
        for i in range(G.shape[0]):
            B = torch.empty(rows, n, dtype=torch.float64)
            for block, (start, stop) in enumerate(self.bounds):
                for row in range(rows):
                    mean = math.fsum(G[i, row, start:stop].tolist()) / (stop - start)
                    m[i, row, block] = self.mu * m[i, row, block] + (1 - self.mu) * mean
                    ahead = (1 - self.mu) * mean + self.mu * m[i, row, block]
                    B[row, start:stop] = ahead + self.rho * (G[i, row, start:stop] - mean)
            U[i] = self.orthogonal(B)
        self.weight *= 1 - self.lr * self.decay
        U = (0.2 * max(rows, n) ** 0.5 * U).clamp(-16, 16)
        self.weight -= self.lr * self.scale * U.view_as(self.weight)
        return self.weight

    @staticmethod
    def orthogonal(B: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(B / max(B.square().sum().sqrt().item(), 1e-7), full_matrices=False)
        bound = max((S**4).sum().sqrt().item(), len(S) ** -0.5) * 1.005
        return U * rounded_values(S / bound**0.5) @ Vh


def rounded_values(x: Tensor) -> Tensor:
    """What the two rounds of ``rules.orthogonal`` make of singular values ``x`` from 0 to 1, float64."""
    first, second = ROUNDS
    return _polynomial(second, _polynomial(first, x) / ((1 + first.error) * 1.01))


def _polynomial(coefficients: Round, x: Tensor) -> Tensor:
    y = [x * x]
    for square, terms in zip(coefficients.squares, coefficients.terms, strict=True):
        y.append(square * y[-1] ** 2 + sum(c * earlier for c, earlier in zip(terms, y, strict=True)))
    return x * (coefficients.linear + y[-1])


class MiniReference:
    """FOAM with Adam-mini: the block rule with one second moment for ``mini_rows`` rows, or for all if it is 0."""

    def __init__(self, weight: Tensor, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, level=8, scale=None,
                 residual_scale=1.0, mini_rows=1):  # fmt: skip
        self.weight = weight.detach().double().clone()
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.scale, self.rho, self.t = _scale(scale, level, "adam_mini"), residual_scale, 0
        n = weight.shape[-1]
        self.bounds = block_bounds(n, level)
        self.rows = weight.numel() // n
        self.together = mini_rows or self.rows
        self.m = torch.zeros(self.rows, len(self.bounds), dtype=torch.float64)
        self.v = torch.zeros(self.rows // self.together, dtype=torch.float64)

    def step(self, grad: Tensor) -> Tensor:
        self.t += 1
        b1, b2 = self.betas
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        G = grad.double().reshape(self.rows, -1)
        U = torch.empty_like(G)
        for block in range(len(self.v)):
            mine = slice(block * self.together, (block + 1) * self.together)
            square = math.fsum((G[mine] ** 2).flatten().tolist()) / G[mine].numel()
            self.v[block] = b2 * self.v[block] + (1 - b2) * square
        for i in range(self.rows):
            v = self.v[i // self.together]
            for j, (start, stop) in enumerate(self.bounds):
                mean = math.fsum(G[i, start:stop].tolist()) / (stop - start)
                self.m[i, j] = b1 * self.m[i, j] + (1 - b1) * mean
                R = self.rho * (G[i, start:stop] - mean)
                root = ((v + R * R) / c2).sqrt()
                U[i, start:stop] = ((self.m[i, j] + R) / c1).clamp(-16 * root, 16 * root) / (root + self.eps)
        self.weight *= 1 - self.lr * self.decay
        self.weight -= self.lr * self.scale * U.view_as(self.weight)
        return self.weight


class MicroReference:
    """The block rule for a gradient that comes in ``k`` micro-batches, one element at a time, as the docs state it."""

    def __init__(self, weight: Tensor, *, lr, k, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, level=8, scale=None,
                 residual_scale=1.0):  # fmt: skip
        self.weight = weight.detach().double().clone()
        self.lr, self.k, self.betas, self.eps, self.decay = lr, k, betas, eps, weight_decay
        self.scale, self.rho, self.t = _scale(scale, level, "block"), residual_scale, 1
        self.bounds = block_bounds(weight.shape[-1], level)
        blocks = weight.shape[0], len(self.bounds)
        self.m, self.v, self.P, self.Q = (torch.zeros(blocks, dtype=torch.float64) for _ in range(4))
        self.come = 0

    def micro(self, grad: Tensor, share: int = 1) -> None:
        """One micro-batch, or with ``share`` above 1 as many that are missing, whose ``grad`` is zero."""
        b1, b2 = self.betas
        c1, c2, before = 1 - b1**self.t, 1 - b2**self.t, 1 - b2 ** (self.t - 1)
        if self.come == 0:
            self.weight *= 1 - self.lr * self.decay
        j, k = self.come + 1, self.k
        for i in range(len(self.weight)):
            for block, (start, stop) in enumerate(self.bounds):
                g = grad[i, start:stop].double()
                r = g - g.mean()
                q = r.square().mean().item()
                self.P[i, block] += g.mean()
                self.Q[i, block] += q
                m, v, P, Q = (x[i, block].item() for x in (self.m, self.v, self.P, self.Q))
                expected = max(v / before, Q) if before else Q
                own = r.square() * (expected / q if q else 0.0)
                second = b2 * v + (1 - b2) * ((k / j * P) ** 2 + k / j * Q)
                numerator = (b1 * m * share / k + (1 - b1) * g.mean() + self.rho * r) / c1
                U = numerator / (((second + self.rho**2 * own) / c2).sqrt() + self.eps)
                limit = 16 * share / k
                self.weight[i, start:stop] -= self.lr * self.scale * U.clamp(-limit, limit)
        self.come += share

    def end(self) -> Tensor:
        """The end of the step: the moments; the new weight, float64."""
        b1, b2 = self.betas
        if self.come < self.k:
            self.micro(torch.zeros_like(self.weight), self.k - self.come)
        self.m = b1 * self.m + (1 - b1) * self.P
        self.v = b2 * self.v + (1 - b2) * (self.P.square() + self.Q)
        self.P, self.Q = torch.zeros_like(self.P), torch.zeros_like(self.Q)
        self.t, self.come = self.t + 1, 0
        return self.weight
