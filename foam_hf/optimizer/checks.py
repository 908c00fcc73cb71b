"""What is legal: hyperparameters, fields of a param group, parameters. Errors say what was given and expected."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from foam_hf.optimizer.nonfinite import MODES
from foam_hf.tensors.folding import MAX_LEVEL
from foam_hf.tensors.places import is_sharded

MAX_NUMBER = 1e9  # products of two of them, over a bias correction, are float32 numbers


def check_options(options: dict[str, Any]) -> None:
    """Validate hyperparameters, a group's or the constructor's; a scale of None is the rule's own.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, NaN and infinity included.
    """
    level = options["level"]
    if not (level == "row" if isinstance(level, str) else _is_int(level) and 0 <= level <= MAX_LEVEL):
        raise ValueError(f"level is out of range: got {level!r}; expected an integer from 0 to {MAX_LEVEL}, or 'row'")
    lr = options["lr"]
    if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.is_complex() or lr.dtype == torch.bool):
        raise ValueError(
            f"lr has {lr.numel()} elements of {lr.dtype}; expected a float or a tensor of one real number"
        )
    _check_number("lr", float(lr) if isinstance(lr, Tensor) else lr)
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas is not a pair: got {betas!r}; expected two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        _check_number(f"betas[{i}]", beta, below=1.0)
    for name in ("eps", "weight_decay", "residual_scale"):
        _check_number(name, options[name])
    if options["scale"] is not None:
        _check_number("scale", options["scale"], positive=True)
    _check_number("momentum", options["momentum"], below=1.0)
    for name, legal in (
        ("second_moment", ("block", "factored", "muon", "adam_mini")),
        ("stochastic_rounding", ("auto", True, False)),
        ("state_dtype", (torch.float32, torch.bfloat16)),
        ("nonfinite", MODES),
        ("plain_state", ("full", "8bit")),
    ):
        if not any(type(options[name]) is type(value) and options[name] == value for value in legal):
            raise ValueError(f"{name} is not valid: got {options[name]!r}; expected one of {legal}")
    mini_rows = options["mini_rows"]
    if not _is_int(mini_rows) or mini_rows < 0:
        raise ValueError(f"mini_rows is out of range: got {mini_rows!r}; expected an integer of 0 or more")
    if options["plain_state"] == "8bit" and options["second_moment"] == "adam_mini":
        raise ValueError(
            "plain_state='8bit' quantizes AdamW's moments, and with second_moment='adam_mini' what does not fold has "
            "Adam-mini's: got both; expected plain_state='full', or another second_moment"
        )
    seed = options["seed"]
    if not _is_int(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is out of range: got {seed!r}; expected an integer from 0 to 2**64 - 1")


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_number(name: str, value: Any, *, below: float = math.inf, positive: bool = False) -> None:
    finite = f"a finite number {'>' if positive else '>='} 0, at most {MAX_NUMBER:g}"
    legal = f"a number in [0, {below:g})" if below < math.inf else finite
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} is not a number: got {value!r}; expected {legal}")
    number: Any = value  # compared before it is converted, which a huge integer does not survive
    if not (0 <= number < below and number <= MAX_NUMBER) or (positive and float(number) == 0):  # NaN fails each
        raise ValueError(f"{name} is out of range: got {value!r}; expected {legal}")


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
    """Raise ValueError for a parameter that the rule of its group does not fit."""
    rule, mini_rows = group["second_moment"], group["mini_rows"]
    if is_sharded(p) and (rule in ("muon", "adam_mini") or group["plain_state"] == "8bit"):
        wanting = f"second_moment={rule!r}" if rule in ("muon", "adam_mini") else "plain_state='8bit'"
        raise ValueError(
            f"{wanting} needs whole weights: got a DTensor of shape {tuple(p.shape)}; expected one process, DDP, or "
            "second_moment='block' with plain_state='full'"
        )
    rows = p.numel() // p.shape[-1] if p.dim() > 1 and p.numel() else 0
    if rule == "adam_mini" and mini_rows and rows % mini_rows:
        raise ValueError(
            f"mini_rows={mini_rows} does not divide the {rows} rows of a parameter of shape {tuple(p.shape)}; "
            "expected the rows of a head, 1 for a second moment of each row, or 0 for one of the whole tensor"
        )


def check_parameter(p: Tensor) -> None:
    """Raise TypeError for a parameter that is not dense float32, bfloat16 or float16."""
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16) or p.layout != torch.strided:
        raise TypeError(
            f"cannot optimize a parameter of dtype {p.dtype} and layout {p.layout}, shape {tuple(p.shape)}; "
            "expected dense float32, bfloat16 or float16"
        )
