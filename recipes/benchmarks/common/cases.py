"""The weights and the optimizers of step_speed.py. Every package is imported by the case that needs it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

LR = 1e-5
GAP = 200  # steps between two refreshes of a projection, the default of GaLore and APOLLO


@dataclass
class Weights:
    """Parameters by what an optimizer may do with them; `heads`: the model's hidden size, heads, key-value heads."""

    named: dict[str, nn.Parameter]
    heads: tuple[int, int, int] = (64, 4, 4)

    def pick(self, wanted: Callable[[str, nn.Parameter], bool]) -> list[nn.Parameter]:
        return [p for name, p in self.named.items() if wanted(name, p)]

    @property
    def matrices(self) -> list[nn.Parameter]:
        return self.pick(lambda name, p: p.dim() > 1 and "embed" not in name)

    @property
    def rest(self) -> list[nn.Parameter]:
        """Embeddings, norms, biases."""
        return self.pick(lambda name, p: p.dim() < 2 or "embed" in name)


def _layer(
    hidden: int, inner: int, kv: int, mlp: tuple[str, ...], biases: tuple[str, ...], norms: tuple[str, ...]
) -> dict:
    sizes = {"attn.q_proj": (hidden, hidden), "attn.k_proj": (kv, hidden), "attn.v_proj": (kv, hidden)}
    sizes["attn.o_proj"] = (hidden, hidden)
    sizes |= {f"mlp.{name}": (hidden, inner) if name == "down" else (inner, hidden) for name in mlp}
    found = {f"{name}.weight": size for name, size in sizes.items()}
    found |= {f"{name}.bias": size[:1] for name, size in sizes.items() if name in biases}
    return found | {f"{norm}.{kind}": (hidden,) for norm in ("norm1", "norm2") for kind in norms}


GATED, PLAIN, QKV = ("gate", "up", "down"), ("up", "down"), ("attn.q_proj", "attn.k_proj", "attn.v_proj")
EVERY = (*QKV, "attn.o_proj", "mlp.up", "mlp.down")
# name: (layers, layer, outside of the layers, (hidden size, heads, key-value heads))
SHAPES: dict[str, tuple[int, dict, dict, tuple[int, int, int]]] = {
    "llama-7b": (8, _layer(4096, 11008, 4096, GATED, (), ()), {}, (4096, 32, 32)),
    "qwen2.5-0.5b": (
        24,
        _layer(896, 4864, 128, GATED, QKV, ("weight",)),
        {"embed_tokens.weight": (151936, 896), "norm.weight": (896,)},
        (896, 14, 2),
    ),
    "roberta-base": (12, _layer(768, 3072, 768, PLAIN, EVERY, ("weight", "bias")), {}, (768, 12, 12)),
    "tiny": (2, _layer(64, 200, 32, GATED, QKV, ("weight",)), {"embed_tokens.weight": (101, 64)}, (64, 4, 2)),
}
SHAPES["roberta-base-full"] = (
    *SHAPES["roberta-base"][:2],
    {
        **{f"embed_{name}.weight": (rows, 768) for name, rows in (("words", 50265), ("positions", 514), ("types", 1))},
        **{f"norm.{kind}": (768,) for kind in ("weight", "bias")},
    },
    SHAPES["roberta-base"][3],
)


def make_weights(shapes: str, dtype: torch.dtype, device: str) -> Weights:
    """Random weights with random gradients, both of `dtype`."""
    layers, layer, outside, heads = SHAPES[shapes]
    sizes = {f"layers.{i}.{name}": size for i in range(layers) for name, size in layer.items()} | outside
    named = {}
    for name, size in sizes.items():
        named[name] = nn.Parameter(torch.randn(size, device=device, dtype=dtype).mul_(0.02))
        named[name].grad = torch.randn(size, device=device, dtype=dtype).mul_(1e-3)
    return Weights(named, heads)


