"""Counting bytes of optimizer state: measured in any optimizer, expected of FOAM, and what AdamW would keep."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.display import UNAVAILABLE, format_bytes
from foam_hf.memory.storages import state_storages, storages, total, without
from foam_hf.optimizer.checks import check_options, fill_scale
from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.sharding import local_shape
from foam_hf.optimizer.state import expected_state
from foam_hf.rules.all import rule_of
from foam_hf.tensors.places import is_sharded, local
from foam_hf.tensors.rows import PLAIN, kind_of


@dataclass(frozen=True)
class MemoryBreakdown:
    """What one process holds, in bytes. `allocated`, `peak` and `shares` are None where there is no CUDA device.

    Attributes:
        parameters: the number of trainable parameters; of DTensors, in the local shard.
        adamw: what `torch.optim.AdamW` would hold for them.
        weights: parameters and buffers of the model.
        gradients: what `parameter.grad` holds at the moment.
        state: of the optimizer.
        allocated: on the model's CUDA devices, now.
        peak: the most that was ever allocated on them, or since Trainer or the user last reset the counter.
        shares: of `peak`, as fractions: "weights", "gradients" and "state", as far as they are on these devices, and
            "rest": activations, temporary memory, what the allocator rounds up.
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
        """Bytes of state for each trainable parameter; None if there are none."""
        return self.state / self.parameters if self.parameters else None

    @property
    def adamw_ratio(self) -> float | None:
        """State as a fraction of AdamW's; None if there are no trainable parameters."""
        return self.state / self.adamw if self.adamw else None


def state_bytes(optimizer: Any) -> int:
    """Measure the bytes that `optimizer` holds for its state in this process.

    Follows whatever an optimizer keeps: tensors, containers, objects with tensors inside (projectors, quantized
    containers), tensor subclasses (by `__tensor_flatten__`), local shards of DTensors. Every storage counts once and
    whole, wherever it lives, paged and CPU-offloaded state included; tensors on the meta device count by their nominal
    size. Parameters and gradients that an optimizer refers to do not count. Wrappers (accelerate's, transformers'
    layer-wise one, any that holds optimizers in its attributes) are looked through.

    Raises:
        TypeError: `optimizer` has no state and param_groups.
    """
    return total(state_storages(optimizer))


def breakdown(model: nn.Module, optimizer: Any) -> MemoryBreakdown:
    """Measure the bytes of weights, gradients and state in this process, and read the counters of CUDA.

    A storage counts once: as weight, else as gradient, else as state.

    Raises:
        TypeError: `optimizer` is no optimizer.
    """
    weights = storages([*model.parameters(), *model.buffers()])
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
    trainable = [p for p in model.parameters() if p.requires_grad]
    return MemoryBreakdown(
        parameters=sum(local(p).numel() for p in trainable),
        adamw=adamw_state_bytes(trainable),
        weights=total(weights),
        gradients=total(gradients),
        state=total(state),
        allocated=allocated,
        peak=peak,
        shares=shares,
    )


def expected_state_bytes(param_groups: Iterable[Mapping[str, Any]]) -> int:
    """The bytes of state that FOAM will hold for `param_groups`, from shapes alone; nothing is allocated.

    Of DTensors, what this process will hold.

    Args:
        param_groups: of a FOAM optimizer, or from `foam_param_groups`; FOAM's default arguments fill in what is
            missing. Parameters may be on the meta device; those without `requires_grad` get no state.

    Raises:
        ValueError, TypeError: a group asks for what FOAM would refuse.
    """
    return sum(_expected(p, group) for group in _filled(param_groups) for p in group["params"] if p.requires_grad)


def adamw_state_bytes(params: Iterable[Tensor]) -> int:
    """The bytes that `torch.optim.AdamW` would hold: two tensors as the parameter, and a step of 4 bytes.

    Args:
        params: tensors of any dtype; each counts once, DTensors by their local shard; those without `requires_grad`
            do not count.
    """
    unique = {id(p): p for p in params if p.requires_grad}
    return sum(2 * mine.numel() * mine.element_size() + 4 for mine in map(local, unique.values()))


def headline(optimizer: Any) -> str:
    """What a FOAM optimizer gains, in one line, from shapes alone: its state beside AdamW's."""
    trained = {
        id(p): (p, _expected(p, group))
        for group in _filled(optimizer.param_groups)
        for p in group["params"]
        if p.requires_grad
    }
    total, adamw = _size([*trained.values()]), adamw_state_bytes(p for p, _ in trained.values())
    count = sum(local(p).numel() for p, _ in trained.values())
    share = ", this process's share" if any(is_sharded(p) for p, _ in trained.values()) else ""
    return (
        f"FOAM: {format_bytes(total)} of optimizer state, {_percent(total, adamw)} of AdamW's {format_bytes(adamw)}, "
        f"for {count:,} trained parameters{share}"
    )


def summarize(optimizer: Any) -> str:
    """A few lines on a FOAM optimizer, from shapes alone: what folds, what stays plain, their cost, and rounding."""
    folded: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = {}
    plain: dict[str, list[tuple[Tensor, int]]] = {}
    rounding: set[str] = set()
    for group in _filled(optimizer.param_groups):
        for p in group["params"]:
            if not p.requires_grad:
                continue
            rule, level = rule_of(p, group)
            sized = (p, _expected(p, group))
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
    total, adamw = _size(everything), adamw_state_bytes(p for p, _ in everything)
    lines.append(
        f"FOAM: {format_bytes(total)} of state in all, {_percent(total, adamw)} of AdamW's {format_bytes(adamw)}; "
        f"weights are rounded: {', '.join(sorted(rounding))}"
    )
    return "\n".join(lines)


def _amount(members: list[tuple[Tensor, int]]) -> str:
    count, s = sum(p.numel() for p, _ in members), "" if len(members) == 1 else "s"
    return f"{len(members)} tensor{s}, {count:,} parameters, {format_bytes(_size(members))} of state"


def _size(members: list[tuple[Tensor, int]]) -> int:
    return sum(size for _, size in members)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g}%" if whole else UNAVAILABLE


def _filled(param_groups: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    arguments = inspect.signature(FOAM).parameters.values()
    defaults = {p.name: p.default for p in arguments if p.default is not inspect.Parameter.empty}
    for group in param_groups:
        filled = {**defaults, **group}
        check_options(filled)
        fill_scale(filled)
        yield filled


def _expected(p: Tensor, group: dict[str, Any]) -> int:
    tensors = expected_state(p, group).values()
    return sum(local_shape(p, tensor).numel() * tensor.dtype.itemsize for tensor in tensors)
