"""Which state ``FOAM`` holds for each parameter, and checks that a checkpoint's state and param groups fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foam_hf.optim_args import names_of, option
from foam_hf.optimizer.checks import check_options
from foam_hf.optimizer.names import names_problem
from foam_hf.rules.all import rule_of
from foam_hf.rules.rule import StateTensor


class CheckpointMismatchError(ValueError):
    """A checkpoint that FOAM wrote under other options, or for other weights; ``state_dict`` is its content."""

    def __init__(self, message: str, state_dict: dict[str, Any] | None = None) -> None:
        super().__init__(message, state_dict)
        self.state_dict: dict[str, Any] = state_dict or {}

    def __str__(self) -> str:
        return str(self.args[0])


State = dict[str, StateTensor]
_SAME_CHOICE = (
    "the same model and the same choice of folded weights (fold_embeddings, fold_head), of their scale "
    "(embedding_scale) and of their rule (embedding_rule, block until version 0.3.0)"
)


def expected_state(p: Tensor, group: dict[str, Any]) -> State:
    """Shape and dtype of each tensor of state of ``p`` in ``group``, by name; allocates nothing.

    State also has ``step``, a Python integer, which is not listed here.
    """
    rule, level = rule_of(p, group)
    return rule.state(p, level, group)


def state_problem(state: dict[str, Any], spec: State) -> str:
    """What in ``state`` differs from ``spec``, as a message; an empty string if nothing does."""
    if state.keys() != {"step", *spec}:
        return f"it holds {sorted(state)}; expected {sorted(['step', *spec])}"
    if not isinstance(state["step"], int):
        return f"its step is {state['step']!r}; expected an integer"
    for name, expected in spec.items():
        if not isinstance(state[name], Tensor) or state[name].shape != expected.shape:
            found = tuple(state[name].shape) if isinstance(state[name], Tensor) else state[name]
            return f"{name} has shape {found}; expected {tuple(expected.shape)}"
    return ""


def with_dtype(saved: dict[str, Any]) -> dict[str, Any]:
    """A copy of a saved param group with its ``state_dtype``, which is saved by name, as a dtype.

    Earlier versions saved a dtype, and a field ``differentiable`` of torch's, which is removed.
    """
    name = saved.get("state_dtype")
    dtype = {"state_dtype": getattr(torch, name, name)} if isinstance(name, str) else {}
    return {**{key: value for key, value in saved.items() if key != "differentiable"}, **dtype}


def list_as_tuple(value: Any) -> Any:
    """``value``, as a tuple if it is a list: a checkpoint may hold betas as either."""
    return tuple(value) if isinstance(value, list) else value


def field_problem(number: int, group: dict[str, Any], saved: dict[str, Any]) -> str:
    """A message about a field of param group ``number`` that a checkpoint must not change, or nothing."""
    for name in names_of(lambda each: each.field and not each.may_change):
        value = saved.get(name, option(name).default)  # versions without the field behaved as its default
        if value != group[name]:
            of_tables = {value, group[name]} == {"block", "factored"}
            same = "the same (for embeddings and heads by embedding_rule)" if of_tables else "the same"
            return (
                f"the checkpoint was trained with {name}={value!r} in param group {number}, this optimizer has "
                f"{name}={group[name]!r}; expected {same}, or training from the start"
            )
    return ""


def check_checkpoint(
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    expected: Callable[[Tensor, dict[str, Any]], State] = expected_state,
) -> list[dict[str, Any]]:
    """The saved state of each parameter in order, or a ValueError that says why the checkpoint does not fit.

    ``expected`` describes the state of a parameter.
    """
    try:
        saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    except (KeyError, TypeError):
        raise ValueError(
            f"not an optimizer's state dict: got {type(state_dict).__name__} with keys "
            f"{sorted(map(str, state_dict)) if isinstance(state_dict, dict) else None}; "
            "expected 'state' and 'param_groups'"
        ) from None
    if not (_holds_dicts(saved_groups, list) and _holds_dicts(saved_state, dict)):
        raise ValueError(
            f"not an optimizer's state dict: 'param_groups' is {type(saved_groups).__name__} and 'state' is "
            f"{type(saved_state).__name__}; expected a list of dicts with 'params', and a dict of dicts"
        )
    sizes, saved_sizes = ([len(group["params"]) for group in some] for some in (groups, saved_groups))
    states = []
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        if not set(saved) - {"params", "param_names"} and any("level" in each for each in saved_groups):
            problem = (  # torch has loaded it by the names of weights
                f"no param group of the checkpoint is left for param group {i}, of {len(group['params'])} parameters: "
                f"there they were in one group with others; expected {_SAME_CHOICE}"
            )
        else:
            _refuse_other_optimizer(saved, saved_state)
            problem = field_problem(i, group, saved)
        if problem and len(sizes) != len(saved_sizes) and "level" in saved:
            problem += f". Its param groups are of {saved_sizes} parameters, here of {sizes}: expected {_SAME_CHOICE}"
        if problem:
            raise CheckpointMismatchError(problem, state_dict)
    if sizes != saved_sizes:
        raise CheckpointMismatchError(
            f"the checkpoint has param groups of {saved_sizes} parameters, this optimizer of {sizes}; "
            f"expected {_SAME_CHOICE}",
            state_dict,
        )
    if problem := names_problem(groups, saved_groups):
        raise CheckpointMismatchError(problem, state_dict)
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        try:
            check_options({**group, **with_dtype(saved)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"param group {i} of the checkpoint is not valid: {error}") from None
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            state, spec = saved_state.get(key, {}), expected(p, group)
            problem = state_problem(state, spec) if state else ""  # a parameter has no state before its first gradient
            if problem:
                who = f"parameter {key}{_name_of(index, group, saved)}"
                problem = _shape_problem(p, state, spec, "param_names" in saved) or problem
                raise CheckpointMismatchError(f"{who} of the checkpoint does not fit: {problem}", state_dict)
            states.append(state)
    return states


def _refuse_other_optimizer(saved: dict[str, Any], saved_state: dict[Any, Any]) -> None:
    for name in ("level", "second_moment"):
        if name not in saved:
            held = sorted({key for state in saved_state.values() for key in state})
            raise ValueError(
                f"the checkpoint is of another optimizer: its param groups have no {name!r}, "
                f"its state holds {held}; expected one that FOAM wrote. To go on from its weights alone, load the "
                "model from that folder and train without resume_from_checkpoint"
            )


def _name_of(index: int, *groups: dict[str, Any]) -> str:
    """The name of a group's parameter number ``index``, in brackets; empty if none of ``groups`` has names."""
    for group in groups:
        names = group.get("param_names")
        if isinstance(names, list) and index < len(names) and names[index]:
            return f" ({names[index]})"
    return ""


