"""Shows memory plans: as a table, as JSON, and as a picture."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foam_hf.display import INK, KIND_COLORS, format_bytes
from foam_hf.planner.plan import Plan

_KINDS = ("weights", "masters", "gradients", "state", "buffers", "activations")
_ONLY_IF_SHARED: dict[str, Callable[[Plan], Any]] = {
    "masters": lambda plan: plan.zero,
    "buffers": lambda plan: plan.zero or plan.fsdp2,
}
_RED = "#c5221f"


@dataclass(frozen=True)
class Row:
    """A plan and whether it fits a card.

    Attributes:
        plan: of one optimizer.
        fits: whether the peak is within the card's bytes; None without a card.
        largest_batch: the most sequences with which the plan fits; 0 if one is too many; None without a card.
    """

    plan: Plan
    fits: bool | None = None
    largest_batch: int | None = None


def kinds_of(rows: Sequence[Row]) -> list[str]:
    """The kinds of memory that a table of `rows` shows."""
    return [kind for kind in _KINDS if any(_ONLY_IF_SHARED.get(kind, bool)(row.plan) for row in rows)]


def print_table(rows: Sequence[Row], *, gpu: int | None = None) -> None:
    """Print `rows` as a table, in their order and at full width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("optimizer", no_wrap=True)
    kinds, host = kinds_of(rows), any(row.plan.host for row in rows)
    for column in (*kinds, "total", *(["host memory"] if host else [])):
        table.add_column(column, justify="right", no_wrap=True)
    if gpu is not None:
        table.add_column(f"fits\n{_short(gpu)}", justify="right", no_wrap=True)
        table.add_column("largest\nbatch", justify="right", no_wrap=True)
    for row in rows:
        cells = [row.plan.label, *(format_bytes(getattr(row.plan, kind)) for kind in kinds)]
        cells.append(f"[bold]{format_bytes(row.plan.total)}[/bold]")
        cells += [format_bytes(row.plan.host)] if host else []
        if gpu is not None:
            cells += ["[green]yes[/green]" if row.fits else "[red]no[/red]", str(row.largest_batch or "none")]
        table.add_row(*cells)
    # At full width on narrow terminals too: rich would cut off numbers.
    Console(highlight=False, width=Console(width=1000).measure(table).maximum).print(table)


def to_json(rows: Sequence[Row], **about: Any) -> str:
    """A JSON object: `about`, and "plans", a list of objects with a plan's fields, total, fits and largest_batch."""
    plans = [
        {**asdict(row.plan), "total": row.plan.total, "fits": row.fits, "largest_batch": row.largest_batch}
        for row in rows
    ]
    return json.dumps({**about, "plans": plans}, indent=2)


def draw(rows: Sequence[Row], path: Path, *, title: str, subtitle: str, gpu: int | None = None) -> None:
    """Draw `rows` as stacked bars, as wide as a column of a paper, into `path`; its suffix is the file format.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: matplotlib cannot write this kind of file.
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    largest = max([row.plan.total for row in rows] + [gpu or 0])
    unit, name = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    with plt.rc_context({"font.size": 7.5, "text.color": INK, "axes.labelcolor": INK}):
        # White, not transparent: the same on light and dark pages.
        figure, axes = plt.subplots(figsize=(3.5, 1.25 + 0.32 * len(rows)), facecolor="white", layout="constrained")
        for y, row in enumerate(rows):
            left = 0.0
            for kind in kinds_of(rows):
                width = getattr(row.plan, kind) / unit
                axes.barh(y, width, left=left, height=0.44, color=KIND_COLORS[kind], label=kind if y == 0 else None)
                left += width
            label = axes.text(0, y - 0.27, row.plan.label, va="bottom", zorder=3)
            size = axes.text(left + 0.012 * largest / unit, y, format_bytes(row.plan.total), va="center", zorder=3)
            for text in (label, size):  # a white background over the line of the card
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.6, -0.85 if gpu is None else -1.25)
        axes.set_xlim(0, 1.2 * largest / unit)
        axes.set_xlabel(f"{name} at the peak of a step")
        axes.tick_params(colors=INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if gpu is not None:
            axes.vlines(gpu / unit, -0.85, len(rows) - 0.6, color=_RED, linewidth=1, linestyle=(0, (4, 2)), zorder=2)
            axes.text(gpu / unit, -0.9, f"{_short(gpu)} card", ha="center", va="bottom", color=_RED)
        figure.suptitle(
            "\n".join(textwrap.fill(line, 56) for line in (title, subtitle)), x=0.02, ha="left", fontsize=8
        )
        figure.legend(
            loc="outside lower center",
            ncols=min(4, len(kinds_of(rows))),
            frameon=False,
            handlelength=1,
            columnspacing=1.5,
        )
        figure.savefig(path, dpi=300)
        plt.close(figure)


def _short(n: int) -> str:
    """`24 GB` where format_bytes has 24.00 GB."""
    return format_bytes(n).replace(".00", "")
