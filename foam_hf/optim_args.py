"""`TrainingArguments.optim_args` as FOAM reads it: typed, checked, with an error for whatever it does not know."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_NUMBER = 1e9  # that of ``options``, which imports torch


def _level(text: str) -> int | str:
    if text == "row":
        return text
    return _in_range(int(text), 0, 16)


def _in_range(value: Any, low: float, high: float) -> Any:
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError
    return value


def _positive(text: str) -> float:
    return _in_range(float(text), math.ulp(0.0), MAX_NUMBER)


def _fraction(text: str) -> float:
    return _in_range(float(text), 0.0, math.nextafter(1.0, 0.0))


def _one_of(**choices: Any) -> Callable[[str], Any]:
    return lambda text: choices[text.lower()]


_dtype = _one_of(float32="float32", fp32="float32", bfloat16="bfloat16", bf16="bfloat16")

_OPTIM_ARGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "level": (_level, "an integer from 0 to 16, or row"),
    "scale": (_positive, "a finite number above 0, at most 1e9"),
    "second_moment": (
        _one_of(block="block", factored="factored", muon="muon", adam_mini="adam_mini"),
        "block, factored, muon or adam_mini",
    ),
    "residual_scale": (
        lambda text: _in_range(float(text), 0.0, MAX_NUMBER),
        "a finite number, 0 or more, at most 1e9",
    ),
    "stochastic_rounding": (_one_of(auto="auto", true=True, false=False), "auto, true or false"),
    "state_dtype": (lambda text: _dtype(text.removeprefix("torch.")), "float32 or bfloat16"),
    "nonfinite": (_one_of(error="error", skip="skip", ignore="ignore"), "error, skip or ignore"),
    "fold_embeddings": (_one_of(true=True, false=False), "true or false"),
    "fold_head": (_one_of(true=True, false=False), "true or false"),
    "gradient_release": (_one_of(true=True, false=False), "true or false"),
    "momentum": (_fraction, "a number from 0 to below 1"),
    "plain_state": (_one_of(full="full", **{"8bit": "8bit"}), "full or 8bit"),
    "seed": (lambda text: int(_in_range(int(text), 0, 2**64 - 1)), "an integer from 0 to 2**64 - 1"),
}
FOAM_KEYS = tuple(_OPTIM_ARGS)
# The scale of each rule under which AdamW's learning rate is the right one, and Muon's for Muon. That of block was
# measured, docs/choosing.md; Adam-mini's update has the same form, and its scale is block's.
SCALES = {"block": 6.0, "factored": 1.0, "muon": 1.0, "adam_mini": 6.0}
# Names of `optim` -> the options that they stand for.
FOAM_NAMES: dict[str, dict[str, Any]] = {
    "foam": {},
    "foam_mini": {"level": "row"},
    "foam_muon": {"second_moment": "muon"},
    "foam_adam_mini": {"second_moment": "adam_mini"},
}


def default_scale(level: int | str, second_moment: str) -> float:
    """The `scale` that a rule has where none is given: that of `SCALES`, and 1 where nothing folds, which is AdamW."""
    return 1.0 if level == 0 else SCALES[second_moment]


# What belongs to the Trainer, by the names under which optimizers know it -> its field of TrainingArguments.
_TRAINERS = {
    **dict.fromkeys(("lr", "learning_rate"), "learning_rate"),
    **dict.fromkeys(("beta1", "adam_beta1"), "adam_beta1"),
    **dict.fromkeys(("beta2", "adam_beta2"), "adam_beta2"),
    **dict.fromkeys(("betas", "adam_betas"), "adam_beta1 and adam_beta2"),
    **dict.fromkeys(("eps", "epsilon", "adam_eps", "adam_epsilon"), "adam_epsilon"),
    **dict.fromkeys(("weight_decay", "wd", "decay"), "weight_decay"),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("optim_target_modules", "target_modules"), "optim_target_modules"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), "lr_scheduler_type"),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_ratio"), "warmup_steps"),
}


def ours_like(name: str) -> str | None:
    """The name of FOAM that `name` is a misspelling of, as "FOAM" or "foam-mini"; None if there is none."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(plain, FOAM_NAMES, n=1, cutoff=0.8)
    return near[0] if near else None


