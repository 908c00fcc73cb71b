"""``Decided``: FOAM's fields for each weight, for param groups that the Trainer or one of its subclasses makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


class Decided:
    """The fields that `foam_param_groups` decided for every trainable weight of a model.

    Trainer and its subclasses make their own param groups, by weight decay and learning rate. `applied_to` keeps these
    groups and adds the fields that they lack, such as the level. A group whose weights need different fields is split.

    Args:
        groups: from `foam_param_groups`.
        model: what messages call the model.
        released: whether the run asked for gradient release. Then it must be enabled before the first step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], model: str, *, released: bool = False) -> None:
        self.groups = list(groups)
        self._model, self.released = model, released

    def applied_to(self, params: Iterable[Any]) -> list[dict[str, Any]]:
        """Param groups of `params` (parameters, or groups), with the decided fields that a group lacks.

        The result is in the order of `groups`, so that the weights of a checkpoint have the same order, however they
        were grouped.

        Raises:
            ValueError: a trainable parameter does not belong to the model.
        """
        decided = {
            id(p): (order, {name: value for name, value in group.items() if name != "params"})
            for order, group in enumerate(self.groups)
            for p in group["params"]
        }
        listed = list(params)
        groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
        split: dict[Any, tuple[int, dict[str, Any]]] = {}
        unknown = []
        for number, group in enumerate(groups):
            for entry, p in _entries(group["params"]):
                if id(p) not in decided and p.requires_grad:
                    unknown.append(tuple(p.shape))
                order, fields = decided.get(id(p), (len(self.groups), {}))
                fields = {name: value for name, value in fields.items() if name not in group}
                key = number, *fields.items()
                split.setdefault(key, (order, {**group, **fields, "params": []}))[1]["params"].append(entry)
        if unknown:
            raise ValueError(
                f"the param groups have {len(unknown)} trainable weights that are not of {self._model}, the first "
                f"of shape {unknown[0]}, so it was not decided whether they fold; expected groups of the weights of "
                "the model that the optimizer is made for, or optim='adamw_torch'"
            )
        return [group for _, group in sorted(split.values(), key=lambda item: item[0])]


def _entries(params: Any) -> Iterator[tuple[Any, Tensor]]:
    """The entries of a group's `params`, each with its parameter: an entry may be a pair of name and parameter."""
    for entry in [params] if isinstance(params, Tensor) else params:
        yield entry, entry[1] if isinstance(entry, tuple) else entry
