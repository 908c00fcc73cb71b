"""Checkpoints that are about to be read, for resuming or as the best model: which, and are they what was saved.

What is read is checked, and nothing else: see `manifest`. A checkpoint without a manifest is from another tool, or an
older version: what can be checked there is. Each refusal names the step that accepts a change made on purpose.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foam_hf.optimizer.names import named
from foam_hf.trainer.file_checks import Damaged, Unfinished, is_weights
from foam_hf.trainer.manifest import check, checked, instead, newest_whole
from foam_hf.trainer.names import foam_of, is_ours
from foam_hf.trainer.weights import loads, problem_of

logger = logging.getLogger("foam_hf")


def checked_arguments(trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of `Trainer.train`, with a checkpoint to resume from that is whole.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or `True` was given and none is whole.
    """
    asked = args[0] if args else kwargs.get("resume_from_checkpoint")
    if asked is None or asked is False:
        return args, kwargs
    output = Path(trainer.args.output_dir)
    chosen = _agreed(trainer, lambda: newest_whole(output) if asked is True else checked(Path(asked)))
    _warn_of_fresh_state(trainer, chosen)
    if chosen is None:
        return args, kwargs
    return ((chosen, *args[1:]), kwargs) if args else (args, {**kwargs, "resume_from_checkpoint": chosen})


def wrap_load_best_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer._load_best_model`, after the last step: where the weights cannot be read, the trained model stays."""

    @functools.wraps(original)
    def _load_best_model(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        best = trainer.state.best_model_checkpoint if is_ours(trainer.args) else None
        if not best:
            return original(trainer, *args, **kwargs)
        try:
            _agreed(trainer, lambda: _weights_are_whole(trainer, Path(best)))
            if not loads(trainer, Path(best)):
                return original(trainer, *args, **kwargs)
        except Exception as error:  # whatever it is, a finished training is not lost for it
            trainer.state.best_model_checkpoint = None  # else Trainer deletes all others under save_total_limit=1
            logger.warning(
                f"the best model, {best}, is not loaded: {error}. The training is finished, and the model in memory "
                "is that of its last step: Trainer.save_model() saves it"
            )
        return None

    return _load_best_model


def wrap_load_from_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer._load_from_checkpoint`, which loads by plain names, and only warns about weights that it does not find.

    Before it, an INT8 checkpoint is compared with the model. Under FOAM weights that transformers saves under other
    names are loaded, and trained weights keep their dtypes: PEFT makes adapters in bfloat16 float32 ones.
    """

    @functools.wraps(original)
    def _load_from_checkpoint(trainer: Any, resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_other_weights(trainer.model, resume_from_checkpoint)
        if not is_ours(trainer.args):
            return original(trainer, resume_from_checkpoint, *args, **kwargs)
        dtypes = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
        result = None
        if not loads(trainer, Path(resume_from_checkpoint)):
            result = original(trainer, resume_from_checkpoint, *args, **kwargs)
        for name, p in trainer.model.named_parameters():
            if p.dtype != dtypes.get(name, p.dtype):
                p.data = p.data.to(dtypes[name])
        return result

    return _load_from_checkpoint


def wrap_load_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer._load_optimizer_and_scheduler`, where FOAM compares the names of weights."""

    @functools.wraps(original)
    def _load_optimizer_and_scheduler(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        with named(foam_of(trainer), trainer.model):
            return original(trainer, *args, **kwargs)

    return _load_optimizer_and_scheduler


def _weights_are_whole(trainer: Any, folder: Path) -> None:
    if folder.is_dir():  # otherwise Trainer says what is missing
        try:
            check(folder, is_weights)
        except (Unfinished, Damaged) as problem:
            raise ValueError(f"{problem}{instead(folder)}") from None
        if unreadable := problem_of(trainer, folder):
            raise ValueError(unreadable)


def _warn_of_fresh_state(trainer: Any, chosen: str | None) -> None:
    """Trainer says nothing where a checkpoint has weights and no state of the optimizer."""
    folder = Path(chosen or "")
    if chosen is None or not trainer.args.should_log or not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    if not {"optimizer.pt", "scheduler.pt"} <= names and not any(
        "optimizer" in name for name in names - {"optimizer.pt"}
    ):
        logger.warning(f"{folder} has no state of the optimizer: moments and schedule start anew from its weights")


def _agreed(trainer: Any, decide: Callable[[], Any]) -> Any:
    """What `decide` says in the main process, in all of them; also its ValueError."""
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
    """Raise ValueError if a checkpoint holds INT8 weights, and the model holds none or others."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        held = config["quantization_config"]
        from foam_hf.int8.files import METHOD  # here: nearly no run has a quantization_config

        if held["quant_method"] != METHOD:  # plain weights are quantized as they are loaded
            return
    except (OSError, ValueError, TypeError, KeyError):  # whatever else is wrong, or odd, is Trainer's to say
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