def _shape_problem(p: Tensor, state: dict[str, Any], spec: State, named: bool) -> str:
    """A message if ``state`` is that of a weight of another shape, or an empty string."""
    name = next(iter(spec))  # the first moment, for every rule
    held, wanted = state.get(name), spec[name].shape
    if (
        state.keys() != {"step", *spec}
        or not isinstance(held, Tensor)
        or held.dim() != p.dim()
        or held.shape == wanted
    ):
        return ""
    columns = p.shape[-1] if held.shape[-1] == wanted[-1] else f"columns of {held.shape[-1]} blocks"
    theirs = ", ".join(map(str, (*held.shape[:-1], columns)))
    why = f"it is the state of a weight of shape ({theirs}), and here the weight has shape {tuple(p.shape)}"
    if not named:  # matched by position alone, these may be two different weights
        return f"{name} has shape {tuple(held.shape)}; expected {tuple(wanted)}: {why}. Expected {_SAME_CHOICE}"
    return (
        f"{why}; expected the same shapes. An embedding that was resized since, for another vocabulary, has no state "
        "to go on with: resize it back, or go on from the weights alone, without optimizer.pt and scheduler.pt"
    )


def _holds_dicts(value: Any, kind: type) -> bool:
    """Whether ``value`` is, as ``kind`` asks, a dict of dicts or a list of dicts that have ``params``."""
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())
    groups = value if isinstance(value, list) else [None]
    return all(isinstance(each, dict) and isinstance(each.get("params"), list | tuple) for each in groups)
