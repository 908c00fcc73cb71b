"""INT8 weights that live in host memory and visit the device one layer at a time (``Int8Config(offload="cpu")``).

A layer is an element of a model's outermost ``nn.ModuleList``. Its codes and scales are one piece of host memory,
which :mod:`foam_hf.int8.visits` brings to the device and back. All other weights stay on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.int8.codes import DTYPES
from foam_hf.int8.host_memory import refuse_too_little
from foam_hf.int8.visits import Layer, Part, Visits
from foam_hf.int8.weight import Int8Weight

_aten = torch.ops.aten
_SPLITS = (_aten.split.Tensor, _aten.split_with_sizes.default)
_VIEWS = (*_SPLITS, _aten.slice.Tensor, _aten.view.default, _aten.as_strided.default)


class Offload:
    """The weights of one model that are offloaded.

    Attributes:
        visits: of the layers.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, int]) -> None:
        """``blocks`` has the columns of a block for each INT8 weight, by name. Those outside of layers stay.

        Raises:
            ValueError: the model has no layers with INT8 weights.
            RuntimeError: too little host memory.
        """
        names = layers_of(model, blocks)
        self.visits = Visits(zip(names, weights_of(model, blocks), strict=True))
        self._where = {
            name: (layer, number)
            for layer, mine in zip(self.visits.layers, names.values(), strict=True)
            for number, name in enumerate(mine)
        }
        refuse_too_little(self.visits.host_bytes)

    def __deepcopy__(self, memo: Any) -> Offload:
        """Itself: a copy of its model that can exist, on the meta device, holds its quantizer and no weight of it."""
        return self

    def __reduce__(self) -> Any:
        """None: weights are pickled as INT8 weights that are not offloaded."""
        return type(None), ()

    def take(self, name: str, weight: Int8Weight) -> Int8Weight:
        """Copy the weight called ``name`` to host memory, and return one that visits the device of ``weight``.

        A weight that belongs to no layer is returned as it is.
        """
        if name not in self._where:
            return weight
        layer, number = self._where[name]
        for mine, given in zip(layer.home()[number], (weight.codes, weight.scales), strict=True):
            mine.copy_(given)
        return OffloadedWeight(layer, number, weight.dtype, weight.device)


class OffloadedWeight(Int8Weight):
    """An INT8 weight whose codes and scales are in host memory, and on its device while its layer visits it.

    ``codes`` and ``scales`` bring the layer there: they are valid until another layer is brought. ``stored`` reads
    host memory. ``weight.to(device)`` of a parameter gives a weight of the same memory that visits another device,
    as ``model.to`` needs it; of ``weight.detach()`` it gives a copy that is not offloaded, as ``clone()`` does.
    """

    _OWN = ("foam_layer", "_number", "_place", "outer_dtype", "_whole")

    @staticmethod
    def __new__(cls, layer: Layer, number: int, dtype: torch.dtype, device: torch.device) -> OffloadedWeight:
        (_, shape, _), _ = layer.parts[number]
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, layer: Layer, number: int, dtype: torch.dtype, device: torch.device) -> None:
        self.foam_layer, self._number, self._place, self._whole = layer, number, device, None
        self.outer_dtype = dtype

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
        (_, codes, _), (_, scales, _) = self._parts
        return codes[-1] // scales[-1]

    @property
    def foam_held(self) -> list[Tensor]:
        """What it holds on the device, with all other weights that visit it: the slots."""
        return self.foam_layer.visits.slots

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        with self.foam_layer.visits.lock:
            return super().dequantize(dtype)

    def stored(self) -> tuple[Tensor, Tensor]:
        with self.foam_layer.visits.lock:
            codes, scales = self.foam_layer.home()[self._number]
        return codes, scales

    def written(self) -> None:
        self.foam_layer.written(self._number)

    def _like(self, dtype: torch.dtype | None = None, device: Any = None) -> OffloadedWeight:
        place = self._place if device is None else torch.empty(0, device=device).device  # with its index
        return OffloadedWeight(self.foam_layer, self._number, dtype or self.outer_dtype, place)

    def _set_data(self, data: Tensor) -> None:
        if not isinstance(data, OffloadedWeight):
            raise TypeError(
                f"cannot make a {type(data).__name__} the data of an INT8 weight that is offloaded; expected "
                "weight.copy_(new), or module.weight = torch.nn.Parameter(new)"
            )
        self.foam_layer, self._number, self._place = data.foam_layer, data._number, data._place
        self.outer_dtype = data.outer_dtype

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        raise NotImplementedError(
            f"cannot compile an INT8 weight of shape {tuple(self.shape)} that is offloaded; expected Int8Config() "
            "without offload, or no torch.compile"
        )

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
                    if hasattr(self, "_is_param"):  # as `Module.to` has it, whose model keeps its host memory
                        return self._like(kwargs.get("dtype"), kwargs.get("device"))
                    return super().__torch_dispatch__(func, types, args, kwargs)
                codes, scales = (torch.empty(part[1], dtype=part[2], device="meta") for part in self._parts)
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
    def _parts(self) -> tuple[Part, Part]:
        return self.foam_layer.parts[self._number]


def layers_of(model: nn.Module, names: Collection[str]) -> dict[str, list[str]]:
    """Name of a layer, an element of an outermost ``nn.ModuleList`` -> those of its parameters that are ``names``.

    Raises:
        ValueError: no layer has any.
    """
    found: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) - 1):
            if isinstance(modules.get(".".join(parts[:end])), nn.ModuleList):
                found.setdefault(".".join(parts[: end + 1]), []).append(name)
                break
    if not found:
        raise ValueError(
            "offload='cpu' brings the layers of an nn.ModuleList to the GPU one after the other, and "
            f"{type(model).__name__} has none with INT8 weights; expected Int8Config() without offload"
        )
    return found


def weights_of(model: nn.Module, blocks: Mapping[str, int]) -> list[list[tuple[torch.Size, int]]]:
    """The shape and the block of each INT8 weight, in a list for each of ``layers_of``."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return [[(shapes[name], blocks[name]) for name in names] for names in layers_of(model, blocks).values()]
