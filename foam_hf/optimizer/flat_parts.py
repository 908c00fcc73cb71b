"""The parts of weights that a flat vector of ZeRO holds, the blocks that it shares with others, and its state."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foam_hf.optimizer.deepspeed import Flat
from foam_hf.rules.all import rule_of
from foam_hf.rules.rule import StateTensor
from foam_hf.tensors.flat import Cut, Rectangle, split
from foam_hf.tensors.folding import Level, block_width, num_blocks
from foam_hf.tensors.places import Place

Group = dict[str, Any]


class Weight(NamedTuple):
    """A weight that an optimizer was made for, and how it was to be updated then."""

    p: Callable[[], Tensor | None]
    shape: torch.Size
    trained: bool
    rule: str
    level: Level

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def dims(self) -> int:
        return len(self.shape)

    @property
    def width(self) -> int:
        """Columns of a block; 1 if it does not fold."""
        return 1 if self.level == 0 else block_width(self.level, self.columns)

    @property
    def blocks(self) -> int:
        return math.prod(self.shape[:-1]) * num_blocks(self.level, self.columns)

    def place(self, first_row: int, first_column: int) -> Place:
        """The place of a part that begins there."""
        rows = math.prod(self.shape[:-1])
        return Place(first_row, first_column, rows, self.shape[-2] if self.dims > 1 else 1, self.columns)


class Part(NamedTuple):
    """A part of a weight whose blocks are whole: a rectangle of a flat vector, or a block that several vectors share.

    Attributes:
        weight: its number among all.
        shape: of the part.
        place: where it lies in its weight.
        at: where it begins in the vector, or in the buffer of shared blocks.
        state: by name, shape and dtype of each tensor of state, and where it begins in the vector's tensor of state.
    """

    weight: int
    shape: tuple[int, ...]
    place: Place
    at: int
    state: dict[str, tuple[int, StateTensor]]
    rule: str
    level: Level


class FlatParts:
    """The parts of weights in a flat vector, the shared blocks at their ends, and the shapes of its state."""

    def __init__(self, flat: Flat, weights: list[Weight], group: Group) -> None:
        self.flat = flat
        self.sizes: dict[str, tuple[int, torch.dtype]] = {}
        self.rectangles, self.cuts = self._split(flat.rank, weights)
        self.parts: list[Part] = []
        for rectangle in self.rectangles:
            weight = weights[rectangle.weight]
            shape = (rectangle.rows, rectangle.columns) if weight.dims > 1 else (rectangle.columns,)
            place = weight.place(rectangle.first_row, rectangle.first_column)
            self.parts.append(self._part(rectangle.weight, shape, place, rectangle.at, group))
        self.shared: list[Part] = []
        at = 0
        for cut in self.cuts:
            weight = weights[cut.weight]
            place = weight.place(*divmod(cut.first, weight.columns))
            self.shared.append(self._part(cut.weight, (1, cut.size), place, at, group))
            at += cut.size
        self.shared_elements = at
        described = [(tuple(w.shape), w.rule, w.level) for w in weights], flat.group, flat.rank, flat.spans
        self.layout = zlib.crc32(repr(described).encode())
        self.counted = self._count(weights, group)

    def _split(self, rank: int, weights: list[Weight]) -> tuple[list[Rectangle], list[Cut]]:
        rectangles, cuts = [], []
        for span in self.flat.spans[rank]:
            weight = weights[span.weight]
            some, at_ends = split(span, max(1, weight.columns), weight.width)
            rectangles += some
            cuts += at_ends
        return rectangles, cuts

    def _part(self, number: int, shape: tuple[int, ...], place: Place, at: int, group: Group) -> Part:
        like = torch.empty(shape, device="meta")
        rule, level = rule_of(like, group)
        state = {}
        for name, tensor in rule.state(like, level, group).items():
            begin, _ = self.sizes.get(name, (0, tensor.dtype))
            state[name] = begin, tensor
            self.sizes[name] = begin + tensor.shape.numel(), tensor.dtype
        return Part(number, shape, place, at, state, rule.name, level)

    def _count(self, weights: list[Weight], group: Group) -> tuple[int, int, int]:
        """How many weights fold that begin here, how many blocks of them, and how many elements lie here in all."""
        folded = [part for part in (*self.parts, *self.shared) if part.level != 0]
        here = {part.weight for part in folded}
        begun = {span.weight for span in self.flat.spans[self.flat.rank] if span.first == 0 and span.weight in here}
        blocks = sum(math.prod(part.shape[:-1]) * num_blocks(part.level, part.shape[-1]) for part in folded)
        blocks -= sum(cut.mine.first > cut.first for cut in self.cuts)  # counted where it begins
        return len(begun), blocks, self.elements

    @property
    def elements(self) -> int:
        """How many elements of weights the vector holds, without padding."""
        return sum(span.size for span in self.flat.spans[self.flat.rank])

    @property
    def spec(self) -> dict[str, StateTensor]:
        """Shape and dtype of each tensor of state of the vector."""
        return {name: StateTensor(torch.Size((size,)), dtype) for name, (size, dtype) in self.sizes.items()}

    def exchange(self, weights: list[Weight]) -> tuple[list[int], list[int], list[int], int]:
        """How gradients of shared blocks travel.

        Returns:
            positions in the vector of the elements to send; their positions in the buffer of shared blocks; for each
            element of that buffer, its position in what all processes sent; and how many elements a process sends.
        """
        sent: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}  # block -> rank, offset, first, size
        most = 0
        for rank in range(len(self.flat.spans)):
            _, cuts = self._split(rank, weights)
            offset = 0
            for cut in cuts:
                sent.setdefault((cut.weight, cut.first), []).append((rank, offset, cut.mine.first, cut.mine.size))
                offset += cut.mine.size
            most = max(most, offset)
        send: list[int] = []
        own: list[int] = []
        take: list[int] = []
        for cut in self.cuts:
            own_begin = len(take) + cut.mine.first - cut.first
            send += range(cut.mine.at, cut.mine.at + cut.mine.size)
            own += range(own_begin, own_begin + cut.mine.size)
            parts = sorted(sent[cut.weight, cut.first], key=lambda part: part[2])
            for rank, offset, _, count in parts:
                take += range(rank * most + offset, rank * most + offset + count)
        return send, own, take, most
