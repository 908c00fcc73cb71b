"""The two pictures of full_or_lora.py: quality against the size of the data, and against peak bytes."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.benchmarks.quality.full_or_lora import Part, Value

SIZE_PICTURE, PEAK_PICTURE = "full_or_lora_size.png", "full_or_lora_peak.png"
INK, FAINT = "#202124", "#d9dce0"
# Arm: colour, mark, how its line is drawn, label. Every weight is blue with FOAM, grey with AdamW; LoRA is green with
# FOAM, orange with AdamW.
LOOKS = {
    "AdamW, fp32": ("#8d949c", "o", "-", "AdamW, all weights, fp32"),
    "FOAM, embeddings factored, bf16": ("#1f6fb4", "o", "-", "foam, all weights, bf16"),
    "FOAM, embeddings factored, INT8": ("#1f6fb4", "s", "--", "foam, all weights, INT8"),
    "FOAM, bf16": ("#8fbfe0", "o", "-.", "foam, embeddings by blocks, bf16"),
    "FOAM, INT8": ("#8fbfe0", "s", ":", "foam, embeddings by blocks, INT8"),
    "LoRA 16, AdamW": ("#e08a1e", "o", "-", "LoRA, rank 16"),
    "LoRA 128, AdamW": ("#b3541e", "o", "-", "LoRA, rank 128"),
    "QLoRA 16, AdamW": ("#e08a1e", "s", "--", "QLoRA, rank 16"),
    "LoRA 16, FOAM": ("#2a9d8f", "^", ":", "LoRA, rank 16, foam"),
    "LoRA 128, FOAM": ("#2a9d8f", "v", ":", "LoRA, rank 128, foam"),
}
TICKS = (0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 3, 4, 6, 8, 10, 15, 20)  # GiB
Point = tuple[float, float, float]  # size or bytes, mean, standard error


def amount(run: dict, part: Part, dataset: str) -> float:
    """Examples, each as often as it is trained on; or tokens."""
    train = run["data"]["train"]
    settings = {**part.study["settings"], **part.study["datasets"][dataset]["settings"]}
    return train.get("tokens", train["used"] * settings["num_train_epochs"])


def ceiling(part: Part, dataset: str, value: Value) -> float:
    """The untrained model's loss: what ends above it has diverged, and would squash the axis."""
    from recipes.benchmarks.quality.full_or_lora import loss

    untrained = part.before(dataset, "eval_loss") if value is loss else None
    return math.inf if untrained is None else untrained


def diverged(part: Part, datasets: list[str], value: Value) -> str:
    """What a panel says of the points that it leaves out."""
    words = []
    for arm, (*_, name) in LOOKS.items():
        for dataset in datasets:
            found = part.values(dataset, arm, value)
            if found and fmean(found) > ceiling(part, dataset, value):
                run = next(iter(part.runs[dataset, arm].values()))
                words.append(f"{name}, {counted(amount(run, part, dataset))}: {fmean(found):.2f}")
    return "\n".join(["diverged, not drawn:", *words]) if words else ""


def counted(size: float) -> str:
    return f"{size / 1e6:.0f} M tokens" if size >= 1e5 else f"{size:,.0f} examples"


def curve(part: Part, datasets: list[str], arm: str, value: Value) -> list[Point]:
    """A point for each size that an arm has run on and not diverged."""
    from recipes.benchmarks.quality.full_or_lora import error

    points = []
    for dataset in datasets:
        found = part.values(dataset, arm, value)
        if found and fmean(found) <= ceiling(part, dataset, value):
            run = next(iter(part.runs[dataset, arm].values()))
            points.append((amount(run, part, dataset), fmean(found), error(found) or 0.0))
    return points


def panels(parts: dict[str, Part]) -> list[tuple[str, str, Part, list[str], Value]]:
    """Title, label of the y axis, and where the points of each panel come from; those without runs are left out."""
    from recipes.benchmarks.quality.full_or_lora import APART, ARMS, TITLES, loss, match, sizes

    found = []
    for name, part in parts.items():
        datasets = [dataset for dataset in sizes(part, name) if dataset not in APART]
        title = TITLES[name].replace(", ", "\n") + ("" if name == "text" else "\nGSM8K")
        kinds = [("exact match, %", match), ("held-out loss", loss)] if name == "qwen" else [("held-out loss", loss)]
        for label, value in kinds:
            if any(part.values(dataset, arm, value) for dataset in datasets for arm in ARMS):
                found.append((title, label, part, datasets, value))
    return found


