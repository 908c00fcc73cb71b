"""All update rules, and which of them a parameter has in its group."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foam_hf.rules.adam import ADAM
from foam_hf.rules.adam_8bit import ADAM_8BIT
from foam_hf.rules.adam_mini import ADAM_MINI
from foam_hf.rules.block import BLOCK
from foam_hf.rules.factored import FACTORED
from foam_hf.rules.muon import MUON
from foam_hf.rules.rule import Group, Rule
from foam_hf.tensors.folding import Level

RULES: tuple[Rule, ...] = (BLOCK, FACTORED, MUON, ADAM_MINI, ADAM_8BIT, ADAM)


def rule_of(p: Tensor, group: Group) -> tuple[Rule, Level]:
    """The rule of ``p`` in ``group`` and the level it folds at: what folds comes first, and AdamW takes the rest."""
    rule = next((rule for rule in asked_rules(group) if rule.takes(p, group)), ADAM)
    return rule, 0 if rule.plain or p.dim() < 2 else group["level"]


def asked_rules(group: Group) -> list[Rule]:
    """The rules that the fields of ``group`` ask for, that of what folds first."""
    return [rule for rule in RULES if rule.is_asked_by(group)]


def rule_named(name: str) -> Rule:
    """The rule of this name; KeyError if there is none."""
    for rule in RULES:
        if rule.name == name:
            return rule
    raise KeyError(name)


def folding_rule(second_moment: Any) -> Rule:
    """The rule of what folds by this name; of None, or a name that FOAM will refuse, the paper's."""
    return next((rule for rule in RULES if rule.asked == ("second_moment", second_moment)), BLOCK)


def shardable_options() -> dict[str, list[str]]:
    """Field of a group -> the values that ask for rules which update shards of weights."""
    found: dict[str, list[str]] = {}
    for field, value in (rule.asked for rule in RULES if rule.shards != "nothing"):
        found.setdefault(field, []).append(value)
    return found
