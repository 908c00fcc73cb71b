"""The rules of what folds, by what suites ask of them: a rule that is added to the tuple is in the suites too."""

from __future__ import annotations

from foam_hf.rules.all import RULES

FOLDING = [rule.name for rule in RULES if not rule.plain]
BY_BLOCK = [rule.name for rule in RULES if not rule.plain and rule.unit == "block"]  # as `Reference` has them
FUSED = [rule.name for rule in RULES if not rule.plain and rule.kernel]
SHARDED = [rule.name for rule in RULES if not rule.plain and rule.shards != "nothing"]
# Options of FOAM that have each of all rules for a matrix.
OPTIONS = {
    rule.name: {"level": 0, rule.asked[0]: rule.asked[1]} if rule.plain else {"second_moment": rule.name}
    for rule in RULES
}
