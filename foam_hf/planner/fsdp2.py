"""Counts what one GPU holds under FSDP2, as accelerate sets it up, from shapes and dtypes alone.

Each layer, the embedding, and the last norm with the head are gathered one after the other, each while the one before
it computes. Weights are divided by rows, and the first process has most of them.

This file relies on a name of transformers, `PreTrainedModel._no_split_modules`, as accelerate does: the classes of the
layers that FSDP2 gathers at a time. Without it the model counts as one unit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.memory.storages import storages, total
from foam_hf.optim_args import FOAM_NAMES, foam_options
from foam_hf.optimizer.checks import whole_weights_problem
from foam_hf.planner.peers import BY_NAME
from foam_hf.tensors.rows import PLAIN, kind_of


def refuse_whole_weights(optim: str, optim_args: str | Mapping[str, Any] | None) -> None:
    """Raise ValueError if FSDP2 cannot divide what ``optim`` needs whole."""
    if optim in FOAM_NAMES:
        if problem := whole_weights_problem(foam_options(optim, optim_args)):
            raise ValueError(problem)
    elif optim in BY_NAME and not BY_NAME[optim].flat:
        can = [name for name, each in BY_NAME.items() if each.flat]
        raise ValueError(
            f"optim={optim!r} needs whole matrices, and FSDP2 splits them; expected foam, foam_mini or one of "
            f"{', '.join(can)}"
        )


def shard_of(model: nn.Module, gpus: int) -> nn.Module:
    """A copy of ``model``, on the meta device, whose weights have the rows of the first of ``gpus`` processes.

    Raises:
        ValueError: a weight has no dimension, which FSDP2 refuses.
    """
    if scalars := [name for name, p in model.named_parameters() if p.dim() == 0]:
        raise ValueError(f"FSDP2 divides weights by rows, and {scalars[0]} has no dimension; expected a shape of (1,)")
    shard = copy.deepcopy(model)
    parts: dict[int, nn.Parameter] = {}
    for module in shard.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in parts:
                    part = p.detach().new_zeros((_rows(p, gpus), *p.shape[1:]))
                    parts[id(p)] = nn.Parameter(part, requires_grad=p.requires_grad)
                    parts[id(parts[id(p)])] = parts[id(p)]
                module._parameters[name] = parts[id(p)]
    return shard


def buffer_bytes(model: nn.Module, gpus: int, computing: torch.dtype | None = None) -> int:
    """The most bytes of gathered weights, and of gradients that are not divided yet, at a time of the backward pass.

    While a unit computes gradients, the next one is gathered: there are the weights of both, and what the next one's
    were gathered into. The unit's gradients are then copied into one tensor, whose sum over processes is divided. That
    of the unit before lives on until then.

    Args:
        model: on the meta device, whole.
        gpus: that share it.
        computing: the dtype of mixed precision.
    """
    units = [*reversed(_units(model))]
    weights = [sum(_gathered(p, gpus, computing) for p in unit) for unit in units]
    gradients = [sum(_gradient(p, gpus, computing) for p in unit if p.requires_grad) for unit in units]
    most = 0
    for i in range(len(units)):
        following = weights[i + 1] if i + 1 < len(units) else 0
        before = gradients[i - 1] if i else 0
        most = max(most, weights[i] + 2 * following + gradients[i] + max(gradients[i], before))
    return most


def _rows(p: Tensor, gpus: int) -> int:
    return -(-p.shape[0] // gpus)


def _units(model: nn.Module) -> list[list[nn.Parameter]]:
    """The weights that accelerate lets FSDP2 gather at a time, in the order of the forward pass, each once."""
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    layers = set(getattr(base, "_no_split_modules", None) or ())
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    wholes = [module for module in model.modules() if type(module).__name__ in layers or module is embedding]
    seen: set[int] = set()
    units = [_unseen(module.parameters(), seen) for module in wholes]
    return [unit for unit in (*units, _unseen(model.parameters(), seen)) if unit]


def _unseen(params: Iterable[nn.Parameter], seen: set[int]) -> list[nn.Parameter]:
    found = {id(p): p for p in params if id(p) not in seen}
    seen.update(found)
    return [*found.values()]


def _gathered(p: Tensor, gpus: int, computing: torch.dtype | None) -> int:
    """Bytes of a weight of all processes, padding included; those of an INT8 weight are codes and scales."""
    if kind_of(p) == PLAIN:
        return _gradient(p, gpus, computing)
    return total(storages([p])) // p.shape[0] * gpus * _rows(p, gpus)


def _gradient(p: Tensor, gpus: int, computing: torch.dtype | None) -> int:
    size = p.element_size() if computing is None else computing.itemsize
    return size * p.shape[1:].numel() * gpus * _rows(p, gpus)
