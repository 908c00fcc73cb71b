"""A weight as rows of its last dimension, which load as float32 and take what an update made of them.

How they do is what makes a *kind of weight*. Tensors of float32, bfloat16 and float16 are plain: ``PlainRows``. A
tensor subclass of another kind has a class that does it as its attribute ``foam_rows``, and nothing else need know it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from foam_hf.tensors.places import Place, whole
from foam_hf.tensors.rounding import random_bits, stochastic_round_
from foam_hf.tensors.step import Hyper

PLAIN = "plain"
# Elements of a pass: small enough to stay in a core's cache, or to bound the temporaries on a GPU.
CHUNK_CPU, CHUNK_GPU = 1 << 18, 1 << 24


class Rows(Protocol):
    """A weight as its kind has it; what is loaded, changed in place and stored is float32 (rows, n)."""

    kind: ClassVar[str]
    kernels: ClassVar[Mapping[str, str]]  # of a rule's name: the module that updates this kind by it; not for PLAIN
    place: Place

    def __init__(self, p: Tensor, place: Place) -> None: ...

    def __len__(self) -> int: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What an update changes."""

    def load(self, rows: range, h: Hyper) -> Tensor:
        """What to subtract the update from; weight decay is in it."""

    def unchanged(self, rows: range) -> Tensor:
        """What to store where nothing is to change: a copy."""

    def store(self, rows: range, W: Tensor, h: Hyper) -> None:
        """Take ``W``, rounded as ``h`` says; it may be overwritten."""

    def finish(self) -> None:
        """All rows are stored."""


class PlainRows:
    """A weight of float32, bfloat16 or float16 as rows that load decayed, and take what became of them."""

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
    found: type[Rows] = getattr(p, "foam_rows", PlainRows)
    return found


def weight_rows(p: Tensor, place: Place | None = None) -> Rows:
    """``p`` as rows of its kind; ``place`` says where in a whole tensor they lie, if it is a piece of one."""
    return _rows_class(p)(p, whole(p) if place is None else place)


def kind_of(p: Tensor) -> str:
    """The kind of weight that ``p`` is: "plain", or what its class says, as "int8"."""
    return _rows_class(p).kind


def kernels_of(p: Tensor) -> Mapping[str, str]:
    """Rule -> module of the kernels for the kind of ``p``, which is not plain."""
    return _rows_class(p).kernels


def as_rows(x: Tensor, n: int) -> Tensor:
    """``x`` as (rows, n): a view where its strides allow, else a copy."""
    return x.detach().reshape(x.numel() // n if n else math.prod(x.shape[:-1]), n)


def chunks(rows: int, n: int, device: torch.device, together: int = 1) -> Iterator[range]:
    """``rows`` of ``n`` columns in passes of a bounded number of elements, each of ``together`` rows at least."""
    size = max(1, (CHUNK_CPU if device.type == "cpu" else CHUNK_GPU) // max(1, n * together)) * together
    return (range(start, min(start + size, rows)) for start in range(0, rows, size))


def load(x: Tensor, rows: range) -> Tensor:
    """``rows`` of ``x`` as float32: a view where ``x`` is float32, else a copy."""
    return x[rows.start : rows.stop].float()


def store(
    x: Tensor,
    rows: range,
    value: Tensor,
    h: Hyper,
    kind: int,
    first_row: int = 0,
    first_column: int = 0,
    n: int | None = None,
) -> None:
    """Write ``value`` to ``rows`` of ``x``, unless it is those rows; ``kind`` tells a parameter's tensors apart.

    In the whole tensor, whose rows have ``n`` columns (by default those of ``x``), ``x`` begins at ``first_row`` and
    ``first_column``.
    """
    if x.dtype == torch.float32 and value.data_ptr() == x[rows.start : rows.stop].data_ptr():
        return
    if x.dtype == torch.bfloat16 and h.stochastic:
        where = range(first_row + rows.start, first_row + rows.stop)
        columns = range(first_column, first_column + x.shape[-1])
        n = x.shape[-1] if n is None else n
        bits = random_bits(
            where, n, seed=h.seed, step=h.step, stream=4 * h.stream + kind, device=x.device, columns=columns
        )
        value = stochastic_round_(value.contiguous(), bits)
    x[rows.start : rows.stop] = value
