"""Messages between ranks that hold several tensors of any dtypes, and their exchange: each rank has one for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from foam_hf.tensors.places import Group

ALIGNMENT = 16  # bytes: kernels read aligned addresses faster
Kind = tuple[tuple[int, ...], torch.dtype]  # a shape and a dtype


class Layout:
    """Where the tensors of the messages for, or from, each rank are in one buffer of bytes, by their kinds."""

    def __init__(self, kinds: Sequence[Sequence[Kind]]) -> None:
        self._kinds = kinds
        self.sizes = [sum(_padded(kind) for kind in some) for some in kinds]  # bytes for each rank

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(sum(self.sizes), dtype=torch.uint8, device=device)

    def views(self, buffer: Tensor) -> list[list[Tensor]]:
        """The tensors in ``buffer``, for each rank, of whose message they are."""
        found: list[list[Tensor]] = []
        start = 0
        for kinds in self._kinds:
            found.append([])
            for shape, dtype in kinds:
                part = buffer[start : start + math.prod(shape) * dtype.itemsize]
                found[-1].append(part.view(dtype).view(shape))
                start += _padded((shape, dtype))
        return found


def _padded(kind: Kind) -> int:
    shape, dtype = kind
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Exchange:
    """The messages ``sent``, laid out as ``out``, are on their way to the ranks of ``group``, and theirs come here.

    Without a group there is one rank, whose message to itself is there already.
    """

    def __init__(self, sent: Tensor, out: Layout, coming: Layout, group: Group | None) -> None:
        self._buffers, self._coming = [sent], coming
        self._work: Any = None
        if group is not None:
            self._buffers.append(coming.empty(sent.device))
            self._work = distributed.all_to_all_single(
                self._buffers[-1], sent, coming.sizes, out.sizes, group=group, async_op=True
            )

    def take(self) -> list[list[Tensor]]:
        """The tensors that have come, for each rank. It can be called once; what was sent is freed."""
        if self._work is not None:
            self._work.wait()
        received = self._buffers[-1]
        self._buffers.clear()
        return self._coming.views(received)
