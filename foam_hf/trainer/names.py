"""FOAM's names among those of the Trainer's optimizers: members of an enum, their pickles, and what they ask for."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

from foam_hf.optim_args import FOAM_NAMES, foam_options, ours_like
from foam_hf.trainer.patches import unwrapped_optimizer
from foam_hf.wrapping import require

logger = logging.getLogger("foam_hf")

# Those of `FOAM_NAMES` that transformers did not have before us; importlib.reload keeps them.
_registered: set[str] = globals().get("_registered", set())


def name_of(optim: Any) -> str:
    """The name of an optimizer, be it a str or a member of the enum."""
    return str(getattr(optim, "value", optim))


def is_ours(args: Any) -> bool:
    """Whether TrainingArguments ask for FOAM."""
    return name_of(getattr(args, "optim", None)) in _registered


def asked_options(args: Any) -> dict[str, Any]:
    """What `args.optim` and `args.optim_args` say of FOAM's options.

    Raises:
        ValueError: a key or a value that it does not have.
    """
    return foam_options(name_of(args.optim), args.optim_args)


def releases_gradients(args: Any) -> bool:
    """Whether TrainingArguments ask FOAM to update inside the backward pass."""
    return is_ours(args) and bool(asked_options(args).get("gradient_release"))


def foam_of(trainer: Any) -> Any:
    """The trainer's FOAM, or None."""
    module = sys.modules.get("foam_hf.optimizer.foam")  # never imported, there is none
    optimizer = unwrapped_optimizer(trainer)
    return optimizer if module is not None and isinstance(optimizer, module.FOAM) else None


def meant_name(optim: Any) -> str | None:
    """Of a name that is nobody's, the one of ours that is nearly the same."""
    from transformers.training_args import OptimizerNames

    meant = ours_like(optim) if isinstance(optim, str) and optim not in OptimizerNames._value2member_map_ else None
    return meant if meant in _registered else None


def register_names(training_args: types.ModuleType) -> None:
    """Add `FOAM_NAMES`, `foam` and its kin, to `transformers.training_args.OptimizerNames`. Idempotent."""
    names = require(training_args, "OptimizerNames")
    for value in FOAM_NAMES:
        existing = names._value2member_map_.get(value)
        if existing is None:
            _add_member(names, value.upper(), value)
            _registered.add(value)
        elif "__reduce_ex__" in vars(existing):  # added by us before, or by an earlier import of this package
            _pickle_by_this_package(existing)
            _registered.add(value)
        else:
            _registered.discard(value)
            logger.warning("transformers has its own optim=%r: foam_hf leaves it alone, and it is the one used", value)


def _add_member(names: Any, name: str, value: str) -> None:
    """What `enum.Enum` does for a member in a class body, on Python 3.10 to 3.13."""
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
    """Pickles name a function of this package, so that loading one registers the member first."""
    member.__reduce_ex__ = lambda protocol: (optimizer_name, (member.value,))


def optimizer_name(value: str) -> Any:
    """The `OptimizerNames` member of `value`, registered first: what a pickled `training_args.bin` calls."""
    from transformers import training_args

    register_names(training_args)
    return training_args.OptimizerNames(value)
