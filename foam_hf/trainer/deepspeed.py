"""FOAM under DeepSpeed's ZeRO in the Trainer: what a DeepSpeed config may ask for, and what is set in it."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from foam_hf.optimizer.flat import refuse_whole_weights_rules
from foam_hf.tensors.rows import kind_of
from foam_hf.trainer.names import name_of, requested_options
from foam_hf.trainer.private import deepspeed_plugin, is_deepspeed_enabled, unwrapped_optimizer
from foam_hf.trainer.sharded_groups import check_zero_groups

logger = logging.getLogger("foam_hf")

CPU_OPTIMIZER = "zero_force_ds_cpu_optimizer"
_TRUE = ("1", "true", "yes")
Config = Mapping[str, Any]


def uses_deepspeed(args: Any, trainer: Any) -> bool:
    """Whether accelerate will train by DeepSpeed, by the arguments and the environment."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _TRUE
    return bool(launched or getattr(args, "deepspeed", None) or is_deepspeed_enabled(trainer))


def refuse_with_deepspeed(args: Any, model: Any, trainer: Any) -> None:
    """Raise ValueError for an option, a kind of weight or a DeepSpeed config with which FOAM does not run.

    ``model`` and ``trainer`` are None if they are not known yet.
    """
    options = requested_options(args)
    refuse_whole_weights_rules(options, "DeepSpeed's ZeRO")
    if options.get("gradient_release"):
        raise ValueError(
            "gradient_release=true updates each weight inside the backward pass, where DeepSpeed's ZeRO has not yet "
            "added up its gradient over the processes; expected gradient_release=false, as ZeRO 2 and 3 themselves "
            "keep this process's part of the gradients alone, or one process without DeepSpeed"
        )
    config = _config(args, trainer)
    for problem in _problems(config) if config is not None else ():
        raise ValueError(f"optim={name_of(args.optim)!r} does not run with this DeepSpeed config: {problem}")
    int8 = [] if model is None else [name for name, p in model.named_parameters() if kind_of(p) == "int8"]
    if int8:
        raise ValueError(
            f"DeepSpeed cannot train INT8 weights: {type(model).__name__} has {len(int8)}, {int8[0]} the first; "
            "expected DDP, or a bfloat16 model with DeepSpeed"
        )


def let_foam_update_on_cpu(trainer: Any) -> None:
    """Set ``zero_force_ds_cpu_optimizer`` to false in the run's config, so that no offload replaces FOAM."""
    plugin = deepspeed_plugin(trainer)
    if plugin is None:
        return
    for config in (plugin.hf_ds_config.config, plugin.deepspeed_config):
        offloads = _at(config, "zero_optimization.offload_optimizer.device") not in (None, "none")
        if offloads and config.get(CPU_OPTIMIZER) is not False:
            config[CPU_OPTIMIZER] = False
            if config is plugin.hf_ds_config.config and trainer.args.should_log:
                logger.warning(
                    f"the DeepSpeed config offloads the optimizer: {CPU_OPTIMIZER} is set to false, so that FOAM "
                    "updates the weights on the CPU itself, and not DeepSpeed's CPU Adam"
                )


def processes_problem(folder: Path, processes: int) -> str:
    """Why so many processes of DeepSpeed cannot resume from a checkpoint that ZeRO wrote, or nothing.

    DeepSpeed may fail without words. Trainer without DeepSpeed, 0 processes, would start FOAM's state anew in silence.
    """
    for saved in sorted(folder.glob("global_step*")):
        wrote = len(list(saved.glob("*zero_pp_rank_*_optim_states.pt")))
        if wrote and wrote != processes:
            here = f"here are {processes}" if processes else "this run is without DeepSpeed"
            return (
                f"{folder} was written by {wrote} processes of DeepSpeed's ZeRO, and {here}; expected as many of its "
                "processes, as each reads its own part of the state, or training from the weights alone"
            )
    return ""


