"""The fields of embeddings and LM heads, and what takes the place of the factored rule if nobody asked for a rule.

`foam_param_groups` marks such groups, and FOAM takes the marks off and keeps them. A run that updates by blocks alone
then needs no option: under DeepSpeed's ZeRO, with gradient release and several backward passes, where both rows and
columns are divided, and at level 0 they are updated like other matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from foam_hf.optim_args import default_scale, embedding_rule_of, option
from foam_hf.tensors.rows import PLAIN, kind_of

Group = dict[str, Any]
Mark = tuple[str, float]

# The mark: the second_moment and the scale that take the place of the group's; None is the optimizer's.
OTHERWISE = "otherwise"


def table_fields(folded: Mapping[str, Any], scale: float | None, asked: str | None) -> Group:
    """What groups of embeddings and heads have beside the fields of other matrices; empty if they are like them.

    Args:
        folded: the fields of other matrices.
        scale, asked: the `embedding_scale` and `embedding_rule` that were given, or None.
    """
    rule = embedding_rule_of({**folded, "embedding_rule": asked})
    if rule == "factored":
        level = folded.get("level", option("level").default)
        fields = {"scale": scale or default_scale(level, rule), "second_moment": rule}
        return fields if asked else {**fields, OTHERWISE: (folded.get("second_moment"), scale or folded.get("scale"))}
    same = rule is None or scale in (None, folded.get("scale"))
    return {} if same else {"scale": scale}


def settle(group: Group, defaults: Mapping[str, Any]) -> None:
    """Fill in the mark of ``group``, if it has one, from the optimizer's ``defaults``.

    If the optimizer has another rule than block, that is the rule of embeddings too, and at level 0 they get AdamW.
    """
    if OTHERWISE not in group:
        return
    rule, scale = group[OTHERWISE]
    rule = rule or defaults["second_moment"]
    group[OTHERWISE] = rule, scale or defaults["scale"] or default_scale(group["level"], rule)
    if rule != "block" or group["level"] == 0:
        like_others(group)


def like_others(group: Group) -> bool:
    """Give ``group`` the rule and scale of other matrices if it is marked; whether it was."""
    if OTHERWISE not in group:
        return False
    for name, value in zip(("second_moment", "scale"), group.pop(OTHERWISE), strict=True):
        if value is None:
            del group[name]  # the optimizer fills it in
        else:
            group[name] = value
    return True


class LeftOpen:
    """What takes the place of the factored rule in each of an optimizer's param groups: (rule, scale), or None.

    It is found by the group's position, as clients and checkpoints replace the dicts. In other numbers of groups than
    were added, none has it.
    """

    def __init__(self, marks: Iterable[Mark | None] = ()) -> None:
        self.marks = list(marks)

    def add(self, group: Group) -> None:
        """Take the mark off a new group."""
        self.marks.append(group.pop(OTHERWISE, None))

    def of(self, groups: Sequence[Group]) -> dict[int, Group]:
        """Position -> the fields of other matrices, of each group that is factored because nobody asked for a rule."""
        if len(groups) != len(self.marks):
            return {}
        return {
            i: {"second_moment": mark[0], "scale": mark[1]}
            for i, (group, mark) in enumerate(zip(groups, self.marks, strict=True))
            if mark and group["second_moment"] != mark[0]
        }

    def as_saved(self, groups: list[Group], state_dict: Any) -> list[Group]:
        """``groups``, with copies like other matrices in place of those that are so in a checkpoint.

        What is no checkpoint of these groups is left to other checks.
        """
        saved, found = state_dict.get("param_groups") if isinstance(state_dict, dict) else None, list(groups)
        if isinstance(saved, list) and len(saved) == len(groups):
            for i, fields in self.of(groups).items():
                if isinstance(saved[i], dict) and saved[i].get("second_moment") == fields["second_moment"]:
                    found[i] = {**groups[i], **fields}
        return found


def by_kind(weights: Sequence[Tensor], fields: Group) -> Iterator[tuple[Sequence[Tensor], Group]]:
    """Yield ``weights`` with their ``fields``; INT8 ones apart if these are marked, as no kernel factors for them."""
    quantized = [p for p in weights if kind_of(p) != PLAIN] if OTHERWISE in fields else []
    if quantized:
        ids, others = {*map(id, quantized)}, dict(fields)
        like_others(others)
        yield quantized, others
        weights = [p for p in weights if id(p) not in ids]
    if weights:
        yield weights, fields
