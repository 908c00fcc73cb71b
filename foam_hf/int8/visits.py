"""How layers of INT8 weights visit a device: the slots that they take turns in, the streams and events of copies.

Any use of one of its weights brings a layer to a slot on the device; three slots take turns. While a layer works, the
one that is expected next is on its way, and the one before goes back if gradient release has updated it. Which layer
follows which is learned from the last time, so that order, reuse and direction do not matter to the result: a wrong
guess costs the time of a copy. Gradient release updates the weights of a bucket layer by layer, aside from this order:
they belong to the layer at work, or to the one before it, which is there still.

Copies run on streams of their own; a layer waits for its copy, a copy for the last work on its slot.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from foam_hf.int8.host_memory import Pages, lock_all
from foam_hf.int8.linear import in_backward

SLOTS = 3  # layers on the device: one that works, one that comes, one that goes
ALIGNMENT = 512  # bytes, of each tensor in a layer's memory

Part = tuple[int, torch.Size, torch.dtype]  # where a tensor begins in a layer's memory, in bytes; shape and dtype


class Visits:
    """The layers of one model and where they are.

    Attributes:
        layers: in the order of the model's parameters.
        lock: held from a visit to the last use of it, where several threads may compute with the model.
    """

    def __init__(self, layers: Iterable[tuple[str, Sequence[tuple[torch.Size, int]]]]) -> None:
        """``layers`` have a name, and the shape of each weight with the columns of its blocks."""
        self.layers = [Layer(self, index, name, weights) for index, (name, weights) in enumerate(layers)]
        self.lock = threading.RLock()
        self._device: torch.device | None = None
        self._slots: list[_Slot] = []
        self._current: Layer | None = None
        self._aside = False  # the current layer was brought to be updated
        self._working: Layer | None = None  # the last one that was not
        self._backward = False  # brought the layer that works
        self._next: dict[tuple[int, bool], int] = {}  # layer, and whether backward brought it -> layer that followed

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def slots(self) -> list[Tensor]:
        """The memory of the slots on the device, uint8; empty before the first visit."""
        return [slot.memory for slot in self._slots]

    def bring(self, layer: Layer, device: torch.device, aside: bool) -> None:
        """As ``Layer.bring``."""
        if layer is not self._current or device != self._device:
            self._to(layer, device)
            self._aside = aside
        elif aside:
            self._aside = True
        if self._aside or layer is self._working:
            return
        if self._working is not None:
            self._next[self._working.index, self._backward] = layer.index
        self._working, self._backward = layer, in_backward()
        self._load(self._expected(layer, self._backward))

    def _to(self, layer: Layer, device: torch.device) -> None:
        if self._current is not None:
            self._current.leave()
        self._current = None  # until another one is there: it may take this one's slot
        if device != self._device:
            self._use(device)
        self._load(layer)
        layer.await_copy()
        self._current = layer

    def _expected(self, layer: Layer, backward: bool) -> Layer | None:
        """The layer that follows, from the last time or by its number; None if it would take the slot of ``layer``."""
        index = self._next.get((layer.index, backward), layer.index + (-1 if backward else 1))
        expected = self.layers[index] if 0 <= index < len(self.layers) else None
        return None if expected is None or expected.slot is layer.slot else expected

    @torch.inference_mode(False)  # or slots of a first visit in inference mode could not be written later
    def _use(self, device: torch.device) -> None:
        """Make slots on ``device``, and forget those on another one."""
        for layer in self.layers:
            self.settle(layer)
            layer.forget_device()
        self._working, self._device, self._slots = None, None, []
        cuda = device.type == "cuda"
        if cuda:
            lock_all([layer.pages for layer in self.layers])
        into, back = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if cuda else (None, None)
        sizes = slot_sizes([layer.nbytes for layer in self.layers])
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device), into, back) for size in sizes]
        if into is not None:
            into.wait_stream(torch.cuda.current_stream(device))  # which may still use what the slots' memory was
        for layer in self.layers:
            layer.visit(self._slots[layer.index % len(sizes)])
        self._device = device  # not before: what fails for want of memory is tried again

    def _load(self, layer: Layer | None) -> None:
        if layer is not None and layer.slot is not None and (layer.slot.holder is not layer or layer.stale):
            layer.slot.take(layer)

    def settle(self, layer: Layer) -> None:
        """Let host memory hold what ``layer`` has on the device."""
        if layer is self._current:
            layer.leave()
        if layer.saved is not None:
            layer.saved.synchronize()

    def hand_out(self, layer: Layer) -> None:
        """Let the caller read and write the host memory of ``layer``; at its next use it comes anew."""
        self.settle(layer)
        if layer.come is not None:
            layer.come.synchronize()
        layer.stale = True
        if layer is self._current:
            self._current = None


class _Slot:
    """Memory on the device for one layer after another."""

    def __init__(self, memory: Tensor, into: Any, back: Any) -> None:
        """``into`` and ``back`` are the CUDA streams of copies to the device and from it, or None."""
        self.memory, self.into, self.back = memory, into, back
        for stream in (into, back):
            if stream is not None:
                memory.record_stream(stream)  # what is freed while a copy runs is not used again before its end
        self.holder: Layer | None = None

    def take(self, layer: Layer) -> None:
        """Copy ``layer`` here when the last work on the slot is done."""
        if self.into is not None:
            old = self.holder
            for event in (old and old.left, old and old.saved, layer.saved):
                if event is not None:
                    self.into.wait_event(event)
        layer.stale = True  # until it is copied, which an interrupt may prevent
        self.holder = layer
        if self.into is None:
            layer.copy_in()
        else:
            with torch.cuda.stream(self.into):
                layer.copy_in()
            layer.come = self.into.record_event()
        layer.stale = False


class Layer:
    """The INT8 weights of one layer.

    Attributes:
        index: its number among the layers.
        name: of its module.
        parts: codes and scales of each weight.
        nbytes: of all of them.
        slot: where it visits the device; None before the first visit.
        there: codes and scales of each weight in that slot.
        stale: whether host memory may have been written to since it came there.
        come, left, saved: CUDA events at the end of the copy to the device, of the work there, of the copy back.
    """

    def __init__(self, visits: Visits, index: int, name: str, weights: Sequence[tuple[torch.Size, int]]) -> None:
        self.visits, self.index, self.name = visits, index, name
        self.parts, self.nbytes = layout(weights)
        self.slot: _Slot | None = None
        self.there: list[tuple[Tensor, ...]] = []
        self.stale = False
        self.come: Any = None
        self.left: Any = None
        self.saved: Any = None
        self._pages: Pages | None = None
        self._written: set[int] = set()  # weights to be copied back

    @property
    def pages(self) -> Pages:
        """Its host memory."""
        if self._pages is None:
            self._pages = Pages(self.nbytes)
        return self._pages

    def bring(self, device: torch.device, aside: bool = False) -> None:
        """Let it be on ``device`` for all work that the current stream gets from now on.

        Args:
            aside: to update its weights, which says nothing on the order of layers.
        """
        self.visits.bring(self, device, aside)

    def home(self) -> list[tuple[Tensor, ...]]:
        """Codes and scales of each weight in host memory, complete: what the device has written is there.

        A caller may write to them, before the next use of the layer.
        """
        self.visits.hand_out(self)
        return [tuple(self.pages.view(*part) for part in parts) for parts in self.parts]

    def visit(self, slot: _Slot) -> None:
        """From now on visit the device in ``slot``."""
        self.slot = slot
        self.there = [
            tuple(
                slot.memory[offset : offset + size.numel() * dtype.itemsize].view(dtype).view(size)
                for offset, size, dtype in parts
            )
            for parts in self.parts
        ]

    def forget_device(self) -> None:
        """Belong to no slot, until ``visit``."""
        self.slot, self.there = None, []
        self.come = self.left = self.saved = None

    def written(self, number: int) -> None:
        """This weight of it was changed on the device."""
        self._written.add(number)

    def await_copy(self) -> None:
        """Let the current stream wait until it is on the device."""
        if self.come is not None:
            torch.cuda.current_stream(self.there[0][0].device).wait_event(self.come)

    def leave(self) -> None:
        """End the work on the device, and copy back what was changed."""
        slot = self.slot
        if slot is None:
            return
        if slot.back is not None:
            self.left = torch.cuda.current_stream(slot.memory.device).record_event()
        if not self._written:
            return
        if slot.back is None:
            self.copy_back()
        else:
            slot.back.wait_event(self.left)
            with torch.cuda.stream(slot.back):
                self.copy_back()
            self.saved = slot.back.record_event()
        self._written.clear()  # not before, as an interrupt may prevent the copy

    def copy_in(self) -> None:
        """Copy all of it to its slot, in the current stream."""
        self._copy(0, self.nbytes, to_device=True)

    def copy_back(self) -> None:
        """Copy the weights that were changed to host memory, in the current stream; neighbours at once."""
        numbers = sorted(self._written)
        ends = [number for number in numbers if number + 1 not in numbers]
        starts = [number for number in numbers if number - 1 not in numbers]
        begins = [codes[0] for codes, _ in self.parts] + [self.nbytes]
        for start, end in zip(starts, ends, strict=True):
            self._copy(begins[start], begins[end + 1], to_device=False)

    def _copy(self, start: int, end: int, *, to_device: bool) -> None:
        assert self.slot is not None
        here, there = self.pages.view(start, torch.Size((end - start,)), torch.uint8), self.slot.memory[start:end]
        if to_device:
            there.copy_(here, non_blocking=True)
        else:
            here.copy_(there, non_blocking=True)


def layout(weights: Sequence[tuple[torch.Size, int]]) -> tuple[list[tuple[Part, Part]], int]:
    """Where codes and scales of ``weights`` lie in the memory of their layer, and its bytes.

    Each has a shape, and the columns of its blocks.
    """
    parts, offset = [], 0
    for shape, block in weights:
        pair = []
        for size, dtype in ((shape, torch.int8), (torch.Size((*shape[:-1], shape[-1] // block)), torch.float32)):
            pair.append((offset, size, dtype))
            offset += -(-size.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        parts.append((pair[0], pair[1]))
    return parts, offset


def slot_sizes(layers: Sequence[int]) -> list[int]:
    """Bytes of each slot, in which every third of ``layers`` must fit, given by their bytes."""
    count = min(SLOTS, len(layers))
    return [max(layers[number::count]) for number in range(count)]
