"""How a step leaves out the blocks of a weight whose gradient is NaN or infinite.

A block is left out if the sum of its gradient's squares is not finite in float32. That happens if an element is NaN,
infinite, or beyond 1.8e19. ``left_out_at`` is an int32 tensor of one element on the gradient's device. A step that
leaves out a block writes its number there; None turns the check off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from foam_hf.tensors.folding import blocked


def left_out_blocks(G: Tensor, width: int) -> Tensor | None:
    """Which blocks of ``width`` columns a step must leave out: bool (rows, blocks), or None if there are none.

    ``G`` is float32 (rows, n). On a CPU one dot product, which allocates nothing, clears nearly every gradient. On a
    GPU the host would have to wait for that product, so the mask is always made and returned.
    """
    if G.device.type == "cpu":
        flat = G.reshape(-1)
        if math.isfinite(torch.dot(flat, flat).item()):
            return None
    sums = torch.cat([part.square().sum(-1) for part in blocked(G, width)], 1)
    mask = (sums < math.inf).logical_not_()  # NaN too
    return None if G.device.type == "cpu" and not bool(mask.any()) else mask


class KeptBlocks:
    """Copies of the weights and moments of a chunk. ``restore`` writes them back to the blocks that are left out.

    ``mask`` is from ``left_out_blocks``; ``G`` and ``weight`` are float32 (rows, n), ``moments`` (rows, blocks).
    ``gradient`` is ``G`` with zeros in those blocks.
    """

    def __init__(self, mask: Tensor, G: Tensor, weight: Tensor, moments: Sequence[Tensor], width: int) -> None:
        wide = mask.repeat_interleave(width, 1)[:, : G.shape[1]]
        self.gradient = G.masked_fill(wide, 0.0)  # a new tensor: G may be the gradient itself
        self._old = [(wide, weight), *((mask, moment.clone()) for moment in moments)]

    def restore(self, W: Tensor, moments: Sequence[Tensor]) -> None:
        for (mask, old), x in zip(self._old, (W, *moments), strict=True):
            x.copy_(torch.where(mask, old, x))


@contextmanager
def undo_if_nonfinite(grad: Tensor, held: Sequence[Tensor], left_out_at: Tensor | None, step: int) -> Iterator[bool]:
    """Undo the changes of the tensors ``held`` in the ``with`` block if ``grad`` is not finite.

    This is for rules that leave out whole tensors, not blocks. On a CPU ``grad`` is checked first, and the value of
    the context is False if the update must not run. On a GPU the check would make the host wait, so the value is True,
    and copies of ``held`` are restored on the device where needed.
    """
    if left_out_at is None:
        yield True
        return
    nonfinite = (grad.float().square().sum() < math.inf).logical_not_()  # NaN too
    left_out_at.masked_fill_(nonfinite, step)
    with undo_if(nonfinite, held) as wanted:
        yield wanted


@contextmanager
def undo_if(unwanted: Tensor, held: Sequence[Tensor]) -> Iterator[bool]:
    """As ``undo_if_nonfinite``, where ``unwanted``, bool of one element, says whether to undo."""
    if unwanted.device.type == "cpu":
        yield not bool(unwanted)
        return
    old = [x.clone() for x in held]
    yield True
    for x, kept in zip(held, old, strict=True):
        x.copy_(torch.where(unwanted, kept, x))
