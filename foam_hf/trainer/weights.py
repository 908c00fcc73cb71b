"""Loads the weights of a checkpoint whose names differ from the model's, and refuses weights that cannot be loaded.

transformers saves ViT, LLaVA, Qwen2-VL, GPT-NeoX and most mixtures of experts under the names of their first release.
Only `from_pretrained` translates these names. Trainer loads by the names in the model and would leave such weights as
they were. Under FOAM `from_pretrained` reads them, and they are copied into the model.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foam_hf.trainer.names import uses_foam
from foam_hf.trainer.private import (
    as_saved,
    has_adapters,
    has_converters,
    is_deepspeed_enabled,
    is_fsdp_enabled,
    saves_other_names,
    warn_after_load,
)

logger = logging.getLogger("foam_hf")

Shapes = dict[str, tuple[int, ...]]


# loading


def load_renamed_weights(trainer: Any, folder: Path) -> bool:
    """Load the weights in `folder` by `from_pretrained` if their names differ from the model's.

    Returns:
        Whether it loaded them; if not, Trainer can.

    Raises:
        ValueError: `from_pretrained` cannot read them, or a trained weight is missing.
    """
    saved = _saved_shapes(folder) if _loads_by_names(trainer) else None
    if saved is None or not _is_renamed(trainer.model, saved):
        return False
    model = trainer.model
    try:
        state, missing = _read(model, folder)
    except Exception as error:
        if reason := _shape_problem(model, saved):  # from_pretrained's error does not name the weight
            raise ValueError(f"{folder} cannot be loaded: {reason}; expected a model of the same shapes") from error
        raise ValueError(
            f"{folder} holds the weights of {type(model).__name__} under other names than it trains, and "
            f"from_pretrained, which would read them, says: {type(error).__name__}: {error}. {_EXPECTED}"
        ) from error
    if missing and (reason := _problem(model, saved)):
        raise ValueError(f"{folder} cannot be loaded: {reason}")
    refuse_missing(model, missing)
    result = model.load_state_dict(state, strict=False)
    warn_after_load(trainer, result)
    return True


_EXPECTED = (
    "Expected a model that its class makes from its config alone, or training without resume_from_checkpoint and "
    "load_best_model_at_end"
)


def _read(model: Any, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The state dict of `model` with the values in `folder`, and the names of the weights that `folder` lacks."""
    import torch

    # For a model of several dtypes: float32 holds every half value exactly, and load_state_dict converts back.
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    with torch.random.fork_rng(devices=[]):  # weights that are missing are drawn at random, and dropped below
        loaded, info = type(model).from_pretrained(
            folder,
            config=_config(model),
            dtype=dtype,
            output_loading_info=True,
            attn_implementation="eager",  # others may need a GPU
        )
    missing = set(info["missing_keys"])
    return {name: tensor for name, tensor in loaded.state_dict().items() if name not in missing}, sorted(missing)


def _config(model: Any) -> Any:
    """A copy of the model's config in which the quantization config is a dict, as in a file."""
    config = copy.deepcopy(model.config)
    quantizer = getattr(config, "quantization_config", None)
    if quantizer is not None and not isinstance(quantizer, dict):
        config.quantization_config = quantizer.to_dict()
    return config


def _loads_by_names(trainer: Any) -> bool:
    """Whether Trainer loads the weights by their names in the model: not with PEFT, FSDP or DeepSpeed."""
    from transformers import PreTrainedModel

    engine = is_fsdp_enabled(trainer) or is_deepspeed_enabled(trainer)
    model = trainer.model
    return isinstance(model, PreTrainedModel) and not engine and not has_adapters(model)


def _saved_shapes(folder: Path) -> Shapes | None:
    """Name -> shape of the weights in a checkpoint, from the headers of its files; None if they cannot be read."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    found: Shapes = {}
    try:
        if not (folder / names[0]).is_file():
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return found


def _is_renamed(model: Any, saved: Shapes) -> bool:
    """Whether `saved` has other names than the model, or may have other layouts under the same names."""
    mine = _shapes(model.state_dict())
    return bool(mine.keys() - saved.keys() and saved.keys() - mine.keys()) or has_converters(model)


def _shapes(state: dict[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items() if hasattr(tensor, "shape")}


# weights that cannot be loaded


def wrap_issue_warnings(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer._issue_warnings_after_load`: a missing trained weight is an error under FOAM, not a warning."""

    @functools.wraps(original)
    def _issue_warnings_after_load(trainer: Any, load_result: Any, *args: Any, **kwargs: Any) -> Any:
        if uses_foam(trainer.args):
            refuse_missing(trainer.model, load_result.missing_keys)
        return original(trainer, load_result, *args, **kwargs)

    return _issue_warnings_after_load


