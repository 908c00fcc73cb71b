"""Where DeepSpeed's ZeRO has put the weights of an optimizer: the only file that knows names inside of DeepSpeed.

ZeRO replaces the weights in ``param_groups`` by flat vectors, of which each process holds one part. The weights
themselves stay in the model and say where they lie. DeepSpeed is not imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foam_hf.tensors.flat import Span, spans_between

# Attribute -> where it is, and what this file reads there.
NAMES = {
    "_dp_group": "a weight under ZeRO 1 and 2, and BF16_Optimizer: the processes that share its flat vector",
    "ds_process_group": "a weight under ZeRO 3: the processes that share it",
    "ds_numel": "a weight under ZeRO 3: how many elements it has",
    "ds_tensor": "a weight under ZeRO 3: this process's part, whose ds_numel counts padding too",
    "_z3_optimizer": "a weight under ZeRO 3: the optimizer that wraps this one",
    "get_param_id": "ZeRO 3's optimizer: weight -> the key of grad_position",
    "grad_position": "ZeRO 3's optimizer: key -> the weight's flat vector, where it begins there, its elements",
    "fp32_partitioned_groups_flat": "ZeRO 3's optimizer: the flat vectors",
}
TESTED = "0.16 to 0.19"  # versions of DeepSpeed


@dataclass(frozen=True)
class Flat:
    """A flat vector of this process.

    Attributes:
        tensor: the vector, a parameter of the optimizer.
        group: the number of its param group.
        process_group: of all processes that hold a vector of the same weights.
        rank: of this process among them.
        spans: which elements of weights each of them holds, in the order of their ranks. What is left is padding.
        device: where collectives of these processes take tensors.
    """

    tensor: Tensor
    group: int
    process_group: Any
    rank: int
    spans: tuple[tuple[Span, ...], ...]
    device: torch.device


def is_partitioned(p: Any) -> bool:
    """Whether ZeRO has put the weight ``p`` into a flat vector."""
    return hasattr(p, "_dp_group") or is_of_zero3(p)


def is_of_zero3(p: Any) -> bool:
    """Whether the weight ``p`` is under ZeRO 3, and not under ZeRO 1 or 2."""
    return hasattr(p, "_z3_optimizer")


def flats_of(groups: Sequence[dict[str, Any]], weights: Sequence[Sequence[tuple[int, Tensor]]]) -> list[Flat]:
    """The flat vectors of an optimizer.

    Args:
        groups: its param groups.
        weights: for each group, the number of each of its weights and the weight.

    Raises:
        ImportError: this version of DeepSpeed lacks one of ``NAMES``.
        ValueError: the vectors do not hold the weights as ZeRO lays them out.
    """
    everything = [p for mine in weights for _, p in mine]
    if any(map(is_of_zero3, everything)):
        return _flats_of_zero3(weights)
    return [
        _flat_of_group(number, group, mine)
        for number, (group, mine) in enumerate(zip(groups, weights, strict=True))
        if any(is_partitioned(p) for _, p in mine)
    ]


def _flat_of_group(number: int, group: dict[str, Any], weights: Sequence[tuple[int, Tensor]]) -> Flat:
    """ZeRO 1 and 2: the weights of a group lie one behind the other in one tensor, which is cut into equal parts."""
    mine = [(i, p) for i, p in weights if is_partitioned(p)]
    if len(group["params"]) != 1:
        raise ValueError(
            f"ZeRO keeps one flat vector for each param group: got {len(group['params'])} in group {number}"
        )
    (tensor,) = group["params"]
    process_group = _read(mine[0][1], "_dp_group")
    world, rank = _size_and_rank(process_group)
    begin = min(p.data_ptr() for _, p in mine)
    # Their order is that of their addresses, which `round_robin_gradients` changes.
    offsets = sorted(((i, (p.data_ptr() - begin) // p.element_size(), p.numel()) for i, p in mine), key=lambda x: x[1])
    ends = [start + count for _, start, count in offsets]
    starts = [start for _, start, _ in offsets]
    if any(a > b for a, b in zip(ends, [*starts[1:], world * tensor.numel()], strict=True)):
        raise ValueError(
            f"the {len(mine)} weights of param group {number} do not lie one behind the other in {world} vectors of "
            f"{tensor.numel()} elements: got them at {starts[:8]}; expected weights that were not replaced since "
            "deepspeed.initialize"
        )
    size = tensor.numel()
    spans = tuple(spans_between(size * r, size * (r + 1), offsets) for r in range(world))
    return Flat(tensor, number, process_group, rank, spans, mine[0][1].device)


def _flats_of_zero3(weights: Sequence[Sequence[tuple[int, Tensor]]]) -> list[Flat]:
    """ZeRO 3: each weight is cut into equal parts, and a flat vector holds this process's parts of some weights."""
    found: dict[int, list[tuple[int, int, Tensor]]] = {}  # number of a vector -> where, number and weight
    group_of: dict[int, int] = {}
    zero = None
    for number, mine in enumerate(weights):
        for i, p in mine:
            if not hasattr(p, "_z3_optimizer") or not hasattr(p, "ds_tensor"):
                continue
            zero = p._z3_optimizer
            position = _read(zero, "grad_position").get(_read(zero, "get_param_id")(p))
            if position is None:  # frozen, or without elements
                continue
            vector, at, _ = position
            found.setdefault(vector, []).append((at, i, p))
            if group_of.setdefault(vector, number) != number:
                raise ValueError("ZeRO 3 put weights of two param groups into one flat vector; expected one group")
    vectors = _read(zero, "fp32_partitioned_groups_flat") if found else []
    if sorted(found) != list(range(len(vectors))):
        raise ValueError(f"ZeRO 3 has {len(vectors)} flat vectors, and weights lie in {len(found)}; expected the same")
    return [_flat_of_zero3(vectors[i], group_of[i], sorted(found[i], key=lambda x: x[:2])) for i in sorted(found)]


def _flat_of_zero3(tensor: Tensor, group: int, weights: list[tuple[int, int, Tensor]]) -> Flat:
    process_group = _read(weights[0][2], "ds_process_group")
    world, rank = _size_and_rank(process_group)
    spans: list[list[Span]] = [[] for _ in range(world)]
    held = 0
    for at, i, p in weights:
        numel, part = _read(p, "ds_numel"), _read(_read(p, "ds_tensor"), "ds_numel")
        if _read(p, "ds_process_group") is not process_group or part != -(-numel // world):
            raise ValueError(
                f"cannot tell which of {numel} elements of a weight each of {world} processes holds: got parts of "
                f"{part}; expected ZeRO 3 without MiCS, hpZ or expert parallelism"
            )
        held = max(held, at + part)
        for r in range(world):
            first = min(part * r, numel)
            if count := min(part * (r + 1), numel) - first:
                spans[r].append(Span(i, first, count, at))
    if held != tensor.numel():
        raise ValueError(
            f"a flat vector of ZeRO 3 has {tensor.numel()} elements, and its weights {held}; expected the same, as "
            "with offload_optimizer on the CPU or without: FOAM does not run with offload to NVMe"
        )
    return Flat(tensor, group, process_group, rank, tuple(map(tuple, spans)), weights[0][2].device)


def _size_and_rank(process_group: Any) -> tuple[int, int]:
    return torch.distributed.get_world_size(process_group), torch.distributed.get_rank(process_group)


def _read(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        version = getattr(sys.modules.get("deepspeed"), "__version__", "of an unknown version")
        raise ImportError(
            f"deepspeed {version} lacks {name!r}, by which FOAM finds its weights ({NAMES[name]}); expected "
            f"deepspeed {TESTED}"
        ) from None