def draw(parts: dict[str, Part], folder: Path) -> list[Path]:
    """Write both pictures; none where nothing has run."""
    drawn = panels(parts)
    if not drawn:
        return []
    import matplotlib

    matplotlib.use("Agg")
    written = [_by_size(drawn, folder / SIZE_PICTURE)]
    with_peaks = [panel for panel in drawn if panel[2].memory]
    return written + ([_by_peak(with_peaks, folder / PEAK_PICTURE)] if with_peaks else [])


def _axes(count: int):
    from matplotlib import pyplot

    across, rows = min(count, 2), -(-count // 2)
    # White, not transparent: the same on light and dark pages.
    figure, axes = pyplot.subplots(
        rows, across, figsize=(4.2 * across, 3 * rows + 0.6), facecolor="white", squeeze=False
    )
    for one in axes.flat[count:]:
        one.remove()
    for one in axes.flat[:count]:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8, colors=INK)
        one.grid(axis="y", color=FAINT, linewidth=0.6)
        one.set_axisbelow(True)
    return figure, list(axes.flat[:count])


def _note(one, text: str) -> None:
    """In the upper right corner, where losses that fall leave room."""
    one.text(0.98, 0.98, text, transform=one.transAxes, ha="right", va="top", fontsize=7, color=INK)


def _save(figure, path: Path, marks: dict[str, object]) -> Path:
    """With a legend of all marks below the panels."""
    from matplotlib import pyplot

    names = [look[-1] for look in LOOKS.values() if look[-1] in marks]
    figure.legend([marks[name] for name in names], names, loc="lower center", ncols=4, fontsize=7.5, frameon=False)
    figure.tight_layout(rect=(0, 0.26 * -(-len(names) // 4) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=160, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _by_size(drawn, path: Path) -> Path:
    figure, axes = _axes(len(drawn))
    seen: dict[str, object] = {}
    for one, (title, label, part, datasets, value) in zip(axes, drawn, strict=True):
        for arm, (colour, mark, line, name) in LOOKS.items():
            points = curve(part, datasets, arm, value)
            if points:
                x, y, bars = zip(*points, strict=True)
                look = {"color": colour, "marker": mark, "linestyle": line, "markersize": 4, "capsize": 2}
                seen[name] = one.errorbar(x, y, yerr=bars, linewidth=1.4, elinewidth=0.9, **look)
        one.set_xscale("log")
        ticks = sorted({x for arm in LOOKS for x, _, _ in curve(part, datasets, arm, value)})
        one.set_xticks(ticks, [f"{x / 1e6:.0f} M" if x >= 1e5 else f"{x:,.0f}" for x in ticks])
        one.minorticks_off()
        one.set_xlabel("tokens" if ticks[-1] >= 1e5 else "examples trained on", fontsize=8, color=INK)
        one.set_ylabel(label, fontsize=8, color=INK)
        one.set_title(title, fontsize=9, color=INK)
        _note(one, diverged(part, datasets, value))
    return _save(figure, path, seen)


def _by_peak(drawn, path: Path) -> Path:
    """Each arm at the largest size of the data that most arms have run on, against its peak one example at a time."""
    figure, axes = _axes(len(drawn))
    seen: dict[str, object] = {}
    for one, (title, label, part, datasets, value) in zip(axes, drawn, strict=True):
        counts = {name: sum(bool(part.values(name, arm, value)) for arm in part.memory) for name in datasets}
        dataset = max(datasets, key=lambda name: (counts[name], datasets.index(name)))
        amounts = 0.0
        for arm, run in part.memory.items():
            found = curve(part, [dataset], arm, value)
            if not found or not run["peak_bytes"]:
                continue
            colour, mark, _, name = LOOKS[arm]
            x, (amounts, y, bar) = run["peak_bytes"]["total"] / 2**30, found[0]
            look = {"color": colour, "marker": mark, "markersize": 6, "capsize": 2, "linestyle": "none"}
            seen[name] = one.errorbar([x], [y], yerr=[bar], **look)
        one.set_xscale("log")
        one.set_xlabel("peak, GiB, one example at a time", fontsize=8, color=INK)
        one.set_ylabel(label, fontsize=8, color=INK)
        one.set_title(f"{title}, {counted(amounts)}", fontsize=9, color=INK)
        _note(one, diverged(part, [dataset], value))
        one.margins(0.12)
        low, high = one.get_xlim()
        ticks = [x for x in TICKS if low <= x <= high]
        one.set_xticks(ticks, [f"{x:g}" for x in ticks])
        one.minorticks_off()
    return _save(figure, path, seen)
