"""Every name of transformers' Trainer that this package wraps, and every private one that it reads: one table.

A new release of transformers is read against `TABLE`, the functions below it, and `foam_hf/int8/quantizer.py`.
Beside the table, the package rests on what the documentation of transformers says.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from foam_hf.wrapping import require, wrap


@dataclass(frozen=True)
class Row:
    """A name of transformers.

    Attributes:
        module, owner, name: where it is; without an owner the module itself has it.
        use: what it is for.
        wrapper: MODULE.FUNCTION of `foam_hf.trainer`, which takes what the name stood for and returns what it stands
            for from then on; empty where the name is read alone.
        since, until: the first version that has the name, and the first that has it no longer.
        without: what goes on without the name. Where nothing does, importing the module of transformers raises an
            ImportError that tells which name has moved.
    """

    module: str
    owner: str
    name: str
    use: str
    wrapper: str = ""
    since: str = "4.57"
    until: str = "6"
    without: str = ""

    def is_in(self, version: str) -> bool:
        """Whether this version of transformers is said to have the name."""
        return Version(self.since) <= Version(version) < Version(self.until)


_TRAINER, _ARGUMENTS = "transformers.trainer", "transformers.training_args"
_MAPPING, _LOADING = "transformers.conversion_mapping", "transformers.core_model_loading"

TABLE = (
    Row(
        _ARGUMENTS,
        "",
        "OptimizerNames",
        use="a str Enum, the legal values of optim: `names` adds ours to the private maps of enum.Enum",
    ),
    Row(
        _ARGUMENTS,
        "TrainingArguments",
        "__post_init__",
        use="a bad optim_args fails before a model is loaded",
        wrapper="refusals.wrap_post_init",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "get_optimizer_cls_and_kwargs",
        use="static, of (args, model): the one road to the optimizer",
        wrapper="build.wrap_get_optimizer",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "create_optimizer",
        use="makes param groups by weight decay, and passes the kwargs of the former on",
        wrapper="build.wrap_create_optimizer",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "get_decay_parameter_names",
        use="which weights decay: see `decay_parameter_names`",
        without="foam_param_groups has an equal rule",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "train",
        use="refusals before the first step, whole checkpoints, gradient release, reports; its first argument is "
        "resume_from_checkpoint",
        wrapper="training.wrap_train",
    ),
    Row(_TRAINER, "Trainer", "_get_output_dir", use="of (trial): the folder of a run's checkpoints"),
    Row(
        _TRAINER,
        "Trainer",
        "_save_checkpoint",
        use="of (model, trial): writes checkpoint-STEP, trainer_state.json last; a manifest says when it is whole",
        wrapper="saving.wrap_save_checkpoint",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_push_from_checkpoint",
        use="called by the former when every file is written",
        wrapper="saving.wrap_after_last_file",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_rotate_checkpoints",
        use="called after that: deletes old checkpoints",
        wrapper="saving.wrap_after_last_file",
        until="5.2",
    ),
    Row(
        _TRAINER,
        "",
        "rotate_checkpoints",
        use="the same, as a function",
        wrapper="saving.wrap_after_last_file",
        since="5.2",
    ),
    Row(
        _TRAINER,
        "CallbackHandler",
        "on_save",
        use="called last: callbacks may change files of the checkpoint",
        wrapper="saving.wrap_on_save",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_load_best_model",
        use="reads state.best_model_checkpoint after the last step",
        wrapper="checkpoints.wrap_load_best_model",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_load_from_checkpoint",
        use="of (resume_from_checkpoint): loads weights by plain names, and only warns of those that it misses",
        wrapper="checkpoints.wrap_load_from_checkpoint",
        without="INT8 checkpoints are not compared with the model, and weights saved under other names not loaded",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_issue_warnings_after_load",
        use="of (load_result), called by the former: no trained weight may be missing",
        wrapper="weights.wrap_issue_warnings",
        without="weights that a checkpoint does not hold are warned of, not refused",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_load_optimizer_and_scheduler",
        use="state goes to the weights that it was saved of, by their names",
        wrapper="checkpoints.wrap_load_optimizer",
        without="state is matched by position alone",
    ),
    Row(
        "transformers.modelcard",
        "",
        "extract_hyperparameters_from_trainer",
        use="model cards name the optimizer",
        wrapper="build.wrap_model_card",
    ),
    Row(
        _MAPPING,
        "",
        "get_model_conversion_mapping",
        use="see `weight_conversions`",
        since="5.0",
        without="no weight is taken for one that is saved under another name",
    ),
    Row(
        _LOADING,
        "",
        "PrefixChange",
        use="see `weight_conversions`",
        since="5.6",
        without="no weight is taken for one that is saved under another name",
    ),
    Row(
        _LOADING,
        "",
        "revert_weight_conversion",
        use="see `as_saved`",
        since="5.0",
        without="what cannot be loaded at the end of a training is not refused before it",
    ),
)


def patch(module: types.ModuleType) -> None:
    """Wrap what `TABLE` names in this module of transformers, which has just been imported. Idempotent.

    Raises:
        ImportError: a name is missing that nothing goes on without.
    """
    from transformers import __version__ as version

    for row in TABLE:
        if row.module != module.__name__:
            continue
        owner = require(module, row.owner) if row.owner else module
        if not hasattr(owner, row.name) and (row.without or not row.is_in(version)):
            continue
        require(owner, row.name)
        if row.wrapper:
            wrap(owner, row.name, _wrapper(row.wrapper))


def _wrapper(path: str) -> Callable[[Any], Any]:
    """Found by its path, as the files with the wrappers import this one."""
    file, name = path.split(".")
    found: Callable[[Any], Any] = getattr(importlib.import_module(f"foam_hf.trainer.{file}"), name)
    return found


# What is read of a Trainer and of its accelerator


def checkpoint_folder(trainer: Any, trial: Any) -> Path:
    """Where the trainer is about to save its state."""
    return Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"


def decay_parameter_names(trainer: Any, model: Any) -> Any:
    """The names of the weights that decay, by a subclass's rule where the trainer is known; None if nobody says."""
    from transformers import Trainer

    rule = getattr(Trainer if trainer is None else trainer, "get_decay_parameter_names", None)
    if rule is None:
        return None
    if trainer is not None:
        return rule(model)
    try:
        return rule(None, model)
    except (AttributeError, TypeError):  # a version that uses self
        return None


