"""Functions that read and set private names of transformers' Trainer, of its accelerator and of models.

No other file of `foam_hf/trainer` names them; what is wrapped is in `patches.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
