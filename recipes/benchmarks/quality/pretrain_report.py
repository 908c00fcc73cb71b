"""The table of recipes/pretrain/README.md and two pictures, from the JSON of pretrain_gpu.py.

python -m recipes.benchmarks.quality.pretrain_report recipes/pretrain/results/*.json \\
    --readme recipes/pretrain/README.md
"""

import argparse
import json
import math
import os
import statistics
from pathlib import Path

from foam_hf.memory import format_bytes
from foam_hf.recipe_kit import renew_page
from recipes.benchmarks.common.report_parts import label_points, table

START, END = "<!-- tables: made by recipes/benchmarks/quality/pretrain_report.py -->", "<!-- end of tables -->"
NONE = "Not measured yet."
PICTURES = {"tokens": "perplexity_tokens", "state": "perplexity_state"}
OURS = ("#e08a1e", "#b8620c", "#f0b05c", "#8a4a08", "#d96b4a", "#a83c28", "#f28f6b", "#c9a227")
PEERS = ("#1f3b63", "#2a7f7f", "#7f97b8", "#777777", "#5aa9a9", "#44546a", "#a9b8cc", "#999966")


class Arm:
    """The runs of one optimizer on one model: all its rates, and the best of them, a mean over seeds."""

    def __init__(self, name: str, runs: list[dict]) -> None:
        self.name, self.runs = name, runs
        self.by_rate: dict[float, list[float | None]] = {}
        for run in runs:
            self.by_rate.setdefault(run["learning_rate"], []).append(run["perplexity"])
        means = {rate: statistics.fmean(values) for rate, values in self.by_rate.items() if None not in values}
        self.rate = min(means, key=means.get) if means else None
        self.perplexity = means.get(self.rate)
        self.best = [run for run in runs if run["learning_rate"] == self.rate]
        self.state, self.layers = runs[0]["optimizer_state_bytes"], runs[0]["layers_state_bytes"]

    def score(self, rate: float) -> str:
        values = self.by_rate[rate]
        if None in values:
            return "diverged"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread}"

    def curve(self) -> list[tuple[int, float]]:
        """(tokens, mean loss) of the best rate, where all seeds have a finite one."""
        points = zip(*(run["curve"] for run in self.best), strict=True)
        return [
            (seeds[0]["tokens"], statistics.fmean(seed["eval_loss"] for seed in seeds))
            for seeds in points
            if all(seed["eval_loss"] is not None for seed in seeds)
        ]


def arms(content: dict, model: str) -> list[Arm]:
    """Best first, those without a finite run last."""
    found: dict[str, list[dict]] = {}
    for run in content["runs"]:
        if run["model"] == model:
            found.setdefault(run["arm"], []).append(run)
    return sorted(
        (Arm(name, runs) for name, runs in found.items()), key=lambda arm: (arm.perplexity is None, arm.perplexity)
    )


def devices(found: list[Arm]) -> str:
    return ", ".join(sorted({run["device"] for arm in found for run in arm.runs}))


def models(content: dict) -> list[str]:
    return list(dict.fromkeys(run["model"] for run in content["runs"]))


def model_table(content: dict, model: str) -> str:
    header = ["optimizer", "perplexity", "learning rate", "at other rates"]
    header += ["state", "of AdamW's", "of it the layers'", "of AdamW's"]
    found = arms(content, model)
    adamw = next((arm for arm in found if arm.name == "AdamW"), None)

    def share(part: int, whole: int | None) -> str:
        return f"{100 * part / whole:.3g}%" if whole else ""

    lines = [
        [
            arm.name,
            "diverged" if arm.rate is None else arm.score(arm.rate),
            "" if arm.rate is None else f"{arm.rate:g}",
            "; ".join(f"{arm.score(rate)} ({rate:g})" for rate in sorted(arm.by_rate) if rate != arm.rate),
            format_bytes(arm.state),
            share(arm.state, adamw and adamw.state),
            format_bytes(arm.layers),
            share(arm.layers, adamw and adamw.layers),
        ]
        for arm in found
    ]
    parameters = next(run["parameters"] for run in content["runs"] if run["model"] == model)
    tokens = sorted({run["tokens"] for run in content["runs"] if run["model"] == model})
    counts = content["data"]["counts"]
    seeds = len({run["seed"] for run in content["runs"] if run["model"] == model})
    title = (
        f"**{model}**, {parameters / 1e6:.1f} M parameters, {' and '.join(f'{n / 1e6:.1f}' for n in tokens)} M "
        f"tokens a run, {seeds} seed{'s' * (seeds != 1)}, on {devices(found)}; "
        f"{counts['train']['tokens'] / 1e6:.1f} M tokens of text, {content['data']['tokenizer']}; "
        "perplexity on held-out documents:"
    )
    return f"{title}\n\n{table(header, lines)}"


