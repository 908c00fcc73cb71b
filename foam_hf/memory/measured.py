"""Counts bytes of optimizer state: measured in any optimizer, expected of FOAM, and expected of AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.display import UNAVAILABLE, format_bytes
from foam_hf.memory.storages import state_storages, storages, total, without
from foam_hf.optimizer.checks import check_options, fill_in
from foam_hf.optimizer.flat_parts import FlatParts
from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.sharding import local_shape
from foam_hf.optimizer.state import expected_state
from foam_hf.rules.all import rule_of
from foam_hf.tensors.places import is_sharded, local, whole
from foam_hf.tensors.rows import PLAIN, kind_of


@dataclass(frozen=True)
class MemoryBreakdown:
    """The bytes that one process holds. `allocated`, `peak` and `shares` are None without a CUDA device.

    Attributes:
        parameters: the number of trainable parameters; DTensors count with their local shard.
        adamw: the state that `torch.optim.AdamW` would hold for them.
        weights: parameters and buffers of the model.
        gradients: the tensors in `parameter.grad` now.
        state: the optimizer's state.
        allocated: on the model's CUDA devices, now.
        peak: the most that was allocated on these devices since Trainer or the user last reset the counter.
        shares: fractions of `peak`: "weights", "gradients" and "state", as far as they are on these devices, and
            "rest": activations, temporary memory, and what the allocator adds by rounding up.
    """

    parameters: int
    adamw: int
    weights: int
    gradients: int
    state: int
    allocated: int | None
    peak: int | None
    shares: dict[str, float] | None

    @property
    def state_per_parameter(self) -> float | None:
        """Bytes of state for each trainable parameter; None if no parameter is trainable."""
        return self.state / self.parameters if self.parameters else None

    @property
    def adamw_ratio(self) -> float | None:
        """State as a fraction of AdamW's; None if no parameter is trainable."""
        return self.state / self.adamw if self.adamw else None


def state_bytes(optimizer: Any) -> int:
    """Measure the bytes that `optimizer` holds for its state in this process.

    It finds tensors in containers, in objects (projectors, quantized containers), in tensor subclasses (by
    `__tensor_flatten__`), and in wrappers with optimizers in their attributes (accelerate's, transformers' layer-wise
    one). A DTensor counts with its local shard. Each storage counts once, at its full size, on any device, so paged
    and offloaded state counts too; tensors on the meta device count with their nominal size. Parameters and gradients
    do not count.

    Raises:
        TypeError: `optimizer` has no state and param_groups.
    """
    return total(state_storages(optimizer))


def breakdown(model: nn.Module, optimizer: Any) -> MemoryBreakdown:
    """Measure the bytes of weights, gradients and state in this process, and read the counters of CUDA.

    A storage that several kinds share counts once, as the first of weights, gradients and state. Under DeepSpeed's
    ZeRO weights are what this process holds of them, with FOAM's float32 copies; ``parameters`` and ``adamw`` are for
    the elements that it updates.

    Raises:
        TypeError: `optimizer` has no state and param_groups.
    """
    params = list(model.parameters())
    held = [getattr(p, "ds_tensor", None) for p in params]  # ZeRO 3 keeps its parts outside of the weights
    flats = _flats_of(optimizer)
    weights = storages([*params, *model.buffers(), *held, *(each.flat.tensor for each in flats)])
    gradients = without(storages([p.grad for p in model.parameters()]), weights)
    state = without(without(state_storages(optimizer), weights), gradients)
    allocated = peak = shares = None
    devices = {device for _, device in weights.values() if device.type == "cuda"}
    if devices:
        allocated = sum(torch.cuda.memory_allocated(device) for device in devices)
        peak = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        parts = {"weights": weights, "gradients": gradients, "state": state}
        on_device = {name: total(part, devices) for name, part in parts.items()}
        on_device["rest"] = peak - sum(on_device.values())
        shares = {name: size / peak for name, size in on_device.items()} if peak else None
    trainable = [p for p in params if p.requires_grad]
    elements = sum(each.elements for each in flats)
    return MemoryBreakdown(
        parameters=elements if flats else sum(local(whole(p)).numel() for p in trainable),
        adamw=sum(8 * each.elements + 4 for each in flats) if flats else adamw_state_bytes(trainable),
        weights=total(weights),
        gradients=total(gradients),
        state=total(state),
        allocated=allocated,
        peak=peak,
        shares=shares,
    )


