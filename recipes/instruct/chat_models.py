"""The model and tokenizer that a run starts from, whole, quantized or with adapters to come."""

import os
from pathlib import Path

import torch
from accelerate import PartialState
from gguf_models import gguf_file, load_gguf
from instruct_arguments import WHOLE, InstructArguments
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from foam_hf import Int8Config, foam_param_groups
from foam_hf.int8.quantizer import quantize_model_
from foam_hf.memory import adamw_state_bytes, expected_state_bytes, format_bytes
from foam_hf.memory.storages import storages, total
from foam_hf.recipe_kit import one_line, say


def load(recipe: InstructArguments, output_dir: Path):
    """Model and tokenizer; SystemExit with one sentence where they cannot be had or cannot be trained as asked."""
    dtype = getattr(torch, recipe.dtype)
    name = os.path.expanduser(recipe.model_name_or_path)
    path = gguf_file(name)
    if not path and not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise SystemExit(f"--model_name_or_path: no folder {name}.")
    try:
        if path and recipe.method in WHOLE:
            model, tokenizer = load_gguf(path, dtype, recipe.attn_implementation)
            if recipe.method == "int8":
                quantize_model_(model, quantization_of(recipe.method, dtype, recipe))
            return model, tokenizer
        if path:  # adapters name the folder of the model under them, and bitsandbytes loads no GGUF
            name = str((output_dir / "base_model").resolve())
            state = PartialState()
            with state.main_process_first():
                for part in load_gguf(path, dtype) if state.is_main_process else ():
                    part.save_pretrained(name)
            say(f"{path.name}, unpacked, is saved in {name}: the model under the adapters.")
        config = AutoConfig.from_pretrained(name)
        quantized = getattr(config, "quantization_config", None)
        if quantized and recipe.method in WHOLE and quantization_kind(quantized) != "foam_int8":
            raise SystemExit(refusal(recipe.method, name, quantization_kind(quantized)))
        if quantized and recipe.method not in WHOLE:
            say(f"{name} is quantized already ({quantization_kind(quantized)}): the adapters go on it as it is.")
        tokenizer = AutoTokenizer.from_pretrained(name)
        # A saved INT8 model is read as it is, but where it is kept is not in its config.
        quantization = None if quantized and not recipe.int8_offload else quantization_of(recipe.method, dtype, recipe)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            **({"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {}),
            # A weight is quantized where it will be, and exists only there.
            **({"device_map": {"": PartialState().device}} if recipe.method == "int8" else {}),
            **({"quantization_config": quantization} if quantization else {}),
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise SystemExit(
            f"Cannot load the model {name}: {one_line(error)} Without the hub, --model_name_or_path takes the folder "
            "of a saved model, a .gguf file, or smollm2-135m."
        ) from None
    for module in model.modules():
        # bitsandbytes 0.50 repacks 4-bit weights on a CPU when it evaluates, and then trains without their gradients.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def quantization_of(method: str, dtype: torch.dtype, recipe: InstructArguments | None = None):
    """`from_pretrained`'s quantization_config, or None; ``recipe`` has the options of INT8 weights."""
    if method == "int8":
        recipe = recipe or InstructArguments()
        return Int8Config(head=recipe.int8_head, offload="cpu" if recipe.int8_offload else None)
    if method == "lora8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if method == "qlora":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def quantization_kind(quantized) -> str:
    """The quant_method of a checkpoint's quantization_config, which is a mapping or an object."""
    kind = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
    return str(getattr(kind, "value", kind))


def refusal(method: str, name: str, kind: str) -> str:
    """Why a quantized checkpoint is not trained whole, and both ways that are."""
    return (
        f"--method {method}: {name} is quantized ({kind}), and its weights cannot be trained directly. What works: "
        "adapters on it (--method lora); or the unquantized model with --method int8, which trains every weight in "
        "INT8 (quantization_config=foam_hf.Int8Config())."
    )


def lora_config(recipe: InstructArguments):
    """PEFT's configuration of the adapters; None for full-parameter training."""
    if recipe.method in WHOLE:
        return None
    from peft import LoraConfig

    targets = recipe.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear":
        targets = [part.strip() for part in targets.split(",")]
    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def adapter_saving(model) -> str:
    """One line on how little an optimizer can save on adapters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw, foam = adamw_state_bytes(trained), expected_state_bytes(foam_param_groups(model))
    weights = total(storages(model.parameters()))
    return (
        f"Adapters: {sum(p.numel() for p in trained):,} trained weights. AdamW keeps {format_bytes(adamw)} of state "
        f"for them, FOAM {format_bytes(foam)} (short dimensions fold into one value a row): at most "
        f"{format_bytes(adamw - foam)} to save, beside {format_bytes(weights)} of weights."
    )
