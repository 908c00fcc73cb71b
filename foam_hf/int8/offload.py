"""INT8 weights that live in host memory and visit the device one layer at a time (``Int8Config(offload="cpu")``).

A layer is an element of a model's outermost ``nn.ModuleList``. Its codes and scales are one piece of host memory. Any
use of one of its weights brings the layer to a slot on the device; three slots take turns. While a layer works, the
one that is expected next is on its way, and the one before goes back if gradient release has updated it. Which layer
follows which is learned from the last time, so that order, reuse and direction do not matter to the result: a wrong
guess costs the time of a copy.

Before a layer is left, gradient release updates the weights of its bucket, so that an update never meets two layers.
Copies run on streams of their own; a layer waits for its copy, a copy for the last work on its slot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.int8.codes import DTYPES
from foam_hf.int8.host_memory import Pages, lock_all, refuse_too_little
from foam_hf.int8.linear import in_backward
from foam_hf.int8.weight import Int8Weight
from foam_hf.optimizer.releases import update_waiting

SLOTS = 3  # layers on the device: one that works, one that comes, one that goes
_ALIGNMENT = 512  # bytes, of each tensor in a layer's memory
_aten = torch.ops.aten
_SPLITS = (_aten.split.Tensor, _aten.split_with_sizes.default)
_VIEWS = (*_SPLITS, _aten.slice.Tensor, _aten.view.default, _aten.as_strided.default)


class Offload:
    """The layers of one model, and the slots, streams and events by which they visit a device.

    Attributes:
        layers: in the order of the model's parameters.
        where: name of a weight -> its layer and its number there.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, int]) -> None:
        """``blocks`` has the columns of a block for each INT8 weight, by name. Those outside of layers stay.

        Raises:
            ValueError: the model has no layers with INT8 weights.
            RuntimeError: too little host memory.
        """
        shapes = {name: p.shape for name, p in model.named_parameters()}
        of_layers = layers_of(model, blocks)
        if not of_layers:
            raise ValueError(
                f"offload='cpu' brings the layers of an nn.ModuleList to the GPU one after the other, and "
                f"{type(model).__name__} has none with INT8 weights; expected Int8Config() without offload"
            )
        self.layers = [
            Layer(self, index, name, [(shapes[each], blocks[each]) for each in names])
            for index, (name, names) in enumerate(of_layers.items())
        ]
        self.where = {
            each: (layer, number)
            for layer, names in zip(self.layers, of_layers.values(), strict=True)
            for number, each in enumerate(names)
        }
        self._device: torch.device | None = None
        self._slots: list[_Slot] = []
        self._current: Layer | None = None
        self._next: dict[tuple[int, bool], int] = {}  # layer, and whether backward brought it -> layer that followed
        self._backward = False  # brought the current layer
        refuse_too_little(self.host_bytes)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def slots(self) -> list[Tensor]:
        """The memory of the slots on the device, uint8; empty before the first visit."""
        return [slot.memory for slot in self._slots]

    def take(self, name: str, weight: Int8Weight) -> Int8Weight:
        """Copy the weight called ``name`` to host memory, and return one that visits the device of ``weight``.

        A weight that belongs to no layer is returned as it is.
        """
        if name not in self.where:
            return weight
        layer, number = self.where[name]
        for mine, given in zip(layer.home()[number], (weight.codes, weight.scales), strict=True):
            mine.copy_(given)
        return OffloadedWeight(layer, number, weight.dtype, weight.device)

    def bring(self, layer: Layer, device: torch.device) -> None:
        """Let ``layer`` be on ``device`` for all work that the current stream gets from now on."""
        if layer is self._current and device == self._device:
            return
        backward = in_backward()
        self._leave()
        if device != self._device:
            self._use(device)
        if self._current is not None:
            self._next[self._current.index, self._backward] = layer.index
        self._load(layer)
        layer.await_copy()
        self._current, self._backward = layer, backward
        self._load(self._expected(layer, backward))

    def _expected(self, layer: Layer, backward: bool) -> Layer | None:
        """The layer that follows, from the last time or by its number; None if it would take the slot of ``layer``."""
        index = self._next.get((layer.index, backward), layer.index + (-1 if backward else 1))
        expected = self.layers[index] if 0 <= index < len(self.layers) else None
        return None if expected is None or expected.slot is layer.slot else expected

    def _use(self, device: torch.device) -> None:
        """Make slots on ``device``, and forget those on another one."""
        for layer in self.layers:
            self.settle(layer)
            layer.forget_device()
        self._current, self._device = None, device
        cuda = device.type == "cuda"
        if cuda:
            lock_all([layer.pages for layer in self.layers])
        count = min(SLOTS, len(self.layers))
        into, back = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if cuda else (None, None)
        sizes = [max(layer.nbytes for layer in self.layers[number::count]) for number in range(count)]
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device), into, back) for size in sizes]
        if into is not None:
            into.wait_stream(torch.cuda.current_stream(device))  # which may still use what the slots' memory was
        for layer in self.layers:
            layer.visit(self._slots[layer.index % count])

    def _leave(self) -> None:
        """Update what waits in the current layer, and send it back if it was written to."""
        if self._current is not None:
            update_waiting()
            self._current.leave()

    def _load(self, layer: Layer | None) -> None:
        if layer is not None and layer.slot is not None and layer.slot.holder is not layer:
            layer.slot.take(layer)

    def settle(self, layer: Layer) -> None:
        """Let host memory hold what ``layer`` has on the device."""
        if layer is self._current:
            layer.leave()
        if layer.saved is not None:
            layer.saved.synchronize()


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
        old, self.holder = self.holder, layer
        if self.into is None:
            layer.copy(to_device=True)
            return
        for event in (old and old.left, old and old.saved, layer.saved):
            if event is not None:
                self.into.wait_event(event)
        with torch.cuda.stream(self.into):
            layer.copy(to_device=True)
        layer.come = self.into.record_event()


