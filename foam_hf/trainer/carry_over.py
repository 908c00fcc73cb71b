"""Finds the `optim_args` with which training can resume from a checkpoint that other settings wrote.

Checkpoints of version 0.1.0 are an example: other weights folded by default then.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from foam_hf.optim_args import default_scale, embedding_rule_of, names_of, option, written
from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.groups import foam_param_groups, plain_options, wraps_models
from foam_hf.optimizer.names import named
from foam_hf.optimizer.state import CheckpointMismatchError, check_checkpoint, with_dtype


def continuing_args(
    model: nn.Module,
    target_modules: Any,
    given: dict[str, Any],
    error: CheckpointMismatchError,
    *,
    blocks_alone: bool = False,
) -> str | None:
    """The `optim_args` of `optim="foam"` that make the groups of a checkpoint, or None if no `optim_args` make them.

    Args:
        model: as the Trainer trains it.
        target_modules: the run's `optim_target_modules`.
        given: the run's `optim_args`, parsed; keys that do not change the groups are kept.
        error: what loading the checkpoint raised; it holds the checkpoint's state dict.
        blocks_alone: as for `embedding_rule_of`.
    """
    saved_groups = [with_dtype(group) for group in error.state_dict["param_groups"]]
    plain = plain_options()
    folding = [group for group in saved_groups if any(group.get(name) != plain[name] for name in plain)]
    if not folding:
        return None
    folded = folding[0]
    options = {name: folded.get(name, default) for name, default in _carried_defaults().items()}
    options["scale"] = folded.get("scale", default_scale(options["level"], options["second_moment"]))
    decided = embedding_rule_of(options, blocks_alone=blocks_alone)
    folds = [*itertools.product((None, False, True), repeat=2)]
    for tables, (embeddings, head) in itertools.product(_of_tables(folding, options, decided), folds):
        choice: dict[str, Any] = {"fold_embeddings": embeddings, "fold_head": head, **tables}
        groups = foam_param_groups(
            model, target_modules=target_modules, second_moment=options["second_moment"], **choice
        )
        try:
            optimizer = FOAM(groups, **options)
            with named(optimizer, model):
                check_checkpoint(error.state_dict, optimizer.param_groups)
        except (TypeError, ValueError):
            continue
        return _as_optim_args({**options, **choice}, given, decided)
    return None


def _of_tables(folding: list[dict[str, Any]], options: dict[str, Any], decided: str | None) -> list[dict[str, Any]]:
    """What the options of a checkpoint's embeddings and heads may have been; `decided` is the rule without options.

    A rule of None is left open: of INT8 weights it is block where others are factored.
    """
    rule, block = options["second_moment"], option("second_moment").default
    if rule != block:
        return [{"embedding_scale": None, "embedding_rule": None}]
    fields = [(group.get("scale"), group.get("second_moment", block)) for group in folding]
    others = [each for each in fields if each != fields[0]]
    if not others:  # none of them folds, so that their rule does not matter, or they are in groups of other matrices
        rules = (block,) if decided == block else (None, block)
        return [{"embedding_scale": None, "embedding_rule": each} for each in rules]
    scale, second_moment = next((each for each in others if each[1] != block), others[0])
    if second_moment != block and scale == default_scale(options["level"], second_moment):
        scale = None
    rules = (block,) if second_moment == block else (None, second_moment)
    return [{"embedding_scale": scale, "embedding_rule": each} for each in rules]


def explain_folded_heads(model: nn.Module, error: CheckpointMismatchError) -> str:
    """Why a checkpoint of version 0.1.0 does not fit if its heads fold; an empty string for other checkpoints."""
    named_weights = any("param_names" in group for group in error.state_dict["param_groups"])
    if named_weights or not wraps_models(model):
        return ""
    return (
        f"Version 0.1.0 folded the heads around a model too, as those of this {type(model).__name__}, and no option "
        "does any more: its checkpoints go on from their weights alone, without optimizer.pt and scheduler.pt"
    )


def _carried_defaults() -> dict[str, Any]:
    """Name -> default of the options that the groups of a checkpoint hold; old checkpoints lack the newer options."""
    return {name: option(name).default for name in names_of(lambda each: each.carried)}


def _as_optim_args(options: dict[str, Any], given: dict[str, Any], decided: str | None) -> str:
    """The text of `optim_args`: those `options` that differ from the default, then the other keys of `given`."""
    defaults = {**_carried_defaults(), "scale": default_scale(options["level"], options["second_moment"])}
    defaults |= {name: option(name).default for name in names_of(lambda each: each.grouping and not each.field)}
    defaults["embedding_rule"] = decided if decided == option("second_moment").default else None
    keys = {name: value for name, value in options.items() if value is not None and value != defaults[name]}
    keys |= {name: value for name, value in given.items() if name not in options}
    return ",".join(f"{name}={written(value)}" for name, value in keys.items())
