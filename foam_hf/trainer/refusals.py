"""Raises an error before the first step of a run that FOAM does not support, or that only FOAM supports."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from foam_hf.optim_args import one_of_ours
from foam_hf.optimizer.checks import whole_weights_problem
from foam_hf.rules.all import rule_named
from foam_hf.tensors.places import is_sharded
from foam_hf.tensors.rows import kind_of
from foam_hf.trainer.deepspeed import refuse_with_deepspeed, uses_deepspeed
from foam_hf.trainer.names import name_of, releases_gradients, requested_options, similar_name, uses_foam
from foam_hf.trainer.private import ddp_settings, fsdp_plugin, is_fsdp_enabled, unwrapped_optimizer

_TRUE = ("1", "true", "yes")


def wrap_post_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `TrainingArguments.__post_init__`: FOAM's options are checked before it runs."""

    @functools.wraps(original)
    def __post_init__(args: Any, *more: Any, **kwargs: Any) -> None:
        if uses_foam(args):  # checked first: transformers would ask to install DeepSpeed before it is refused
            requested_options(args)
            refuse_sharding(args)
            if releases_gradients(args):
                refuse_kept_gradients(args)
        elif similar := similar_name(args.optim):  # transformers' own error lists some forty names
            raise ValueError(f"optim={args.optim!r} is no optimizer of the Trainer; did you mean {similar!r}?")
        original(args, *more, **kwargs)

    return __post_init__


# sharded weights


def refuse_sharding(args: Any, model: Any = None, trainer: Any = None) -> None:
    """Raise ValueError if weights are sharded by anything but FSDP2 and ZeRO, or if these meet what they exclude."""
    found = _sharding(args, model, trainer)
    if found is not None:
        raise ValueError(
            f"optim={name_of(args.optim)!r} does not run with {found}. What works: one GPU, or several with DDP or "
            "with FSDP2 of accelerate 1.6 or newer (fsdp_version: 2) or with DeepSpeed's ZeRO 1, 2 or 3, started by "
            "torchrun or accelerate launch."
        )
    if uses_deepspeed(args, trainer):
        refuse_with_deepspeed(args, model, trainer)
    if _uses_fsdp(args, trainer):
        _refuse_with_fsdp(trainer, requested_options(args))


def _sharding(args: Any, model: Any, trainer: Any) -> str | None:
    """What shards the weights in an unsupported way, or None; more is known once there is a model and a trainer."""
    if found := _unsupported_fsdp(args, trainer):
        return found
    from transformers.utils import is_sagemaker_mp_enabled

    if is_sagemaker_mp_enabled():
        return "SageMaker model parallelism"

    def degree(owner: Any, name: str) -> int:
        return getattr(owner, name, None) or 1

    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    if getattr(distributed, "enable_expert_parallel", False) or degree(distributed, "ep_size") > 1:
        return "expert parallelism"
    parallelism = getattr(getattr(trainer, "accelerator", args), "parallelism_config", None)
    if degree(model, "tp_size") > 1 or degree(parallelism, "tp_size") > 1:
        return "tensor parallelism, as Trainer would save the optimizer state of one process alone"
    sharded = model is not None and any(is_sharded(parameter) for parameter in model.parameters())
    if sharded and not _uses_fsdp(args, trainer):
        return "a model sharded before the Trainer got it, whose optimizer state it would save from one process alone"
    return None


def _uses_fsdp(args: Any, trainer: Any) -> bool:
    """Whether accelerate will shard the model by FSDP, by the arguments and the environment."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in _TRUE
    return bool(launched or getattr(args, "fsdp", None) or is_fsdp_enabled(trainer))


def _unsupported_fsdp(args: Any, trainer: Any) -> str | None:
    """The unsupported kind of FSDP that is in use, or None."""
    if not _uses_fsdp(args, trainer):
        return None
    config = getattr(args, "fsdp_config", None)
    config = config if isinstance(config, Mapping) else {}  # it is a path until TrainingArguments has read the file
    if config.get("xla"):
        return "FSDP of torch_xla"
    if getattr(trainer, "accelerator", None) is None:
        version = config.get("version", config.get("fsdp_version"))
        if version is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in _TRUE:
            version = os.environ.get("FSDP_VERSION")  # `accelerate launch` sets it
        if version is None:
            return None  # refuse_sharding is called again when the version is known
    else:
        plugin = fsdp_plugin(trainer)
        if plugin is None:
            return "FSDP where accelerate does not set it up, as without a GPU"
        version = getattr(plugin, "fsdp_version", None)
        if version is None:
            import accelerate

            return f"FSDP of accelerate {accelerate.__version__}, which knows version 1 alone"
    if str(version) != "2":
        return f"FSDP version {version}, which hands an optimizer flat pieces of many weights"
    return None


def _refuse_with_fsdp(trainer: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option or a CPU offload that FSDP2 excludes.

    Args:
        trainer: None if it is not known yet.
        options: FOAM's options that the run gives.
    """
    offload = getattr(fsdp_plugin(trainer), "cpu_offload", None)
    if offload is True or type(offload).__name__ == "CPUOffloadPolicy":
        raise ValueError(
            "FSDP2's CPU offload is not supported by FOAM: got fsdp_offload_params: true (fsdp_config's cpu_offload); "
            "expected false, as FOAM's state is small"
        )
    if problem := whole_weights_problem(options):
        raise ValueError(problem)