def one_of_ours() -> str:
    """The names of FOAM, for messages: 'foam', 'foam_mini' or ..."""
    *names, last = map(repr, FOAM_NAMES)
    return f"{', '.join(names)} or {last}"


def foam_options(optim: str, optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that `optim`, one of `FOAM_NAMES`, and `optim_args` ask for; FOAM's own defaults fill the rest.

    Raises:
        ValueError: as `parse_optim_args`, or the two contradict each other.
    """
    parsed = parse_optim_args(optim_args)
    for key, value in FOAM_NAMES[optim].items():
        if parsed.setdefault(key, value) != value:
            raise ValueError(
                f"optim_args: {key}={parsed[key]} contradicts optim={optim!r}, which is {key}={value}; "
                f"expected optim='foam' with {key}={parsed[key]}, or {optim!r} without {key}."
            )
    if "momentum" in parsed and parsed.get("second_moment") != "muon":
        raise ValueError(
            f"optim_args: momentum={parsed['momentum']} is Muon's, and optim={optim!r} has Adam's adam_beta1; "
            "expected optim='foam_muon', or no momentum."
        )
    if parsed.get("plain_state") == "8bit" and parsed.get("second_moment") == "adam_mini":
        raise ValueError(
            "optim_args: plain_state=8bit quantizes AdamW's moments, and with Adam-mini what does not fold has "
            "others; expected no plain_state, or another optim."
        )
    return parsed


def parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Read `TrainingArguments.optim_args` for FOAM.

    Args:
        optim_args: "key=value,key=value" with blanks allowed around keys and values, a mapping, or None.

    Returns:
        Only the keys that were given, typed: `level` (int or "row"), `scale`, `residual_scale` and `momentum` (float),
        `second_moment`, `plain_state` and `nonfinite` (str), `stochastic_rounding` ("auto" or bool), `state_dtype`
        ("float32" or "bfloat16"), `fold_embeddings`, `fold_head` and `gradient_release` (bool), `seed` (int).

    Raises:
        ValueError: unknown or repeated key, missing "=", empty piece, or a value that is ill-typed or out of range.
    """
    parsed: dict[str, Any] = {}
    for key, text in split_optim_args(optim_args):
        if key.lower() in _TRAINERS:
            field = _TRAINERS[key.lower()]
            raise ValueError(
                f"optim_args: {key}={text} is TrainingArguments' own; expected {field} of TrainingArguments "
                f"(--{field.replace(' and ', ', --')}), and no {key} in optim_args."
            )
        if key not in _OPTIM_ARGS:
            near = difflib.get_close_matches(key.lower(), _OPTIM_ARGS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"optim_args: unknown key {key!r}.{hint} The keys of FOAM are {', '.join(_OPTIM_ARGS)}.")
        convert, legal = _OPTIM_ARGS[key]
        try:
            parsed[key] = convert(text)
        except (ValueError, KeyError, OverflowError):
            raise ValueError(f"optim_args: {key} must be {legal}, got {text!r}.") from None
    return parsed


def split_optim_args(optim_args: str | Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The pairs of key and value in `optim_args`, blanks stripped.

    ValueError where "=" or a side of it is missing, and for a key that is given twice.
    """
    if optim_args is None or (isinstance(optim_args, str) and not optim_args.strip()):
        return []
    if isinstance(optim_args, Mapping):
        return [(str(key), str(value)) for key, value in optim_args.items()]
    if not isinstance(optim_args, str):
        raise ValueError(f"optim_args must be a string like 'level=row,scale=2' or a dict, got {optim_args!r}.")
    pairs: dict[str, str] = {}
    for piece in optim_args.split(","):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not (key and equals and value):
            raise ValueError(
                f"optim_args: {piece.strip()!r} in {optim_args!r} is not of the form key=value; "
                "expected something like 'level=row,scale=2'."
            )
        if "=" in value or ";" in value:
            right = ",".join(re.split(r"[;|&\s]+", optim_args.strip().strip(";")))
            raise ValueError(
                f"optim_args: pairs are separated by commas, got {optim_args!r}; expected something like {right!r}."
            )
        if key in pairs:
            raise ValueError(f"optim_args: {key!r} is given twice, in {optim_args!r}; expected each key once.")
        pairs[key] = value
    return list(pairs.items())
