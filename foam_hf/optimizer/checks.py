"""Checks of what a user gives to ``FOAM``: hyperparameters, fields of param groups, and parameters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from foam_hf.optim_args import check_fields, default_scale
from foam_hf.optimizer.tables import settle
from foam_hf.rules.all import asked_rules, shardable_options
from foam_hf.tensors.places import is_sharded


def check_options(options: dict[str, Any]) -> None:
    """Check the hyperparameters of a param group or of the constructor. A scale of None is legal: the rule's default.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, NaN and infinity included.
    """
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex() or lr.dtype == torch.bool:
            raise ValueError(
                f"lr has {lr.numel()} elements of {lr.dtype}; expected a float or a tensor of one real number"
            )
        lr = float(lr)
    check_fields({**options, "lr": lr})


# Fields that torch's schedulers write into param groups.
SCHEDULER_FIELDS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")


# Fields of torch's other optimizers -> values that change nothing, and what messages say is right for other values.
FOREIGN_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "maximize": ((False,), "a loss to minimize, its negative"),
    "amsgrad": ((False,), "no such field: FOAM keeps no maximum of its second moments"),
    "nesterov": ((False,), "no such field: second_moment='muon' has Nesterov's momentum of its own"),
    "foreach": ((False, None), "no such field: FOAM's kernels update all weights at once"),
    "fused": ((False, None), "no such field: FOAM's kernels are fused wherever Triton is"),
    "capturable": ((False,), "no such field: FOAM's step is not captured in CUDA graphs"),
    "differentiable": ((False,), "no such field: autograd does not go through FOAM's step"),
    "decoupled_weight_decay": ((True,), "no such field: FOAM's weight decay is decoupled, as AdamW's"),
}


def fill_in(group: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Fill in what ``group``, whose options were checked, leaves open: the rule of embeddings, and a scale of None.

    ``defaults`` are the optimizer's.
    """
    settle(group, defaults)
    if group["scale"] is None:
        group["scale"] = default_scale(group["level"], group["second_moment"])


def check_field_names(group: dict[Any, Any], known: Iterable[str]) -> None:
    """Raise ValueError for a field that FOAM does not support, or that is likely a misspelling of one in ``known``."""
    for name, (harmless, right) in FOREIGN_FIELDS.items():
        if name in group and not any(group[name] is value for value in harmless):
            raise ValueError(f"FOAM has no {name}: got {name}={group[name]!r} in a param group; expected {right}")
    known = [*known, "params", "param_names", *SCHEDULER_FIELDS, *FOREIGN_FIELDS]
    for name in group:
        # Other tools add keys of their own to groups, so only a likely misspelling is an error.
        if not isinstance(name, str) or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"unknown field in a param group: got {name!r}; did you mean {near[0]!r}?")


def check_rule(p: Tensor, group: dict[str, Any]) -> None:
    """Raise ValueError if a rule of ``group`` cannot update ``p``, because of its shape or its shards."""
    for rule in asked_rules(group):
        if rule.shards == "nothing" and is_sharded(p):
            field, value = rule.asked
            right = " with ".join(
                f"{name}={' or '.join(map(repr, legal))}" for name, legal in shardable_options().items()
            )
            raise ValueError(
                f"{field}={value!r} needs whole weights: got a DTensor of shape {tuple(p.shape)}; expected one "
                f"process, DDP, or {right}"
            )
        rule.check(p, group)


def whole_weights_problem(options: Mapping[str, Any]) -> str | None:
    """What is wrong with ``options`` if weights are sharded, or None. ``options`` has the keys that were given."""
    for field, legal in shardable_options().items():
        if options.get(field, legal[0]) not in legal:
            return (
                f"{field}={options[field]} needs whole weights, and FSDP2 splits them; expected "
                f"{field}={' or '.join(legal)}, or DDP"
            )
    return None


def check_parameter(p: Tensor) -> None:
    """Raise TypeError for a parameter that is not dense float32, bfloat16 or float16."""
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16) or p.layout != torch.strided:
        raise TypeError(
            f"cannot optimize a parameter of dtype {p.dtype} and layout {p.layout}, shape {tuple(p.shape)}; "
            "expected dense float32, bfloat16 or float16"
        )


def check_gradient(p: Tensor, i: int) -> None:
    """Check the gradient of ``p``, parameter number ``i``, if there is one.

    Raises:
        TypeError: it is sparse or complex.
        ValueError: it has not the shape of ``p``, or is on another device: ``p.data`` was replaced.
    """
    grad = p.grad
    if grad is None:
        return
    if grad.layout != torch.strided or grad.is_complex():
        kind = "complex" if grad.is_complex() else str(grad.layout)
        raise TypeError(
            f"FOAM needs dense real gradients: got {kind} for parameter {i} of shape {tuple(p.shape)}; "
            "for an embedding, expected sparse=False"
        )
    if grad.shape != p.shape or grad.device != p.device:
        raise ValueError(
            f"the gradient of parameter {i} is not that of the weight as it is now: got a gradient of shape "
            f"{tuple(grad.shape)} on {grad.device} for a weight of shape {tuple(p.shape)} on {p.device}; expected "
            "zero_grad() before a weight's data is replaced or moved"
        )
