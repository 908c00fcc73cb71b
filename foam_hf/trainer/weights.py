"""The weights of a checkpoint and those of the model: Trainer loads by plain names, transformers saves under others.

ViT, LLaVA, Qwen2-VL, GPT-NeoX and most mixtures of experts are saved as their first authors' files are, and only
`from_pretrained` reads that; Trainer would leave such weights as they were. Under FOAM they are read by it and copied.

"""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foam_hf.trainer.names import is_ours
from foam_hf.trainer.patches import (
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


def loads(trainer: Any, folder: Path) -> bool:
    """Load the weights in `folder` by `from_pretrained` where Trainer could not by their names; whether it did.

    Raises:
        ValueError: `from_pretrained` cannot read them, or they lack a trained weight.
    """
    saved = _saved_shapes(folder) if _by_plain_names(trainer) else None
    if saved is None or not _is_renamed(trainer.model, saved):
        return False
    model = trainer.model
    try:
        state, missing = _read(model, folder)
    except Exception as error:
        if reason := _other_shape(model, saved):  # from_pretrained says it in a report alone
            raise ValueError(f"{folder} cannot be loaded: {reason}; expected a model of the same shapes") from error
        raise ValueError(
            f"{folder} holds the weights of {type(model).__name__} under other names than it trains, and "
            f"from_pretrained, which would read them, says: {type(error).__name__}: {error}. {_EXPECTED}"
        ) from error
    if missing and (reason := _unreadable(model, saved)):
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
    """The state dict of `model` with the values in `folder`, and the names that have none there."""
    import torch

    # by keyword: of several dtypes, float32 holds every half one exactly, and loading brings each back
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    with torch.random.fork_rng(devices=[]):  # what is not in the checkpoint is drawn, and dropped here
        loaded, info = type(model).from_pretrained(
            folder,
            config=_config(model),
            dtype=dtype,
            output_loading_info=True,
            attn_implementation="eager",  # the fast ones may ask for a GPU
        )
    missing = set(info["missing_keys"])
    return {name: tensor for name, tensor in loaded.state_dict().items() if name not in missing}, sorted(missing)


def _config(model: Any) -> Any:
    """A copy of the model's config as it stands in a file: with a quantizer's as a dict."""
    config = copy.deepcopy(model.config)
    quantizer = getattr(config, "quantization_config", None)
    if quantizer is not None and not isinstance(quantizer, dict):
        config.quantization_config = quantizer.to_dict()
    return config


def _by_plain_names(trainer: Any) -> bool:
    """Whether Trainer would load a state dict into the model by its names: not of PEFT, FSDP or DeepSpeed."""
    from transformers import PreTrainedModel

    engine = is_fsdp_enabled(trainer) or is_deepspeed_enabled(trainer)
    model = trainer.model
    return isinstance(model, PreTrainedModel) and not engine and not has_adapters(model)


def _saved_shapes(folder: Path) -> Shapes | None:
    """Name -> shape of what a checkpoint's weights files hold, from their headers; None where none can be read."""
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
    """Whether `saved` has names that are not the model's in place of some that are, or other layouts under its own."""
    mine = _shapes(model.state_dict())
    return bool(mine.keys() - saved.keys() and saved.keys() - mine.keys()) or has_converters(model)


def _shapes(state: dict[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items() if hasattr(tensor, "shape")}


# weights that nothing could load


def wrap_issue_warnings(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer._issue_warnings_after_load`, which only warns about weights that a checkpoint did not bring."""

    @functools.wraps(original)
    def _issue_warnings_after_load(trainer: Any, load_result: Any, *args: Any, **kwargs: Any) -> Any:
        if is_ours(trainer.args):
            refuse_missing(trainer.model, load_result.missing_keys)
        return original(trainer, load_result, *args, **kwargs)

    return _issue_warnings_after_load


def refuse_missing(model: Any, missing: list[str]) -> None:
    """Raise ValueError if a trained weight is under no name in what was loaded."""
    names = _trained_names(model)
    absent = _absent(names, set(missing))
    if absent:
        raise ValueError(
            f"the checkpoint brought no values for {len(absent)} of {len(names)} trained weights of "
            f"{type(model).__name__}, {absent[0]} the first: it is of another model, or its files hold them under "
            f"other names. {_EXPECTED}"
        )


def _trained_names(model: Any) -> list[list[str]]:
    """The names of each trained weight: tied ones have several."""
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        half = bool(module.__dict__.get("_int8_waiting"))  # codes without scales, which say so at the first forward
        for own, p in module.named_parameters(recurse=False):
            if p.requires_grad and not (half and own == "weight"):
                names.setdefault(id(p), []).append(f"{module_name}.{own}".lstrip("."))
    return list(names.values())


def _absent(names: list[list[str]], missing: set[str]) -> list[str]:
    return [known[0] for known in names if set(known) <= missing]


def problem_of(trainer: Any, folder: Path) -> str:
    """Why the weights in `folder` could not be loaded into the model as it is, or an empty string. Reads headers."""
    saved = _saved_shapes(folder) if _by_plain_names(trainer) else None
    if saved is None:
        return ""
    return _unreadable(trainer.model, saved)


def _unreadable(model: Any, saved: Shapes) -> str:
    if _is_renamed(model, saved):
        reason = _not_remade(model)
        return reason and (
            f"transformers saves {type(model).__name__} under other names than it trains, and from_pretrained, which "
            f"alone reads them, {reason}. {_EXPECTED}"
        )
    mine = _shapes(model.state_dict())
    absent = _absent(_trained_names(model), mine.keys() - saved.keys())
    if absent:
        return f"it has no values for {len(absent)} trained weights of {type(model).__name__}, {absent[0]} the first"
    return _other_shape(model, saved)


def _other_shape(model: Any, saved: Shapes) -> str:
    """Which weight has another shape in `saved`, or an empty string."""
    mine = _shapes(model.state_dict())
    other = [name for name in mine.keys() & saved.keys() if mine[name] != saved[name]]
    if not other:
        return ""
    name = min(other)
    return f"{name} has shape {saved[name]} there, and {mine[name]} in {type(model).__name__}"


def _not_remade(model: Any) -> str:
    """Why the model's class does not make such a model from its config, as the rest of a sentence, or nothing."""
    import torch

    if getattr(model.config, "quantization_config", None) is not None:
        return ""  # its quantizer changes what the class makes
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = _shapes(type(model)(copy.deepcopy(model.config)).state_dict())
    except Exception as error:  # of the class's own constructor
        return f"cannot make one from its config: {type(error).__name__}: {error}"
    mine = _shapes(model.state_dict())
    names = {name for name in mine.keys() | made.keys() if mine.get(name) != made.get(name)}
    if not names:
        return ""
    name = min(names)
    return f"makes one with other weights: {name} is {made.get(name)} there, and {mine.get(name)} here"


def refuse_unreadable(trainer: Any) -> None:
    """Before the first step: raise ValueError if the best model is to be loaded at the end and could not be."""
    model = trainer.model
    if model is None or not trainer.args.load_best_model_at_end or not _by_plain_names(trainer):
        return
    reason = saves_other_names(model) and _not_remade(model)
    if reason and _is_renamed(model, _reverted(model)):
        raise ValueError(f"load_best_model_at_end: {_unreadable(model, _reverted(model))}")


def _reverted(model: Any) -> Shapes:
    """What transformers 5 would save of the model."""
    return _shapes(as_saved(model, {name: tensor.to("meta") for name, tensor in model.state_dict().items()}))


def warn_unreadable(trainer: Any, folder: Path) -> None:
    """At the first save: say that a checkpoint cannot be resumed from."""
    if getattr(trainer, "_foam_hf_read_back", None) is trainer.model:
        return
    trainer._foam_hf_read_back = trainer.model
    problem = problem_of(trainer, folder)
    if problem:
        logger.warning(f"{folder} will not resume: {problem}")
