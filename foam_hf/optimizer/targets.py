"""The choice of weights that fold by the names of their modules, as Trainer's `optim_target_modules` makes it."""

from __future__ import annotations

import difflib
import logging
import re

from torch import nn

logger = logging.getLogger("foam_hf")


def select_targets(model: nn.Module, folded: set[int], asked: set[int], targets: str | list[str]) -> set[int]:
    """The ids in `folded` whose modules match `targets`.

    ValueError if neither they nor any of `asked` match, the weights that fold whatever `targets` is.
    """
    if isinstance(targets, str):
        entries = [targets]
    elif isinstance(targets, list | tuple) and all(isinstance(entry, str) for entry in targets):
        entries = list(targets)
    else:
        raise TypeError(
            f"target_modules is neither a string nor a list of strings, got {targets!r}; "
            "expected module names, a regex, or 'all-linear'"
        )
    all_linear = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    selected: set[int] = set()
    used: set[str] = set()
    candidates = []
    for module_name, module in model.named_modules():
        own = {id(p) for p in module.parameters(recurse=False)} & (folded | asked)
        if not own:
            continue
        candidates.append(module_name)
        if all_linear:
            hits = set(entries) if _is_linear(module) else set()
        elif isinstance(targets, str):
            hits = {targets} if _fullmatch(targets, module_name) else set()
        else:
            hits = {entry for entry in entries if matches(entry, module_name)}
        if hits:
            used |= hits
            selected |= own & folded
    if not used:
        raise ValueError(_no_match(targets, entries, candidates))
    for entry in entries:
        if entry not in used:
            logger.warning(
                "target_modules: %r matches no weight that folds; such are %s",
                entry,
                _nearest_names(candidates, entry),
            )
    return selected


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's transposed linear layer, Conv1D, is found by its name, because transformers is not imported here.
    return isinstance(module, nn.Linear) or any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__
    )


def matches(entry: str, name: str) -> bool:
    """Whether an entry of a list is part of a module's name, or a regex of the whole of it."""
    try:
        return entry in name or re.fullmatch(entry, name) is not None
    except re.error:
        return False


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"target_modules is not a valid regular expression ({error}), got {pattern!r}; "
            "expected a regex, a list of names, or 'all-linear'"
        ) from error


def _no_match(targets: str | list[str], entries: list[str], candidates: list[str]) -> str:
    if not candidates:
        return f"target_modules matches no weight that folds, got {targets!r}; this model has none at all"
    wanted = " ".join(entries)
    if isinstance(targets, str) and any(targets in name for name in candidates) and targets:
        return (
            f"target_modules (Trainer's optim_target_modules) matches no weight that folds, got {targets!r}; "
            f"a string is a regex of whole names: expected {'.*' + targets + '.*'!r}, or a list, [{targets!r}]"
        )
    return (
        f"target_modules (Trainer's optim_target_modules) matches no weight that folds, got {targets!r}; "
        f"expected names such as {_nearest_names(candidates, wanted)}, parts of them in a list, or 'all-linear'"
    )


def _nearest_names(candidates: list[str], wanted: str, count: int = 4) -> str:
    """Up to `count` names, for a message: those nearest to `wanted` first, compared by their last part."""
    by_last_part: dict[str, str] = {}
    for name in candidates:
        by_last_part.setdefault(name.rsplit(".", 1)[-1], name)
    last_wanted = re.split(r"[.\s*]+", wanted)[-1]
    near = [
        by_last_part[part] for part in difflib.get_close_matches(last_wanted, list(by_last_part), n=count, cutoff=0.5)
    ]
    near += [name for name in difflib.get_close_matches(wanted, candidates, n=count) if name not in near]
    chosen = list(dict.fromkeys([*near, *by_last_part.values()]))[:count]
    return ", ".join(repr(name) for name in chosen)