class Layer:
    """The INT8 weights of one layer.

    Attributes:
        index: its number among the layers.
        name: of its module.
        nbytes: of its codes and scales.
        slot: where it visits the device; None before the first visit.
        there: codes and scales of each weight in that slot.
        come, left, saved: CUDA events at the end of the copy to the device, of the work there, of the copy back.
    """

    def __init__(self, offload: Offload, index: int, name: str, weights: Collection[tuple[torch.Size, int]]) -> None:
        self.index, self.name, self._offload = index, name, offload
        self.shapes = [shape for shape, _ in weights]
        self._parts: list[tuple[tuple[int, torch.Size, torch.dtype], ...]] = []
        offset = 0
        for shape, block in weights:
            scales = torch.Size((*shape[:-1], shape[-1] // block))
            parts = []
            for size, dtype in ((shape, torch.int8), (scales, torch.float32)):
                parts.append((offset, size, dtype))
                offset += -(-size.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            self._parts.append(tuple(parts))
        self.nbytes = offset
        self._pages: Pages | None = None
        self._written = False
        self.forget_device()

    @property
    def pages(self) -> Pages:
        """Its host memory."""
        if self._pages is None:
            self._pages = Pages(self.nbytes)
        return self._pages

    def bring(self, device: torch.device) -> None:
        """Let it be on ``device`` for all work that the current stream gets from now on."""
        self._offload.bring(self, device)

    def home(self) -> list[tuple[Tensor, ...]]:
        """Codes and scales of each weight in host memory, complete: what the device has written is there."""
        self._offload.settle(self)
        return [tuple(self.pages.view(*part) for part in parts) for parts in self._parts]

    def visit(self, slot: _Slot) -> None:
        """From now on visit the device in ``slot``."""
        self.slot = slot
        self.there = [
            tuple(
                slot.memory[offset : offset + size.numel() * dtype.itemsize].view(dtype).view(size)
                for offset, size, dtype in parts
            )
            for parts in self._parts
        ]

    def forget_device(self) -> None:
        """Belong to no slot, until ``visit``."""
        self.slot: _Slot | None = None
        self.there: list[tuple[Tensor, ...]] = []
        self.come: Any = None
        self.left: Any = None
        self.saved: Any = None

    def written(self) -> None:
        """Its weights were changed on the device."""
        self._written = True

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
        self._written = False
        if slot.back is None:
            self.copy(to_device=False)
            return
        slot.back.wait_event(self.left)
        with torch.cuda.stream(slot.back):
            self.copy(to_device=False)
        self.saved = slot.back.record_event()

    def copy(self, *, to_device: bool) -> None:
        """Copy all of it between host memory and its slot, in the current stream."""
        assert self.slot is not None
        here, there = self.pages.view(0, torch.Size((self.nbytes,)), torch.uint8), self.slot.memory[: self.nbytes]
        if to_device:
            there.copy_(here, non_blocking=True)
        else:
            here.copy_(there, non_blocking=True)


class OffloadedWeight(Int8Weight):
    """An INT8 weight whose codes and scales are in host memory, and on its device while its layer visits it.

    ``codes`` and ``scales`` bring the layer there: they are valid until another layer is brought. ``stored`` reads
    host memory. ``weight.to(device)`` gives a weight of the same memory that visits another device.
    """

    _INNER = ("foam_layer", "_number", "_place", "_whole")

    @staticmethod
    def __new__(cls, layer: Layer, number: int, dtype: torch.dtype, device: torch.device) -> OffloadedWeight:
        shape = layer.shapes[number]
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, layer: Layer, number: int, dtype: torch.dtype, device: torch.device) -> None:
        self.foam_layer, self._number, self._place, self._whole = layer, number, device, None

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        """On the device, int8 (m, n)."""
        self.foam_layer.bring(self._place)
        return self.foam_layer.there[self._number][0]

    @property
    def scales(self) -> Tensor:  # type: ignore[override]
        """On the device, float32 (m, n / block size)."""
        self.foam_layer.bring(self._place)
        return self.foam_layer.there[self._number][1]

    @property
    def block_size(self) -> int:
        (_, codes, _), (_, scales, _) = self.foam_layer._parts[self._number]
        return codes[-1] // scales[-1]

    @property
    def foam_held(self) -> list[Tensor]:
        """What it holds on the device, with all other weights that visit it: the slots."""
        return self.foam_layer._offload.slots

    def stored(self) -> tuple[Tensor, Tensor]:
        codes, scales = self.foam_layer.home()[self._number]
        return codes, scales

    def written(self) -> None:
        self.foam_layer.written()

    def _like(self, dtype: torch.dtype | None = None, device: Any = None) -> OffloadedWeight:
        place = self._place if device is None else torch.empty(0, device=device).device  # with its index
        return OffloadedWeight(self.foam_layer, self._number, self.dtype if dtype is None else dtype, place)

    def _set_data(self, data: Tensor) -> None:
        if not isinstance(data, OffloadedWeight):
            raise TypeError(
                f"cannot make a {type(data).__name__} the data of an INT8 weight that is offloaded; expected "
                "weight.copy_(new), or module.weight = torch.nn.Parameter(new)"
            )
        self.foam_layer, self._number, self._place = data.foam_layer, data._number, data._place

    def share_memory_(self) -> OffloadedWeight:
        """Its pages are shared between forked processes as they are."""
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        raise NotImplementedError(
            f"cannot copy an INT8 weight of shape {tuple(self.shape)} that is offloaded: the copy would be on "
            f"{self._place} as a whole; expected another from_pretrained of the model"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        self = args[0] if args else None
        if isinstance(self, OffloadedWeight):
            if func in (_aten.detach.default, _aten.alias.default):
                return self._like()
            if func is _aten._to_copy.default and kwargs.get("dtype") in (None, *DTYPES):
                if torch.device(kwargs.get("device") or self._place).type != "meta":
                    return self._like(kwargs.get("dtype"), kwargs.get("device"))
                codes, scales = (torch.empty(part[1], dtype=part[2], device="meta") for part in self._layout)
                return Int8Weight(codes, scales, kwargs.get("dtype") or self.dtype)
            if func in _SPLITS:
                raise NotImplementedError(
                    f"cannot split an INT8 weight of shape {tuple(self.shape)} that is offloaded, as fully_shard "
                    "does; expected Int8Config() without offload"
                )
            if func in _VIEWS:  # a view of a slot would be another layer's soon
                return func(self.dequantize(), *args[1:], **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    @property
    def _layout(self) -> tuple[tuple[int, torch.Size, torch.dtype], ...]:
        return self.foam_layer._parts[self._number]


def layers_of(model: nn.Module, names: Collection[str]) -> dict[str, list[str]]:
    """Name of a layer, an element of an outermost ``nn.ModuleList`` -> those of its parameters that are ``names``."""
    found: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) - 1):
            if isinstance(modules.get(".".join(parts[:end])), nn.ModuleList):
                found.setdefault(".".join(parts[: end + 1]), []).append(name)
                break
    return found
