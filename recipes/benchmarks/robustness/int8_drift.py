"""Do INT8 weights drift? 10,000 further steps of a small model, beside fp32 weights: loss, and where the weights are.

A model of the next symbol (embedding, three linear layers) is trained on a random source of order two, in fp32. From
there every variant takes the same further steps at a constant, lower learning rate. "fp32, other batches" is the
yardstick: what the order of the batches alone changes. Of a variant's weights w and fp32's v, |w|/|v| compares the
norms; (w.v)/(v.v) is 1 where w differs by noise alone, as stochastic rounding's must, and not by a drift along v.

    python -m recipes.benchmarks.robustness.int8_drift
    # does it run?
    python -m recipes.benchmarks.robustness.int8_drift --steps 200 --first-steps 100 --seeds 1 --results /tmp
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foam_hf import FOAM
from foam_hf.int8.weight import Int8Weight
from foam_hf.recipe_kit import write_json
from recipes.benchmarks.common.folders import RESULTS

SYMBOLS, CONTEXT, BATCH = 64, 8, 64
FIRST_LR, LR = 4e-3, 1e-4  # of the steps in fp32, and of the further ones
VARIANTS = {
    "fp32": {},
    "fp32, other batches": {},
    "int8": {},
    "int8, rounded to nearest": {"stochastic_rounding": False},
    "bf16": {},
}


class Source:
    """A random Markov source of order two, of rank 8: something that a small model can learn, but not at once."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        first, second, then = (torch.randn(SYMBOLS, 8, generator=generator) for _ in range(3))
        self.logits = (first[:, None] * second[None]) @ then.t()

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Contexts (count, CONTEXT) and the symbols that follow."""
        symbols = torch.randint(SYMBOLS, (count, CONTEXT + 1), generator=generator)
        for i in range(2, CONTEXT + 1):
            chances = self.logits[symbols[:, i - 2], symbols[:, i - 1]].softmax(-1)
            symbols[:, i] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return symbols[:, :-1], symbols[:, -1]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 32)
        self.layers = nn.ModuleList([nn.Linear(32 * CONTEXT, 128), nn.Linear(128, 128), nn.Linear(128, SYMBOLS)])

    def forward(self, contexts: Tensor) -> Tensor:
        first, second, head = self.layers
        return head(F.gelu(second(F.gelu(first(self.embedding(contexts).flatten(1))))))


def converted(model: Model, variant: str) -> Model:
    model = copy.deepcopy(model)
    for layer in model.layers:
        if variant.startswith("int8"):
            layer.weight = nn.Parameter(Int8Weight.from_float(layer.weight.detach()))
        elif variant.startswith("bf16"):
            layer.to(torch.bfloat16)
            layer.register_forward_pre_hook(lambda _, inputs: inputs[0].to(torch.bfloat16))
    return model


def plain(weight: Tensor) -> Tensor:
    return weight.detach().dequantize() if isinstance(weight, Int8Weight) else weight.detach().float().clone()


@torch.no_grad()
def loss(model: Model, held_out: tuple[Tensor, Tensor]) -> float:
    contexts, targets = held_out
    return F.cross_entropy(model(contexts).float(), targets).item()


def trained(model: Model, batches: list, steps: int, seed: int, held_out, every: int, lr: float, **options) -> list:
    """Step, loss and weights after each `every` steps over shuffled `batches`."""
    order = torch.Generator().manual_seed(seed)
    optimizer = FOAM(model.parameters(), lr=lr, level=3, weight_decay=0.01, seed=seed, **options)
    found = []
    for step in range(1, steps + 1):
        contexts, targets = batches[int(torch.randint(len(batches), (1,), generator=order))]
        optimizer.zero_grad()
        F.cross_entropy(model(contexts).float(), targets).backward()
        optimizer.step()
        if step % every == 0:
            found.append((step, loss(model, held_out), [plain(layer.weight) for layer in model.layers]))
    return found


def measure(seed: int, options) -> list[dict]:
    """A row for each variant."""
    torch.manual_seed(seed)
    source, draws = Source(seed), torch.Generator().manual_seed(seed + 1)
    batches = [source.draw(BATCH, draws) for _ in range(2000)]
    held_out = source.draw(8192, draws)
    start = Model()
    trained(start, batches, options.first_steps, seed, held_out, options.first_steps, FIRST_LR)
    rows, courses = [], {}
    for variant, settings in VARIANTS.items():
        began = time.monotonic()
        model = converted(start, variant)
        before, order = loss(model, held_out), seed + 100 * (variant == "fp32, other batches")
        every = max(1, options.steps // 20)
        courses[variant] = trained(model, batches, options.steps, order, held_out, every, LR, **settings)
        course = [
            {"step": step, "loss": value, "norm_ratios": ratios(w, v, False), "slopes": ratios(w, v, True)}
            for (step, value, w), (_, _, v) in zip(courses[variant], courses["fp32"], strict=True)
        ]
        rows.append({"seed": seed, "variant": variant, "start_loss": before, "course": course})
        said = f"{before:.4f} -> {course[-1]['loss']:.4f} ({time.monotonic() - began:.0f} s)"
        print(f"seed {seed}, {variant}: {said}", flush=True)
    return rows


def ratios(weights: list[Tensor], others: list[Tensor], along: bool) -> list[float]:
    """|w| / |v|, or (w.v) / (v.v), of each layer."""
    if along:
        return [((w * v).sum() / v.square().sum()).item() for w, v in zip(weights, others, strict=True)]
    return [(w.norm() / v.norm()).item() for w, v in zip(weights, others, strict=True)]


def summary(rows: list[dict]) -> list[dict]:
    """Each variant at the end, against fp32 of its seed: mean loss, and the worst of the ratios of any layer."""
    fp32 = {row["seed"]: row["course"][-1]["loss"] for row in rows if row["variant"] == "fp32"}
    found = []
    for variant in VARIANTS:
        ends = {row["seed"]: row["course"][-1] for row in rows if row["variant"] == variant}
        above = [end["loss"] - fp32[seed] for seed, end in ends.items()]
        worst = {
            name: max((ratio for end in ends.values() for ratio in end[name]), key=lambda ratio: abs(ratio - 1))
            for name in ("norm_ratios", "slopes")
        }
        mean = sum(end["loss"] for end in ends.values()) / len(ends)
        found.append({"variant": variant, "loss": mean, "loss_above_fp32": sum(above) / len(above), **worst})
    return found


def table(rows: list[dict]) -> str:
    lines = [
        "| weights | loss at the end | above fp32 | norm / fp32's | along fp32's |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        numbers = f"{row['loss']:.4f} | {row['loss_above_fp32']:+.4f} | {row['norm_ratios']:.4f} | {row['slopes']:.4f}"
        lines.append(f"| {row['variant']} | {numbers} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10_000, help="of every variant, after the first ones")
    parser.add_argument("--first-steps", type=int, default=5_000, help="in fp32, which all variants start from")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of int8_drift.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small only lose by more
    rows = [row for seed in range(options.seeds) for row in measure(seed, options)]
    said = {
        "steps": options.steps,
        "first_steps": options.first_steps,
        "seeds": options.seeds,
        "lr": LR,
        "first_lr": FIRST_LR,
    }
    content = {"benchmark": "int8_drift", "settings": said, "torch": torch.__version__, "summary": summary(rows)}
    write_json(options.results / "int8_drift.json", {**content, "rows": rows})
    print(table(content["summary"]))
    return content


if __name__ == "__main__":
    main()
