"""How alike FOAM's updates are to AdamW's: cosine similarities on AdamW's own trajectory, by weight, level and rule.

AdamW trains the model; beside it, every variant keeps its own state of the chosen weights and computes, from the same
gradients, the update it would make. Nothing but AdamW moves the weights.

    python -m recipes.benchmarks.quality.update_similarity --model path/to/MiniLM --data path/to/glue \\
        --json minilm.json
    python -m recipes.benchmarks.quality.update_similarity --json pydoc.json  # tiny_language.py, from scratch
    python -m recipes.benchmarks.quality.update_similarity --picture similarity.png minilm.json pydoc.json
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from foam_hf.optimizer.groups import layer_names
from foam_hf.recipe_kit import write_json
from recipes.benchmarks.quality import tiny_language
from recipes.benchmarks.quality.candidates import Candidate, adam_update

LEVELS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, "row"]
RULES = ("block", "factored")
EXTRAS = {  # at level 8, what the candidates change
    "factored, residual x 0.25": {"second_moment": "factored", "residual_scale": 0.25},
    "factored, residual x 0.5": {"second_moment": "factored", "residual_scale": 0.5},
    "factored, residual by agreement": {"second_moment": "factored", "agreement": 1},
    "factored, no first moment": {"second_moment": "factored", "first_moment_level": "none"},
    "factored, two-way first moment": {"second_moment": "factored", "two_way": True},
    "block, residual x 0.25": {"residual_scale": 0.25},
    "block, residual outside bias correction": {"residual_in_correction": False},
}


def variants(levels: list, extras: bool = True) -> dict[str, dict]:
    """Name -> arguments of `Candidate`."""
    found = {
        f"{rule}, level {level}{'' if residual else ', no residual'}": {
            "level": level,
            "second_moment": rule,
            "residual_scale": residual,
        }
        for rule in RULES
        for level in levels
        for residual in (1.0, 0.0)
    }
    return found | ({name: {"level": 8, **given} for name, given in EXTRAS.items()} if extras else {})


class Shadow:
    """One variant's state of the watched weights."""

    def __init__(self, weights: dict[str, Tensor], options: dict):
        copies = {name: p.detach().clone() for name, p in weights.items()}  # their values are never used
        self.optimizer = Candidate(list(copies.values()), **options)
        self.copies, self.group = copies, self.optimizer.param_groups[0]

    @torch.no_grad()
    def take(self, gradients: dict[str, Tensor], wanted: bool) -> dict[str, Tensor]:
        """Advance the state; where they are `wanted`, the updates that it would subtract, else nothing."""
        found = {}
        for name, p in self.copies.items():
            state = self.optimizer.state[p]
            state["step"] = state.get("step", 0) + 1
            if self.group["level"] == 0 and self.group["second_moment"] == "block":
                found[name] = adam_update(gradients[name], state, self.group)
            elif wanted:
                found[name] = self.optimizer.folded_update(gradients[name], state, self.group)
            else:
                self.optimizer.advance(gradients[name], state, self.group)
        return found


