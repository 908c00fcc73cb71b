"""Names of the weights in an optimizer's checkpoint, in torch's field `param_names`.

torch matches state to weights by position alone. With names, state that would go to another weight is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from foam_hf.tensors.places import is_sharded

_WRAPPERS = ("_orig_mod.", "module.", "_checkpoint_wrapped_module.")  # torch.compile, DDP, activation checkpointing
_UNNAMED = ""  # for a weight outside of the Trainer's model, such as one of a loss


def names_problem(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> str:
    """A message about a weight that would get another one's state, or an empty string.

    Only groups that have names on both sides are compared.
    """
    for group, saved in zip(groups, saved_groups, strict=True):
        mine, theirs = (each.get("param_names") for each in (group, saved))
        if not isinstance(mine, list) or not isinstance(theirs, list) or len(mine) != len(theirs):
            continue
        for i, (own, other) in enumerate(
            zip(map(_without_wrappers, mine), map(_without_wrappers, theirs), strict=True)
        ):
            if own != other and _UNNAMED not in (own, other):
                return (
                    f"the checkpoint's state number {i} of its group is that of {other}, and here that place is "
                    f"{own}'s; expected the same weights in the same order: the same model and the same choice of "
                    "folded weights (optim_target_modules). If the weights were only renamed, delete 'param_names' "
                    "from the param groups of the checkpoint (optimizer.pt), and state is matched by position"
                )
    return ""


def _without_wrappers(name: Any) -> str:
    """``name`` without the parts that torch.compile, DDP and activation checkpointing add."""
    name = str(name)
    for wrapper in _WRAPPERS:
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return name


@contextmanager
def named(optimizer: Any, model: Any) -> Iterator[None]:
    """Give the param groups of a FOAM the names of their weights in ``model``, inside the ``with`` block.

    Outside of it groups have no names, because torch refuses a later group without names beside groups with names.
    Groups of FSDP2 get no names, as FSDP2 saves state by name already.
    """
    groups = [] if optimizer is None or model is None else optimizer.param_groups
    if any("param_names" in group or any(map(is_sharded, group["params"])) for group in groups) or not groups:
        yield
        return
    names = {id(p): _without_wrappers(name) for name, p in model.named_parameters()}
    for group in groups:
        group["param_names"] = [names.get(id(p), _UNNAMED) for p in group["params"]]
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group.pop("param_names", None)
