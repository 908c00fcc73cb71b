"""Which blocks of a gradient are not finite, and an update that leaves them as they were.

A block is left out if the sum of its gradient's squares is not finite in float32: NaN, infinity, or an element beyond
1.8e19. ``left_out_at`` is an int32 tensor of one element on the gradient's device, which then becomes the number of
the step; None where nothing is looked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from foam_hf.tensors.folding import blocked


def left_out_blocks(G: Tensor, width: int) -> Tensor | None:
    """Which blocks of ``width`` columns a step must leave out: bool (rows, blocks), or None where it is none.

    ``G`` is float32 (rows, n). On a CPU one product without temporaries answers for nearly every gradient; elsewhere
    an answer would wait for the device, and the mask is always made.
    """
    if G.device.type == "cpu":
        flat = G.reshape(-1)
        if math.isfinite(torch.dot(flat, flat).item()):
            return None
    sums = torch.cat([part.square().sum(-1) for part in blocked(G, width)], 1)
    mask = (sums < math.inf).logical_not_()  # NaN too
    return None if G.device.type == "cpu" and not bool(mask.any()) else mask


class KeptBlocks:
    """The blocks of a chunk that keep what they hold: ``restore`` undoes what an update did to them."""

    def __init__(self, mask: Tensor, G: Tensor, weight: Tensor, moments: Sequence[Tensor], width: int) -> None:
        wide = mask.repeat_interleave(width, 1)[:, : G.shape[1]]
        self.gradient = G.masked_fill(wide, 0.0)  # a new tensor: G may be the gradient itself
        self._old = [(wide, weight), *((mask, moment.clone()) for moment in moments)]

    def restore(self, W: Tensor, moments: Sequence[Tensor]) -> None:
        for (mask, old), x in zip(self._old, (W, *moments), strict=True):
            x.copy_(torch.where(mask, old, x))


@contextmanager
def leaving_out_whole(grad: Tensor, held: Sequence[Tensor], left_out_at: Tensor | None, step: int) -> Iterator[bool]:
    """Around an update of ``held`` whose unit is the whole tensor: it is undone if ``grad`` is not finite.

    Gives False where that is known before the update. Elsewhere an answer would wait for the device, so what is held
    is copied.
    """
    if left_out_at is None:
        yield True
        return
    unfit = (grad.float().square().sum() < math.inf).logical_not_()  # NaN too
    left_out_at.masked_fill_(unfit, step)
    if grad.device.type == "cpu":
        yield not bool(unfit)
        return
    old = [x.clone() for x in held]
    yield True
    for x, kept in zip(held, old, strict=True):
        x.copy_(torch.where(unfit, kept, x))
