"""Finds the storages of tensors, containers, objects and optimizers; a storage that several share is listed once."""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Device and address of a storage -> (its bytes, its device).
Storages = dict[Hashable, tuple[int, torch.device]]

_NOT_STATE = ("state", "param_groups", "defaults")
_OPAQUE = (str, bytes, int, float, complex, type, types.ModuleType, types.FunctionType, types.MethodType)


def storages(values: Iterable[Any], *, objects: bool = True) -> Storages:
    """The storages of all tensors in `values`, in containers there and, if `objects`, in attributes of objects."""
    found: Storages = {}
    stack = list(values)
    seen: dict[int, Any] = {}  # keeps each value alive, as the id of a dead one could be reused
    while stack:
        value = stack.pop()
        if id(value) in seen or value is None or isinstance(value, _OPAQUE):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            parts = _tensor_parts(value)
            if parts is None:
                key, size, device = _storage(value)
                found[key] = (max(size, found.get(key, (0, device))[0]), device)
                # A subclass may hold tensors in attributes (scales). A fake tensor holds its tracing mode there.
                plain = type(value) in (Tensor, nn.Parameter) or device.type == "meta"
                parts = [] if plain else [inner for _, inner in _attributes(value)]
            stack += parts
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value
        elif objects:
            stack += [inner for _, inner in _attributes(value)]
    return found


def state_storages(optimizer: Any) -> Storages:
    """The storages of an optimizer's state, without those of its parameters and gradients.

    Args:
        optimizer: may be a wrapper that holds optimizers in its attributes.

    Raises:
        TypeError: `optimizer` has no state and param_groups.
    """
    optimizers = list(_optimizers(optimizer))
    found: Storages = {}
    own: Storages = {}
    for inner in optimizers:
        found |= storages([getattr(inner, "state", None)])
        # Some optimizers keep state in attributes (AdaLomo). Objects there are managers that all optimizers share.
        # DeepSpeed's wrappers keep weights and buffers there.
        if not type(inner).__module__.startswith("deepspeed."):
            attributes = [value for name, value in _attributes(inner) if name not in _NOT_STATE]
            found |= storages(attributes, objects=False)
        params = [p for group in getattr(inner, "param_groups", ()) for p in group["params"]]
        own |= storages([*params, *(getattr(p, "grad", None) for p in params)])
    return without(found, own)


def total(found: Storages, devices: set[torch.device] | None = None) -> int:
    """The bytes of all storages, or of those on `devices`."""
    return sum(size for size, device in found.values() if devices is None or device in devices)


def without(found: Storages, others: Storages) -> Storages:
    """The storages in `found` that are not in `others`."""
    return {key: value for key, value in found.items() if key not in others}


def _optimizers(optimizer: Any) -> Iterator[Any]:
    """Yield `optimizer` and every optimizer in its attributes or in containers there.

    Raises:
        TypeError: `optimizer` has no state and param_groups.
    """
    if not _is_optimizer(optimizer):
        raise TypeError(f"not an optimizer, got {type(optimizer).__name__}; expected one with state and param_groups")
    stack, seen = [optimizer], set()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        attributes = (value for name, value in _attributes(value) if name not in _NOT_STATE)
        stack += [inner for inner in _with_items(attributes) if _is_optimizer(inner)]


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, torch.optim.Optimizer) or (
        not isinstance(value, type) and hasattr(value, "param_groups") and hasattr(value, "state")
    )


def _with_items(values: Iterable[Any]) -> Iterator[Any]:
    """Yield each value; for a mapping, a list or a tuple its items instead."""
    for value in values:
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _attributes(value: Any) -> list[tuple[str, Any]]:
    names = [*getattr(value, "__dict__", {})]
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else [*slots]
    return [(name, getattr(value, name, None)) for name in names if name not in ("__dict__", "__weakref__")]


def _tensor_parts(tensor: Tensor) -> list[Any] | None:
    """The inner tensors of a subclass or of a sparse tensor; None if `tensor` has a storage of its own."""
    if hasattr(tensor, "foam_held"):  # its inner tensors are on the device at times only
        return [*tensor.foam_held]
    if hasattr(tensor, "__tensor_flatten__"):  # for example a DTensor or a quantized tensor
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [part for part in parts if isinstance(part, Tensor)]  # torch lists a DTensor's mesh too
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return None


def _storage(tensor: Tensor) -> tuple[Hashable, int, torch.device]:
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # opaque layouts
        return id(tensor), tensor.numel() * tensor.element_size(), tensor.device
    # Meta and fake tensors have no address, but their storage object is unique.
    address = 0 if storage.device.type == "meta" else storage.data_ptr()
    key = (str(storage.device), address) if address else ("storage", storage._cdata)
    return key, storage.nbytes(), storage.device
