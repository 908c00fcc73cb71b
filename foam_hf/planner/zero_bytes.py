"""Counts what one GPU holds under DeepSpeed's ZeRO, from shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.memory.storages import storages, total
from foam_hf.optim_args import FOAM_NAMES, foam_options
from foam_hf.optimizer.flat import refuse_whole_weights_rules
from foam_hf.optimizer.groups import foam_parameter_names
from foam_hf.optimizer.state import expected_state
from foam_hf.planner.counting import foam_groups, peer_options
from foam_hf.planner.peers import BY_NAME, FLOAT
from foam_hf.planner.zero import Flat, Segment, Zero, flats
from foam_hf.rules.all import rule_of
from foam_hf.tensors.folding import block_width


@dataclass(frozen=True)
class ZeroBytes:
    """Bytes of one process. All but `host` are on its GPU.

    Attributes:
        weights: in the dtype that computes, with buffers and frozen weights.
        gradients: as they lie while the backward pass runs.
        masters: the float32 copies of weights that the optimizer updates.
        state: of the optimizer, after the first step.
        buffers: of DeepSpeed, during the backward pass: gradients on their way, and in stage 3 gathered weights.
        step: bytes beside weights, masters and state while DeepSpeed reduces the last gradients or updates.
        host: what offloading moves to host memory.
    """

    weights: int
    gradients: int
    masters: int
    state: int
    buffers: int
    step: int
    host: int


def count_zero(
    model: nn.Module,
    zero: Zero,
    optim: str,
    optim_args: str | Mapping[str, Any] | None = None,
    *,
    accumulation: bool = False,
    target_modules: str | list[str] | None = None,
) -> ZeroBytes:
    """Count the bytes of the process that holds most; nothing is allocated.

    Args:
        model: may be on the meta device, in the dtype in which DeepSpeed computes.
        optim, optim_args, target_modules: as for `foam_hf.estimate_memory`.
        accumulation: gradients are added up over several backward passes.

    Raises:
        ValueError: the optimizer or its rule needs whole matrices, or an option is not known.
    """
    groups = _param_groups(model, optim, optim_args, target_modules)
    parts = [[each for group in groups for each in flats(group["params"], zero, rank)] for rank in range(zero.gpus)]
    state = max(map(_state_counter(groups, optim, optim_args), parts))
    trained = [p for group in groups for p in group["params"]]
    size = trained[0].element_size()  # ZeRO wants one dtype
    whole, largest = sum(p.numel() for p in trained), max(p.numel() for p in trained)
    share, widest = sum(each.numel for each in parts[0]), max(each.numel for each in parts[0])
    owned = max(sum(s.weight.numel() for each in flat for s in each.segments) for flat in parts)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if zero.stage == 3:
        weights = size * share + sum(p.element_size() * -(-p.numel() // zero.gpus) for p in frozen)
        masters = FLOAT * share
        gathered = size * min(zero.live, whole + sum(p.numel() for p in frozen))
        gradients = size * (largest + (0 if zero.offload else share))
        bucket = size * zero.reduce_bucket
        step = bucket + (0 if zero.offload else size * share + FLOAT * widest)
        kept = size * share  # gradients wait in host memory, in the weights' dtype
    else:
        padded = size * share * zero.gpus
        weights = padded + total(storages(frozen))
        masters, gathered = FLOAT * share, 0
        bucket = size * zero.reduce_bucket * (2 if zero.overlap else 1)
        held = 0 if zero.offload else size * owned  # a weight that two processes share counts whole in both
        update = 0 if zero.offload else (FLOAT if size == FLOAT else FLOAT + size) * widest
        kept = size * (share + largest)  # the new weights, and a gradient on its way
        if zero.stage == 1:
            gradients = size * whole
            step = max(gradients + bucket + size * min(zero.reduce_bucket, whole), update) + held
        else:
            gradients = size * largest + held * (2 if accumulation else 1)
            step = held + update
        if zero.offload:
            gathered = size * largest  # the buffer through which gradients go to the host
            kept += size * owned if accumulation else 0
    weights += total(storages(model.buffers()))
    buffers = bucket + size * min(zero.reduce_bucket, whole) + gathered
    if not zero.offload:
        return ZeroBytes(weights, gradients, masters, state, buffers, step + _temporary(parts[0], optim), 0)
    host = masters + state + FLOAT * share + kept
    return ZeroBytes(weights, gradients, 0, 0, buffers, step, host)


def _param_groups(
    model: nn.Module, optim: str, optim_args: Any, target_modules: str | list[str] | None
) -> list[dict[str, Any]]:
    """The param groups that Trainer makes: FOAM's own, or one with weight decay and one without."""
    if optim in FOAM_NAMES:
        refuse_whole_weights_rules(foam_options(optim, optim_args), "ZeRO")
        return foam_groups(model, optim, optim_args, target_modules, blocks_alone=True)
    peer = BY_NAME[optim]
    if not peer.flat:
        can = [name for name, each in BY_NAME.items() if each.flat]
        raise ValueError(
            f"optim={optim!r} needs whole matrices, which ZeRO flattens and cuts; expected foam, foam_mini or one of "
            f"{', '.join(can)}"
        )
    parameters = dict(model.named_parameters())
    groups: dict[str, list[Tensor]] = {}
    for group, names in foam_parameter_names(model).items():
        groups.setdefault(group.split("/")[1], []).extend(parameters[name] for name in names)
    return [{"params": params} for params in groups.values()]


def _state_counter(groups: Sequence[Mapping[str, Any]], optim: str, optim_args: Any) -> Any:
    """A function from the flat vectors of a process to its bytes of state."""
    if optim in FOAM_NAMES:
        group_of = {id(p): group for group in groups for p in group["params"]}

        def foam(parts: Iterable[Flat]) -> int:
            return sum(segment_state_bytes(s, group_of[id(s.weight)]) for each in parts for s in each.segments)

        return foam
    options = peer_options(optim, optim_args)
    return lambda parts: BY_NAME[optim].state_bytes(_as_model(parts), options)


def segment_state_bytes(segment: Segment, group: Mapping[str, Any]) -> int:
    """The bytes of FOAM's state for a part of a weight: all blocks that it touches, also those that it shares."""
    p = segment.weight
    rule, level = rule_of(p, group)
    n = p.shape[-1] if p.dim() else 1
    found = 0
    for tensor in expected_state(p, dict(group)).values():
        columns = tensor.shape[-1] if tensor.shape else 1
        width = 1 if columns == n else block_width(level, n)

        def number(element: int, columns: int = columns, width: int = width) -> int:
            return element // n * columns + element % n // width

        touched = number(segment.first + segment.size - 1) - number(segment.first) + 1
        found += touched * tensor.dtype.itemsize
    return found


def _as_model(parts: Iterable[Flat]) -> nn.Module:
    """A module whose parameters are the flat vectors, as another optimizer sees them."""
    vectors = [torch.empty(each.numel, dtype=torch.float32, device="meta") for each in parts]
    return nn.ParameterList([nn.Parameter(vector) for vector in vectors])


def _temporary(parts: Iterable[Flat], optim: str) -> int:
    """Bytes that a step allocates and frees again: FOAM's on flat vectors allocates nothing."""
    return 0 if optim in FOAM_NAMES else BY_NAME[optim].temporary([*_as_model(parts).parameters()])
