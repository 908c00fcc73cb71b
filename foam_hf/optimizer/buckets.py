"""The buckets of gradient release: parameters whose gradients wait for each other, to be updated in one launch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from foam_hf.optimizer.sharding import largest_share
from foam_hf.tensors.places import local

WAITING = 256 * 2**20  # bytes of gradients at which a bucket is updated at the latest


class Bucket:
    """Parameters whose gradients are collected for one launch."""

    def __init__(self, limit: int, stream: Any = None) -> None:
        self.params: list[Tensor] = []
        self._limit, self._held, self._stream = limit, 0, stream

    def add(self, p: Tensor, grad: Tensor) -> list[Tensor]:
        """Add ``p``. If the gradients now have ``limit`` bytes or more, return all parameters and empty the bucket."""
        self.params.append(p)
        self._held += largest_share(grad)  # all ranks must update the same weights together, as some add up sums
        return self.take() if self._held >= self._limit else []

    def take(self) -> list[Tensor]:
        """Return all parameters and empty the bucket."""
        params, self.params, self._held = self.params, [], 0
        return params

    def wait(self) -> list[Tensor]:
        """As ``take``; the current CUDA stream waits for the bucket's, in which the gradients are computed."""
        if self.params and self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            if current != self._stream:
                current.wait_stream(self._stream)
                for grad in gradients(self.params):
                    if grad is not None:
                        local(grad).record_stream(current)
        return self.take()


def stream_of(grad: Any) -> torch.cuda.Stream | None:
    """The current CUDA stream, in which ``grad`` was computed, or None on a CPU."""
    device = local(grad).device
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def gradients(params: list[Tensor]) -> list[Any]:
    """The gradient of each parameter, or None."""
    with torch._C.DisableTorchFunctionSubclass():  # or tensor subclasses would run Python code
        return [p.grad for p in params]


def waiting_limit(params: Iterable[Tensor]) -> int:
    """Bytes at which a bucket is full: those of the largest gradient, which must fit anyway, at most ``WAITING``."""
    return min(WAITING, max(map(largest_share, params), default=0))
