"""Pages and pictures of the study of every weight against adapters, from its JSON; what has not run is said.

python -m recipes.benchmarks.quality.full_or_lora          # renews full_or_lora.md, docs/choosing.md and both pictures
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from foam_hf.recipe_kit import renew_page
from recipes.benchmarks.common.folders import RESULTS, ROOT
from recipes.benchmarks.quality import continued
from recipes.benchmarks.quality.table import _table

PAGE = Path(__file__).with_name("full_or_lora.md")
CHOOSING = ROOT / "docs" / "choosing.md"
MARKS = "<!-- {}: made by full_or_lora.py -->", "<!-- end of {} -->"
TITLES = {
    "qwen": "Qwen2.5-Coder-0.5B-Instruct",
    "smollm2": "SmolLM2-135M-Instruct",
    "text": "SmolLM2-135M-Instruct, Debian's documentation",
}
SIZES = {
    **dict.fromkeys(("qwen", "smollm2"), ("gsm8k_16th", "gsm8k_4th", "gsm8k", "gsm8k_x3", "alpaca")),
    "text": ("text_2m", "text_8m", "text_32m"),
}
SHORT = {
    "AdamW, fp32": "AdamW, all weights, fp32",
    continued.FACTORED: "`foam`, all weights, bf16",
    "FOAM, embeddings factored, INT8": "`foam`, all weights, INT8",
    "FOAM, bf16": "`foam`, embeddings by blocks, bf16",
    "FOAM, INT8": "`foam`, embeddings by blocks, INT8",
    continued.PLAIN: "`foam`, embeddings plain, bf16",
    "LoRA 16, AdamW": "LoRA, rank 16, AdamW",
    "LoRA 128, AdamW": "LoRA, rank 128, AdamW",
    "QLoRA 16, AdamW": "QLoRA, rank 16, AdamW",
    "LoRA 16, FOAM": "LoRA, rank 16, `foam`",
    "LoRA 128, FOAM": "LoRA, rank 128, `foam`",
}
APART = ("gsm8k_x3", "alpaca")  # no larger size of the data before them: more passes, and other pairs
ARMS = tuple(SHORT)
CORE = ("AdamW, fp32", continued.FACTORED, "LoRA 16, AdamW", "LoRA 128, AdamW")  # what every comparison needs
Value = Callable[[dict], float | None]


@dataclass
class Part:
    """All that was measured by one plan, of however many JSON files."""

    runs: dict[tuple[str, str], dict[int, dict]] = field(default_factory=dict)  # data set and arm -> seed -> run
    untrained: dict[str, dict] = field(default_factory=dict)  # data set -> scores
    alone: dict[str, dict] = field(default_factory=dict)  # arm -> run
    memory: dict[str, dict] = field(default_factory=dict)
    chosen: dict[tuple[str, str], float] = field(default_factory=dict)  # data set and arm -> learning rate
    tried: dict[tuple[str, str], set[float]] = field(default_factory=dict)  # likewise, all that were searched
    study: dict = field(default_factory=dict)

    def add(self, content: dict) -> None:
        """Take in a file. Raises ValueError where it has another plan than one before it, or the same run again."""
        plan = {name: value for name, value in content["study"].items() if name != "arms"}  # these may have joined
        if {**self.study, **plan} != {**plan, **self.study}:
            raise ValueError("two files have plans that differ in more than arms; expected one plan")
        self.study = content["study"]
        for run in content["runs"]:
            known = self.runs.setdefault((run["dataset"], run["arm"]), {})
            if known.setdefault(run["seed"], run) != run:
                raise ValueError(
                    f"{run['dataset']}, {run['arm']}: two files have seed {run['seed']}; expected it once"
                )
            if run["before"]:
                self.untrained[run["dataset"]] = run["before"]
        self.alone |= {run["arm"]: run for run in content["alone"]}
        self.memory |= {run["arm"]: run for run in content.get("memory", [])}
        for run in content["search"]:
            self.tried.setdefault((run["dataset"], run["arm"]), set()).add(run["learning_rate"])
        self.chosen |= {(one["dataset"], one["arm"]): one["learning_rate"] for one in content["chosen"]}

    def check_rates(self) -> None:
        """Raise ValueError where runs of one arm and data set are at several learning rates, or not at the chosen."""
        for key, runs in self.runs.items():
            rates = {run["learning_rate"] for run in runs.values()} | {self.chosen.get(key)} - {None}
            if len(rates) > 1:
                raise ValueError(
                    f"{', '.join(key)}: got learning rates {sorted(rates)}; expected the chosen one alone"
                )

    def values(self, dataset: str, arm: str, value: Value) -> list[float]:
        """One number a seed; a run that diverged has none."""
        found = [value(run) for _, run in sorted(self.runs.get((dataset, arm), {}).items())]
        return [number for number in found if number is not None]

    def diverged(self, dataset: str, arm: str) -> int:
        """How many seeds ended without a loss."""
        return sum(loss(run) is None for run in self.runs.get((dataset, arm), {}).values())

    def cell(self, dataset: str, arm: str, value: Value, digits: int) -> str:
        """What a table says of these seeds."""
        wanted = self.seeds(dataset)
        return shown(self.values(dataset, arm, value), wanted, digits, self.diverged(dataset, arm))

    def before(self, dataset: str, name: str) -> float | None:
        """A score of the untrained model, which only one of the data sets with the same held-out examples has."""
        same = self.study["datasets"][dataset]["file"]
        found = [self.untrained[name] for name in self.untrained if self.study["datasets"][name]["file"] == same]
        return found[0].get(name) if found else None

    def datasets(self) -> set[str]:
        return {dataset for dataset, _ in self.runs}

    def seeds(self, dataset: str) -> int:
        return len(self.study["seeds"][: self.study["datasets"][dataset].get("seeds")])


def read(folder: Path = RESULTS) -> dict[str, Part]:
    """The plans that have results, by name."""
    parts: dict[str, Part] = {}
    for path in sorted(folder.glob("full_or_lora_*.json")):
        name = path.stem.split("_")[3]
        parts.setdefault(name, Part()).add(json.loads(path.read_text(encoding="utf-8")))
    continued.join(parts, folder)
    for part in parts.values():
        part.check_rates()
    return {name: parts[name] for name in TITLES if name in parts}


def loss(run: dict) -> float | None:
    return run["after"]["eval_loss"]


def match(run: dict) -> float | None:
    """In percent."""
    found = run["after"].get("exact_match")
    return None if found is None else 100 * found


def other(run: dict) -> float | None:
    return run["after"].get("other_loss")


def error(values: list[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def shown(values: list[float], wanted: int, digits: int, diverged: int) -> str:
    """Mean and standard error, and how many seeds there are where some are missing or have diverged."""
    if not values:
        return f"{diverged} of {wanted} seeds diverged" if diverged else "not run"
    text = f"{fmean(values):.{digits}f}"
    text += "" if len(values) == 1 else f" ± {error(values):.{digits}f}"
    text += "" if len(values) == wanted else f", {len(values)} of {wanted} seeds"
    return f"{text}, {diverged} diverged" if diverged else text


def size(part: Part, dataset: str) -> str:
    """What a data set is, from the runs: examples and passes over them, or tokens."""
    run = next((run for (name, _), runs in part.runs.items() if name == dataset for run in runs.values()), None)
    if run is None:
        return dataset
    train = run["data"]["train"]
    if "tokens" in train:
        return f"{train['tokens'] / 1e6:.0f} M tokens"
    settings = {**part.study["settings"], **part.study["datasets"][dataset]["settings"]}
    passes = int(settings["num_train_epochs"])
    kind = "Alpaca pairs" if dataset == "alpaca" else "of GSM8K"
    return f"{train['used']:,} {kind}" + (f", {passes} times" if passes > 1 else "")


def sizes(part: Part, name: str) -> list[str]:
    """The data sets of a plan that have runs, smallest first."""
    return [dataset for dataset in SIZES[name] if dataset in part.datasets()]


def quality(part: Part, name: str, value: Value, score: str, digits: int) -> str:
    """A row an arm, a column a size of the data; empty where no run has this score."""
    columns = [dataset for dataset in sizes(part, name) if any(part.values(dataset, arm, value) for arm in ARMS)]
    if score == "exact_match":  # a few runs of SmolLM2 have it, before its plan left it out
        columns = [name for name in columns if part.study["datasets"][name]["settings"].get("eval_exact_match")]
    if not columns:
        return ""
    rows = [["", *(size(part, dataset) for dataset in columns)]]
    untrained = [part.before(dataset, score) for dataset in columns]
    percent = 100 if score == "exact_match" else 1
    rows.append(["untrained", *("" if one is None else f"{percent * one:.{digits}f}" for one in untrained)])
    for arm in ran(part):
        rows.append([SHORT[arm], *(part.cell(dataset, arm, value, digits) for dataset in columns)])
    return _table(rows)


def ran(part: Part) -> list[str]:
    """The arms that have a run."""
    return [arm for arm in ARMS if any(key[1] == arm for key in part.runs)]


def missing(part: Part) -> str:
    """A sentence on the arms that have no run at all."""
    names = [SHORT[arm] for arm in ARMS if arm not in ran(part)]
    return f"Not run: {'; '.join(names)}." if names else ""


def gib(run: dict | None) -> float | None:
    peak = (run or {}).get("peak_bytes")
    return peak["total"] / 2**30 if peak else None


def number(value: float | None, form: str) -> str:
    return "not run" if value is None else format(value, form)


def cost(part: Part, name: str) -> str:
    """Bytes, speed, and seconds for all of the data at that speed; a column without a number is left out."""
    columns = [dataset for dataset in sizes(part, name) if dataset not in APART][-1:]
    rows = [["", "trained weights", "state, MB", "peak, GiB, one at a time", "peak, GiB", "tokens/s"]]
    rows[0] += [f"seconds, {size(part, dataset)}" for dataset in columns]
    target = goal(part, name)
    rows[0] += [] if target is None else [f"seconds to a loss of {target:.3f}"]
    for arm in ARMS:
        any_run = next((run for (_, of), runs in part.runs.items() if of == arm for run in runs.values()), None)
        run = part.memory.get(arm) or any_run
        if run is None:
            continue
        speed = part.alone.get(arm, {}).get("tokens_per_second")
        cells = [f"{run['trained_parameters'] / 1e6:.1f} M", f"{run['optimizer_state_bytes'] / 1e6:.1f}"]
        cells += [number(gib(part.memory.get(arm)), ".2f"), number(gib(part.alone.get(arm)), ".2f")]
        cells += [number(speed, ",.0f"), *(number(seconds(part, dataset, arm), ".0f") for dataset in columns)]
        cells += [] if target is None else [seconds_to(part, sizes(part, name), arm, target)]
        rows.append([SHORT[arm], *cells])
    some = [i for i in range(len(rows[0])) if any(row[i] != "not run" for row in rows[1:])]
    return _table([[row[i] for i in some] for row in rows]) if rows[1:] else ""


def goal(part: Part, name: str) -> float | None:
    """The loss that every core arm reaches on the largest size that all of them have run on, rounded up.

    None without such a size, or where all seeds of one of them have diverged on it.
    """
    losses = [part.values(dataset, arm, loss) for dataset in shared_sizes(part, name)[-1:] for arm in CORE]
    return math.ceil(1000 * max(map(fmean, losses))) / 1000 if losses and all(losses) else None


def shared_sizes(part: Part, name: str) -> list[str]:
    """The sizes of a plan's growing data on which all core arms have run, smallest first."""
    return [
        dataset
        for dataset in sizes(part, name)
        if dataset not in APART and all((dataset, arm) in part.runs for arm in CORE)
    ]