def _flats_of(optimizer: Any) -> list[FlatParts]:
    """What DeepSpeed's ZeRO has made of the weights of a FOAM, perhaps inside of wrappers; or nothing."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer.flat_parts if isinstance(optimizer, FOAM) else []


def expected_state_bytes(param_groups: Iterable[Mapping[str, Any]]) -> int:
    """The bytes of state that FOAM will hold in this process for `param_groups`; nothing is allocated.

    Args:
        param_groups: of a FOAM optimizer, or from `foam_param_groups`; FOAM's defaults fill in missing fields.
            Parameters may be on the meta device; those without `requires_grad` get no state. DeepSpeed's ZeRO replaces
            the parameters of an optimizer, so ask before, or with new groups of the model: then it is the sum over
            processes, in which each block that two of them share counts once.

    Raises:
        ValueError, TypeError: a field that FOAM's constructor would refuse.
    """
    groups = _with_defaults(param_groups)
    return sum(_expected_bytes(p, group) for group in groups for p in group["params"] if p.requires_grad)


def adamw_state_bytes(params: Iterable[Tensor]) -> int:
    """The bytes that `torch.optim.AdamW` would hold for each parameter: two tensors like it, and a step of 4 bytes.

    Args:
        params: tensors of any dtype. Each counts once, a DTensor with its local shard. Tensors without
            `requires_grad` do not count.
    """
    unique = {id(p): whole(p) for p in params if p.requires_grad}
    return sum(2 * mine.numel() * mine.element_size() + 4 for mine in map(local, unique.values()))


def headline(optimizer: Any, *, zero: int | None = None) -> str:
    """One line on a FOAM optimizer, from shapes alone: the bytes of its state and of AdamW's.

    Args:
        optimizer: a FOAM.
        zero: the number of processes among which DeepSpeed's ZeRO will divide both; it keeps AdamW's moments in
            float32, whatever the dtype of the weights.
    """
    trained = {
        id(p): (p, _expected_bytes(p, group))
        for group in _with_defaults(optimizer.param_groups)
        for p in group["params"]
        if p.requires_grad
    }
    total, adamw = _total_bytes([*trained.values()]), adamw_state_bytes(p for p, _ in trained.values())
    count = sum(local(whole(p)).numel() for p, _ in trained.values())
    if zero is not None:
        adamw = 8 * count + 4 * len(trained)
    share = ", this process's share" if any(is_sharded(p) for p, _ in trained.values()) else ""
    share = f", divided by {zero} processes" if (zero or 1) > 1 else share
    return (
        f"FOAM: {format_bytes(total)} of optimizer state, {_percent(total, adamw)} of AdamW's {format_bytes(adamw)}, "
        f"for {count:,} trained parameters{share}"
    )


def summarize(optimizer: Any) -> str:
    """A few lines on a FOAM optimizer, from shapes alone: which weights fold, their state, and how weights round."""
    folded: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = {}
    plain: dict[str, list[tuple[Tensor, int]]] = {}
    rounding: set[str] = set()
    for group in _with_defaults(optimizer.param_groups):
        for p in map(whole, group["params"]):
            if not p.requires_grad:
                continue
            rule, level = rule_of(p, group)
            sized = (p, _expected_bytes(p, group))
            if level == 0 and rule.plain_words and (group["scale"] == 1 or p.dim() < 2):
                plain.setdefault(rule.plain_words, []).append(sized)
            else:
                folded.setdefault((level, group["scale"], rule.words), []).append(sized)
            kind = kind_of(p)
            precision = str(p.dtype).removeprefix("torch.") if kind == PLAIN else kind.upper()
            stochastic = (kind != PLAIN or p.dtype == torch.bfloat16) and group["stochastic_rounding"] is not False
            rounding.add(f"{precision} {'stochastically' if stochastic else 'to nearest'}")
    lines = [
        f"FOAM: folded (level {level}, scale {scale:g}, {words}): {_amount(members)}"
        for (level, scale, words), members in folded.items()
    ] or ["FOAM: no weight folds"]
    for words, members in plain.items():
        largest, cost = max(members, key=lambda sized: sized[1])
        lines.append(
            f"FOAM: unfolded ({words}): {_amount(members)}, of which {format_bytes(cost)} for the largest "
            f"tensor, {list(largest.shape)}"
        )
    everything = [sized for members in (*plain.values(), *folded.values()) for sized in members]
    total, adamw = _total_bytes(everything), adamw_state_bytes(p for p, _ in everything)
    lines.append(
        f"FOAM: {format_bytes(total)} of state in all, {_percent(total, adamw)} of AdamW's {format_bytes(adamw)}; "
        f"weights are rounded: {', '.join(sorted(rounding))}"
    )
    return "\n".join(lines)


def _amount(members: list[tuple[Tensor, int]]) -> str:
    count, s = sum(p.numel() for p, _ in members), "" if len(members) == 1 else "s"
    return f"{len(members)} tensor{s}, {count:,} parameters, {format_bytes(_total_bytes(members))} of state"


def _total_bytes(members: list[tuple[Tensor, int]]) -> int:
    return sum(size for _, size in members)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g}%" if whole else UNAVAILABLE


def _with_defaults(param_groups: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each group with FOAM's defaults for missing fields, after its fields were checked."""
    arguments = inspect.signature(FOAM).parameters.values()
    defaults = {p.name: p.default for p in arguments if p.default is not inspect.Parameter.empty}
    for group in param_groups:
        filled = {**defaults, **group}
        check_options(filled)
        fill_in(filled, defaults)
        yield filled


def _expected_bytes(p: Tensor, group: dict[str, Any]) -> int:
    p = whole(p)
    tensors = expected_state(p, group).values()
    return sum(local_shape(p, tensor).numel() * tensor.dtype.itemsize for tensor in tensors)
