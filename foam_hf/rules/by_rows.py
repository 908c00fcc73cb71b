"""The loop over chunks of rows, for rules that can update a weight row by row, and the arithmetic that rules share.

Symbols are the paper's (arXiv 2512.07112). All tensors are float32. The gradient ``G`` is (rows, blocks, width), and
folded moments ``m`` and ``v`` are (rows, blocks, 1): ``fold`` is a mean over the last dimension, and broadcasting
unfolds. ``b1, b2`` are Adam's betas, ``c1 = 1 - b1**t`` and ``c2 = 1 - b2**t`` its bias corrections, and ``rho`` is
the residual's scale. A rule updates its moments in place. It returns the update ``U`` as a numerator and a
denominator.
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

Fraction = tuple[Tensor, Tensor]  # numerator and denominator
UpdateChunk = Callable[[range, Tensor, Tensor, list[Tensor]], None]


def fold(X: Tensor) -> Tensor:
    """The mean over each block: (rows, blocks, width) -> (rows, blocks, 1)."""
    if X.shape[-1] <= 4:  # torch adds a few slices several times faster than it reduces a very short dimension
        return reduce(torch.add, X.split(1, dim=-1)) / X.shape[-1]
    return X.mean(-1, keepdim=True)


def limit_numerator_(N: Tensor, S: Tensor) -> Tensor:
    """Clamp ``N``, in place, so that ``N / S`` is at most ``LARGEST_STEP`` in magnitude; returns ``N``."""
    limit = S * LARGEST_STEP
    return torch.minimum(torch.maximum(N, -limit, out=N), limit, out=N)


def subtract_update_(W: Tensor, U: Fraction, h: Hyper) -> None:
    """W <- W - lr * scale * U; ``W`` has decayed already."""
    W.addcdiv_(*U, value=-h.lr * h.scale)


class Moment(Protocol):
    """A moment that is loaded and stored by the rows of its weight."""

    def load(self, rows: range) -> Tensor:
        """``rows`` as float32. The rule changes the result in place and passes it to ``store``."""

    def store(self, rows: range, value: Tensor, h: Hyper) -> None: ...


class RowMoment:
    """A tensor of state with a row for each row of its weight, folded at ``level``; ``substream`` as in ``store``."""

    def __init__(self, x: Tensor, place: Place, level: Level, substream: int) -> None:
        self.rows, self.substream = as_rows(x, x.shape[-1] if x.dim() else 1), substream
        width = block_width(level, place.columns)
        self.where = place.first_row, place.first_column // width, num_blocks(level, place.columns)

    def load(self, rows: range) -> Tensor:
        return load(self.rows, rows)

    def store(self, rows: range, value: Tensor, h: Hyper) -> None:
        store(self.rows, rows, value, h, self.substream, *self.where)


def row_moments(state: Sequence[Tensor], weight: Rows, level: Level) -> list[RowMoment]:
    """The tensors of ``state``, which are folded at ``level``; the first one has substream 1, as the weight has 0."""
    return [RowMoment(x, weight.place, level, number) for number, x in enumerate(state, start=1)]


def update_rows(
    weight: Rows,
    grad: Tensor,
    moments: Sequence[Moment],
    update_chunk: UpdateChunk,
    h: Hyper,
    *,
    width: int = 1,
    left_out_at: Tensor | None = None,
    multiple: int = 1,
) -> None:
    """Update a weight and its moments chunk by chunk, by ``update_chunk(rows, G, W, moments)``.

    ``update_chunk`` gets float32 tensors of (rows, ...) and changes ``W`` and ``moments`` in place. If ``left_out_at``
    is given, blocks of ``width`` columns whose gradient is not finite keep their weights and moments, and ``G`` is
    zero there. ``multiple`` is as in ``tensors.rows.chunks``.
    """
    n = grad.shape[-1] if grad.dim() else 1
    gradient = as_rows(grad, n)
    for rows in chunks(len(weight) if n else 0, n, grad.device, multiple):
        G, kept = load(gradient, rows), None
        loaded = [moment.load(rows) for moment in moments]
        if left_out_at is not None and (mask := left_out_blocks(G, width)) is not None:
            left_out_at.masked_fill_(mask.any(), h.step)
            kept = KeptBlocks(mask, G, weight.unchanged(rows), loaded, width)
            G = kept.gradient
        W = weight.load(rows, h)
        update_chunk(rows, G, W, loaded)
        if kept is not None:
            kept.restore(W, loaded)
        weight.store(rows, W, h)
        for moment, value in zip(moments, loaded, strict=True):
            moment.store(rows, value, h)
    weight.finish()


def in_blocks(width: int, *wide: Tensor, moments: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Views of ``wide`` (rows, n) as (rows, blocks, width) and of ``moments`` as (rows, blocks, 1).

    The full blocks come first; the shorter last block of every row, if there is one, comes as a second item.
    """
    n = wide[0].shape[-1]
    return zip(*(blocked(x, width) for x in wide), *(split_moment(m, width, n) for m in moments), strict=True)
