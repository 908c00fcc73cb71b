"""Views of INT8 weights: those of whole rows share codes and scales, all others are dequantized copies.

FSDP2 cuts weights into shards, and pads these, by views of whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
Parts = tuple[Tensor, Tensor]


def shared_views(func: Any, codes: Tensor, scales: Tensor, args: Sequence[Any]) -> Parts | list[Parts] | None:
    """Codes and scales of what ``func`` gives: one pair, or a list of pairs; None if it is no view of whole rows.

    Args:
        func: any overload of an operator of torch.
        codes: int8 (..., n).
        scales: float32 (..., n / block size).
        args: of ``func``, without the weight.
    """
    make = _VIEWS.get(func)
    return None if make is None else make(func, codes, scales, *args)


def _slice(func: Any, codes: Tensor, scales: Tensor, dim: int = 0, *bounds: Any) -> Parts | None:
    by_rows = codes.dim() > 1 and dim % codes.dim() == 0
    step = bounds[2] if len(bounds) > 2 else 1
    return (func(codes, dim, *bounds), func(scales, dim, *bounds)) if by_rows and step == 1 else None


def _split(func: Any, codes: Tensor, scales: Tensor, sizes: Any, dim: int = 0) -> list[Parts] | None:
    by_rows = codes.dim() > 1 and dim % codes.dim() == 0
    return list(zip(func(codes, sizes, dim), func(scales, sizes, dim), strict=True)) if by_rows else None


def _view(func: Any, codes: Tensor, scales: Tensor, size: Sequence[int]) -> Parts | None:
    viewed = func(codes, size)
    if viewed.dim() == 1:
        return viewed, scales.view(-1)
    if viewed.shape[-1] != codes.shape[-1]:
        return None
    return viewed, scales.view(*viewed.shape[:-1], scales.shape[-1])


def _as_strided(
    func: Any, codes: Tensor, scales: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Parts | None:
    """The first rows, which is what FSDP2 takes of rows with padding."""
    first = codes[: size[0]] if len(size) == codes.dim() > 1 else codes
    if first.shape != torch.Size(size) or first.stride() != tuple(stride) or offset:
        return None
    return first, scales[: size[0]] if codes.dim() > 1 else scales


_VIEWS: dict[Any, Callable[..., Any]] = {
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.view.default: _view,
    _aten.as_strided.default: _as_strided,
}


class ReadOnly(Tensor):
    """A dequantized view of an INT8 weight. It is a copy; writing to it raises an error, as it would be lost."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")
        target = (kwargs or {}).get("out") if not writes else args[0]
        if (
            isinstance(target, ReadOnly)
            and name != "requires_grad_"
            and name not in ("__int__", "__index__", "__invert__")
        ):
            raise NotImplementedError(
                f"{name} would write to a copy, as such views of INT8 weights are dequantized copies; expected "
                "weight.copy_(new) for the whole weight, or for a range of its rows"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return read_only(func(*args, **(kwargs or {})))


def read_only(result: Any) -> Any:
    """``result``, in which plain views of INT8 weights are ``ReadOnly``."""
    if isinstance(result, list | tuple):
        return type(result)(map(read_only, result)) if type(result) in (list, tuple) else result
    if type(result) is Tensor and hasattr(result._base, "foam_rows"):
        return result.as_subclass(ReadOnly)
    return result
