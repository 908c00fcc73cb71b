"""Names of the rules, in lists that test suites are parametrised by. A rule that is added to ``RULES`` is in them."""

from __future__ import annotations

from foam_hf.rules.all import RULES, rule_named

FOLDING = [rule.name for rule in RULES if not rule.plain]
BY_BLOCK = [rule.name for rule in RULES if not rule.plain and rule.unit == "block"]  # those that `Reference` has
FUSED = [name for name in BY_BLOCK if rule_named(name).kernel]
# Those that update any rows by themselves; `gathering_worker` is for those that gather whole matrices.
SHARDED = [rule.name for rule in RULES if not rule.plain and rule.shards != "nothing" and rule.on_whole is None]
# Rule -> options of FOAM under which a matrix gets this rule.
OPTIONS = {
    rule.name: {"level": 0, rule.asked[0]: rule.asked[1]} if rule.plain else {"second_moment": rule.name}
    for rule in RULES
}
