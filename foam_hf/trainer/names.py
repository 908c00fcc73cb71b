"""Adds FOAM's names to the optimizers that `TrainingArguments` knows, and reads what a run asks of FOAM."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

from foam_hf.optim_args import FOAM_NAMES, foam_options, ours_like
from foam_hf.trainer.private import unwrapped_optimizer
from foam_hf.wrapping import require

logger = logging.getLogger("foam_hf")

# The names of `FOAM_NAMES` that this package added, kept over importlib.reload; transformers may have its own `foam`.
_registered: set[str] = globals().get("_registered", set())


def name_of(optim: Any) -> str:
    """The name of an optimizer, given as a str or as a member of `OptimizerNames`."""
    return str(getattr(optim, "value", optim))


def uses_foam(args: Any) -> bool:
    """Whether TrainingArguments ask for FOAM."""
    return name_of(getattr(args, "optim", None)) in _registered


def requested_options(args: Any) -> dict[str, Any]:
    """FOAM's options in `args.optim` and `args.optim_args`; those that are not given are missing.

    Raises:
        ValueError: an unknown key or a value that is not legal.
    """
    return foam_options(name_of(args.optim), args.optim_args)


def releases_gradients(args: Any) -> bool:
    """Whether TrainingArguments ask FOAM to update inside the backward pass."""
    return uses_foam(args) and bool(requested_options(args).get("gradient_release"))


def foam_of(trainer: Any) -> Any:
    """The trainer's optimizer if it is a FOAM, else None."""
    module = sys.modules.get("foam_hf.optimizer.foam")  # if the module was never imported, no FOAM exists
    optimizer = unwrapped_optimizer(trainer)
    return optimizer if module is not None and isinstance(optimizer, module.FOAM) else None


def similar_name(optim: Any) -> str | None:
    """The name of FOAM that an unknown optimizer name nearly equals, or None."""
    from transformers.training_args import OptimizerNames

    similar = ours_like(optim) if isinstance(optim, str) and optim not in OptimizerNames._value2member_map_ else None
    return similar if similar in _registered else None


def register_names(training_args: types.ModuleType) -> None:
    """Add `FOAM_NAMES` to `transformers.training_args.OptimizerNames`. Idempotent."""
    names = require(training_args, "OptimizerNames")
    for value in FOAM_NAMES:
        existing = names._value2member_map_.get(value)
        if existing is None:
            _add_member(names, value.upper(), value)
            _registered.add(value)
        elif "__reduce_ex__" in vars(existing):  # this package added it, perhaps in an earlier import
            _pickle_by_this_package(existing)
            _registered.add(value)
        else:
            _registered.discard(value)
            logger.warning("transformers has its own optim=%r: foam_hf leaves it alone, and it is the one used", value)


def _add_member(names: Any, name: str, value: str) -> None:
    """Do what `enum.Enum` of Python 3.10 to 3.13 does for a member in a class body."""
    member = str.__new__(names, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    _pickle_by_this_package(member)
    names._member_names_.append(name)
    names._member_map_[name] = member
    names._value2member_map_[value] = member
    if hasattr(names, "_hashable_values_"):  # Python >= 3.12
        names._hashable_values_.append(value)
    type.__setattr__(names, name, member)


def _pickle_by_this_package(member: Any) -> None:
    """Let pickles of `member` call `optimizer_name`, which registers the member before it is looked up."""
    member.__reduce_ex__ = lambda protocol: (optimizer_name, (member.value,))


def optimizer_name(value: str) -> Any:
    """The `OptimizerNames` member of `value`, after FOAM's names are registered; a `training_args.bin` calls this."""
    from transformers import training_args

    register_names(training_args)
    return training_args.OptimizerNames(value)