def seconds_to(part: Part, datasets: list[str], arm: str, target: float) -> str:
    """Of the smallest size of the growing data on which an arm ends at this loss or below."""
    took = {dataset: seconds(part, dataset, arm) for dataset in datasets if dataset not in APART}
    if not any(took.values()):
        return "not run"
    for dataset, found in took.items():
        losses = part.values(dataset, arm, loss)
        if losses and fmean(losses) <= target:
            return number(found, ".0f")
    return "not reached"


def seconds(part: Part, dataset: str, arm: str) -> float | None:
    """Of training alone on one GPU: a run's tokens over the arm's tokens a second."""
    tokens = part.values(dataset, arm, lambda run: run["trained_tokens"])
    speed = part.alone.get(arm, {}).get("tokens_per_second")
    return fmean(tokens) / speed if tokens and speed else None


def rates(part: Part) -> str:
    """The learning rates, with a word where none beyond was tried."""
    words = []
    for (dataset, arm), tried in sorted(part.tried.items()):
        if (dataset, arm) not in part.chosen or dataset not in part.datasets():
            continue
        if (rate := part.chosen[dataset, arm]) is None:
            words.append(f"{SHORT[arm]}, on {size(part, dataset)}: none, as all {len(tried)} tried diverged")
            continue
        edge = {max(tried): ", the highest tried", min(tried): ", the lowest tried"}.get(rate, "")
        words.append(f"{SHORT[arm]}, on {size(part, dataset)}: {rate:g}{edge}")
    return f"Learning rates: {'; '.join(words)}." if words else ""


