"""One table of what this package wraps in transformers' Trainer, and of the private names that it reads there.

When transformers releases a version, compare it with `TABLE`, the functions below it, `foam_hf/int8/quantizer.py`
and `foam_hf/planner/fsdp2.py`. All other uses of transformers are of its documented interface.
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
        module, owner, name: the dotted module, the class or "" for the module itself, and the attribute.
        use: what this package uses it for.
        wrapper: MODULE.FUNCTION of `foam_hf.trainer`, which takes the original function and returns its replacement;
            empty if the name is only read.
        since, until: the first version that has the name, and the first that no longer has it.
        without: what is lost if the name is missing. If this is empty, a missing name is an ImportError that names it,
            raised when transformers is imported.
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
        """Whether the table says that this version of transformers has the name."""
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
        use="static, of (args, model): Trainer gets the class and the arguments of every named optimizer from it",
        wrapper="build.wrap_get_optimizer",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "create_optimizer",
        use="makes param groups by weight decay, and calls get_optimizer_cls_and_kwargs",
        wrapper="build.wrap_create_optimizer",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "get_decay_parameter_names",
        use="which weights decay: see `decay_parameter_names`",
        without="foam_param_groups decides by the same rule",
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
        use="of (model, trial): writes checkpoint-STEP, trainer_state.json last; the wrapper adds a manifest",
        wrapper="saving.wrap_save_checkpoint",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_push_from_checkpoint",
        use="_save_checkpoint calls it when every file is written",
        wrapper="saving.wrap_after_last_file",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_rotate_checkpoints",
        use="_save_checkpoint calls it after every file is written: deletes old checkpoints",
        wrapper="saving.wrap_after_last_file",
        until="5.2",
    ),
    Row(
        _TRAINER,
        "",
        "rotate_checkpoints",
        use="the successor of Trainer._rotate_checkpoints, a function",
        wrapper="saving.wrap_after_last_file",
        since="5.2",
    ),
    Row(
        _TRAINER,
        "CallbackHandler",
        "on_save",
        use="called after _save_checkpoint: callbacks may change files of the checkpoint",
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
        use="of (resume_from_checkpoint): loads weights by their names in the model, and only warns of missing ones",
        wrapper="checkpoints.wrap_load_from_checkpoint",
        without="INT8 checkpoints are not compared with the model, and weights saved under other names are not loaded",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_issue_warnings_after_load",
        use="of (load_result), called by _load_from_checkpoint: no trained weight may be missing",
        wrapper="weights.wrap_issue_warnings",
        without="a trained weight that a checkpoint lacks is a warning, not an error",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_load_optimizer_and_scheduler",
        use="the optimizer matches saved state to weights by their names",
        wrapper="checkpoints.wrap_load_optimizer",
        without="state is matched by position alone",
    ),
    Row(
        _TRAINER,
        "",
        "deepspeed_load_checkpoint",
        use="of (engine, folder): loads what DeepSpeed saved; the wrapper compares the options of the optimizer first",
        wrapper="deepspeed.wrap_load_checkpoint",
        without="a checkpoint of other options is refused in DeepSpeed's own words",
    ),
    Row(
        "accelerate.accelerator",
        "",
        "map_pytorch_optim_to_deepspeed",
        use="of (optimizer): with offload_optimizer accelerate replaces every optimizer by DeepSpeed's CPU Adam",
        wrapper="deepspeed.wrap_map_to_deepspeed",
        without="FOAM in an own loop of accelerate is replaced by DeepSpeed's CPU Adam with offload_optimizer",
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
        without="weights that are saved under other names are not recognized",
    ),
    Row(
        _LOADING,
        "",
        "PrefixChange",
        use="see `weight_conversions`",
        since="5.6",
        without="weights that are saved under other names are not recognized",
    ),
    Row(
        _LOADING,
        "",
        "revert_weight_conversion",
        use="see `as_saved`",
        since="5.0",
        without="weights that cannot be loaded after training are not refused before it",
    ),
)


def patch(module: types.ModuleType) -> None:
    """Wrap the names of `TABLE` in `module`, a module of transformers that was just imported. Idempotent.

    Raises:
        ImportError: `module` lacks a name whose `without` is empty.
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
    """Import a wrapper by its path, late: the files with the wrappers import this one."""
    file, name = path.split(".")
    found: Callable[[Any], Any] = getattr(importlib.import_module(f"foam_hf.trainer.{file}"), name)
    return found


# Private names of a Trainer and of its accelerator


def checkpoint_folder(trainer: Any, trial: Any) -> Path:
    """The folder of the checkpoint that the trainer writes at this step."""
    return Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"


