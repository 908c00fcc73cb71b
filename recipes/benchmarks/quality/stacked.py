"""One job of swap_encoders.py, by its file: all seeds of one optimizer, model and task train at once.

Every seed has its own data order, classifier, dropout and gradient clipping; the loss is the sum of the seeds' means,
so their gradients stay apart. Settings are those of recipes/glue/roberta-base.yaml. results.json has a score a seed.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from foam_hf.recipe_kit import write_json
from recipes.benchmarks.common.folders import RECIPES, load_script
from recipes.benchmarks.quality.stacked_models import Batch, Rows, Stack, index_batch, on_device, read_model
from recipes.benchmarks.quality.stacked_optim import build_optimizer, clip_each_seed, state_bytes_per_seed
from recipes.glue.data import TASKS

metrics = load_script(RECIPES / "glue" / "metrics.py", "stacked_glue_metrics")
SETTINGS = {
    "epochs": 3,
    "batch": 32,
    "eval_batch": 64,
    "warmup": 0.1,
    "clip": 1.0,
    "dtype": "bfloat16",
    "train_rows": None,
    "eval_rows": None,
}
# cuDNN's attention is left out: it has given NaN on such machines.
ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def order_of(rows: int, seeds: list[int], settings: dict) -> list[np.ndarray]:
    """Row numbers, (seeds, batch), of each step: every seed shuffles every epoch by itself."""
    generators = [np.random.default_rng(seed) for seed in seeds]
    steps = []
    for _ in range(settings["epochs"]):
        shuffled = np.stack([generator.permutation(rows) for generator in generators])
        steps += np.split(shuffled, range(settings["batch"], rows, settings["batch"]), axis=1)
    return steps


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Trainer's cosine: the share of the learning rate at a step, from 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return step / max(1, warm)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(stack: Stack, optimizer: Any, batches: list[Batch], rate: float, settings: dict) -> list[float]:
    """Train on the batches; the mean loss of each seed."""
    seeds, parameters = len(stack.seeds), list(stack.parameters.values())
    total = torch.zeros(seeds, device=parameters[0].device)
    stack.training = True
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, len(batches), settings["warmup"])
        losses = F.cross_entropy(stack(batch).flatten(0, 1), batch.labels.long(), reduction="none")
        losses = losses.view(seeds, -1).mean(1)
        losses.sum().backward()
        total += losses.detach()
        clip_each_seed(parameters, seeds, settings["clip"])
        optimizer.step()
        for p in parameters:
            p.grad = None
    return (total / len(batches)).tolist()


@torch.no_grad()
def predict(stack: Stack, data: Rows, device, settings: dict) -> np.ndarray:
    """Logits of all rows, (seeds, rows, labels); rows of like length share a batch."""
    stack.training = False
    order = np.argsort(data.lengths, kind="stable")
    parts = np.split(order, range(settings["eval_batch"], len(data), settings["eval_batch"]))
    batches = [index_batch(data, np.tile(part, (len(stack.seeds), 1)), stack.config, stack.shared) for part in parts]
    logits = torch.cat([stack(batch) for batch in on_device(batches, device)], dim=1).cpu().numpy()
    return logits[:, np.argsort(order, kind="stable")]


def scores_of(task: str, logits: np.ndarray, labels: np.ndarray) -> list[dict[str, float] | None]:
    """The task's scores of each seed; None for one that diverged."""
    return [metrics.local_scores(task, one.argmax(-1), labels) if np.isfinite(one).all() else None for one in logits]


def run(job: dict) -> dict:
    """Train and evaluate what a job asks for: what its results.json holds."""
    settings, task, seeds, arm = {**SETTINGS, **job["settings"]}, job["task"], job["seeds"], job["arm"]
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(seeds[0])  # of dropout, one stream for all seeds
    began = time.monotonic()
    config, weights = read_model(Path(job["model"]))
    stack = Stack(config, weights, seeds, getattr(torch, settings["dtype"]), device, arm.get("lora"))
    optimizer = build_optimizer(stack, arm["optim"], arm.get("optim_args") or {}, job["rate"])
    with np.load(job["data"]) as file:
        data = Rows(file, f"{task}_train", settings["train_rows"])
        held_out = Rows(file, f"{task}_validation", settings["eval_rows"])
    chosen = order_of(len(data), seeds, settings)
    batches = on_device([index_batch(data, rows, config, stack.shared) for rows in chosen], device)
    ready = time.monotonic()
    with sdpa_kernel(ATTENTION):
        losses = train(stack, optimizer, batches, job["rate"], settings)
        trained = time.monotonic()
        scores = scores_of(task, predict(stack, held_out, device, settings), held_out.labels)
    count = sum(value.numel() for value in weights.values())
    count += sum(p[0].numel() for name, p in stack.parameters.items() if name.startswith("classifier"))
    return {
        "scores": [None if one is None else metrics.main_score(task, one) for one in scores],
        "all_scores": scores,
        "train_losses": [value if math.isfinite(value) else None for value in losses],
        "steps": len(batches),
        "state_bytes": state_bytes_per_seed(optimizer, len(seeds)),
        "adamw_state_bytes": 8 * count,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "seconds": {"start": round(ready - began, 1), "train": round(trained - ready, 1)},
        "versions": {"torch": torch.__version__, "device": _name(device), "metric": list(TASKS[task].main)},
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main(argv: list[str]) -> dict:
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    result = run(job)
    write_json(Path(job["folder"]) / "results.json", result)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
