"""Folding: how the columns of a weight are divided into blocks, and the mean over each block.

A weight is seen as rows of its last dimension, of length ``n``. ``F = 2**level`` adjacent columns form a block. If
``F`` does not divide ``n``, the last block of every row is shorter, and its mean is over its own elements.
``level="row"`` makes the whole row one block.
"""

from __future__ import annotations

from torch import Tensor

Level = int | str


def block_width(level: Level, n: int) -> int:
    """Columns in a full block of a row of ``n`` columns: ``min(2**level, n)``, or ``n`` for "row"; at least 1."""
    return max(1, n if level == "row" else min(2 ** int(level), n))


def num_blocks(level: Level, n: int) -> int:
    """Blocks in a row of ``n`` columns, the shorter last one included: ``ceil(n / F)``."""
    return -(-n // block_width(level, n))


def blocked(x: Tensor, width: int) -> list[Tensor]:
    """Views of ``x`` (rows, n) as (rows, blocks, width): the full blocks, then the shorter last block if there is one.

    Nothing is copied; an operation in place on a view writes to ``x``.
    """
    n = x.shape[-1]
    if n and n % width == 0:
        return [x.unflatten(1, (n // width, width))]
    full = n - n % width
    views = [x[:, :full].unflatten(1, (full // width, width))] if full else []
    return views + ([x[:, full:].unsqueeze(1)] if full < n else [])


def split_moment(m: Tensor, width: int, n: int) -> list[Tensor]:
    """Views of a folded moment (rows, ceil(n/width)) as (rows, blocks, 1), in the same parts as :func:`blocked`."""
    if n and n % width == 0:
        return [m.unsqueeze(-1)]
    full = n // width
    views = [m[:, :full].unsqueeze(-1)] if full else []
    return views + ([m[:, full:].unsqueeze(-1)] if n % width else [])


def fold(x: Tensor, level: Level) -> Tensor:
    """Mean over each block of adjacent columns: (..., n) -> (..., ceil(n/F)), in the dtype of ``x``."""
    n = x.shape[-1]
    width = block_width(level, n)
    folded = x.new_empty(*x.shape[:-1], num_blocks(level, n))
    rows, means = x.reshape(-1, n), folded.view(-1, folded.shape[-1])
    for part, mean in zip(blocked(rows, width), split_moment(means, width, n), strict=True):
        mean.copy_(part.mean(-1, keepdim=True))
    return folded


def unfold(m: Tensor, level: Level, n: int) -> Tensor:
    """Broadcast block means back over their columns: (..., ceil(n/F)) -> (..., n)."""
    return m.repeat_interleave(block_width(level, n), dim=-1)[..., :n]