def similarities(model: nn.Module, loss_of, watched: list[str], named: dict[str, dict], options) -> dict:
    """variant -> weight -> cosine at every measured step. `loss_of(step)` is the training loss of a batch."""
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name] for name in watched}
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    reference = Shadow(weights, {"level": 0})
    shadows = {name: Shadow(weights, given) for name, given in named.items()}
    found: dict = {name: {weight: [] for weight in watched} for name in named}
    losses = []
    for step in range(options.steps):
        for group in optimizer.param_groups:  # warm-up over the first tenth
            group["lr"] = options.lr * min(1.0, (step + 1) / max(1, options.steps // 10))
        loss = loss_of(step)
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        gradients = {name: p.grad for name, p in weights.items()}
        measured = (step + 1) % options.every == 0
        adamw = reference.take(gradients, measured)
        for name, shadow in shadows.items():
            updates = shadow.take(gradients, measured)
            for weight, update in updates.items() if measured else ():
                cosine = nn.functional.cosine_similarity(update.flatten(), adamw[weight].flatten(), dim=0)
                found[name][weight].append(round(cosine.item(), 4))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if measured:
            print(f"step {step + 1}, loss {loss.item():.4f}", flush=True)
    return {"cosines": found, "losses": [round(loss, 4) for loss in losses]}


def minilm(options) -> tuple:
    """A classifier on one GLUE task, in training mode: model, loss of a step, what to watch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from recipes.glue.data import load_splits

    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, dtype=torch.float32).train()
    rows = load_splits(options.task, options.data, several=True)["train"]
    generator = torch.Generator().manual_seed(options.seed)

    def loss_of(step: int) -> Tensor:
        picked = [rows[i] for i in torch.randint(len(rows), (options.batch,), generator=generator).tolist()]
        pairs = [row["text_pair"] for row in picked] if picked[0]["text_pair"] is not None else None
        batch = tokenizer([row["text"] for row in picked], pairs, padding=True, truncation=True, return_tensors="pt")
        return model(**batch, labels=torch.tensor([row["label"] for row in picked])).loss

    return model, loss_of


def pydoc(options) -> tuple:
    """tiny_language.py's model, wider, from random weights."""
    torch.manual_seed(options.seed)
    settings = {**tiny_language.DEFAULTS, "hidden_size": options.width, "intermediate_size": 2 * options.width}
    model, (text, _) = tiny_language.build_model(settings), tiny_language.corpus()
    source = tiny_language.batches(text, options.seed, options.batch, settings["sequence"])

    def loss_of(step: int) -> Tensor:
        batch = next(source)
        return model(input_ids=batch, labels=batch).loss

    return model, loss_of


def watched_weights(model: nn.Module, layers: list[int] | None) -> list[str]:
    """Names of the folded matrices, of some layers only if `layers` is given."""
    names = sorted(layer_names(model), key=list(dict(model.named_parameters())).index)
    names = [name for name in names if dict(model.named_parameters())[name].dim() == 2]
    if layers is not None:
        names = [name for name in names if (found := re.search(r"\.(\d+)\.", name)) and int(found[1]) in layers]
    if not names:
        raise SystemExit(f"--layers {layers}: no folded matrix there; expected numbers of the model's layers")
    return names


def measure(options) -> dict:
    model, loss_of = (minilm if options.model else pydoc)(options)
    layers = [int(number) for number in options.layers.split(",")] if options.layers else None
    watched = watched_weights(model, layers)
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if name in watched}
    found = similarities(model, loss_of, watched, variants(LEVELS), options)
    what = "all-MiniLM-L6-v2" if options.model else f"LLaMA-shaped, width {options.width}, from scratch"
    settings = {name: getattr(options, name) for name in ("steps", "every", "batch", "lr", "seed")}
    title = f"{what}, {options.task}" if options.model else what
    return {"subject": title, **settings, "shapes": shapes, "torch": torch.__version__, **found}


def late(values: list[float]) -> float:
    """The mean over the second half of the measured steps: at the first, the first moment is the gradient itself."""
    return statistics.fmean(values[len(values) // 2 :])


def by_level(content: dict, rule: str, residual: bool) -> list[float]:
    """Mean over the weights, one number a level."""
    names = [f"{rule}, level {level}{'' if residual else ', no residual'}" for level in LEVELS]
    return [statistics.fmean(late(values) for values in content["cosines"][name].values()) for name in names]


def kind_of(weight: str) -> str:
    """A weight's layer and place in it: bert.encoder.layer.3.attention.self.query.weight -> 3 query."""
    parts = weight.removesuffix(".weight").split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    layer, inside = (parts[places[-1]], parts[places[-1] + 1 :]) if places else ("", parts)
    return f"{layer} {'.'.join(inside[-3:]) if inside[-1] == 'dense' else inside[-1]}".strip()


def markdown(content: dict) -> str:
    """Levels down, rules across; then the candidates at level 8."""
    lines = ["| level | block | block, no residual | factored | factored, no residual |", "|---|---:|---:|---:|---:|"]
    columns = [by_level(content, rule, residual) for rule in RULES for residual in (True, False)]
    lines += [
        f"| {level} | {' | '.join(f'{column[i]:.2f}' for column in columns)} |" for i, level in enumerate(LEVELS)
    ]
    lines += ["", "| at level 8 | cosine |", "|---|---:|"]
    means = {name: statistics.fmean(map(late, content["cosines"][name].values())) for name in EXTRAS}
    lines += [f"| {name} | {mean:.2f} |" for name, mean in means.items()]
    return "\n".join(lines)


def picture(contents: list[dict], path: Path) -> None:
    """A row for each subject: cosine by level and rule, then by weight and level for the paper's rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(contents), 2, figsize=(13, 4.6 * len(contents)), squeeze=False)
    for (left, right), content in zip(axes, contents, strict=True):
        for rule, color in zip(RULES, ("tab:blue", "tab:orange"), strict=True):
            for residual, style in ((True, "o-"), (False, "s--")):
                label = rule if residual else f"{rule}, no residual"
                left.plot(range(len(LEVELS)), by_level(content, rule, residual), style, color=color, label=label)
        left.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
        left.set_xticks(range(len(LEVELS)), LEVELS)
        left.set_ylim(0, 1)
        left.set_xlabel("level")
        left.set_ylabel("cosine with AdamW's update")
        left.set_title(f"{content['subject']}: mean over weights", fontsize=10)
        left.legend(fontsize=8)
        weights = list(content["shapes"])
        grid = [[late(content["cosines"][f"block, level {level}"][w]) for level in LEVELS] for w in weights]
        image = right.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        labels = [kind_of(weight) for weight in weights]
        right.set_yticks(range(len(weights)), labels, fontsize=7)
        right.set_xticks(range(len(LEVELS)), LEVELS)
        right.set_xlabel("level")
        right.set_title("block rule with residual, by layer and weight", fontsize=10)
        figure.colorbar(image, ax=right)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("results", nargs="*", type=Path, help="JSON files to draw or to print as tables")
    parser.add_argument("--picture", type=Path, help="draw the results into this file")
    parser.add_argument("--json", type=Path, help="measure, and write this file")
    parser.add_argument("--model", help="folder of an encoder (default: tiny_language.py's model)")
    parser.add_argument("--data", help="folder of the GLUE tasks")
    parser.add_argument("--task", default="cola")
    parser.add_argument("--layers", help="watch the weights of these layers only, as 0,5")
    parser.add_argument("--width", type=int, default=256, help="of the model from scratch")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between measurements")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    if options.json:
        if options.steps < options.every:
            parser.error(f"--steps {options.steps} is less than --every {options.every}: nothing would be measured")
        if options.model and not options.data:
            parser.error("--model needs --data, the folder of the GLUE tasks")
        write_json(options.json, measure(options))
        return
    if not options.results:
        parser.error("expected --json FILE to measure, or result files")
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    if options.picture:
        picture(contents, options.picture)
    for content in contents:
        print(f"{content['subject']}\n\n{markdown(content)}\n")


if __name__ == "__main__":
    main()
