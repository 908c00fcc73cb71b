"""Optimizers for stacks of seeds (`stacked_models.Stack`), each doing what it would for every seed on its own.

FOAM and AdamW take the stacks: a leading dimension is rows to them. Others mix a tensor's elements, so there is one
of them for each seed, over views of the stacks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from foam_hf import FOAM
from foam_hf.memory import state_bytes
from recipes.benchmarks.quality.stacked_models import BIAS, EMBEDDINGS, Stack

EPS = 1e-8
BETAS = (0.9, 0.999)
PLAIN = {"level": 0, "scale": 1.0, "second_moment": "block"}
KINDS = ("matrix", "embedding", "plain")


def kind_of(name: str, dimensions: int) -> str:
    """What a weight of so many dimensions in one seed's model is: one of KINDS."""
    if name.startswith("classifier") or dimensions < 2:
        return "plain"
    return "embedding" if name.removesuffix(".weight") in EMBEDDINGS or name == BIAS else "matrix"


def foam_groups(stack: Stack, embeddings: str = "fold", **rule: Any) -> list[dict]:
    """Param groups of FOAM. `embeddings`: "fold" as matrices do, "factored" at scale 1, or "plain".

    Raises:
        ValueError: another value of `embeddings`.
    """
    if embeddings not in ("fold", "factored", "plain"):
        raise ValueError(f"embeddings: got {embeddings!r}; expected 'fold', 'factored' or 'plain'")
    of_embeddings = {"fold": rule, "factored": {**rule, "second_moment": "factored", "scale": 1.0}, "plain": PLAIN}
    fields = {"matrix": rule, "embedding": of_embeddings[embeddings], "plain": PLAIN}
    groups: dict[str, dict] = {}
    for name, p in stack.parameters.items():
        options = dict(fields[kind_of(name, p.dim() - 1)])
        if rule.get("second_moment") == "adam_mini" and not name.endswith("bias"):
            options |= {"second_moment": "adam_mini", "mini_rows": _mini_rows(name, stack)}
        group = groups.setdefault(repr(sorted(options.items())), {"params": [], **options})
        group["params"].append(p)
    return list(groups.values())


def _mini_rows(name: str, stack: Stack) -> int:
    """A head of queries and keys, else a row; a stacked vector is a row for each seed."""
    layer = name.removesuffix(".weight").split("layer.", 1)[-1].partition(".")[2]
    queries = (stack.names["query"], stack.names["key"])
    return stack.config.hidden_size // stack.config.num_attention_heads if layer in queries else 1


class PerSeed:
    """One optimizer for each seed, made by `make(parameters by name)`, over views of the stacks."""

    def __init__(self, stack: Stack, make: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]):
        self.stacks = list(stack.parameters.values())
        self.views = [
            {name: nn.Parameter(p.data[k]) for name, p in stack.parameters.items()} for k in range(len(stack.seeds))
        ]
        self.optimizers = [make(views) for views in self.views]
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]

    def step(self) -> None:
        pieces = [p.grad.unbind(0) for p in self.stacks]
        for k, views in enumerate(self.views):
            for view, piece in zip(views.values(), pieces, strict=True):
                view.grad = piece[k]
        for optimizer in self.optimizers:
            optimizer.step()


def build_optimizer(stack: Stack, optim: str, options: dict, rate: float) -> Any:
    """The optimizer `optim` of OPTIMIZERS with AdamW's betas and eps and no weight decay.

    Raises:
        ValueError: an unknown name.
    """
    if optim not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer, got {optim!r}; expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[optim](stack, rate, **options)


def _adamw(stack: Stack, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(stack.parameters.values(), lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)


def _foam(stack: Stack, rate: float, **options: Any) -> FOAM:
    # "ignore": a run that diverges shows it in its score, as AdamW's does, and the other seeds go on.
    return FOAM(foam_groups(stack, **options), lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0, nonfinite="ignore")


def _adamw_8bit(stack: Stack, rate: float) -> PerSeed:
    from bitsandbytes.optim import AdamW

    common = {"lr": rate, "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "optim_bits": 8}
    return PerSeed(stack, lambda views: AdamW(list(views.values()), **common))


def _adafactor(stack: Stack, rate: float) -> PerSeed:
    from transformers.optimization import Adafactor

    common = {"lr": rate, "scale_parameter": False, "relative_step": False}  # as Trainer does
    return PerSeed(stack, lambda views: Adafactor(list(views.values()), **common))


def _apollo(stack: Stack, rate: float, rank: int = 8, scale: float = 1.0, update_proj_gap: int = 200) -> PerSeed:
    from apollo_torch import APOLLOAdamW

    fields = {"rank": rank, "proj": "random", "scale_type": "channel", "update_proj_gap": update_proj_gap}
    fields |= {"scale": scale, "proj_type": "std"}  # Trainer's defaults, but the rank

    def make(views: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        # Trainer's all-linear: classifiers too
        kinds = {name: kind_of(name, p.dim()) for name, p in views.items()}
        linear = [name for name, p in views.items() if p.dim() == 2 and kinds[name] != "embedding"]
        groups = [
            {"params": [p for name, p in views.items() if name not in linear]},
            {"params": [views[name] for name in linear], **fields},
        ]
        return APOLLOAdamW(groups, lr=rate, betas=BETAS, eps=EPS)

    return PerSeed(stack, make)


def _gefen(stack: Stack, rate: float) -> PerSeed:
    from gefen import Gefen

    common = {"lr": rate, "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "fused": False}  # no compiler needed
    return PerSeed(stack, lambda views: Gefen(list(views.items()), **common))


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": _adamw,
    "foam": _foam,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "apollo_adamw": _apollo,
    "gefen": _gefen,
}


def state_bytes_per_seed(optimizer: Any, seeds: int) -> int:
    """Bytes of the tensors that an optimizer of so many seeds keeps, for one of them."""
    parts = optimizer.optimizers if isinstance(optimizer, PerSeed) else [optimizer]
    return round(sum(state_bytes(part) for part in parts) / seeds)


@torch.no_grad()
def clip_each_seed(parameters: list[nn.Parameter], seeds: int, most: float) -> None:
    """Scale the gradients of each seed, in place, so that their norm is at most `most`; no wait for the GPU."""
    grads = [p.grad for p in parameters]
    norms = torch._foreach_norm([piece for grad in grads for piece in grad.unbind(0)])
    total = torch.stack(norms).view(-1, seeds).norm(dim=0)
    factor = (most / (total + 1e-6)).clamp_max(1.0)  # as torch.nn.utils.clip_grad_norm_
    by_dimensions = {count: factor.view(-1, *[1] * (count - 1)) for count in {grad.dim() for grad in grads}}
    torch._foreach_mul_(grads, [by_dimensions[grad.dim()] for grad in grads])
