"""What every report of the benchmarks is made of: Markdown tables, a line on the machine, labels in a picture."""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def heading(content: dict) -> str:
    """The machine of a results JSON, its software, and the days on which the rows were measured."""
    machine = content["machine"]
    software = [
        f"{name} {machine[name]}" for name in ("torch", "triton", "transformers", "driver") if machine.get(name)
    ]
    copy = f"; a large copy moves {machine['copy_GBps']:.0f} GB/s, read and written" if "copy_GBps" in machine else ""
    days = sorted({row.get("date", machine["date"]) for row in content["rows"]} or {machine["date"]})
    return f"{machine['name']}, {', '.join(software)}, {' to '.join(dict.fromkeys([days[0], days[-1]]))}{copy}."


def sharded_table(rows: list[dict]) -> str:
    """A table for each model of sharded_speed.py; scaling is a row's tokens a second over those of one GPU."""
    header = ["engine and optimizer", "GPUs", "optimizer ms", "ms a step", "tokens a second", "x one GPU"]
    header += ["state GB a GPU", "peak GB a GPU"]
    parts = []
    for (model, layers, sequence, batch), same in split(rows, "model", "layers", "sequence", "batch").items():
        good = [row for row in same if row["status"] == "ok"]
        tokens = {(row["case"], row["gpus"]): row["tokens_per_s"] for row in good}
        lines = []
        for row in sorted(good, key=lambda row: (row["label"], row["gpus"])):
            one, peak = tokens.get((row["case"], 1)), row["peak_bytes_per_gpu"]
            lines.append(
                [
                    row["label"],
                    str(row["gpus"]),
                    number(row["optimizer_ms"], ".3f"),
                    number(row["ms"], ".1f"),
                    number(row["tokens_per_s"], ".0f"),
                    number(one and row["tokens_per_s"] / one),
                    number(row["state_bytes_per_gpu"] / 1e9),
                    number(peak and peak / 1e9),
                ]
            )
        shape = f"**{model}, {layers} layers, {batch} x {sequence} tokens a step on each GPU**"
        size = f", {good[0]['parameters'] / 1e9:.2f} G parameters" if good else ""
        failed = [{**row, "label": f"{row['label']}, {row['gpus']} GPUs"} for row in same if row["status"] != "ok"]
        parts += [shape + size, *([table(header, lines)] if lines else []), not_measured(failed)]
    return "\n\n".join(part for part in parts if part)


def int8_table(rows: list[dict]) -> str:
    """A row a case of int8_speed.py."""
    header = ["what", "case", "ms", "x its floor", "ms, new gradients", "host ms", "temporary B/param"]
    lines = []
    for row in rows:
        numbers = [
            number(row.get("ms"), ".3f"),
            number(row.get("floor_ratio")),
            *(number(row.get(name), ".3f") for name in ("ms_moved_gradients", "host_ms", "temporary_bytes_per_param")),
        ]
        lines.append([row["what"], row["case"], *(numbers if row["status"] == "ok" else [row["status"], *[""] * 4])])
    return table(header, lines)


def not_measured(rows: list[dict]) -> str:
    """The rows without numbers, and why: nothing that was tried is left out."""
    lines = [f"* {row['label']}: {row['status']}. {row['reason']}" for row in rows if row["status"] != "ok"]
    return "\n".join(lines)


def split(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def label_points(axes, points: list[tuple[float, float]], labels: list[str]) -> None:
    """Write each label on the first side of its point where it covers no point and no label."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(points)]
    for point, text in zip(points, labels, strict=True):
        for x, y in ((7, -3), (-7, -3), (0, 7), (0, -13), (7, 6), (7, -13), (-7, 6), (-7, -13)):
            side = {0: "center", 7: "left", -7: "right"}[x]
            label = axes.annotate(text, point, (x, y), textcoords="offset points", fontsize=7, ha=side)
            box = label.get_window_extent()
            if not box.count_overlaps(taken) and axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1):
                break
            label.remove()
        else:
            label = axes.annotate(text, point, (7, -3), textcoords="offset points", fontsize=7)
        taken.append(label.get_window_extent())
