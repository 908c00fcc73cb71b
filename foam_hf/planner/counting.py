"""Counts weights, gradients and optimizer state of a plan, to the byte, from shapes and dtypes alone."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foam_hf.memory.measured import expected_state_bytes
from foam_hf.memory.storages import storages, total
from foam_hf.optim_args import (
    FOAM_NAMES,
    RELEASE_KEYS,
    foam_options,
    names_of,
    one_of_ours,
    option,
    split_optim_args,
)
from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.groups import foam_param_groups, grouping_options
from foam_hf.optimizer.micro_batches import bytes_between_passes, refusing_rule
from foam_hf.planner.peers import BY_NAME

OPTIMIZERS = (*FOAM_NAMES, *BY_NAME)


def option_keys(optim: str) -> tuple[str, ...]:
    """The keys that `optim`, one of `OPTIMIZERS`, reads from `optim_args`."""
    if optim in FOAM_NAMES:
        fixed = FOAM_NAMES[optim]
        rules = (None, fixed.get("second_moment", option("second_moment").default))
        return names_of(lambda each: each.key and each.name not in fixed and each.rule in rules)
    return tuple(BY_NAME[optim].options)


@dataclass(frozen=True)
class Counted:
    """Bytes of one model under one optimizer, after a step. The attributes are those of a `Plan`."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    state: int


def count_bytes(
    model: nn.Module,
    optim: str,
    optim_args: str | Mapping[str, Any] | None = None,
    *,
    target_modules: str | list[str] | None = None,
    gradient_release: bool = False,
    accumulation: bool = False,
) -> Counted:
    """Count the bytes that training holds after a step; nothing is allocated.

    Args:
        model: may be on the meta device.
        optim, optim_args, target_modules, gradient_release: as for `foam_hf.estimate_memory`.
        accumulation: gradients are added up over several backward passes.

    Raises:
        ValueError: as `foam_hf.estimate_memory`.
    """
    if gradient_release and optim not in FOAM_NAMES:
        raise ValueError(f"gradient_release is FOAM's, got it with optim={optim!r}; expected {one_of_ours()}")
    blocks_alone = gradient_release and accumulation
    state = count_state(model, optim, optim_args, target_modules=target_modules, blocks_alone=blocks_alone)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.numel() * p.element_size() for p in trained]
    held = sum(gradients)
    if gradient_release:
        held = max(gradients, default=0)
        if accumulation:
            held += _between_passes(foam_groups(model, optim, optim_args, target_modules, blocks_alone=True))
    return Counted(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in trained),
        weights=total(storages([*model.parameters(), *model.buffers()])),
        gradients=held,
        state=state,
    )


def _between_passes(groups: list[dict[str, Any]]) -> int:
    if name := refusing_rule(groups):
        raise ValueError(
            f"gradient_release adds up backward passes by the block rule alone: got second_moment={name} with "
            "accumulation; expected second_moment=block and embedding_rule=block, or one of them"
        )
    return bytes_between_passes(groups)


def count_state(
    model: nn.Module,
    optim: str,
    optim_args: str | Mapping[str, Any] | None = None,
    *,
    target_modules: str | list[str] | None = None,
    blocks_alone: bool = False,
) -> int:
    """Count the bytes of state that `optim` holds for `model` after one step in Trainer; nothing is allocated.

    `blocks_alone` is that of `embedding_rule_of`.

    Raises:
        ValueError: an unknown optimizer, or an option that the optimizer does not have.
    """
    if optim not in OPTIMIZERS:
        near = difflib.get_close_matches(optim, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown optimizer {optim!r}; {hint}expected one of {', '.join(OPTIMIZERS)}")
    if optim in FOAM_NAMES:
        return expected_state_bytes(foam_groups(model, optim, optim_args, target_modules, blocks_alone=blocks_alone))
    return BY_NAME[optim].state_bytes(model, peer_options(optim, optim_args), target_modules)


def foam_groups(
    model: nn.Module,
    optim: str,
    optim_args: str | Mapping[str, Any] | None,
    target_modules: str | list[str] | None = None,
    *,
    blocks_alone: bool = False,
) -> list[dict[str, Any]]:
    """The param groups of FOAM, which checks every value, for the trained weights of `model`.

    `blocks_alone` is that of `embedding_rule_of`.
    """
    options = foam_options(optim, optim_args)
    for name in RELEASE_KEYS:
        options.pop(name, None)
    if "state_dtype" in options:
        options["state_dtype"] = getattr(torch, options["state_dtype"])
    grouping = grouping_options(options, blocks_alone=blocks_alone)
    groups = foam_param_groups(model, target_modules=target_modules, **grouping)
    return FOAM(groups, **options).param_groups


def peer_options(optim: str, optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Check every key of `optim_args`, and return those that change the bytes, converted to their types."""
    legal = BY_NAME[optim].options
    options: dict[str, Any] = {}
    for key, text in split_optim_args(optim_args):
        if key not in legal:
            known = f"it takes {', '.join(legal)}" if legal else "it takes none"
            raise ValueError(f"optim_args: {optim} has no {key!r}; {known}")
        words = legal[key]
        if words is not None and text not in words:
            raise ValueError(f"optim_args: {key} of {optim} must be one of {', '.join(words)}, got {text!r}")
        if key == "rank" and not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"optim_args: rank of {optim} must be an integer of 1 or more, got {text!r}")
        if key in ("rank", "proj", "proj_type"):
            options[key] = int(text) if key == "rank" else text
    return options