def decay_parameter_names(trainer: Any, model: Any) -> Any:
    """The names of the weights that decay, by the rule of the trainer's class; None if transformers has no rule.

    Args:
        trainer: None if the optimizer is made outside of a Trainer; then `Trainer`'s own rule decides.
        model: whose weights are meant.
    """
    from transformers import Trainer

    rule = getattr(Trainer if trainer is None else trainer, "get_decay_parameter_names", None)
    if rule is None:
        return None
    if trainer is not None:
        return rule(model)
    try:
        return rule(None, model)
    except (AttributeError, TypeError):  # this version of transformers uses self
        return None


def is_fsdp_enabled(trainer: Any) -> bool:
    return bool(getattr(trainer, "is_fsdp_enabled", False))


def is_deepspeed_enabled(trainer: Any) -> bool:
    return bool(getattr(trainer, "is_deepspeed_enabled", False))


def fsdp_plugin(trainer: Any) -> Any:
    """accelerate's settings of FSDP, or None. Since accelerate 1.6 they have an `fsdp_version`."""
    return getattr(getattr(getattr(trainer, "accelerator", None), "state", None), "fsdp_plugin", None)


def deepspeed_plugin(trainer: Any) -> Any:
    """accelerate's settings of DeepSpeed, or None; they hold the config in `hf_ds_config.config`."""
    return getattr(getattr(getattr(trainer, "accelerator", None), "state", None), "deepspeed_plugin", None)


def unwrapped_optimizer(trainer: Any) -> Any:
    """The optimizer of a trainer or an engine without the wrappers of accelerate and DeepSpeed, or None."""
    optimizer: Any = getattr(trainer, "optimizer", None)
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def skipped_steps(trainer: Any) -> int:
    """How many steps DeepSpeed has left out since its engine was made, but for those that a loss scaler has."""
    engine = getattr(trainer, "model_wrapped", None)
    scaled = getattr(engine, "fp16_enabled", lambda: True)()
    return 0 if scaled else int(getattr(engine, "skipped_steps", 0))


def replace_clipping(accelerator: Any, clip: Callable[..., Any]) -> Callable[[], None]:
    """Replace `accelerator.clip_grad_norm_`, which Trainer calls between a backward pass and the step.

    Returns:
        A function that restores the original.
    """
    accelerator.clip_grad_norm_ = clip

    def undo() -> None:
        del accelerator.clip_grad_norm_

    return undo


def prepare_without_ddp(trainer: Any) -> Callable[[], None]:
    """Let accelerate prepare the model without DDP, which would hold all gradients in buckets.

    `prepare_model(evaluation_mode=True)` leaves out nothing else.

    Returns:
        A function that restores the original, and lets a later run of the trainer wrap its model again.
    """
    accelerator = trainer.accelerator
    original = accelerator.prepare_model

    def prepare_model(model: Any, device_placement: Any = None, evaluation_mode: bool = False) -> Any:
        return original(model, device_placement=device_placement, evaluation_mode=True)

    accelerator.prepare_model = prepare_model

    def undo() -> None:
        vars(accelerator).pop("prepare_model", None)
        if accelerator.num_processes > 1:
            vars(trainer.model).pop("_is_accelerate_prepared", None)

    return undo


def ddp_of(trainer: Any) -> Any:
    """The DDP that the trainer's model is wrapped in, or None."""
    wrapped = getattr(trainer, "model_wrapped", None)
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # of torch.compile
    return wrapped if type(wrapped).__name__ == "DistributedDataParallel" else None


def ddp_settings(trainer: Any) -> Any:
    """accelerate's arguments of DDP, or None."""
    return getattr(trainer.accelerator, "ddp_handler", None)


def micro_batches_of_step(trainer: Any) -> int:
    """How many backward passes the step has that begins: the last step of an epoch may have fewer than others."""
    count = getattr(trainer, "current_gradient_accumulation_steps", None)
    return int(count or trainer.args.gradient_accumulation_steps)


# Private names of a model


def warn_after_load(trainer: Any, result: Any) -> None:
    """Let Trainer warn about the result of `load_state_dict`, if its version does so."""
    if hasattr(trainer, "_issue_warnings_after_load"):
        trainer._issue_warnings_after_load(result)


def has_adapters(model: Any) -> bool:
    """Whether a transformers model has adapters of PEFT."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def weight_conversions(model: Any) -> list[Any]:
    """The changes of names and layouts that transformers 5 makes when it saves the model's weights."""
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
    """Whether transformers 5 saves weights of the model in another layout, under whatever names."""
    return any(type(each).__name__ == "WeightConverter" for each in weight_conversions(model))


def saves_other_names(model: Any) -> bool:
    """Whether transformers saves weights of the model under other names."""
    return bool(getattr(model, "_checkpoint_conversion_mapping", None) or weight_conversions(model))


def as_saved(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict as transformers 5 would save it; empty for older versions, which have no such function."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    reverted: dict[str, Any] = revert_weight_conversion(model, state)
    return reverted
