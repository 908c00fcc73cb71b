"""FOAM with Muon in two halves, by the kernels of ``muon_kernel``, for matrices whose rows ranks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from torch import Tensor

from foam_hf.kernels.tables import Entry, device_of
from foam_hf.kernels.uploads import SharedTables, share_tables
from foam_hf.rules.muon_kernel import Launch, MatrixGeometry
from foam_hf.rules.rule import Part
from foam_hf.tensors.folding import Level
from foam_hf.tensors.places import whole_place
from foam_hf.tensors.step import Hyper


def takes(weight: torch.dtype, G: Tensor, m: Tensor, level: Level) -> bool:
    """Whether ``Halves`` updates matrices like this one, whose gradient and momentum may be on the meta device."""
    entry = Entry(torch.empty_like(G, dtype=weight, device="meta"), G, (m,), level, 0, whole_place(G), 0)
    return MatrixGeometry.of_matrix(entry) is not None


class Halves:
    """``rule.Halves`` in kernels, for plain weights: one launch finds directions, another one updates weights."""

    dtype, scaled = torch.float16, True

    def __init__(self, parts: Sequence[Part], own: slice, level: Level) -> None:
        self._parts, self._own, self._level = parts, parts[own], level
        self._finds: tuple[Launch, SharedTables] | None = None
        self._subtracts: tuple[Launch, SharedTables] | None = None
        if parts[0].weight.numel():  # this launch reads neither gradients nor momenta
            self._subtracts = _launch(
                [Entry(part.weight, part.weight, (part.moment,), level, part.stream, part.place, 0) for part in parts]
            )
        size = 1 + max(part.stream for part in parts)
        self._unread = torch.empty(size, dtype=torch.int32, device=parts[0].weight.device)

    def find(
        self, G: Tensor, M: Tensor, h: Hyper, grad_scale: Tensor | None, left_out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self._finds is None:
            entries = [
                Entry(g, g, (m,), self._level, part.stream, part.whole, 0)
                for g, m, part in zip(G, M, self._own, strict=True)
            ]
            self._finds = _launch(entries)
        launch, tables = self._finds
        launch.move(_addresses(G), _addresses(M))
        tables.upload()
        numbers = launch.of_step(h, grad_scale, None if left_out is None else self._unread)
        with device_of(G.device):
            factors, _ = launch.factors(numbers)
            if left_out is not None:
                factors.masked_fill_(left_out, -1.0)
            return launch.find(0, len(G), factors, numbers)

    def subtract(
        self, X: Tensor, M: Sequence[Tensor], scales: Tensor | None, h: Hyper, left_out: Tensor | None
    ) -> None:
        if self._subtracts is None or scales is None:
            return
        torch._foreach_copy_([part.moment for part in self._parts], list(M))  # ``find`` has kept those left out
        launch, tables = self._subtracts
        tables.upload()
        numbers = launch.of_step(h, None, None if left_out is None else self._unread)
        factors = torch.ones_like(scales)
        if left_out is not None:
            factors.masked_fill_(left_out, -1.0)
        with device_of(X.device):
            launch.subtract(0, X, scales, factors, numbers, self._parts[0].place.rows)


def _launch(entries: list[Entry]) -> tuple[Launch, SharedTables]:
    found = [MatrixGeometry.of_matrix(entry) for entry in entries]
    geometries = [geometry for geometry in found if geometry is not None]
    if len(geometries) < len(found):
        strides = entries[found.index(None)].weight.stride()
        raise RuntimeError(f"the shard of a weight is not contiguous: got strides {strides}; expected it contiguous")
    aligned = all(geometry.aligned for geometry in geometries)  # of weights alone, where it changes no bit
    launch = Launch(replace(geometries[0], aligned=aligned), entries)
    (tables,) = share_tables([launch])
    return launch, tables


def _addresses(x: Tensor) -> numpy.ndarray:
    """The addresses of the matrices of ``x``, int64."""
    return x.data_ptr() + x.stride(0) * x.element_size() * numpy.arange(len(x))
