"""What was decided for each weight of a model, for param groups that somebody else makes of these weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


class Decided:
    """The fields of every trainable weight of a model, as `foam_param_groups` decided them.

    Trainer and its clients make param groups by weight decay, and by learning rates that they know of. Those groups
    stay as they are but for what they do not say: a group whose weights fold by different rules becomes several.

    Args:
        groups: from `foam_param_groups`.
        model: its name in messages.
        released: the run asked for gradient release, which has to be there at the first step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], model: str, *, released: bool = False) -> None:
        self.groups = list(groups)
        self._model, self.released = model, released

    def applied_to(self, params: Iterable[Any]) -> list[dict[str, Any]]:
        """Param groups of `params` (parameters, or groups), with the decided fields where a group lacks them.

        They are in the order of `groups`, so that an optimizer has its weights in one order, whoever grouped them.

        Raises:
            ValueError: a trainable parameter is none of the model's.
        """
        decided = {
            id(p): (place, {name: value for name, value in group.items() if name != "params"})
            for place, group in enumerate(self.groups)
            for p in group["params"]
        }
        listed = list(params)
        groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
        found: dict[Any, tuple[int, dict[str, Any]]] = {}
        strangers = []
        for number, group in enumerate(groups):
            for member, p in _members(group["params"]):
                if id(p) not in decided and p.requires_grad:
                    strangers.append(tuple(p.shape))
                place, fields = decided.get(id(p), (len(self.groups), {}))
                fields = {name: value for name, value in fields.items() if name not in group}
                key = number, *fields.items()
                found.setdefault(key, (place, {**group, **fields, "params": []}))[1]["params"].append(member)
        if strangers:
            raise ValueError(
                f"the param groups have {len(strangers)} trainable weights that are not of {self._model}, the first "
                f"of shape {strangers[0]}, so it was not decided whether they fold; expected groups of the weights of "
                "the model that the optimizer is made for, or optim='adamw_torch'"
            )
        return [group for _, group in sorted(found.values(), key=lambda item: item[0])]


def _members(params: Any) -> Iterator[tuple[Any, Tensor]]:
    """What a group lists, and the parameter in it: torch also takes pairs of name and parameter."""
    for member in [params] if isinstance(params, Tensor) else params:
        yield member, member[1] if isinstance(member, tuple) else member
