"""Names of the weights in an optimizer's checkpoint, as in torch's `param_names`: state is matched by position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from foam_hf.tensors.places import is_sharded

_WRAPPERS = ("_orig_mod.", "module.", "_checkpoint_wrapped_module.")  # torch.compile, DDP, activation checkpointing
_UNNAMED = ""  # a weight that the Trainer's model does not have, such as that of a loss


def names_problem(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> str:
    """Which weight would get the state of another one, where both sides have names; an empty string if none would."""
    for group, saved in zip(groups, saved_groups, strict=True):
        mine, theirs = (each.get("param_names") for each in (group, saved))
        if not isinstance(mine, list) or not isinstance(theirs, list) or len(mine) != len(theirs):
            continue
        for i, (own, other) in enumerate(zip(map(_plain_name, mine), map(_plain_name, theirs), strict=True)):
            if own != other and _UNNAMED not in (own, other):
                return (
                    f"the checkpoint's state number {i} of its group is that of {other}, and here that place is "
                    f"{own}'s; expected the same weights in the same order: the same model and the same choice of "
                    "folded weights (optim_target_modules). If the weights were only renamed, delete 'param_names' "
                    "from the param groups of the checkpoint (optimizer.pt), and state is matched by position"
                )
    return ""


def _plain_name(name: Any) -> str:
    name = str(name)
    for wrapper in _WRAPPERS:
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return name


@contextmanager
def named(optimizer: Any, model: Any) -> Iterator[None]:
    """While this lasts, the param groups of a FOAM have the names that its weights have in ``model``.

    They do not stay: torch refuses a group without names beside one with names. Groups of FSDP2 get none, as their
    state is saved by name anyway.
    """
    groups = [] if optimizer is None or model is None else optimizer.param_groups
    if any("param_names" in group or any(map(is_sharded, group["params"])) for group in groups) or not groups:
        yield
        return
    names = {id(p): _plain_name(name) for name, p in model.named_parameters()}
    for group in groups:
        group["param_names"] = [names.get(id(p), _UNNAMED) for p in group["params"]]
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group.pop("param_names", None)
