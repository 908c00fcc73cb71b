"""What is legal: hyperparameters, fields of a param group, parameters. Errors say what was given and expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from foam_hf.optim_args import check_fields, default_scale
from foam_hf.rules.all import asked_rules, shardable_options
from foam_hf.tensors.places import is_sharded


def check_options(options: dict[str, Any]) -> None:
    """Validate hyperparameters, a group's or the constructor's; a scale of None is the rule's own.

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


# What torch's schedulers write into groups.
SCHEDULER_FIELDS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")


# What other optimizers of torch have in their groups, the values that ask for nothing, and what to do about others.
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


def fill_scale(group: dict[str, Any]) -> None:
    """Give ``group``, whose options are legal, its rule's own scale where it has None."""
    if group["scale"] is None:
        group["scale"] = default_scale(group["level"], group["second_moment"])


def check_field_names(group: dict[Any, Any], known: Iterable[str]) -> None:
    """Raise ValueError for a field that looks like a misspelling of one in ``known``, or asks for what FOAM lacks."""
    for name, (idle, right) in FOREIGN_FIELDS.items():
        if name in group and not any(group[name] is value for value in idle):
            raise ValueError(f"FOAM has no {name}: got {name}={group[name]!r} in a param group; expected {right}")
    known = [*known, "params", "param_names", *SCHEDULER_FIELDS, *FOREIGN_FIELDS]
    for name in group:
        # Other tools tag groups with keys of their own; only a likely misspelling of ours is an error.
        if not isinstance(name, str) or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"unknown field in a param group: got {name!r}; did you mean {near[0]!r}?")


def check_rule(p: Tensor, group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that a rule which its group asks for does not fit."""
    for rule in asked_rules(group):
        if rule.shards == "nothing" and is_sharded(p):
            field, value = rule.asked
            raise ValueError(
                f"{field}={value!r} needs whole weights: got a DTensor of shape {tuple(p.shape)}; expected one "
                "process, DDP, or second_moment='block' with plain_state='full'"
            )
        rule.check(p, group)


def whole_weights_problem(options: Mapping[str, Any]) -> str | None:
    """What of ``options``, keys of FOAM as far as they were given, does not go with sharded weights; None: nothing."""
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
