"""What a study means by FOAM where an arm does not say: version 0.1.0, under which the first studies ran."""

from foam_hf.optim_args import FOAM_NAMES

BEFORE = {"scale": 0.25, "fold_embeddings": False, "fold_head": False}


def as_before(settings: dict) -> dict:
    """`settings`, flags of a recipe, with what BEFORE says in the optim_args of FOAM, unless they say it."""
    if settings.get("optim") not in FOAM_NAMES:
        return settings
    given = dict(pair.split("=") for pair in settings.get("optim_args", "").split(",") if pair)
    options = given | {name: str(value).lower() for name, value in BEFORE.items() if name not in given}
    return settings | {"optim_args": ",".join(f"{name}={value}" for name, value in options.items())}