def verdicts(content: dict, model: str) -> str:
    """What FOAM is meant to reach, as far as these runs can tell, whichever way it went."""
    found = {arm.name: arm for arm in arms(content, model) if arm.perplexity is not None}
    lines = []

    def add(what: str, names: tuple[str, str], value, limit: str, met) -> None:
        if all(name in found for name in names):
            one, other = (found[name] for name in names)
            lines.append([what, limit, f"{value(one, other):.3f}", "yes" if met(one, other) else "no"])

    def ratio(one: Arm, other: Arm) -> float:
        return one.perplexity / other.perplexity

    def layers(one: Arm, other: Arm) -> float:
        return one.layers / other.layers

    def whole(one: Arm, other: Arm) -> float:
        return one.state / other.state

    for peer in ("AdamW", "GaLore"):
        names = ("FOAM, level 2", peer)
        add(f"perplexity of FOAM, level 2 / of {peer}", names, ratio, "1", lambda a, b: ratio(a, b) <= 1)
    names = ("FOAM-Mini", "AdamW")
    add("the layers' state, FOAM-Mini / AdamW", names, layers, "0.01", lambda a, b: layers(a, b) < 0.01)
    names = ("FOAM-Muon", "AdamW")  # the name's default: embeddings and head fold too
    add("perplexity of FOAM-Muon / of AdamW", names, ratio, "1", lambda a, b: ratio(a, b) <= 1)
    add("the whole state, FOAM-Muon / AdamW", names, whole, "0.01", lambda a, b: whole(a, b) <= 0.01)
    names = ("FOAM-Muon, level 2", "Muon")
    add("perplexity of FOAM-Muon, level 2 / of Muon", names, ratio, "1.01", lambda a, b: ratio(a, b) <= 1.01)
    add("the layers' state, FOAM-Muon / Muon", names, layers, "0.26", lambda a, b: layers(a, b) <= 0.26)
    return table(["target", "at most", "measured", "met"], lines) if lines else ""


def section(content: dict, folder: str) -> str:
    """All that stands between the markers; `folder` is that of the pictures, as the README sees it."""
    if not content["runs"]:
        return NONE
    parts = []
    for model in models(content):
        parts += [model_table(content, model), verdicts(content, model)]
        parts += [f"![{_alt(kind)}, {model}]({folder}/{name}-{model}.png)" for kind, name in PICTURES.items()]
    failed = [f"{run['model']}, {run['arm']}, lr {run['learning_rate']:g}" for run in content["failed"]]
    parts.append(f"Failed: {'; '.join(failed)}." if failed else "")
    left = content["unfinished"]
    parts.append(f"{left} run{'s' * (left != 1)} of the study {'are' if left != 1 else 'is'} missing." if left else "")
    return "\n\n".join(part for part in parts if part)


def _alt(kind: str) -> str:
    return {"tokens": "Perplexity against tokens", "state": "Perplexity against bytes of optimizer state"}[kind]


def draw(content: dict, folder: Path) -> list[Path]:
    """Two pictures a model: perplexity against tokens, and against bytes of state."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    drawn = []
    for model in models(content):
        found = [arm for arm in arms(content, model) if arm.perplexity is not None]
        colors = {True: iter(OURS * len(found)), False: iter(PEERS * len(found))}
        shades = {arm.name: next(colors[arm.name.startswith("FOAM")]) for arm in found}
        for kind, name in PICTURES.items():
            figure = Figure(figsize=(8, 5), facecolor="white", layout="constrained")
            axes = figure.subplots()
            axes.set(ylabel="perplexity on held-out documents", yscale="log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
            axes.grid(True, which="both", alpha=0.2)
            axes.set_title(f"{model}, {devices(found)}" if found else model, fontsize=10)
            if kind == "tokens":
                axes.set(xlabel="million tokens")
                for arm in found:
                    foam = arm.name.startswith("FOAM")
                    curve = [(tokens / 1e6, math.exp(loss)) for tokens, loss in arm.curve()]
                    axes.plot(
                        *zip(*curve, strict=True),
                        "-" if foam else "--",
                        marker=".",
                        color=shades[arm.name],
                        label=f"{arm.name}: {arm.perplexity:.1f}",
                    )
                # The first evaluations are far above all that tells the arms apart.
                tail = [math.exp(loss) for arm in found for _, loss in arm.curve()[1:]]
                if tail:
                    axes.set_ylim(min(tail) * 0.97, max(tail) * 1.03)
                figure.legend(loc="outside right upper", fontsize=7, frameon=False)
            else:
                axes.set(xlabel="MB of optimizer state", xscale="log")
                axes.xaxis.set_major_formatter(ScalarFormatter())
                points = [(arm.state / 1e6, arm.perplexity) for arm in found]
                # Over several powers of ten there is no room for labels between them.
                wide = points and max(points)[0] > 10 * min(points)[0]
                axes.xaxis.set_minor_formatter(NullFormatter() if wide else ScalarFormatter())
                for arm, point in zip(found, points, strict=True):
                    axes.plot(*point, "o", color=shades[arm.name])
                axes.margins(x=0.2, y=0.15)
                label_points(axes, points, [arm.name for arm in found])
            path = folder / f"{name}-{model}.png"
            figure.savefig(path, dpi=130, metadata={"Software": None})
            drawn.append(path)
    return drawn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("results", nargs="*", type=Path, help="the JSON of each study; none: not measured yet")
    parser.add_argument("--readme", type=Path, help="replace what is between its markers; else print it")
    options = parser.parse_args(argv)
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    beside = options.readme.parent if options.readme else Path(".")
    folders = [Path(os.path.relpath(path.parent, beside)).as_posix() for path in options.results]
    texts = [section(content, folder) for content, folder in zip(contents, folders, strict=True)]
    text = "\n\n".join(texts) or NONE
    if options.readme is None:
        print(text)
        return
    renew_page(options.readme, START, END, text)
    drawn = [path for content, at in zip(contents, options.results, strict=True) for path in draw(content, at.parent)]
    print(", ".join(map(str, [options.readme, *drawn])))


if __name__ == "__main__":
    main()
