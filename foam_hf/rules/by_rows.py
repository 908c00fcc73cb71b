"""The loop of rules that need a chunk of rows at a time, and the arithmetic that rules share.

In the paper's symbols (arXiv 2512.07112) a rule sees float32 parts of a weight in blocks: the gradient ``G`` is (rows,
blocks, width), folded moments ``m`` and ``v`` are (rows, blocks, 1), so ``fold`` is a mean over the last dimension and
unfolding is broadcasting. ``b1, b2`` are Adam's betas, ``c1 = 1 - b1**t`` and ``c2 = 1 - b2**t`` its bias corrections,
``rho`` is the residual's scale. A rule updates its moments in place and gives the numerator and the denominator of the
direction ``U``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from foam_hf.rules.rule import LARGEST_STEP
from foam_hf.tensors.finite import KeptBlocks, left_out_blocks
from foam_hf.tensors.folding import Level, block_width, blocked, num_blocks, split_moment
from foam_hf.tensors.places import Place
from foam_hf.tensors.rows import Rows, as_rows, chunks, load, store
from foam_hf.tensors.step import Hyper

Fraction = tuple[Tensor, Tensor]
Change = Callable[[range, Tensor, Tensor, list[Tensor]], None]


def fold(X: Tensor) -> Tensor:
    if X.shape[-1] <= 4:  # torch reduces a very short dimension several times slower than it adds slices
        return reduce(torch.add, X.split(1, dim=-1)) / X.shape[-1]
    return X.mean(-1, keepdim=True)


def bounded_(N: Tensor, S: Tensor) -> Tensor:
    """``N``, an update times its root of a second moment ``S``, within what a step may be."""
    limit = S * LARGEST_STEP
    return torch.minimum(torch.maximum(N, -limit, out=N), limit, out=N)


def step_(W: Tensor, U: Fraction, h: Hyper) -> None:
    """W <- W - lr * scale * U, where ``W`` has decayed already."""
    W.addcdiv_(*U, value=-h.lr * h.scale)


class Moment(Protocol):
    """State that has rows as its weight."""

    def load(self, rows: range) -> Tensor:
        """``rows`` as float32; what is done to it in place is what ``store`` gets."""

    def store(self, rows: range, value: Tensor, h: Hyper) -> None: ...


class RowMoment:
    """A tensor of state whose rows are those of its weight, folded at ``level``; ``kind`` is its random stream."""

    def __init__(self, x: Tensor, place: Place, level: Level, kind: int) -> None:
        self.rows, self.kind = as_rows(x, x.shape[-1] if x.dim() else 1), kind
        width = block_width(level, place.columns)
        self.where = place.first_row, place.first_column // width, num_blocks(level, place.columns)

    def load(self, rows: range) -> Tensor:
        return load(self.rows, rows)

    def store(self, rows: range, value: Tensor, h: Hyper) -> None:
        store(self.rows, rows, value, h, self.kind, *self.where)


def row_moments(state: Sequence[Tensor], weight: Rows, level: Level) -> list[RowMoment]:
    """The tensors of ``state``, folded at ``level``, with random streams in order."""
    return [RowMoment(x, weight.place, level, kind) for kind, x in enumerate(state, start=1)]


def change_rows(
    weight: Rows,
    grad: Tensor,
    moments: Sequence[Moment],
    change: Change,
    h: Hyper,
    *,
    width: int = 1,
    left_out_at: Tensor | None = None,
    together: int = 1,
) -> None:
    """Let ``change`` advance chunks of rows: ``change(rows, G, W, moments)``, in place, all float32 (rows, ...).

    Chunks are bounded, and of a multiple of ``together`` rows. With ``left_out_at`` blocks of ``width`` columns whose
    gradient is not finite keep their weights and moments, and ``change`` sees zeros there.
    """
    n = grad.shape[-1] if grad.dim() else 1
    gradient = as_rows(grad, n)
    for rows in chunks(len(weight) if n else 0, n, grad.device, together):
        G, kept = load(gradient, rows), None
        loaded = [moment.load(rows) for moment in moments]
        if left_out_at is not None and (mask := left_out_blocks(G, width)) is not None:
            left_out_at.masked_fill_(mask.any(), h.step)
            kept = KeptBlocks(mask, G, weight.unchanged(rows), loaded, width)
            G = kept.gradient
        W = weight.load(rows, h)
        change(rows, G, W, loaded)
        if kept is not None:
            kept.restore(W, loaded)
        weight.store(rows, W, h)
        for moment, value in zip(moments, loaded, strict=True):
            moment.store(rows, value, h)
    weight.finish()


def in_blocks(width: int, *wide: Tensor, moments: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """``wide`` (rows, n) as (rows, blocks, width), ``moments`` as (rows, blocks, 1); then the shorter last ones."""
    n = wide[0].shape[-1]
    return zip(*(blocked(x, width) for x in wide), *(split_moment(m, width, n) for m in moments), strict=True)