def refuse_missing(model: Any, missing: list[str]) -> None:
    """Raise ValueError if `missing` has every name of a trained weight."""
    names = _trained_names(model)
    absent = _missing_weights(names, set(missing))
    if absent:
        raise ValueError(
            f"the checkpoint brought no values for {len(absent)} of {len(names)} trained weights of "
            f"{type(model).__name__}, {absent[0]} the first: it is of another model, or its files hold them under "
            f"other names. {_EXPECTED}"
        )


def _trained_names(model: Any) -> list[list[str]]:
    """The names of each trained weight; a tied weight has several."""
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        # An INT8 weight of which only codes or scales were loaded raises its own error in the first forward pass.
        half_loaded = bool(module.__dict__.get("_int8_waiting"))
        for own, p in module.named_parameters(recurse=False):
            if p.requires_grad and not (half_loaded and own == "weight"):
                names.setdefault(id(p), []).append(f"{module_name}.{own}".lstrip("."))
    return list(names.values())


def _missing_weights(names: list[list[str]], missing: set[str]) -> list[str]:
    """The first name of each weight that is missing under all of its names."""
    return [known[0] for known in names if set(known) <= missing]


def loading_problem(trainer: Any, folder: Path) -> str:
    """Why the weights in `folder` cannot be loaded into the model, or an empty string. It reads headers only."""
    saved = _saved_shapes(folder) if _loads_by_names(trainer) else None
    if saved is None:
        return ""
    return _problem(trainer.model, saved)


def _problem(model: Any, saved: Shapes) -> str:
    if _is_renamed(model, saved):
        reason = _rebuilding_problem(model)
        return reason and (
            f"transformers saves {type(model).__name__} under other names than it trains, and from_pretrained, which "
            f"alone reads them, {reason}. {_EXPECTED}"
        )
    mine = _shapes(model.state_dict())
    absent = _missing_weights(_trained_names(model), mine.keys() - saved.keys())
    if absent:
        return f"it has no values for {len(absent)} trained weights of {type(model).__name__}, {absent[0]} the first"
    return _shape_problem(model, saved)


def _shape_problem(model: Any, saved: Shapes) -> str:
    """A sentence on the first weight that has another shape in `saved`, or an empty string."""
    mine = _shapes(model.state_dict())
    other = [name for name in mine.keys() & saved.keys() if mine[name] != saved[name]]
    if not other:
        return ""
    name = min(other)
    return f"{name} has shape {saved[name]} there, and {mine[name]} in {type(model).__name__}"


def _rebuilding_problem(model: Any) -> str:
    """Why the model's class does not build this model from its config, as the end of a sentence; "" if it does."""
    import torch

    if getattr(model.config, "quantization_config", None) is not None:
        return ""  # unknown: the quantizer changes the model after it is built
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = _shapes(type(model)(copy.deepcopy(model.config)).state_dict())
    except Exception as error:  # a constructor can raise anything
        return f"cannot make one from its config: {type(error).__name__}: {error}"
    mine = _shapes(model.state_dict())
    names = {name for name in mine.keys() | made.keys() if mine.get(name) != made.get(name)}
    if not names:
        return ""
    name = min(names)
    return f"makes one with other weights: {name} is {made.get(name)} there, and {mine.get(name)} here"


def refuse_unreadable(trainer: Any) -> None:
    """Raise ValueError, before the first step, if load_best_model_at_end could not load the best model."""
    model = trainer.model
    if model is None or not trainer.args.load_best_model_at_end or not _loads_by_names(trainer):
        return
    reason = saves_other_names(model) and _rebuilding_problem(model)
    if reason and _is_renamed(model, _shapes_as_saved(model)):
        raise ValueError(f"load_best_model_at_end: {_problem(model, _shapes_as_saved(model))}")


def _shapes_as_saved(model: Any) -> Shapes:
    """Name -> shape of the weights as transformers 5 would save them."""
    return _shapes(as_saved(model, {name: tensor.to("meta") for name, tensor in model.state_dict().items()}))


def warn_unreadable(trainer: Any, folder: Path) -> None:
    """Warn, once a model, that training cannot resume from its checkpoints; called at every save."""
    if getattr(trainer, "_foam_hf_read_back", None) is trainer.model:
        return
    trainer._foam_hf_read_back = trainer.model
    problem = loading_problem(trainer, folder)
    if problem:
        logger.warning(f"{folder} will not resume: {problem}")
