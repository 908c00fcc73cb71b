"""A weight as rows of its last dimension: how rules read them as float32, and how they write them back.

Each *kind of weight* has a class for this. Tensors of float32, bfloat16 and float16 are the plain kind, read and
written by ``PlainRows``. A tensor subclass of another kind names its class in the attribute ``foam_rows``, so that
rules need not know the kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from foam_hf.tensors.places import Place, local, whole_place
from foam_hf.tensors.rounding import random_bits, stochastic_round_
from foam_hf.tensors.step import Hyper

PLAIN = "plain"
# Elements that are updated at a time: on a CPU so few that they stay in its cache, and so many that threads have more
# to do than to wait for each other; on a GPU so few that temporaries stay small.
CHUNK_CPU, CHUNK_GPU = 1 << 19, 1 << 24


class Rows(Protocol):
    """The rows of a weight of any kind, float32 (rows, n): a rule loads a chunk, changes it in place and stores it."""

    kind: ClassVar[str]
    kernels: ClassVar[Mapping[str, str]]  # rule -> module of its kernels for this kind; empty for PLAIN
    place: Place

    def __init__(self, p: Tensor, place: Place) -> None: ...

    def __len__(self) -> int: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that an update changes."""

    def load(self, rows: range, h: Hyper) -> Tensor:
        """The values of ``rows``, from which the rule subtracts its update. Weight decay is applied already."""

    def unchanged(self, rows: range) -> Tensor:
        """What ``store`` must get so that ``rows`` keep their values, not even decayed: a copy."""

    def store(self, rows: range, W: Tensor, h: Hyper) -> None:
        """Write ``W`` to ``rows``, rounded as ``h`` says. ``W`` may be overwritten."""

    def finish(self) -> None:
        """Called once, after all rows are stored."""


class PlainRows:
    """The rows of a weight of float32, bfloat16 or float16."""

    kind: ClassVar[str] = PLAIN
    kernels: ClassVar[Mapping[str, str]] = {}

    def __init__(self, p: Tensor, place: Place) -> None:
        self.p, self.rows, self.place = p, as_rows(p, p.shape[-1] if p.dim() else 1), place

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.p,)

    def load(self, rows: range, h: Hyper) -> Tensor:
        """W * (1 - lr * weight_decay), as in torch.optim.AdamW."""
        W = load(self.rows, rows)
        return W.mul_(1 - h.lr * h.weight_decay) if h.weight_decay else W

    def unchanged(self, rows: range) -> Tensor:
        return load(self.rows, rows).clone()

    def store(self, rows: range, W: Tensor, h: Hyper) -> None:
        place = self.place
        store(self.rows, rows, W, h, 0, place.first_row, place.first_column, place.columns)

    def finish(self) -> None:
        if self.rows.data_ptr() != self.p.data_ptr():
            self.p.copy_(self.rows.view(self.p.shape))


def _rows_class(p: Tensor) -> type[Rows]:
    rows_class: type[Rows] = getattr(p, "foam_rows", PlainRows)
    return rows_class


def weight_rows(p: Tensor, place: Place | None = None) -> Rows:
    """The rows of ``p``, in the class of its kind. ``place`` says where they lie if ``p`` is a piece of a DTensor."""
    return _rows_class(p)(p, whole_place(p) if place is None else place)


def kind_of(p: Tensor) -> str:
    """The name of the kind of weight that ``p`` is: ``PLAIN``, or what the class of its rows says.

    Of a DTensor: the kind of this rank's shard.
    """
    return _rows_class(local(p)).kind


def visiting_layer(p: Tensor) -> Any:
    """The layer that brings ``p`` to its device, if ``p`` is there at times only; None if it always is.

    ``layer.bring(device, aside=True)`` does it for an update. Weights of two layers cannot be updated together.
    """
    return getattr(p, "foam_layer", None)


def kernels_of(p: Tensor) -> Mapping[str, str]:
    """Rule -> module of its kernels for the kind of ``p``. Empty for plain weights, whose rules name their kernels."""
    return _rows_class(p).kernels


def as_rows(x: Tensor, n: int) -> Tensor:
    """``x`` as (rows, n): a view if its strides allow one, else a copy."""
    return x.detach().reshape(x.numel() // n if n else math.prod(x.shape[:-1]), n)


def chunks(rows: int, n: int, device: torch.device, multiple: int = 1) -> Iterator[range]:
    """``range(rows)`` in chunks whose elements, at ``n`` a row, fit ``CHUNK_CPU`` or ``CHUNK_GPU``.

    A chunk has a multiple of ``multiple`` rows, even if those do not fit; the last one may have fewer.
    """
    size = max(1, (CHUNK_CPU if device.type == "cpu" else CHUNK_GPU) // max(1, n * multiple)) * multiple
    return (range(start, min(start + size, rows)) for start in range(0, rows, size))


def load(x: Tensor, rows: range) -> Tensor:
    """``rows`` of ``x`` as float32: a view if ``x`` is float32, else a copy."""
    return x[rows.start : rows.stop].float()


def store(
    x: Tensor,
    rows: range,
    value: Tensor,
    h: Hyper,
    substream: int,
    first_row: int = 0,
    first_column: int = 0,
    n: int | None = None,
) -> None:
    """Write ``value``, float32, to ``rows`` of ``x``, rounded as ``h`` says. A view of those rows is there already.

    Args:
        substream: which tensor of the parameter ``x`` is, so that each draws random bits of its own: 0 to 2, as 3 is
            for the signs of ``rules.micro_batches``.
        first_row: where ``x`` begins in the whole tensor, if it is a piece of one.
        first_column: the same for columns.
        n: columns of the whole tensor; by default those of ``x``.
    """
    if x.dtype == torch.float32 and value.data_ptr() == x[rows.start : rows.stop].data_ptr():
        return
    if x.dtype == torch.bfloat16 and h.stochastic:
        whole_rows = range(first_row + rows.start, first_row + rows.stop)
        columns = range(first_column, first_column + x.shape[-1])
        n = x.shape[-1] if n is None else n
        stream = 4 * h.stream + substream
        bits = random_bits(
            whole_rows, n, seed=h.seed, step=h.step, stream=stream, device=x.device, columns=columns, micro=h.micro
        )
        value = stochastic_round_(value.contiguous(), bits)
    x[rows.start : rows.stop] = value
