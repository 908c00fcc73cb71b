"""The tables and the picture of memory_peak.py's results. Sizes are in GiB, 2**30 bytes, as on the label of a card."""

from pathlib import Path

from recipes.benchmarks.common.report_parts import heading, not_measured, number, table

MEMORY_PICTURE = "memory_peak.png"
GIB = 2**30
# Beginning of a case's name: what its table is about.
SECTIONS = {
    "8b-": "An 8 B model on a 12 GB card",
    "7b-": "7 B in bf16",
    "ladder-": "The ladder: bytes a parameter",
    "glue-": "RoBERTa-large at GLUE's shapes",
    "speed-": "Speed at 2,048 tokens",
    "speed4-": "Speed at four times 2,048 tokens",
}


def gib(value: float | None) -> str:
    return number(value and value / GIB)


def _held(row: dict) -> list[int]:
    """Bytes of weights, gradients and state between backward pass and step."""
    return [row[f"{part}_bytes"] for part in ("weights", "gradients", "state")]


def _title(prefix: str, row: dict) -> str:
    size = f"{row['parameters'] / 1e9:.2f} G parameters, " if row["status"] == "ok" else ""
    return f"**{SECTIONS[prefix]}**: {row['model']}, {size}{row['batch']} x {row['sequence']} tokens a step"


def _line(row: dict) -> list[str]:
    parts = [size / row["parameters"] for size in _held(row)]
    return [
        row["label"],
        *(number(part) for part in parts),
        number(sum(parts)),
        gib(row["loading_peak_bytes"]),
        gib(row["peak_bytes"]),
        gib(row["peak_reserved_bytes"]),
        number(row["tokens_per_s"], ".0f"),
    ]


def memory_tables(content: dict) -> str:
    header = ["run", "weights B/param", "gradients", "state", "sum", "peak GiB while loading", "peak GiB"]
    header += ["reserved GiB", "tokens a second"]
    parts = [heading(content)]
    for prefix in SECTIONS:
        rows = [row for row in content["rows"] if row["case"].startswith(prefix)]
        good = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: -sum(_held(row)))
        if rows:
            measured = table(header, [_line(row) for row in good]) if good else ""
            parts += [_title(prefix, (good or rows)[0]), measured, not_measured(rows)]
    return "\n\n".join(part for part in [*parts, targets(content)] if part)


def targets(content: dict) -> str:
    """Each target that these results can judge, with what was measured."""
    found = {row["case"]: row for row in content["rows"] if row["status"] == "ok" and row["model"] != "tiny"}
    lines = []

    def judge(what: str, limit: str, value: str, met: bool) -> None:
        lines.append([what, limit, value, "yes" if met else "no"])

    for name in ("8b-int8-release", "8b-int8-release-liger", "8b-int8-loaded"):
        row = found.get(name)
        if row and row["peak_bytes"]:
            what = f"{row['model']}, {row['label']}: peak, loading included, GiB; no more could be allocated"
            judge(
                what, f"<= {gib(row['limit_bytes'])}", gib(row["peak_bytes"]), row["peak_bytes"] <= row["limit_bytes"]
            )
    row = found.get("7b-bf16-release")
    if row and row["peak_bytes"]:
        above = row["peak_bytes"] - row["weights_bytes"]
        judge(f"{row['model']}, {row['label']}: peak above the weights, GiB", "<= 2", gib(above), above <= 2 * GIB)
    for prefix in ("speed", "speed4"):
        row, base = found.get(f"{prefix}-int8-release"), found.get(f"{prefix}-adamw")
        if row and base and row["tokens_per_s"] and base["tokens_per_s"]:
            ratio = row["tokens_per_s"] / base["tokens_per_s"]
            what = f"{row['model']}, {row['label']}: tokens a second / those of {base['label']}"
            what += f", {row['batch']} sequences a step" if row["batch"] > 1 else ""
            judge(what, ">= 0.85", number(ratio), ratio >= 0.85)
    return table(["target", "limit", "measured", "met"], lines) if lines else ""


def pictured(content: dict) -> list[dict]:
    """The rows of the picture: the ladder from the top, where peaks were measured."""
    ladder = [row for row in content["rows"] if row["case"].startswith("ladder-") and row["status"] == "ok"]
    return sorted((row for row in ladder if row["peak_bytes"] is not None), key=lambda row: -sum(_held(row)))


def memory_picture(contents: list[dict], path: Path) -> bool:
    """Draw what the ladder's peaks are made of; False where no results have it."""
    content = next((c for c in contents if c["benchmark"] == "memory_peak" and pictured(c)), None)
    if content is None:
        return False
    from matplotlib.figure import Figure

    rows = pictured(content)
    figure = Figure(figsize=(9, 0.6 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    run = f"{rows[0]['parameters'] / 1e9:.2f} G parameters, {rows[0]['batch']} x {rows[0]['sequence']} tokens"
    axes.set_title(f"{rows[0]['model']}, {run}, {content['machine']['name']}", fontsize=10)
    labels = [row["label"] for row in rows]
    left = [0.0] * len(rows)
    for part, color in (("weights", "C0"), ("gradients", "C1"), ("state", "C3")):
        sizes = [row[f"{part}_bytes"] / GIB for row in rows]
        axes.barh(labels, sizes, left=left, color=color, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    rest = [max(0.0, row["peak_bytes"] / GIB - start) for row, start in zip(rows, left, strict=True)]
    axes.barh(labels, rest, left=left, color="0.8", label="the rest of the peak: activations, one gradient")
    for i, row in enumerate(rows):
        end = (left[i] + rest[i], i)
        axes.annotate(gib(row["peak_bytes"]), end, (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("GiB at the peak of training")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True
