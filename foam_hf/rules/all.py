"""The tuple of all update rules, and functions that find a rule by name or for a parameter in its group."""

from __future__ import annotations

from collections.abc import Collection
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
    """The rule that updates ``p`` in ``group``, and the level at which it folds.

    It is the first rule that the group asks for and that takes ``p``. Plain AdamW takes what is left, as vectors.
    """
    rule = next((rule for rule in asked_rules(group) if rule.takes(p, group)), ADAM)
    return rule, 0 if rule.plain or p.dim() < 2 else group["level"]


def asked_rules(group: Group) -> list[Rule]:
    """The rules that the fields of ``group`` ask for: the one of ``second_moment`` first, then ``plain_state``'s."""
    return [rule for rule in RULES if rule.is_asked_by(group)]


def rule_named(name: str) -> Rule:
    """The rule of this name; KeyError if there is none."""
    for rule in RULES:
        if rule.name == name:
            return rule
    raise KeyError(name)


def folding_rule(second_moment: Any) -> Rule:
    """The rule that this value of ``second_moment`` asks for. The paper's for any other value, which FOAM refuses."""
    return next((rule for rule in RULES if rule.asked == ("second_moment", second_moment)), BLOCK)


ANY_SHARDS = ("rows and columns", "rows or columns", "rows, gathered")


def shardable_options(shards: Collection[str] = ANY_SHARDS) -> dict[str, list[str]]:
    """Field of a param group -> those of its values whose rules have one of ``shards``: by default any shards."""
    found: dict[str, list[str]] = {}
    for field, value in (rule.asked for rule in RULES if rule.shards in shards):
        found.setdefault(field, []).append(value)
    return found
