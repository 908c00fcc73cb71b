"""A language model small enough to train on one CPU core in a minute, from scratch, on Python's own manual.

The text is `pydoc_data.topics` of the standard library, half a megabyte of English, read as bytes; every sixteenth
piece of 2,048 bytes is held out. The seed draws the weights and the batches.
"""

import math
import pydoc_data.topics
import time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import foam_hf
from foam_hf.memory import state_bytes
from recipes.benchmarks.quality.candidates import Candidate

PIECE = 2048
DEFAULTS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "sequence": 64,
    "batch": 8,
    "max_steps": 150,
    "warmup": 0.1,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "eval_sequences": 192,
}


def corpus() -> tuple[Tensor, Tensor]:
    """The bytes to train on, and those held out."""
    topics = pydoc_data.topics.topics
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.long)
    pieces = text[: len(text) // PIECE * PIECE].view(-1, PIECE)
    held = torch.arange(len(pieces)) % 16 == 15
    return pieces[~held].flatten(), pieces[held].flatten()


def build_model(settings: dict) -> nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=settings["hidden_size"],
        num_hidden_layers=settings["num_hidden_layers"],
        intermediate_size=settings["intermediate_size"],
        num_attention_heads=settings["num_attention_heads"],
        num_key_value_heads=settings["num_attention_heads"],
        max_position_embeddings=settings["sequence"],
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def build_optimizer(model: nn.Module, arm: dict, rate: float, betas: tuple[float, float], steps: int):
    """An arm's optimizer over a model: AdamW, FOAM or a candidate, with version 0.1.0's choice of folded weights."""
    optim, options = arm["optim"], dict(arm.get("optim_args") or {})
    if optim == "adamw_torch":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=0.0)
    if optim not in ("foam", "candidate"):
        raise SystemExit(f"unknown optimizer here, got {optim!r}; expected adamw_torch, foam or candidate")
    groups = foam_hf.foam_param_groups(model, fold_embeddings=False, fold_head=False)
    if optim == "foam":
        return foam_hf.FOAM(groups, lr=rate, betas=betas, **{"scale": 0.25, **options})
    if options.get("residual_start") is not None:
        options.setdefault("total_steps", steps)
    return Candidate(groups, lr=rate, betas=betas, **options)


def batches(text: Tensor, seed: int, batch: int, sequence: int):
    """Endless batches of windows at random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - sequence, (batch,), generator=generator)
        yield torch.stack([text[start : start + sequence] for start in starts.tolist()])


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; the share of the learning rate at `step`, from 0."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor, sequence: int, count: int) -> float:
    rows = text[: len(text) // sequence * sequence].view(-1, sequence)[:count]
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(32)]
    return sum(losses) / len(rows)


def run(job: dict) -> dict:
    """Train one arm with one learning rate and seed; the loss on the held-out text."""
    settings = {**DEFAULTS, **job["settings"]}
    if unknown := sorted(settings.keys() - DEFAULTS.keys()):
        raise SystemExit(f"unknown setting, got {unknown[0]}; expected some of {', '.join(DEFAULTS)}")
    started = time.perf_counter()
    torch.manual_seed(job["seed"])
    model, (text, held_out) = build_model(settings), corpus()
    steps, sequence = settings["max_steps"], settings["sequence"]
    betas = (settings["adam_beta1"], settings["adam_beta2"])
    optimizer = build_optimizer(model, job["arm"], job["rate"], betas, steps)
    source = batches(text, job["seed"], settings["batch"], sequence)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = job["rate"] * schedule(step, steps, settings["warmup"])
        batch = next(source)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loss = held_out_loss(model.eval(), held_out, sequence, settings["eval_sequences"])
    return {
        "score": loss if math.isfinite(loss) else None,
        "loss": loss if math.isfinite(loss) else None,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": state_bytes(optimizer),
        "seconds": round(time.perf_counter() - started, 1),
    }
