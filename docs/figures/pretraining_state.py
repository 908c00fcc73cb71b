"""Bytes of optimizer state for pretraining LLaMA models of 60 M to 13 B parameters, as the memory planner counts them.

python docs/figures/pretraining_state.py --figure docs/figures/pretraining_state.png

Shapes and settings are those of the GaLore, APOLLO and FOAM papers: weights, gradients and moments are bfloat16, the
paper's FOAM has blocks of 4 weights and a plain embedding and head, GaLore and APOLLO rank hidden size / 4; 8-bit Adam
keeps the moments of the embedding in float32, as Trainer has it. FOAM and FOAM-Muon are the defaults
of this package, with float32 state. Nothing is downloaded or allocated. Without --figure the numbers are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from foam_hf.memory import format_bytes
from foam_hf.optimizer.groups import layer_names
from foam_hf.planner.counting import count_state
from foam_hf.planner.meta_models import meta_model
from foam_hf.planner.model_configs import load_config

MODELS = ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-3b", "llama-7b", "llama-13b")
# Label -> Trainer's optim and optim_args; "muon" and "adam_mini" are not Trainer's.
OPTIMIZERS = {
    "AdamW": ("adamw_torch", ""),
    "8-bit Adam": ("adamw_8bit", ""),
    "Adam-mini": ("adam_mini", ""),
    "Muon": ("muon", ""),
    "GaLore": ("galore_adamw", "rank={quarter}"),
    "APOLLO": ("apollo_adamw", "rank={quarter}"),
    "FOAM, paper": ("foam", "level=2,state_dtype=bfloat16,fold_embeddings=false,fold_head=false"),
    "FOAM": ("foam", ""),
    "FOAM-Muon": ("foam_muon", ""),
}
# One model -> label -> (bytes of state, how many of them are those of the embedding, the LM head and norms).
Counts = dict[str, tuple[int, int]]


def count(name: str) -> Counts:
    """Count one model's state from shapes and dtypes alone."""
    model: Any = meta_model(load_config(name))
    quarter = model.config.hidden_size // 4
    chosen = {label: (optim, args.format(quarter=quarter)) for label, (optim, args) in OPTIMIZERS.items()}
    whole = {label: count_state(model, *choice) for label, choice in chosen.items()}
    inside = layer_names(model)
    for parameter_name, p in model.named_parameters():
        p.requires_grad_(parameter_name not in inside)
    return {label: (whole[label], count_state(model, *choice)) for label, choice in chosen.items()}


def table(counted: dict[str, Counts]) -> str:
    """A line for each optimizer, a column for each model."""
    rows = [["", *counted]]
    rows += [[label, *(format_bytes(counts[label][0]) for counts in counted.values())] for label in OPTIMIZERS]
    return "\n".join("".join(cell.ljust(12) for cell in row).rstrip() for row in rows)


def draw(counted: dict[str, Counts], path: Path) -> None:
    """Draw a panel for each model; the table goes into the file's metadata."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    ink, light, grey, pale, orange = "#202124", "#d5d9de", "#8d949c", "#f6d3a3", "#e08a1e"
    plt.rcParams.update({"font.size": 6.5, "text.color": ink, "axes.labelcolor": ink})
    # As wide as a column of a paper; white, not transparent: the same on light and dark pages.
    figure, axes = plt.subplots(4, 2, figsize=(3.5, 5.2), facecolor="white", layout="constrained", sharey=True)
    for panel, (name, counts) in zip(axes.flat, counted.items(), strict=False):
        unit, unit_name = (1e9, "GB") if counts["AdamW"][0] >= 1e9 else (1e6, "MB")
        for y, (label, (size, rest)) in enumerate(counts.items()):
            ours = label.startswith("FOAM")
            panel.barh(y, rest / unit, color=pale if ours else light, height=0.76)
            panel.barh(y, (size - rest) / unit, left=rest / unit, color=orange if ours else grey, height=0.76)
            digits = 2 if size < 10 * unit and unit == 1e9 else 1 if unit == 1e9 else 0
            panel.text(size / unit, y, f" {size / unit:.{digits}f}", va="center", fontsize=6)
        panel.set_title(f"{name.replace('llama-', 'LLaMA ').replace('m', ' M').replace('b', ' B')}, {unit_name}")
        panel.title.set(fontsize=6.5, weight="bold")
        panel.set_yticks(range(len(counts)), list(counts))
        panel.set_ylim(len(counts) - 0.5, -0.5)
        panel.set_xlim(0, 1.17 * counts["AdamW"][0] / unit)
        panel.set_xticks([])
        panel.tick_params(colors=ink, length=0, pad=2)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    legend = axes.flat[-1]
    legend.axis("off")
    parts = [(orange, "FOAM: weights of the layers"), (pale, "FOAM: embedding, head, norms")]
    parts += [(grey, "others: weights of the layers"), (light, "others: embedding, head, norms")]
    handles = [Patch(color=color, label=label) for color, label in parts]
    legend.legend(handles=handles, loc="center", frameon=False, fontsize=6.5, handlelength=1, borderpad=0)
    figure.savefig(path, dpi=300, metadata={"Description": table(counted), "Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="draw the figure into this PNG (needs matplotlib)")
    arguments = parser.parse_args()
    counted = {name: count(name) for name in MODELS}
    print(table(counted))
    if arguments.figure:
        draw(counted, arguments.figure)


if __name__ == "__main__":
    main()