def is_fsdp_enabled(trainer: Any) -> bool:
    return bool(getattr(trainer, "is_fsdp_enabled", False))


def is_deepspeed_enabled(trainer: Any) -> bool:
    return bool(getattr(trainer, "is_deepspeed_enabled", False))


def fsdp_plugin(trainer: Any) -> Any:
    """accelerate's settings of FSDP, or None. They have an `fsdp_version` since accelerate 1.6."""
    return getattr(getattr(getattr(trainer, "accelerator", None), "state", None), "fsdp_plugin", None)


def unwrapped_optimizer(trainer: Any) -> Any:
    """The trainer's optimizer, or None, without accelerate's wrapper."""
    optimizer = getattr(trainer, "optimizer", None)
    return getattr(optimizer, "optimizer", optimizer)


def replace_clipping(accelerator: Any, clip: Callable[..., Any]) -> Callable[[], None]:
    """Let Trainer clip and measure gradients by `clip`; returns what undoes it.

    Between a backward pass and the step, Trainer calls `accelerator.clip_grad_norm_`.
    """
    accelerator.clip_grad_norm_ = clip

    def undo() -> None:
        del accelerator.clip_grad_norm_

    return undo


# What is read of a model


def warn_after_load(trainer: Any, result: Any) -> None:
    """Trainer's own words on the result of `load_state_dict`, where it has any."""
    if hasattr(trainer, "_issue_warnings_after_load"):
        trainer._issue_warnings_after_load(result)


def has_adapters(model: Any) -> bool:
    """Whether adapters of PEFT were loaded into a transformers model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def weight_conversions(model: Any) -> list[Any]:
    """How transformers 5 changes the model's weights as it saves them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange
    except ImportError:
        return []
    kept = getattr(model, "_weight_conversions", None)
    if kept is not None:
        return list(kept)
    return [
        each for each in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(each, PrefixChange)
    ]


def has_converters(model: Any) -> bool:
    """Whether transformers 5 saves weights of the model in another layout, whatever their names."""
    return any(type(each).__name__ == "WeightConverter" for each in weight_conversions(model))


def saves_other_names(model: Any) -> bool:
    """Whether transformers saves weights of the model under other names."""
    return bool(getattr(model, "_checkpoint_conversion_mapping", None) or weight_conversions(model))


def as_saved(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict as transformers 5 would save it; empty for older versions, which cannot tell."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    reverted: dict[str, Any] = revert_weight_conversion(model, state)
    return reverted
