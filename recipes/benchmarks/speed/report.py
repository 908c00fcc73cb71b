"""The tables of README.md and the picture, from results/*.json; `--check` only says if they agree."""

import argparse
import json
import sys
from pathlib import Path

from foam_hf.recipe_kit import put_between
from recipes.benchmarks.common.folders import BENCHMARKS, RESULTS
from recipes.benchmarks.common.report_parts import (
    heading,
    int8_table,
    label_points,
    not_measured,
    number,
    sharded_table,
    split,
    table,
)
from recipes.benchmarks.memory.memory_report import MEMORY_PICTURE, memory_picture, memory_tables
from recipes.benchmarks.memory.memory_report import pictured as pictured_memory
from recipes.benchmarks.memory.offload_report import offload_tables

START, END = "<!-- results: made by report.py from results/*.json -->", "<!-- end of results -->"
NONE = "*Not yet measured: no JSON in results/.*"
PICTURE = "step_speed.png"
KNOWN = ("step_speed", "training_speed", "memory_peak", "offload_peak", "cpu_step", "sharded_speed", "int8_speed")

# What a step must reach: shapes, dtype, optimizer, a field of its row or the optimizer to divide by, limit.
BUDGET = [
    ("llama-7b", "bf16", "foam-nearest", "floor_ratio", 1.05),
    ("llama-7b", "bf16", "foam", "foam-nearest", 1.05),
    ("llama-7b", "bf16", "foam-2-nearest", "floor_ratio", 1.05),
    ("llama-7b", "bf16", "foam-factored", "foam", 1.10),
    ("llama-7b", "bf16", "foam", "temporary_bytes_per_param", 0.001),
    ("llama-7b", "bf16", "foam", "first_step_s", 10),
    ("roberta-base", "fp32", "foam", "floor_ratio", 1.15),
    ("roberta-base", "fp32", "foam", "adamw-fused", 1 / 3.5),
]
SAID = {
    "floor_ratio": "ms / its floor",
    "temporary_bytes_per_param": "temporary bytes a parameter",
    "first_step_s": "seconds of the first step, caches empty",
}


def step_tables(content: dict) -> str:
    header = ["optimizer", "ms a step", "x its floor", "x FOAM", "ms, new gradients", "host ms", "state B/param"]
    header += ["temporary B/param", "first step s (cached)"]
    parts = [heading(content)]
    for (shapes, dtype), rows in split(content["rows"], "shapes", "dtype").items():
        good = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["ms"])
        foam = next((row["ms"] for row in good if row["optimizer"] == "foam"), None)
        lines = [
            [
                row["label"],
                number(row["ms"], ".3f"),
                number(row["floor_ratio"]),
                number(foam and row["ms"] / foam),
                number(row["ms_moved_gradients"], ".3f"),
                number(row["host_ms"]),
                number(row["state_bytes_per_param"], ".3f"),
                number(row["temporary_bytes_per_param"], ".3f"),
                number(row["first_step_s"])
                + (f" ({row['first_step_cached_s']:.2f})" if row.get("first_step_cached_s") else ""),
            ]
            for row in good
        ]
        size = f", {good[0]['parameters'] / 1e6:.1f} M parameters" if good else ""
        parts += [f"**{shapes}, {dtype}**{size}", *([table(header, lines)] if lines else []), not_measured(rows)]
    return "\n\n".join(part for part in parts if part)


def budget(content: dict) -> str:
    """Each limit that this run can judge, with what was measured."""
    found = {(row["shapes"], row["dtype"], row["optimizer"]): row for row in content["rows"] if row["status"] == "ok"}
    lines = []
    for shapes, dtype, name, base, limit in BUDGET:
        row, other = found.get((shapes, dtype, name)), found.get((shapes, dtype, base))
        if row is None or (other is None and row.get(base) is None):
            continue
        value = row["ms"] / other["ms"] if other else row[base]
        what = f"ms / ms of {other['label']}" if other else SAID[base]
        verdict = "yes" if value <= limit else "no"
        lines.append([f"{shapes} {dtype}, {row['label']}: {what}", f"{limit:.3g}", f"{value:.3f}", verdict])
    return table(["budget", "at most", "measured", "met"], lines) if lines else ""


def training_tables(content: dict) -> str:
    header = ["optimizer", "tokens a second", "ms a step", "of it the optimizer", "state GB", "peak GB"]
    parts = [heading(content)]
    for (model, sequence, batch), rows in split(content["rows"], "model", "sequence", "batch").items():
        good = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: -row["tokens_per_s"])
        lines = [
            [
                row["label"],
                f"{row['tokens_per_s']:.0f}",
                number(row["ms"], ".1f"),
                f"{100 * row['optimizer_share']:.1f}%",
                number(row["state_bytes"] / 1e9),
                number(row["peak_bytes"] and row["peak_bytes"] / 1e9),
            ]
            for row in good
        ]
        title = f"**{model}, sequences of {sequence} tokens, {batch} a batch**"
        size = f", {good[0]['parameters'] / 1e9:.2f} G parameters" if good else ""
        parts += [title + size, *([table(header, lines)] if lines else []), not_measured(rows)]
    return "\n\n".join(part for part in parts if part)


