"""FOAM with Adam-mini: a folded first moment, and one second moment for each of Adam-mini's blocks of rows.

Such a block of rows is a head of a query or key weight, one output row of any other matrix, one token of an
embedding, or a whole tensor (Zhang et al., arXiv 2406.16793). ``mean_B`` is the mean over it. Other symbols are as in
``by_rows``:

    m <- b1 m + (1 - b1) fold(G)
    v <- b2 v + (1 - b2) mean_B(G * G)                                     one value for a block of rows
    U  = ((unfold(m) + rho R) / c1) / (sqrt((v + rho^2 R^2) / c2) + eps), at most 16 in magnitude

This is the paper's rule with Adam-mini's second moment instead of the folded one. The residual's square stays in the
denominator, because it bounds ``R / c1`` in the first steps. The limit of 16 is needed because a mean over many
elements can be much smaller than the square of one of them: if one element of a million has a gradient, Adam-mini
moves it by 1,000 times the learning rate. At ``level=0`` there is no residual, and the rule is Adam-mini's own. The
formula is our choice; the paper's own combination with Adam-mini (arXiv 2512.07112) may differ.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.rules.by_rows import (
    Fraction,
    fold,
    in_blocks,
    limit_numerator_,
    row_moments,
    subtract_update_,
    update_rows,
)
from foam_hf.rules.rule import Group, Rule, StateTensor
from foam_hf.tensors.folding import Level, block_width, num_blocks
from foam_hf.tensors.rows import CHUNK_GPU, Rows, as_rows, chunks, load, store
from foam_hf.tensors.step import Hyper

logger = logging.getLogger("foam_hf")

# The last part of the names of query and key modules in transformers' models; rows of their weights are heads.
_QUERIES_AND_KEYS = frozenset(
    ("q_proj", "k_proj", "query", "key", "q_lin", "k_lin", "query_proj", "key_proj", "q", "k", "wq", "wk", "to_q")
)
# Modules that hold queries, keys and values in one weight.
_FUSED = frozenset(("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj", "att_proj"))


def adam_mini_rule(G: Tensor, m: Tensor, v: Tensor, h: Hyper) -> Fraction:
    """U as above. ``m`` is updated in place; ``v`` is this step's already, and broadcasts to the blocks of ``m``."""
    g = fold(G)
    m.lerp_(g, 1 - h.b1)
    if G.shape[-1] == 1:  # a block of one column has no residual
        S = (v / h.c2).sqrt_()
        return limit_numerator_(m / h.c1, S), S + h.eps
    R = G - g
    RR = R.square()
    S = torch.add(v / h.c2, RR, alpha=h.rho**2 / h.c2, out=RR).sqrt_()
    torch.add(m / h.c1, R, alpha=h.rho / h.c1, out=R)
    return limit_numerator_(R, S), S.add_(h.eps)