def _config(args: Any, trainer: Any) -> Config | None:
    """The DeepSpeed config of a run as far as it is known, or None."""
    plugin = deepspeed_plugin(trainer)
    if plugin is not None:
        return plugin.hf_ds_config.config
    given = getattr(args, "deepspeed", None)
    if isinstance(given, str) and Path(given).is_file():
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except ValueError:  # transformers reports it
            return None
    return given if isinstance(given, Mapping) else None


def _at(config: Config, path: str) -> Any:
    """The value at a path of keys, or None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _problems(config: Config) -> Iterator[str]:
    """What in a DeepSpeed config FOAM does not run with, and what is right instead."""
    if "optimizer" in config:
        name = _at(config, "optimizer.type")
        yield f'its "optimizer" section would train by {name!r} instead of FOAM; expected no such section'
    stage = _at(config, "zero_optimization.stage") or 0
    if stage not in (1, 2, 3, "auto"):
        yield f"got zero_optimization.stage={stage!r}; expected 1, 2 or 3, or DDP without DeepSpeed"
    for part in ("optimizer", "param"):
        if _at(config, f"zero_optimization.offload_{part}.device") == "nvme":
            yield f'got offload_{part}.device="nvme"; expected "cpu", or no offload, as FOAM\'s state is small'
    ratio = _at(config, "zero_optimization.offload_optimizer.ratio")
    if isinstance(ratio, int | float) and ratio < 1:
        yield (
            f"offload_optimizer.ratio={ratio} lets DeepSpeed's Adam update the part that stays on the GPU; expected "
            "ratio=1, or no offload"
        )
    for path, right in (
        ("zero_optimization.offload_optimizer.super_offload", "false"),
        ("zero_optimization.zenflow", "no such section"),
        ("zero_optimization.elastic_checkpoint", "false, as FOAM's blocks cannot be cut as DeepSpeed cuts Adam's"),
        ("checkpoint.load_universal", "false, as universal checkpoints hold Adam's state"),
    ):
        if value := _at(config, path):
            yield f"got {path}={value!r}; expected {right}"
    if isinstance(size := _at(config, "zero_optimization.mics_shard_size"), int) and size > 0:
        yield f"got mics_shard_size={size}; expected ZeRO 3 without MiCS"
    if (_at(config, "tensor_parallel.autotp_size") or 1) not in (1, "auto"):
        yield "tensor_parallel cuts weights inside their blocks; expected autotp_size=1"
    autocast = _at(config, "torch_autocast.dtype")
    if _at(config, "torch_autocast.enabled") and "16" in str(autocast) and "bf" not in str(autocast):
        yield f'got torch_autocast.dtype="{autocast}"; expected "bfloat16", or the section "fp16"'


def wrap_load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap transformers' `deepspeed_load_checkpoint`: options are compared before DeepSpeed compares its vectors."""

    @functools.wraps(original)
    def deepspeed_load_checkpoint(engine: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        from foam_hf.optimizer.foam import FOAM

        if isinstance(foam := unwrapped_optimizer(engine), FOAM):
            check_zero_groups(foam, Path(checkpoint_path))
        return original(engine, checkpoint_path, *args, **kwargs)

    return deepspeed_load_checkpoint


def wrap_map_to_deepspeed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap accelerate's `map_pytorch_optim_to_deepspeed`, which would replace FOAM by DeepSpeed's CPU Adam."""

    @functools.wraps(original)
    def map_pytorch_optim_to_deepspeed(optimizer: Any) -> Any:
        from foam_hf.optimizer.foam import FOAM

        if isinstance(optimizer, FOAM):
            raise ValueError(
                "this DeepSpeed config offloads the optimizer, and accelerate would replace FOAM by DeepSpeed's CPU "
                f'Adam; expected "{CPU_OPTIMIZER}": false in the config, with which FOAM updates on the CPU itself'
            )
        return original(optimizer)

    return map_pytorch_optim_to_deepspeed