def tables(parts: dict[str, Part]) -> str:
    """All tables of the study's own page."""
    blocks = []
    for name, part in parts.items():
        devices = sorted({run["device"] for runs in part.runs.values() for run in runs.values()})
        blocks.append(f"### {TITLES[name]}\n\nOn {', '.join(devices)}." if devices else f"### {TITLES[name]}")
        for title, text in (
            ("Exact match, percent of 500 questions", quality(part, name, match, "exact_match", 1)),
            ("Held-out loss", quality(part, name, loss, "eval_loss", 4)),
            ("Loss on text of the other kind: what was forgotten", quality(part, name, other, "other_loss", 4)),
            ("Cost", cost(part, name)),
        ):
            blocks += [f"**{title}**", text] if text else []
        blocks += [rates(part), missing(part)]
    return "\n\n".join(filter(None, blocks)) or "Not measured yet."


def answer(parts: dict[str, Part]) -> str:
    """The table of docs/choosing.md: the smallest and the largest size of each plan that all core arms have run on."""
    titles = ["peak, one example at a time"]
    columns: list[tuple[Part, str, Value, int]] = []
    for name, part in parts.items():
        common = shared_sizes(part, name)
        if not common:
            continue
        model = TITLES[name].split("-")[0].split(",")[0]
        small, large = (f"{model}, {size(part, dataset)}" for dataset in (common[0], common[-1]))
        found = [(f"{small}: loss", common[0], loss, 4)] if len(common) > 1 else []
        found += [(f"{large}: loss", common[-1], loss, 4)]
        found += [(f"{large}: exact match, %", common[-1], match, 1)] if name == "qwen" else []
        found += [(f"{large}: loss on other text", common[-1], other, 3)]
        titles += [title for title, *_ in found]
        columns += [(part, dataset, value, digits) for _, dataset, value, digits in found]
    if not columns:
        return "Not measured yet."
    first, rows = next(iter(parts.values())), [["", *titles]]
    for arm in ARMS:
        if any((dataset, arm) in part.runs for part, dataset, *_ in columns):
            numbers = [part.cell(dataset, arm, value, digits) for part, dataset, value, digits in columns]
            peak = gib(first.memory.get(arm))
            rows.append([SHORT[arm], number(peak, ".2f") + (" GiB" if peak else ""), *numbers])
    return _table(rows)


def main() -> None:
    from recipes.benchmarks.quality.full_or_lora_pictures import draw

    parts = read()
    renew_page(PAGE, *(mark.format("tables") for mark in MARKS), tables(parts))
    renew_page(CHOOSING, *(mark.format("full or lora") for mark in MARKS), answer(parts))
    draw(parts, RESULTS)


if __name__ == "__main__":
    main()
