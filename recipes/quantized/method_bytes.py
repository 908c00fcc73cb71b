"""Bytes of weights, gradients and optimizer state of each method, from shapes: makes the README's table.

python recipes/quantized/method_bytes.py --readme recipes/quantized/README.md

Models exist on the meta device only; nothing is downloaded or allocated. Without --readme the table is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from foam_hf import foam_param_groups
from foam_hf.int8.models import plan_int8
from foam_hf.memory import adamw_state_bytes, expected_state_bytes
from foam_hf.planner.meta_models import meta_model, with_adapters
from foam_hf.planner.model_configs import load_config
from foam_hf.planner.offload import offloaded
from foam_hf.recipe_kit import renew_page

START, END = "<!-- table: made by recipes/quantized/method_bytes.py -->", "<!-- end of table -->"
MODELS = {"Qwen2.5-0.5B": "qwen2.5-0.5b", "Qwen2.5-7B": "qwen2.5-7b", "LLaMA-3.1-8B": "llama-3.1-8b"}
RANK = 16
OFFLOAD = "int8, offloaded"
WHOLE = ("full", "int8", OFFLOAD)
LEAN = "FOAM, released"  # with gradient_release: one gradient at a time
# AdamW does not train INT8 weights, and those in host memory are trained with gradient_release alone.
OPTIMIZERS = {"full": ("AdamW", "FOAM", LEAN), "int8": ("FOAM", LEAN), OFFLOAD: (LEAN,)}
METHODS = {  # method -> how it is described
    "full": "every weight, bf16",
    "int8": "every weight, INT8",
    OFFLOAD: "every weight, INT8, in host memory",
    "lora": "adapters on bf16",
    "lora8bit": "adapters on 8 bits",
    "qlora": "adapters on 4 bits",
}


def quantized_bytes(weight: torch.Tensor, method: str) -> int:
    """What bitsandbytes keeps for one linear layer's weight, as chat_models.py asks for it."""
    count = weight.numel()
    if method == "lora8bit":
        return count + 4 * weight.shape[0]  # a code a weight, an fp32 scale a row
    blocks = -(-count // 64)
    scales = blocks + 4 * -(-blocks // 256)  # an 8-bit scale a block of 64, an fp32 scale for 256 of them
    return -(-count // 2) + scales + 4 * (16 + 256 + 1)  # both codes and the scales' mean


def with_method(model: nn.Module, method: str) -> nn.Module:
    """`model` with what the method trains: all of it, or adapters in the dtype that they are trained in."""
    if method in WHOLE:
        return model
    model = with_adapters(model, RANK)
    for p in model.parameters():
        if p.requires_grad:  # PEFT makes adapters fp32, TRL makes them bf16 again on quantized weights
            p.data = p.data.to(torch.float32 if method == "lora" else torch.bfloat16)
    return model


def count(model: nn.Module, method: str) -> dict[str, int]:
    """Bytes of weights (buffers too), gradients and each optimizer's state; of a model in bf16, which changes."""
    model = with_method(model, method)
    # The layers under adapters are those that are quantized.
    linear = {id(module.base_layer.weight) for module in model.modules() if hasattr(module, "base_layer")}
    weights = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    blocks = plan_int8(model).blocks if method in ("int8", OFFLOAD) else {}
    if method == OFFLOAD:
        found = offloaded(model, blocks)
        weights += found.slots - found.weights
    for name, p in model.named_parameters():
        if name in blocks:
            weights += p.numel() + 4 * p.numel() // blocks[name]  # a code a weight, an fp32 scale a block
        else:
            quantized = method in ("lora8bit", "qlora") and id(p) in linear
            weights += quantized_bytes(p, method) if quantized else p.numel() * p.element_size()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.numel() * p.element_size() for p in trained]
    counted = {
        "weights": weights,
        "gradients": sum(gradients),
        "AdamW": adamw_state_bytes(trained),
        "FOAM": expected_state_bytes(foam_param_groups(model)),
    }
    if method in WHOLE:
        counted[LEAN] = counted["FOAM"]
        counted["largest gradient"] = max(gradients)
    return counted


def cell(weights: int, gradients: int, state: int) -> str:
    parts = [weights, gradients, state]
    return " + ".join(f"{part / 1e9:.2f}" for part in parts) + f" = **{sum(parts) / 1e9:.2f}**"


def table() -> str:
    lines = [
        f"| method | | optimizer | {' | '.join(MODELS)} |",
        f"| --- | --- | --- |{' ---: |' * len(MODELS)}",
    ]
    for method, what in METHODS.items():
        counts = [count(meta_model(load_config(name), dtype=torch.bfloat16), method) for name in MODELS.values()]
        for optimizer in OPTIMIZERS.get(method, ("AdamW", "FOAM")):
            gradients = "largest gradient" if optimizer == LEAN else "gradients"
            cells = [cell(found["weights"], found[gradients], found[optimizer]) for found in counts]
            name = "`int8 --int8_offload true`" if method == OFFLOAD else f"`{method}`"
            lines.append(f"| {name} | {what} | {optimizer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, help="put the table between its marks in this file")
    options = parser.parse_args()
    text = table()
    if options.readme is None:
        print(text)
        return
    renew_page(options.readme, START, END, text)


if __name__ == "__main__":
    main()