def cpu_tables(content: dict) -> str:
    """Least and median of each optimizer, and the least of FOAM's against that of each."""
    parts = [heading(content)]
    for (shapes,), rows in split(content["rows"], "shapes").items():
        foam = next((row["ms_least"] for row in rows if row["optimizer"] == "foam"), None)
        lines = [
            [row["label"], *(number(row[name], ".0f") for name in ("ms_least", "ms"))]
            + [number(foam and row["ms_least"] / foam), str(row["rounds"])]
            for row in sorted(rows, key=lambda row: row["ms_least"])
        ]
        header = ["optimizer", "least ms", "median ms", "least x FOAM's", "rounds"]
        parts += [f"**{shapes}, fp32**", table(header, lines)]
    return "\n\n".join(parts)


def read(folder: Path) -> list[dict]:
    """The results of a folder, by file name; other files there are not ours."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [content for content in contents if content.get("benchmark") in KNOWN]


def section(contents: list[dict]) -> str:
    """All that stands between the markers of README.md."""
    parts = []
    steps = [content for content in contents if content["benchmark"] == "step_speed"]
    processors = [content for content in contents if content["benchmark"] == "cpu_step"]
    trainings = [content for content in contents if content["benchmark"] == "training_speed"]
    if any(pictured(content) for content in steps):
        parts.append(f"![Milliseconds a step against bytes of state a parameter](results/{PICTURE})")
    for content in steps:
        parts += ["### One step", step_tables(content), budget(content)]
    for content in processors:
        parts += ["### One step on a CPU", cpu_tables(content)]
    for content in trainings:
        parts += ["### Whole training steps", training_tables(content)]
    for content in (content for content in contents if content["benchmark"] == "sharded_speed"):
        parts += ["### Several GPUs", heading(content), sharded_table(content["rows"])]
    for content in (content for content in contents if content["benchmark"] == "int8_speed"):
        parts += ["### Kernels of INT8 weights", heading(content), int8_table(content["rows"])]
    memory = [content for content in contents if content["benchmark"] == "memory_peak"]
    for content in memory:
        shown = f"![What the peak of training holds, by optimizer](results/{MEMORY_PICTURE})"
        parts += ["### Peak memory", shown if pictured_memory(content) else "", memory_tables(content)]
    for content in (content for content in contents if content["benchmark"] == "offload_peak"):
        parts += ["### INT8 weights in host memory", offload_tables(content)]
    return "\n\n".join(part for part in parts if part) or NONE


def pictured(content: dict) -> list[dict]:
    """The rows of the picture: one set of shapes, without FOAM's variants that would lie on another's point."""
    rows = [row for row in content["rows"] if (row["shapes"], row["dtype"]) == ("llama-7b", "bf16")]
    return [row for row in rows if row["status"] == "ok" and not row["optimizer"].endswith(("-nearest", "-ignore"))]


def picture(contents: list[dict], path: Path) -> bool:
    """Draw ms a step against state of the LLaMA-7B shapes; False where no results have them."""
    content = next((c for c in contents if c["benchmark"] == "step_speed" and pictured(c)), None)
    if content is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="bytes of state a parameter", ylabel="milliseconds a step")
    axes.set_title(f"LLaMA-7B shapes, bf16, 1.62 G parameters, {content['machine']['name']}", fontsize=10)
    axes.grid(True, which="both", alpha=0.2)
    # Next to nothing (APOLLO-Mini) stays on a logarithmic axis.
    points = [(max(row["state_bytes_per_param"], 1e-3), row["ms"]) for row in pictured(content)]
    for row, point in zip(pictured(content), points, strict=True):
        axes.plot(*point, "o", color="C3" if row["optimizer"].startswith("foam") else "C0")
    axes.margins(x=0.15, y=0.12)
    label_points(axes, points, [row["label"] for row in pictured(content)])
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True


def renewed(readme: str, text: str) -> str:
    """`readme` with `text` between its marks."""
    return put_between(readme, START, END, f"\n{text}\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files, and the picture")
    parser.add_argument("--readme", type=Path, default=BENCHMARKS / "README.md")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if the README's tables are others"
    )
    options = parser.parse_args(argv)
    contents = read(options.results)
    old = options.readme.read_text(encoding="utf-8")
    new = renewed(old, section(contents))
    if options.check:
        sys.exit(f"{options.readme} differs from {options.results}: run this without --check" if new != old else 0)
    options.readme.write_text(new, encoding="utf-8")
    drawn = [
        str(options.results / name)
        for name, draw in ((PICTURE, picture), (MEMORY_PICTURE, memory_picture))
        if draw(contents, options.results / name)
    ]
    files = ", ".join([str(options.readme), *drawn])
    print(f"{files}, from {len(contents)} JSON file{'s' * (len(contents) != 1)} in {options.results}")


if __name__ == "__main__":
    main()