@dataclass(frozen=True)
class Case:
    """An optimizer to time: `build` makes the optimizers that together step all weights."""

    label: str
    build: Callable[[Weights], list[Optimizer]]
    env: dict[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    refreshes: bool = False  # a projection is computed anew every GAP steps
    compiles: bool = False  # time the first step with a filled compiler cache as well
    embedding: bool = False  # only where the shapes have an embedding
    checked: bool = False  # compared with FOAM's plain path before it is timed


def _groups(w: Weights, matrices: dict, rest: dict) -> list[dict]:
    groups = [{"params": w.matrices, **matrices}, {"params": w.rest, **rest}]
    return [group for group in groups if group["params"]]


def _foam(w: Weights, fold_embeddings: bool = False, **options) -> list[Optimizer]:
    from foam_hf import FOAM

    plain = {"level": 0, "scale": 1.0, "second_moment": "block"}
    if not fold_embeddings:
        return [FOAM(_groups(w, {}, plain), lr=LR, **options)]
    return [FOAM(list(w.named.values()), lr=LR, **options)]


def _adamw(w: Weights, **options) -> list[Optimizer]:
    return [torch.optim.AdamW(list(w.named.values()), lr=LR, **options)]


def _bitsandbytes(w: Weights) -> list[Optimizer]:
    from bitsandbytes.optim import AdamW8bit

    return [AdamW8bit(list(w.named.values()), lr=LR)]


def _flash(w: Weights, bits: int | None) -> list[Optimizer]:
    from flashoptim import FlashAdamW

    return [FlashAdamW(list(w.named.values()), lr=LR, master_weight_bits=bits)]


def _torchao(w: Weights) -> list[Optimizer]:
    from torchao.optim import AdamW8bit

    return [AdamW8bit(list(w.named.values()), lr=LR)]


def _galore(w: Weights) -> list[Optimizer]:
    from galore_torch import GaLoreAdamW

    low_rank = {"rank": 128, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    return [GaLoreAdamW(_groups(w, low_rank, {}), lr=LR, no_deprecation_warning=True)]


def _apollo(w: Weights, **options) -> list[Optimizer]:
    from apollo_torch import APOLLOAdamW

    low_rank = {"proj": "random", "update_proj_gap": GAP, "proj_type": "std", **options}
    return [APOLLOAdamW(_groups(w, low_rank, {}), lr=LR)]


def _adam_mini(w: Weights) -> list[Optimizer]:
    from adam_mini import Adam_mini

    hidden, heads, kv_heads = w.heads
    return [Adam_mini(w.named.items(), lr=LR, dim=hidden, n_heads=heads, n_kv_heads=kv_heads, verbose=False)]


def _muon(w: Weights) -> list[Optimizer]:
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch {torch.__version__} has no torch.optim.Muon")
    rest = [torch.optim.AdamW(w.rest, lr=LR, fused=True)] if w.rest else []
    return [torch.optim.Muon(w.matrices, lr=LR), *rest]


def _adafactor(w: Weights) -> list[Optimizer]:
    from transformers import Adafactor

    return [Adafactor(list(w.named.values()), lr=LR, scale_parameter=False, relative_step=False)]


def _gefen(w: Weights) -> list[Optimizer]:
    from gefen import Gefen

    return [Gefen(list(w.named.items()), lr=LR)]


nearest = partial(_foam, stochastic_rounding=False)
BF16 = ("bf16",)
_CASES = {
    "foam": Case("FOAM, level 8", _foam, compiles=True),
    "foam-ignore": Case("FOAM, level 8, nonfinite=ignore", partial(_foam, nonfinite="ignore")),
    "foam-nearest": Case("FOAM, level 8, rounding to nearest", nearest, dtypes=BF16),
    "foam-factored": Case("FOAM, level 8, factored", partial(_foam, second_moment="factored"), compiles=True),
    "foam-2": Case("FOAM, level 2", partial(_foam, level=2)),
    "foam-2-nearest": Case("FOAM, level 2, rounding to nearest", partial(nearest, level=2), dtypes=BF16),
    "foam-row": Case("FOAM-Mini, level row", partial(_foam, level="row")),
    "foam-0": Case("FOAM, level 0 (AdamW)", partial(_foam, level=0)),
    "foam-embeddings": Case("FOAM, level 8, embeddings too", partial(_foam, fold_embeddings=True), embedding=True),
    "adamw-fused": Case("torch AdamW, fused", partial(_adamw, fused=True)),
    "adamw-foreach": Case("torch AdamW, foreach", partial(_adamw, foreach=True)),
    "bitsandbytes": Case("bitsandbytes AdamW8bit", _bitsandbytes),
    "flash": Case("FlashAdamW, no master weights", partial(_flash, bits=None), compiles=True),
    "flash-24": Case("FlashAdamW, 24-bit master weights", partial(_flash, bits=24), dtypes=BF16),
    "torchao": Case("torchao AdamW8bit", _torchao, compiles=True),
    "gefen-x": Case("Gefen-X", _gefen, compiles=True),
    "galore": Case("GaLore, rank 128", _galore, refreshes=True),
    "apollo": Case("APOLLO, rank 256", partial(_apollo, rank=256, scale=1, scale_type="channel"), refreshes=True),
    "apollo-mini": Case("APOLLO-Mini", partial(_apollo, rank=1, scale=128, scale_type="tensor"), refreshes=True),
    "adam-mini": Case("Adam-mini", _adam_mini),
    "muon": Case("torch Muon, AdamW for the rest", _muon),
    "adafactor": Case("Adafactor of transformers", _adafactor),
    "foam-reference": Case("FOAM, level 8, without its kernel", _foam, env={"FOAM_HF_KERNEL": "reference"}),
}


CASES = {
    name: replace(case, checked=name.startswith("foam") and name != "foam-reference") for name, case in _CASES.items()
}


def skip_first_projection(optimizer: Optimizer) -> None:
    """Give GaLore projections that are no SVD: the SVDs of a real first step take minutes, and speed is the same."""
    from galore_torch.galore_projector import GaLoreProjector

    for group in optimizer.param_groups:
        if "rank" not in group:
            continue
        for p in group["params"]:
            rank, (rows, columns) = min(group["rank"], *p.shape), p.shape
            size = (rank, columns) if rows >= columns else (rows, rank)
            projector = GaLoreProjector(group["rank"], update_proj_gap=GAP, scale=group["scale"], proj_type="std")
            projector.ortho_matrix = torch.randn(size, device=p.device, dtype=p.dtype) / columns**0.5
            optimizer.state[p] |= {"projector": projector, "step": 1}