# INT8 weights without FOAM


def refuse_other_optimizer(model: Any, optimizer: str) -> None:
    """Raise ValueError if `model` has INT8 weights to train, which only FOAM can; `optimizer` names the one in use."""
    trained = _trained_int8(model)
    if trained:
        raise ValueError(
            f"{optimizer} cannot train INT8 weights, and {len(trained)} of {type(model).__name__} are to be trained, "
            f"{trained[0]} the first; expected optim={one_of_ours()}, or LoRA on frozen INT8 weights"
        )


def _trained_int8(model: Any) -> list[str]:
    if not callable(getattr(model, "named_parameters", None)):
        return []
    return [name for name, p in model.named_parameters() if kind_of(p) == "int8" and p.requires_grad]


def refuse_ready_made_optimizer(trainer: Any) -> None:
    """Raise ValueError if the Trainer has INT8 weights to train and was given an optimizer or a class that cannot."""
    model = getattr(trainer, "model", None)
    if not _trained_int8(model):
        return
    from foam_hf.optimizer.foam import FOAM

    optimizer = unwrapped_optimizer(trainer)
    given = getattr(trainer, "optimizer_cls_and_kwargs", None)
    made_by = type(optimizer) if optimizer is not None else given[0] if given else FOAM
    if not (isinstance(made_by, type) and issubclass(made_by, FOAM)):
        refuse_other_optimizer(model, f"the optimizer {getattr(made_by, '__name__', made_by)}")


# gradient_release=true


def refuse_kept_gradients(args: Any) -> None:
    """Raise ValueError for TrainingArguments that need gradients after the backward pass."""
    options = requested_options(args)
    rules = {name: options[name] for name in ("second_moment", "embedding_rule") if name in options}
    for name, rule in rules.items():
        if args.gradient_accumulation_steps > 1 and rule_named(rule).update_micro is None:
            raise ValueError(
                "gradient_release=true adds up the gradients of several backward passes by the block rule alone: got "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} with {name}={rule}; expected "
                f"{name}=block, gradient_accumulation_steps=1, or gradient_release=false"
            )
    if args.gradient_accumulation_steps > 1 and args.max_grad_norm and options.get("clip_by") == "weight":
        raise ValueError(
            "clip_by=weight bounds the gradient of a whole step, and gradient_release=true with several backward "
            f"passes has only parts of it: got gradient_accumulation_steps={args.gradient_accumulation_steps}; "
            "expected clip_by=all, gradient_accumulation_steps=1 or max_grad_norm=0"
        )
    if args.fp16:
        raise ValueError(
            "gradient_release=true updates each weight before a loss scaler could look for overflows in all of them: "
            "got fp16=True; expected bf16=True or float32, or gradient_release=false"
        )


def refuse_kept_gradients_of(trainer: Any) -> None:
    """Raise ValueError for a trainer that needs gradients after the backward pass, or that trains on several GPUs."""
    refuse_kept_gradients(trainer.args)
    hook = getattr(ddp_settings(trainer), "comm_hook", None)
    if hook is not None and getattr(hook, "value", hook) != "no":
        raise ValueError(
            f"gradient_release=true averages gradients in place of DDP: got the communication hook {hook}; expected "
            "none, or gradient_release=false"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"gradient_release=true trains on one GPU: got {trainer.args.n_gpu}, which DataParallel would share; "
            "expected one of them in CUDA_VISIBLE_DEVICES, or gradient_release=false"
        )
    if getattr(trainer.accelerator, "scaler", None) is not None:
        raise ValueError(
            "gradient_release=true updates each weight before a loss scaler could look for overflows in all of them: "
            f"got mixed_precision={trainer.accelerator.mixed_precision!r} from accelerate; expected 'bf16' or 'no', "
            "or gradient_release=false"
        )
