"""Flat vectors that hold parts of many weights, as DeepSpeed's ZeRO makes them: which rows and blocks are whole.

A vector is cut anywhere, so a part of a weight begins and ends inside a row, and perhaps inside a block. All whole
blocks of a part form at most three rectangles: the end of a row, whole rows, the beginning of a row. The blocks at its
two ends that other vectors share are listed apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """Adjacent elements of a weight that lie in a flat vector."""

    weight: int  # its number
    first: int  # element of the weight, counted over all its rows
    size: int
    at: int  # element of the vector


class Rectangle(NamedTuple):
    """Rows or a part of one row of a weight, whose blocks are whole."""

    weight: int
    first_row: int
    first_column: int
    rows: int
    columns: int
    at: int  # element of the vector


class Cut(NamedTuple):
    """A block of a weight that several vectors share, and the elements of it that lie in this one."""

    weight: int
    first: int  # element of the weight
    size: int
    mine: Span


def spans_between(begin: int, end: int, offsets: list[tuple[int, int, int]]) -> tuple[Span, ...]:
    """The parts of weights between two positions in a row of weights; ``at`` counts from ``begin``.

    Args:
        offsets: for each weight its number, where it begins, and how many elements it has.
    """
    found = []
    for weight, start, count in offsets:
        first, last = max(begin, start), min(end, start + count)
        if first < last:
            found.append(Span(weight, first - start, last - first, first - begin))
    return tuple(found)


def split(span: Span, columns: int, width: int) -> tuple[list[Rectangle], list[Cut]]:
    """The rectangles of whole blocks in ``span``, and the blocks that it shares with others: one at each end at most.

    Args:
        columns: of the weight's rows.
        width: of its blocks; the last block of a row may be shorter.
    """
    begin, end = span.first, span.first + span.size
    cuts: dict[int, Cut] = {}
    for place in (begin, end):
        row, column = divmod(place, columns)
        if column % width:
            first = place - column % width
            last = min(first + width, (row + 1) * columns)
            mine_first, mine_last = max(begin, first), min(end, last)
            mine = Span(span.weight, mine_first, mine_last - mine_first, span.at + mine_first - begin)
            if mine.size < last - first:
                cuts[first] = Cut(span.weight, first, last - first, mine)
    for cut in cuts.values():
        if cut.mine.first == begin:
            begin = min(end, cut.first + cut.size)
        else:
            end = cut.first
    return [*_rectangles(span, begin, end, columns)], [*cuts.values()]


def _rectangles(span: Span, begin: int, end: int, columns: int) -> Iterator[Rectangle]:
    while begin < end:
        row, column = divmod(begin, columns)
        whole_rows = (end - begin) // columns if column == 0 else 0
        rows = max(1, whole_rows)
        width = columns if whole_rows else min(end, (row + 1) * columns) - begin
        yield Rectangle(span.weight, row, column, rows, width, span.at + begin - span.first)
        begin += rows * width
