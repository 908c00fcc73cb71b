"""Builds models on the meta device, where they have shapes and dtypes and take no memory."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from foam_hf.planner.model_configs import ModelError, first_line


def meta_model(
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Build the model of `config` on the meta device; nothing is allocated.

    Args:
        config: a transformers config.
        dtype: of the weights; default: the config's own, else float32.
        architecture: name of the class in transformers; default: the first that `config` names and transformers has,
            else the causal language model for this kind of config.
        trust_remote_code: as for `load_config`.

    Raises:
        ModelError: the config contradicts itself or is that of a quantized checkpoint, or transformers has no model
            for it.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = getattr(settings.get("quant_method"), "value", settings.get("quant_method"))
        option = ", with --int8-weights (int8_weights=True)" if method == "foam_int8" else ""
        raise ModelError(f"a checkpoint quantized by {method}; expected the plain model that it was made from{option}")
    dtype = dtype or config_dtype(config)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # model.to(dtype) would also cast buffers that stay float32 when a model is loaded
    try:
        with torch.device("meta"):
            if architecture is not None:
                return _model_class(architecture, config)(config)
            return _build(config, trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # a config that contradicts itself can raise anything
        raise ModelError(
            f"cannot build {type(config).__name__}: {first_line(error)}; expected a config that transformers can build"
        ) from error
    finally:
        torch.set_default_dtype(default)


def config_dtype(config: Any) -> torch.dtype:
    """The dtype of the weights in `config`; float32 if it names none."""
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def on_meta(model: nn.Module) -> nn.Module:
    """`model` itself if it is on the meta device, else a copy of it there; nothing is allocated."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.is_meta for tensor in tensors):
        return model
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = tensor.detach().to("meta")
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
    return copy.deepcopy(model, memo)


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """`model` with peft's LoRA adapters on all linear layers but the head; its own weights are frozen.

    Raises:
        ModelError: peft is missing, or cannot adapt this model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError(f"lora_rank needs peft, which cannot be imported ({error}); pip install peft") from error
    # peft trains a classifier itself, without an adapter, because it has no pretrained weights.
    task = "SEQ_CLS" if "ForSequenceClassification" in type(model).__name__ else None
    try:
        return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type=task))
    except ValueError as error:
        raise ModelError(f"peft cannot adapt {type(model).__name__}: {first_line(error)}") from error


_NOT_TEXT = re.compile(r"(^|[._])(vision|visual|image|audio|speech|video|pixel|patch)")


def positions(model: nn.Module) -> int | None:
    """The longest text, in tokens, that the model's learned positions allow; None if it learns no positions.

    Rotary positions have no limit. Positions of patches and frames, in a tower for images or sound, do not count; the
    decoder of a model for sound has a text's.
    """
    inputs = {name: of for name, module in model.named_modules() if name and (of := main_input(module))}
    found = []
    for name, module in model.named_modules():
        own_name = name.rsplit(".", 1)[-1]
        nearest = max((each for each in inputs if name.startswith(f"{each}.")), key=len, default=None)
        if _NOT_TEXT.search(name) or (nearest is not None and inputs[nearest] != "input_ids"):
            continue
        if isinstance(module, nn.Embedding) and ("position" in own_name or own_name == "wpe"):
            # RoBERTa numbers its positions from the one after padding_idx.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - offset)
    return min(found, default=None)


def main_input(module: nn.Module) -> str | None:
    """The name of what a model or a part of one reads; None for a module that is no model of transformers."""
    name = getattr(module, "main_input_name", None)
    return name if isinstance(name, str) else None


def _model_class(name: str, config: Any) -> Any:
    """The class `name` of transformers; ModelError if it does not take `config`."""
    import transformers

    known = getattr(transformers, name, None)
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise ModelError(f"transformers has no model class {name!r}; expected one like LlamaForCausalLM")
    if not isinstance(config, known.config_class or ()):
        raise ModelError(f"{name} does not take a {type(config).__name__}; expected a class of the same family")
    return known


def _build(config: Any, trust_remote_code: bool) -> nn.Module:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        try:
            known = _model_class(name, config)
        except ModelError:  # a class of the model's own code, or a misspelt one (LLaMAForCausalLM in GaLore's configs)
            continue
        return known(config)
    own_code = getattr(config, "auto_map", None) or {}
    for name, mapping in (
        ("AutoModelForCausalLM", transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
        ("AutoModelForSeq2SeqLM", transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        ("AutoModelForSequenceClassification", transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        ("AutoModel", transformers.MODEL_MAPPING),
    ):
        if name in own_code or type(config) in mapping:
            return getattr(transformers, name).from_config(config, trust_remote_code=trust_remote_code)
    raise ModelError(f"transformers has no model for {type(config).__name__}; expected one that it can train")
