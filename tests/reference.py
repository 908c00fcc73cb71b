"""FOAM as slow, readable float64 arithmetic, one row and one block at a time. Shares no code with foam_hf."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max


def block_bounds(n: int, level: int | str) -> list[tuple[int, int]]:
    width = max(n, 1) if level == "row" else 2**level
    return [(start, min(start + width, n)) for start in range(0, n, width)]


class Reference:
    """The state and step of one parameter. ``step`` takes a gradient and returns the new weight, float64.

    A block whose gradient's squares have no finite sum in float32 is left as it is, and is zeros to row and column.
    """

    def __init__(self, weight: Tensor, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, level=8, scale=0.25,
                 second_moment="block", residual_scale=1.0):  # fmt: skip
        self.weight = weight.detach().double().clone()
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        plain = weight.dim() < 2
        self.level = 0 if plain else level
        self.scale = 1.0 if plain else scale
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
                        U[i, j] = (m / c1 + self.rho * R) / (math.sqrt(V[i, j].item()) + self.eps)
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
        return (b2 * torch.nan_to_num(before) + (1 - b2) * GG) / c2  # 0/0 where there never was a gradient