def update_adam_mini(
    weight: Rows, grad: Tensor, state: dict[str, Tensor], level: Level, h: Hyper, left_out_at: Tensor | None = None
) -> None:
    """Reads the gradient twice, because a second moment is the mean over all rows that share it."""
    if grad.numel() == 0:
        return
    n = grad.shape[-1]
    gradient, width = as_rows(grad, n), block_width(level, n)
    squares = torch.empty(len(weight), dtype=torch.float32, device=grad.device)
    for rows in chunks(len(weight), n, grad.device):
        torch.mean(load(gradient, rows).square(), -1, out=squares[rows.start : rows.stop])
    stored = state["row_block_exp_avg_sq"]
    v = stored.float()
    v.lerp_(squares.view(len(v), -1).mean(-1), 1 - h.b2)
    v_of_rows = v.repeat_interleave(len(weight) // len(v)).view(-1, 1, 1)

    def update_chunk(rows: range, G: Tensor, W: Tensor, moments: list[Tensor]) -> None:
        for Gi, Wi, mi in in_blocks(width, G, W, moments=moments):
            subtract_update_(Wi, adam_mini_rule(Gi, mi, v_of_rows[rows.start : rows.stop], h), h)

    update_rows(weight, grad, row_moments([state["folded_exp_avg"]], weight, level), update_chunk, h)
    store(stored.view(1, -1), range(1), v.view(1, -1), h, substream=2)


def _state(p: Tensor, level: Level, group: Group) -> dict[str, StateTensor]:
    dtype, mini_rows = group["state_dtype"], group["mini_rows"]  # 0: all rows share one second moment
    rows = p.numel() // p.shape[-1] if p.numel() else 1
    blocks = max(1, rows // mini_rows) if mini_rows else 1
    return {
        "folded_exp_avg": StateTensor(torch.Size((*p.shape[:-1], num_blocks(level, p.shape[-1]))), dtype),
        "row_block_exp_avg_sq": StateTensor(torch.Size((blocks,)), dtype),
    }


def _check(p: Tensor, group: Group) -> None:
    mini_rows = group["mini_rows"]
    rows = p.numel() // p.shape[-1] if p.dim() > 1 and p.numel() else 0
    if mini_rows and rows % mini_rows:
        raise ValueError(
            f"mini_rows={mini_rows} does not divide the {rows} rows of a parameter of shape {tuple(p.shape)}; "
            "expected the rows of a head, 1 for a second moment of each row, or 0 for one of the whole tensor"
        )


def _groups(
    model: nn.Module, names: list[str], fields: Group, config: Any
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """One group for each number of rows in a block, as a group has one ``mini_rows``.

    All weights but biases get Adam-mini, whether they fold or not.
    """
    sizes = rows_of_blocks(model, names, config)
    for size in dict.fromkeys(sizes.values()):
        own = {} if size is None else {"second_moment": "adam_mini", "mini_rows": size}
        yield [name for name in names if sizes[name] == size], {**fields, **own}


def rows_of_blocks(model: nn.Module, names: Iterable[str], config: Any) -> dict[str, int | None]:
    """The number of rows that share a second moment, ``mini_rows``, of each named parameter; None means plain Adam.

    * Queries and keys: the rows of a head, if the layer or ``config`` gives its size.
    * Norms: 0, the whole tensor.
    * Convolutions: the rows of an output channel.
    * Other matrices and embeddings: one row.
    * Biases: None, as in Adam-mini.

    Weights that hold queries, keys and values together have one row too, and so have transposed weights (``Conv1D``,
    whose rows are inputs). That is finer than a head, and is logged.
    """
    parameters = dict(model.named_parameters())
    owners = {
        id(p): (name, module) for name, module in model.named_modules() for p in module.parameters(recurse=False)
    }
    found: dict[str, int | None] = {}
    by_row: dict[str, list[str]] = {}
    for name in names:
        p = parameters[name]
        module_name, module = owners[id(p)]
        last = module_name.removesuffix(".base_layer").rpartition(".")[2]
        if p.dim() < 2:
            found[name] = None if p.dim() == 0 or name.rpartition(".")[2].startswith("bias") else 0
        elif isinstance(module, nn.modules.conv._ConvNd):
            found[name] = p[0].numel() // p.shape[-1]
        elif last in _QUERIES_AND_KEYS and isinstance(module, nn.Linear):
            around = model.get_submodule(module_name.removesuffix(".base_layer").rpartition(".")[0])
            nearest = _nearest_config(model, module_name, config)
            size = next((size for size in _head_sizes(nearest, around) if p.shape[0] % size == 0), None)
            found[name] = size or 1
            if size is None:
                by_row.setdefault(f"the config gives no head size that divides {p.shape[0]} rows", []).append(name)
        else:
            found[name] = 1
            if last in _FUSED:
                by_row.setdefault("query, key and value are one weight", []).append(name)
            elif type(module).__name__ == "Conv1D":
                by_row.setdefault("the weight is transposed", []).append(name)
    for reason, members in by_row.items():
        logger.info("adam_mini: one second moment a row for %d weights, as %s: %s", len(members), reason, members[0])
    return found


def _nearest_config(model: nn.Module, module_name: str, config: Any) -> Any:
    """The config of the innermost part of `model` around a module that has its own, as a vision tower has."""
    parts = module_name.split(".")
    around = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts), 0, -1))
    found = (getattr(module, "config", None) for module in around)
    return next((inner for inner in found if inner is not None and _head_sizes(inner)), config)


def _head_sizes(config: Any, layer: nn.Module | None = None) -> list[int]:
    """Candidates for the size of a head, from the layer and from a model's config, the likeliest first."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def config_value(name: str) -> Any:
        try:
            return getattr(text, name, None)
        except RuntimeError:  # transformers raises it for a value that differs between layers
            return None

    sizes = [getattr(layer, "head_dim", None), config_value("head_dim"), config_value("d_kv")]
    hidden, count = config_value("hidden_size"), config_value("num_attention_heads")
    if isinstance(hidden, int) and isinstance(count, int) and count and hidden % count == 0:
        sizes.append(hidden // count)
    return [size for size in sizes if isinstance(size, int) and size > 0]


ADAM_MINI = Rule(
    name="adam_mini",
    words="second moment adam_mini",
    plain_words="Adam-mini",
    state=_state,
    update=update_adam_mini,
    unit="tensor",
    shards="nothing",
    takes=lambda p, group: p.dim() > 1 or (p.dim() == 1 and group["mini_rows"] == 0),  # vectors: norms, as one block
    check=_check,
    groups=_groups,
    temporary=lambda p, level: min(p.numel(), CHUNK_GPU) * (22 if p.element_size() < 4 else 17),
)
