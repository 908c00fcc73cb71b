"""INT8 weights in the Trainer: which optimizers may train them, and which checkpoints they may go on from."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foam_hf.optim_args import one_of_ours
from foam_hf.tensors.rows import kind_of


def refuse_other_optimizer(model: Any, optimizer: str) -> None:
    """Raise ValueError where `optimizer`, which is not FOAM, would have to train INT8 weights."""
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
    """The same for an optimizer that was handed to the Trainer: itself, its class, or any function that makes it."""
    model = getattr(trainer, "model", None)
    if not _trained_int8(model):
        return
    from foam_hf.optimizer.foam import FOAM

    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    given = getattr(trainer, "optimizer_cls_and_kwargs", None)
    made_by = type(optimizer) if optimizer is not None else given[0] if given else FOAM
    if not (isinstance(made_by, type) and issubclass(made_by, FOAM)):
        refuse_other_optimizer(model, f"the optimizer {getattr(made_by, '__name__', made_by)}")


def refusing_other_checkpoints(original: Callable[..., Any], is_ours: Callable[[Any], bool]) -> Callable[..., Any]:
    """`Trainer._load_from_checkpoint`, which only warns about weights that it does not find, with a check before.

    Under FOAM trained weights keep their dtypes: PEFT makes adapters in bfloat16 float32 ones as it loads them.
    """

    @functools.wraps(original)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_other_checkpoint(self.model, resume_from_checkpoint)
        if not is_ours(self.args):
            return original(self, resume_from_checkpoint, *args, **kwargs)
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        result = original(self, resume_from_checkpoint, *args, **kwargs)
        for name, p in self.model.named_parameters():
            if p.dtype != dtypes.get(name, p.dtype):
                p.data = p.data.to(dtypes[name])
        return result

    return _load_from_checkpoint


def _refuse_other_checkpoint(model: Any, folder: Any) -> None:
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
