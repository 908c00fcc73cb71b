"""What a study means by FOAM where an arm does not say: the version of the package under which the first studies ran.

In version 0.1.0 the scale was 0.25, and embeddings and LM heads were plain. Those that an arm folds have the scale of
all other matrices, and their rule, as in every version before 0.4.0; the arm then says so. One that names an option of
embeddings is newer, and must say all of this but the rule.
"""

from collections.abc import Mapping
from typing import Any

from foam_hf.optim_args import FOAM_NAMES, split_optim_args, written

BEFORE = {"scale": 0.25, "fold_embeddings": False, "fold_head": False}
NEWER = ("embedding_scale", "embedding_rule")
WANTED = (*BEFORE, "embedding_scale")  # of an arm that names one of NEWER


def as_before(settings: dict) -> dict:
    """`settings`, flags of a recipe, with optim_args of FOAM that say all that `options_before` does.

    Raises:
        ValueError: as `options_before`, or optim_args that cannot be read.
    """
    if settings.get("optim") not in FOAM_NAMES:
        return settings
    options = options_before(settings["optim"], dict(split_optim_args(settings.get("optim_args"))))
    return settings | {"optim_args": ",".join(f"{name}={written(value)}" for name, value in options.items())}


def options_before(optim: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an arm with `optim`, a name of FOAM: those given, and what an earlier version did for the others.

    Raises:
        ValueError: an arm with some of NEWER that leaves some of WANTED to an earlier version.
    """
    options = {**given, **{name: value for name, value in BEFORE.items() if name not in given}}
    newer, missing = [name for name in NEWER if name in given], [name for name in WANTED if name not in given]
    if newer and missing:
        raise ValueError(
            f"optim_args: got {newer[0]}={written(given[newer[0]])} without {', '.join(missing)}, which a study "
            f"takes from an earlier version; expected {', '.join(WANTED)} beside it"
        )
    rule = {**options, **FOAM_NAMES[optim]}.get("second_moment", "block")
    folds = any(written(options[name]) == "true" for name in ("fold_embeddings", "fold_head"))
    if not folds or rule != "block":  # other rules have no options for embeddings
        return options
    of_embeddings = {"embedding_rule": "block", "embedding_scale": options["scale"]}
    return {**options, **{name: value for name, value in of_embeddings.items() if name not in options}}
