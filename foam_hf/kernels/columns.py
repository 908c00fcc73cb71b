"""The columns of a launch's table: names that fill a row on the host, and the numbers of these names in the kernels.

A table has a row of int64 for each tensor. ``row_of`` is the only list of its columns: the host writes them by name,
and the kernels read them by the constants that ``number_of`` makes of it. So a column may be added in any place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import triton.language as tl

# What the row of every table has: addresses, the tensor's last dimension, its random stream; and the step and bias
# corrections of the tensor, as bits of a float32, which are read where weights have missed steps.
_COMMON = ("weight", "gradient", "exp_avg", "columns", "stream", "step", "inv_c1", "inv_c2")
_OWN_NUMBERS = ("step", "inv_c1", "inv_c2")


def row_of(*names: str) -> numpy.dtype:
    """The row of a table that has the columns ``names`` beside those of every table."""
    return numpy.dtype([(name, numpy.int64) for name in (*_COMMON, *names)])


def number_of(row: numpy.dtype, name: str) -> tl.constexpr:
    """The number of a column, as kernels read it: ``tl.load(entry + NUMBER)`` with ``entry`` where the row begins."""
    return tl.constexpr(_names(row).index(name))


def count_of(row: numpy.dtype) -> int:
    """How many columns there are: what kernels multiply a tensor's number by to find its row."""
    return len(_names(row))


def filled(row: numpy.dtype, values: Mapping[str, Sequence[int]]) -> numpy.ndarray:
    """A table with ``values`` for each tensor, by column. A tensor's own numbers are zeros as yet.

    Raises:
        ValueError: ``values`` has not the columns of ``row``.
    """
    expected = [name for name in _names(row) if name not in _OWN_NUMBERS]
    if values.keys() != {*expected}:
        raise ValueError(f"values are not those of a row: got {sorted(values)}; expected {sorted(expected)}")
    table = numpy.zeros(len(values["weight"]), dtype=row)
    for name in expected:
        table[name] = values[name]
    return table


def _names(row: numpy.dtype) -> tuple[str, ...]:
    return row.names or ()


_ROW = row_of()
WEIGHT, GRADIENT, EXP_AVG = number_of(_ROW, "weight"), number_of(_ROW, "gradient"), number_of(_ROW, "exp_avg")
COLUMNS, STREAM = number_of(_ROW, "columns"), number_of(_ROW, "stream")
STEP, INV_C1, INV_C2 = number_of(_ROW, "step"), number_of(_ROW, "inv_c1"), number_of(_ROW, "inv_c2")
