"""Bytes of optimizer state on well-known models, by foam_hf's own counting; makes the README's table and figure.

python docs/figures/state_bytes.py --readme README.md --figure docs/figures/state_bytes.png

Models exist on the meta device only: their shapes are written out below, and nothing is downloaded or allocated.
Without arguments the table is printed, and no file is touched.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foam_hf import foam_param_groups
from foam_hf.memory import adamw_state_bytes, expected_state_bytes, format_bytes
from foam_hf.recipe_kit import renew_page

START, END = "<!-- table: made by docs/figures/state_bytes.py -->", "<!-- end of table -->"
# Trainer's optim_args of the rows, as keyword arguments of foam_param_groups.
DEFAULT, PAPER = "**FOAM, the default**", "FOAM, the paper's setting (embeddings and heads plain)"
FOAM_ROWS: dict[str, dict[str, Any]] = {
    DEFAULT: {"level": 8},
    "FOAM, `state_dtype=bfloat16`": {"level": 8, "state_dtype": torch.bfloat16},
    "FOAM-Mini (`level=row`)": {"level": "row"},
    "FOAM, `level=2`": {"level": 2},
    PAPER: {"level": 8, "fold_embeddings": False, "fold_head": False},
}


def _roberta(hidden: int, layers: int, heads: int, intermediate: int) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=50265,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=514,
            type_vocab_size=1,
            num_labels=2,
        )
    )


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            tie_word_embeddings=True,
        )
    )


def _llama(hidden: int, layers: int, intermediate: int, *, tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=intermediate,
            tie_word_embeddings=tied,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "RoBERTa-base": lambda: _roberta(768, 12, 12, 3072),
    "RoBERTa-large": lambda: _roberta(1024, 24, 16, 4096),
    "Qwen2.5-0.5B": _qwen2,
    "LLaMA-3.2-1B": lambda: _llama(2048, 16, 8192, tied=True),
    "LLaMA-3.1-8B": lambda: _llama(4096, 32, 14336, tied=False),
}

IN_FIGURE = ("RoBERTa-base", "Qwen2.5-0.5B", "LLaMA-3.1-8B")


@dataclass(frozen=True)
class Counted:
    """One model: its trainable parameters, and bytes of state. `foam` and `unfolded` are by the names of FOAM_ROWS.

    Attributes:
        parameters: tied ones once.
        adamw_fp32: AdamW's state where weights are float32.
        adamw_bf16: the same where they are bfloat16: AdamW's moments have the dtype of the weights.
        foam: all of FOAM's state.
        unfolded: the part of `foam` in plain groups: norms, biases, classifiers, and what was asked to stay plain.
    """

    parameters: int
    adamw_fp32: int
    adamw_bf16: int
    foam: dict[str, int]
    unfolded: dict[str, int]


def count(model: nn.Module) -> Counted:
    """Count one model's state from shapes and dtypes alone; the model is cast to bfloat16."""
    fp32 = adamw_state_bytes(model.to(torch.float32).parameters())
    model = model.to(torch.bfloat16)  # FOAM's state has a dtype of its own, and does not change
    foam, unfolded = {}, {}
    for name, options in FOAM_ROWS.items():
        # The constructor's arguments hold for all groups, the groups' own for the folded ones.
        shared = {"state_dtype": options.get("state_dtype", torch.float32)}
        groups = [{**group, **shared} for group in foam_param_groups(model, **options)]
        foam[name] = expected_state_bytes(groups)
        unfolded[name] = expected_state_bytes(group for group in groups if group.get("level") == 0)
    return Counted(
        parameters=sum(p.numel() for p in model.parameters()),
        adamw_fp32=fp32,
        adamw_bf16=adamw_state_bytes(model.parameters()),
        foam=foam,
        unfolded=unfolded,
    )


def count_all() -> dict[str, Counted]:
    counted = {}
    for name, build in MODELS.items():
        with torch.device("meta"):
            counted[name] = count(build())
    return counted


def table(counted: dict[str, Counted]) -> str:
    """A markdown table: a row for each optimizer, a column for each model."""
    columns = list(counted.values())
    rows = [
        ["state of the optimizer", *counted],
        ["---", *["---:"] * len(columns)],
        ["*trainable parameters*", *(f"*{c.parameters / 1e6:,.0f} M*" for c in columns)],
        ["AdamW, fp32 weights", *(format_bytes(c.adamw_fp32) for c in columns)],
        ["AdamW, bf16 weights", *(format_bytes(c.adamw_bf16) for c in columns)],
    ]
    rows += [[name, *(format_bytes(c.foam[name]) for c in columns)] for name in FOAM_ROWS]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(counted: dict[str, Counted], path: Path) -> None:
    """Draw bytes of state for each trainable parameter; the table goes into the file's metadata."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    ink, light, dark, orange, blue = "#202124", "#c4c8cd", "#8d949c", "#e08a1e", "#1f6fb4"
    plt.rcParams.update({"font.size": 11.5, "text.color": ink, "axes.labelcolor": ink})
    # White, not transparent: the same on light and dark pages.
    figure, axes = plt.subplots(figsize=(8, 5), facecolor="white", layout="constrained")
    ticks: dict[float, str] = {}
    y = 0.0
    for name in IN_FIGURE:
        c = counted[name]
        axes.text(0, y, f"{name}, {c.parameters / 1e6:,.0f} M parameters", weight="bold", va="center")
        bars = [("AdamW, fp32 weights", c.adamw_fp32, 0, dark), ("AdamW, bf16 weights", c.adamw_bf16, 0, light)]
        for label, row in (("FOAM", DEFAULT), ("FOAM as in its paper", PAPER)):
            bars.append((label, c.foam[row], c.unfolded[row], blue))
        for label, size, unfolded, color in bars:
            y += 1
            ticks[y] = label
            width = size / c.parameters
            axes.barh(y, width, color=color, height=0.84)
            axes.barh(y, unfolded / c.parameters, color=orange, height=0.84)
            axes.text(width + 0.08, y, format_bytes(size), va="center", fontsize=10.5)
        y += 1.4
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(colors=ink, left=False)
    axes.set_ylim(y - 0.6, -0.7)
    axes.set_xlim(0, 9)
    axes.set_xlabel("bytes of optimizer state per trainable parameter")
    axes.spines[["top", "right", "left"]].set_visible(False)
    parts = [
        ("folded weights", blue),
        ("unfolded: norms, biases,\nclassifiers; in the paper's\nsetting embeddings, heads", orange),
    ]
    axes.legend(
        handles=[Patch(color=color, label=label) for label, color in parts],
        title="FOAM, level 8:",
        alignment="left",
        loc="upper right",
        bbox_to_anchor=(1, 0.53),  # beside the second model's short bars
        frameon=False,
        fontsize=10.5,
    )
    figure.savefig(path, dpi=150, metadata={"Description": table(counted), "Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, help="renew the table between the markers of this file")
    parser.add_argument("--figure", type=Path, help="draw the figure into this PNG (needs matplotlib)")
    arguments = parser.parse_args()
    counted = count_all()
    print(table(counted))
    if arguments.figure:
        draw(counted, arguments.figure)
    if arguments.readme:
        renew_page(arguments.readme, START, END, table(counted))


if __name__ == "__main__":
    main()
