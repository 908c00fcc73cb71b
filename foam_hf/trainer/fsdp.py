"""FSDP in the Trainer: which kind of it runs, and what FOAM refuses there.

What this file relies on, in transformers 4.57 to 5.x and accelerate: `TrainingArguments.fsdp` and `fsdp_config`;
`trainer.is_fsdp_enabled` and `trainer.accelerator.state.fsdp_plugin` with `fsdp_version`, since accelerate 1.6; and
the variables ACCELERATE_USE_FSDP and FSDP_VERSION, by which `accelerate launch` tells a script.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from foam_hf.tensors.rows import kind_of

_TRUE = ("1", "true", "yes")


def fsdp_in_use(args: Any, trainer: Any) -> bool:
    """Whether accelerate will shard the model, as far as is known by now."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in _TRUE
    return bool(launched or getattr(args, "fsdp", None) or getattr(trainer, "is_fsdp_enabled", False))


def unsupported_fsdp(args: Any, trainer: Any) -> str | None:
    """What is wrong with the kind of FSDP in use, or None."""
    if not fsdp_in_use(args, trainer):
        return None
    config = getattr(args, "fsdp_config", None)
    config = config if isinstance(config, Mapping) else {}  # a path, before TrainingArguments has read it
    if config.get("xla"):
        return "FSDP of torch_xla"
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is None:
        version = config.get("version", config.get("fsdp_version"))
        if version is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in _TRUE:
            version = os.environ.get("FSDP_VERSION")
        if version is None:
            return None  # not known yet
    else:
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return "FSDP where accelerate does not set it up, as without a GPU"
        version = getattr(plugin, "fsdp_version", None)
        if version is None:
            import accelerate

            return f"FSDP of accelerate {accelerate.__version__}, which knows version 1 alone"
    if str(version) != "2":
        return f"FSDP version {version}, which hands an optimizer flat pieces of many weights"
    return None


def refuse_with_fsdp(model: Any, trainer: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError for what FSDP2 cannot be combined with; ``options`` are those that were asked of FOAM."""
    plugin = getattr(getattr(getattr(trainer, "accelerator", None), "state", None), "fsdp_plugin", None)
    offload = getattr(plugin, "cpu_offload", None)
    if offload is True or type(offload).__name__ == "CPUOffloadPolicy":
        raise ValueError(
            "FSDP2's CPU offload is not supported by FOAM: got fsdp_offload_params: true (fsdp_config's cpu_offload); "
            "expected false, as FOAM's state is small"
        )
    for name, legal in (("second_moment", ("block", "factored")), ("plain_state", ("full",))):
        if options.get(name, legal[0]) not in legal:
            raise ValueError(
                f"{name}={options[name]} needs whole weights, and FSDP2 splits them; expected "
                f"{name}={' or '.join(legal)}, or DDP"
            )
    if options.get("gradient_release"):
        raise ValueError(
            "gradient_release=true updates each weight inside the backward pass, before FSDP2 has added up its "
            "gradient over the processes; expected gradient_release=false, or one process without FSDP"
        )
    if model is None:
        return
    names = [name for name, p in model.named_parameters() if kind_of(p) == "int8"]
    if names:
        raise ValueError(
            f"INT8 weights cannot be sharded: {type(model).__name__} has {len(names)}, {names[0]} the first, and runs "
            "with FSDP; expected DDP, or a bfloat16 model with FSDP2"
        )
