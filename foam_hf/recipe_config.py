"""What the scripts in `recipes/` share of YAML configs and flags: finding, reading, checking and merging them.

The functions are private to those scripts, also after they are copied, and may change in any version.
"""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn, get_origin

from foam_hf.recipe_kit import one_line

SENTENCE_LENGTH = 3  # names in a hint


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The names that a user may have meant: those that begin with `name`, else contain it, else the most similar."""
    known = sorted(names)
    for found in ([n for n in known if n.startswith(name)], [n for n in known if name and name in n]):
        if found:
            return found[:SENTENCE_LENGTH]
    return difflib.get_close_matches(name, known, 1, 0.0)


def find_config(path: Path, here: Path) -> Path:
    """`path` if the file exists, else the config of that name in `here`, the script's folder, or in another recipe."""
    if path.is_file() or path.is_absolute():
        return path
    places = (here / path, here / path.name, here.parent / path, here.parent / "quantized" / path.name)
    return next((place for place in places if place.is_file()), path)


def with_optimizer_hint(message: str) -> str:
    """argparse's `message`; if it is about a misspelt name of FOAM, a message with the right name instead."""
    from foam_hf.optim_args import ours_like

    wrong = re.search(r"argument --optim: invalid choice: '([^']*)'", message)
    meant = ours_like(wrong[1]) if wrong else None
    return f"--optim: no optimizer {wrong[1]!r}; did you mean {meant!r}?" if wrong and meant else message


def replaced_optim_args(given: str | None, config: str | None, name: str) -> str | None:
    """A note if --optim_args drops keys of the config `name`, because it replaces all of them; else None."""
    if not given or not config:
        return None
    kept, had = ({pair.partition("=")[0].strip() for pair in text.split(",")} for text in (given, config))
    dropped = [pair.strip() for pair in config.split(",") if pair.partition("=")[0].strip() in had - kept]
    if not dropped:
        return None
    return f"--optim_args {given} replaces all optim_args of {name}: without {','.join(dropped)} from now on."


def read_config(path: Path) -> dict[str, Any]:
    """The values of a YAML config, with optim_args as text; SystemExit if the file cannot be read or has no keys."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"Cannot read the config {path}: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise SystemExit(f"{path}: expected lines of 'key: value', got {type(config).__name__}.")
    return {key: pairs(value) if key == "optim_args" else value for key, value in config.items()}


def pairs(value: Any) -> Any:
    """A mapping as the text "key=value,key=value"; any other value unchanged."""
    return ",".join(f"{key}={one}" for key, one in value.items()) if isinstance(value, dict) else value


def config_values(
    config: dict[str, Any], path: Path, parser: ArgumentParser, own: Collection[str], lists: Collection[str] = ()
) -> dict[str, Any]:
    """A config's values, checked and converted as the flags of the same names; SystemExit if one is wrong.

    Args:
        config: from `read_config`.
        path: of the config, for messages.
        parser: of the recipe's flags and TrainingArguments.
        own: names of the recipe's own flags, which take no mappings and no lists.
        lists: names of the recipe's own flags that do take a list.
    """
    names = {action.dest for action in parser._actions} - {"help"}
    structured = {a.dest for a in parser._actions if a.type is str or a.nargs == "+" or get_origin(a.type)}
    flags, unconverted = [], {}
    for key, value in config.items():
        if key not in names:
            near = ", ".join(map(repr, nearest(str(key), names)))
            raise SystemExit(f"{path}: unknown key {key!r}; nearest: {near}.")
        if key in lists:
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        elif isinstance(value, (dict, list)):
            if key not in structured or key in own:
                raise SystemExit(f"{path}: {key}: got {value}; expected one value.")
            unconverted[key] = value  # TrainingArguments takes a mapping as it is (lr_scheduler_kwargs)
        elif value is not None:
            flags += [f"--{key}={value}"]
    return {**parse_flags(parser, flags, str(path)), **unconverted}


def parse_flags(parser: ArgumentParser, flags: list[str], source: str) -> dict[str, Any]:
    """The given flags, without defaults: argparse sets no default if the namespace already has the name."""

    def fail(message: str) -> NoReturn:
        raise SystemExit(f"{source}: {with_optimizer_hint(message)}")

    parser.error = fail  # type: ignore[method-assign]  # argparse would print a page of usage
    names = {action.dest for action in parser._actions} - {"help"}
    found, unknown = parser.parse_known_args(flags, Namespace(**dict.fromkeys(names)))
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        fail(f"unknown argument {unknown[0]}; nearest: --{', --'.join(nearest(name, names))}.")
    return {name: value for name, value in vars(found).items() if value is not None}


def drop_foreign_settings(config: dict[str, Any], given: Collection[str], optim: str, name: str) -> list[str]:
    """Remove the optim_args from a config that was written for another optimizer than `optim`.

    Args:
        config: changed in place.
        given: names of the flags that the user gave.
        optim: the optimizer of this run.
        name: of the config, for the notes.

    Returns:
        Notes for the user on what is dropped and what is kept.
    """
    notes, of = [], config.get("optim")
    dropped = config.pop("optim_args", None)
    if dropped and "optim_args" not in given:
        notes.append(f"optim_args {dropped} of {name} are for {of}: dropped for {optim}.")
    if "learning_rate" in config and "learning_rate" not in given:
        notes.append(f"learning_rate {config['learning_rate']} of {name} is for {of}: kept.")
    return notes


def settle_pairs(
    exclusive: Iterable[tuple[str, str]], given: dict[str, Any], config: dict[str, Any], path: Path
) -> None:
    """Of flags that exclude each other, remove both from the config if the user gave one.

    Args:
        exclusive: pairs of names.
        given: the flags that the user gave.
        config: changed in place.
        path: of the config, for messages.

    Raises:
        SystemExit: the user's flags, or the config, have both of a pair.
    """
    for pair in exclusive:
        for source, where in ((given, "train.py"), (config, path)):
            if set(pair) <= source.keys():
                raise SystemExit(f"{where}: got both {pair[0]} and {pair[1]}; expected one of them.")
        if set(pair) & given.keys():
            for name in pair:
                config.pop(name, None)
