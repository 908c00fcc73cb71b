"""Checks checkpoints before Trainer reads them, to resume training or to load the best model at its end.

Only files that Trainer reads are checked, against the checksums in the manifest. A checkpoint of another tool or of an
older version has no manifest; then each file is checked by its own format. Every error names what to do if a file was
changed on purpose.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foam_hf.optimizer.names import named
from foam_hf.trainer.deepspeed import processes_problem, uses_deepspeed
from foam_hf.trainer.file_checks import Damaged, Unfinished, is_weights
from foam_hf.trainer.manifest import check, checked_folder, name_complete_checkpoint, newest_complete
from foam_hf.trainer.names import foam_of, uses_foam
from foam_hf.trainer.private import is_fsdp_enabled
from foam_hf.trainer.sharded_groups import check_sharded_groups
from foam_hf.trainer.weights import load_renamed_weights, loading_problem

logger = logging.getLogger("foam_hf")


def checked_arguments(trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of `Trainer.train`, in which `resume_from_checkpoint` is None or a complete checkpoint's folder.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or `True` was given and no checkpoint is complete.
    """
    asked = args[0] if args else kwargs.get("resume_from_checkpoint")
    if asked is None or asked is False:
        return args, kwargs
    output = Path(trainer.args.output_dir)
    chosen = _decide_on_main_process(
        trainer, lambda: newest_complete(output) if asked is True else checked_folder(Path(asked))
    )
    zero = uses_deepspeed(trainer.args, trainer)
    if chosen is not None and (problem := processes_problem(Path(chosen), trainer.args.world_size if zero else 0)):
        raise ValueError(problem)
    _warn_of_fresh_state(trainer, chosen)
    if chosen is None:
        return args, kwargs
    return ((chosen, *args[1:]), kwargs) if args else (args, {**kwargs, "resume_from_checkpoint": chosen})


def wrap_load_best_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer._load_best_model`: if the best model cannot be loaded, it warns and keeps the trained model."""

    @functools.wraps(original)
    def _load_best_model(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        best = trainer.state.best_model_checkpoint if uses_foam(trainer.args) else None
        if not best:
            return original(trainer, *args, **kwargs)
        try:
            _decide_on_main_process(trainer, lambda: _check_weights(trainer, Path(best)))
            if not load_renamed_weights(trainer, Path(best)):
                return original(trainer, *args, **kwargs)
        except Exception as error:  # no error may lose a training that is finished
            trainer.state.best_model_checkpoint = None  # else Trainer deletes all others under save_total_limit=1
            logger.warning(
                f"the best model, {best}, is not loaded: {error}. The training is finished, and the model in memory "
                "is that of its last step: Trainer.save_model() saves it"
            )
        return None

    return _load_best_model


def wrap_load_from_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer._load_from_checkpoint`, which loads weights by their names in the model.

    The wrapper refuses an INT8 checkpoint that does not fit the model. Under FOAM it also loads weights that
    transformers saves under other names, and it restores the dtypes of trained weights: PEFT loads bfloat16 adapters
    as float32.
    """

    @functools.wraps(original)
    def _load_from_checkpoint(trainer: Any, resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_other_weights(trainer.model, resume_from_checkpoint)
        if not uses_foam(trainer.args):
            return original(trainer, resume_from_checkpoint, *args, **kwargs)
        dtypes = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
        result = None
        if not load_renamed_weights(trainer, Path(resume_from_checkpoint)):
            result = original(trainer, resume_from_checkpoint, *args, **kwargs)
        for name, p in trainer.model.named_parameters():
            if p.dtype != dtypes.get(name, p.dtype):
                p.data = p.data.to(dtypes[name])
        return result

    return _load_from_checkpoint


def wrap_load_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer._load_optimizer_and_scheduler`: FOAM matches state to weights by their names."""

    @functools.wraps(original)
    def _load_optimizer_and_scheduler(trainer: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        foam = foam_of(trainer)
        if foam is not None and checkpoint is not None and is_fsdp_enabled(trainer):
            check_sharded_groups(foam, Path(checkpoint))
        with named(foam, trainer.model):
            return original(trainer, checkpoint, *args, **kwargs)

    return _load_optimizer_and_scheduler


def _check_weights(trainer: Any, folder: Path) -> None:
    """Raise ValueError if the weights in `folder` are damaged or do not fit the model."""
    if folder.is_dir():  # otherwise Trainer reports the missing folder
        try:
            check(folder, is_weights)
        except (Unfinished, Damaged) as problem:
            raise ValueError(f"{problem}{name_complete_checkpoint(folder)}") from None
        if unreadable := loading_problem(trainer, folder):
            raise ValueError(unreadable)


def _warn_of_fresh_state(trainer: Any, chosen: str | None) -> None:
    """Warn about a checkpoint with weights and no optimizer state: Trainer starts its moments anew in silence."""
    folder = Path(chosen or "")
    if chosen is None or not trainer.args.should_log or not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    others = names - {"optimizer.pt"}
    if not {"optimizer.pt", "scheduler.pt"} <= names and not any(
        "optimizer" in name or name.startswith("global_step") for name in others
    ):
        logger.warning(f"{folder} has no state of the optimizer: moments and schedule start anew from its weights")


def _decide_on_main_process(trainer: Any, decide: Callable[[], Any]) -> Any:
    """Call `decide` in the main process alone; every process returns its result, or raises its error as ValueError."""
    outcome: list[Any] = [None, None]
    if trainer.args.process_index == 0:
        try:
            outcome[0] = decide()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    if trainer.args.world_size > 1:
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def refuse_other_weights(model: Any, folder: Any) -> None:
    """Raise ValueError if a checkpoint has INT8 weights and the model has none, or has them by another Int8Config."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        held = config["quantization_config"]
        from foam_hf.int8.files import METHOD  # imported late, as few runs have a quantization_config

        if held["quant_method"] != METHOD:
            return
    except (OSError, ValueError, TypeError, KeyError):  # Trainer reports other problems of the folder
        return
    mine = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    mine = mine if isinstance(mine, dict) else mine.to_dict()
    if mine.get("quant_method") != METHOD:
        raise ValueError(
            f"{folder} holds INT8 weights, and the {type(model).__name__} to load them into has none; expected "
            "from_pretrained(..., quantization_config=foam_hf.Int8Config())"
        )
    other = [f"{name}={held[name]!r}, not {mine.get(name)!r}" for name in held if held[name] != mine.get(name)]
    if other:
        raise ValueError(
            f"{folder} holds INT8 weights of Int8Config with {', '.join(other)} as in this run; expected the same"
        )
