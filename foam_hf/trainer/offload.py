"""Refuses what does not go with INT8 weights that live in host memory, before a run allocates anything."""

from __future__ import annotations

from typing import Any

from foam_hf.optim_args import one_of_ours
from foam_hf.tensors.rows import visiting_layer
from foam_hf.trainer.names import name_of, releases_gradients, uses_foam
from foam_hf.trainer.private import has_adapters, is_deepspeed_enabled, is_fsdp_enabled


def refuse_with_offload(trainer: Any) -> None:
    """Raise ValueError if the Trainer has offloaded weights and cannot train them."""
    model: Any = getattr(trainer, "model", None)
    if not callable(getattr(model, "parameters", None)):
        return
    if not any(visiting_layer(p) is not None for p in model.parameters()):
        return
    problem = _problem(trainer, model)
    if problem:
        raise ValueError(f"INT8 weights that are offloaded (Int8Config(offload='cpu')) {problem}")


def _problem(trainer: Any, model: Any) -> str:
    """Why they cannot be trained, as the rest of a sentence, or ""."""
    args = trainer.args
    if hasattr(model, "peft_config") or has_adapters(model):
        return "are all trained: got adapters of PEFT on them; expected Int8Config() without offload"
    if is_fsdp_enabled(trainer):
        return "are trained in one process: got FSDP; expected Int8Config() without offload, or no FSDP"
    if is_deepspeed_enabled(trainer):
        return "are trained in one process: got DeepSpeed; expected plain bf16 weights, or no DeepSpeed"
    if args.world_size > 1:
        return f"are trained in one process: got {args.world_size}; expected Int8Config() without offload, or one"
    if not uses_foam(args):
        return f"are trained by FOAM: got optim={name_of(args.optim)!r}; expected optim={one_of_ours()}"
    if not releases_gradients(args):
        return (
            f"are updated in the backward pass: got optim_args={args.optim_args!r}; expected gradient_release=true in "
            "it"
        )
    if args.torch_compile:
        return "move between host and GPU, which no compiled model follows: got torch_compile=True; expected False"
    return ""
