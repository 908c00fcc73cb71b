"""Brings the tables of all launches of a step to their device in one copy, and only where they have changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy
import torch
from torch import Tensor

# The driver takes a copy of fewer bytes from any memory at once. For more it may wait for the GPU, unless the memory
# is pinned.
PINNED = 1 << 16


class Table(Protocol):
    """A table that has a place in memory that others share, as ``tables.AddressTable``."""

    changed: bool  # since the last upload

    @property
    def device(self) -> torch.device: ...

    @property
    def words(self) -> int:
        """How many int64 it has."""

    def place(self, host: numpy.ndarray, table: Tensor) -> None:
        """Keep the table at ``host``, int64 (words,), from where it is copied to ``table`` on the device."""


class SharedTables:
    """The tables of several launches on one device, one behind the other."""

    def __init__(self, device: torch.device, tables: Sequence[Table]) -> None:
        self._tables = tables
        sizes = [-(-table.words // 2) * 2 for table in tables]  # so that each begins on 16 bytes
        self._host = numpy.zeros(sum(sizes), dtype=numpy.int64)
        self._source = torch.from_numpy(self._host)
        self._device = self._source if device.type == "cpu" else torch.empty_like(self._source, device=device)
        start = 0
        for table, size in zip(tables, sizes, strict=True):
            end = start + table.words
            table.place(self._host[start:end], self._device[start:end])
            start += size

    def upload(self) -> None:
        """Copy the tables to the device if one has changed; nothing waits for the GPU."""
        if not any(table.changed for table in self._tables):
            return
        for table in self._tables:
            table.changed = False
        device = self._device.device
        if device.type == "cpu":  # the same memory
            return
        source = self._source
        if device.type == "cuda" and self._host.nbytes >= PINNED:
            # torch keeps this memory from others until the copy has ended.
            source = torch.empty_like(source, pin_memory=True).copy_(source)
        self._device.copy_(source, non_blocking=True)


def share_tables(tables: Iterable[Table]) -> list[SharedTables]:
    """One memory for the tables of each device."""
    by_device: dict[torch.device, list[Table]] = {}
    for table in tables:
        by_device.setdefault(table.device, []).append(table)
    return [SharedTables(device, some) for device, some in by_device.items()]
