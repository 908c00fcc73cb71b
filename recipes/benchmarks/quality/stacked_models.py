"""BERT and MPNet classifiers of many seeds at once: every weight is a stack with the seed as its first dimension.

A matrix is (seeds, out, in), a vector (seeds, n), an embedding (seeds, rows, width). Tokens of a batch lie packed,
without padding, as (seeds, tokens, width); attention alone sees them padded. Weights are float32, products are of
`dtype`, norms and the residual stream float32, as under autocast. A test compares the logits with transformers'.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = {
    "bert": {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
        "first_norm": "attention.output.LayerNorm",
    },
    "mpnet": {
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "out": "attention.attn.o",
        "first_norm": "attention.LayerNorm",
    },
}
EMBEDDINGS = ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings")
BIAS = "encoder.relative_attention_bias.weight"  # MPNet's, one for all layers


def read_model(folder: Path) -> tuple[SimpleNamespace, dict[str, Tensor]]:
    """Config and float32 weights of a folder, under the names of the model without a head."""
    from safetensors.torch import load_file

    config = SimpleNamespace(**json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    if config.model_type not in NAMES or getattr(config, "hidden_act", "gelu") != "gelu":
        raise SystemExit(f"{folder} is a {config.model_type}; expected BERT or MPNet with hidden_act gelu")
    found = {}
    for name, value in load_file(Path(folder) / "model.safetensors").items():
        name = name.removeprefix(f"{config.model_type}.")
        # A classifier's MPNet has no pooler; position ids are buffers.
        if not name.endswith("position_ids") and not (config.model_type == "mpnet" and name.startswith("pooler")):
            found[name] = value.float()
    return config, found


def fresh_classifiers(config: SimpleNamespace, seeds: list[int], labels: int = 2) -> dict[str, Tensor]:
    """Stacked heads, drawn for each seed as transformers draws a new Linear: normal weights, no bias."""
    shapes = {"classifier": (labels, config.hidden_size)}
    if config.model_type == "mpnet":
        shapes = {"classifier.dense": (config.hidden_size,) * 2, "classifier.out_proj": shapes["classifier"]}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = {}
    for name, shape in shapes.items():
        drawn = [torch.randn(shape, generator=generator) for generator in generators]
        found[f"{name}.weight"] = torch.stack(drawn) * getattr(config, "initializer_range", 0.02)
        found[f"{name}.bias"] = torch.zeros(len(seeds), shape[0])
    return found


class _Rows(torch.autograd.Function):
    """Rows of x at the indices `there`. `back` is the way back, so that the gradient is a gather too."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Linear(torch.autograd.Function):
    """x (seeds, tokens, in) by a float32 stack of weights; the gradient of the stack is contiguous, as it is."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        half = weight.to(x.dtype)
        ctx.save_for_backward(x, half)
        return torch.baddbmm(bias.to(x.dtype).unsqueeze(1), x, half.transpose(1, 2))

    @staticmethod
    def backward(ctx, grad):
        x, half = ctx.saved_tensors
        dx, dw, db = ctx.needs_input_grad
        return (
            torch.bmm(grad, half) if dx else None,
            torch.bmm(grad.transpose(1, 2), x).float() if dw else None,
            grad.sum(1, dtype=torch.float32) if db else None,
        )


class Stack:
    """The classifier of `seeds`, from the weights of `read_model`.

    With `lora`, {"r", "lora_alpha"}, adapters on every linear layer of the base model and the classifier are trained,
    and the seeds share the frozen rest.
    """

    def __init__(self, config, weights: dict[str, Tensor], seeds: list[int], dtype, device, lora: dict | None = None):
        self.config, self.names, self.seeds, self.dtype = config, NAMES[config.model_type], seeds, dtype
        self.shared, self.training = lora is not None, True
        self.scaling = lora["lora_alpha"] / lora["r"] if lora else 0.0
        self.weights: dict[str, Tensor] = {}  # all of them
        self.parameters: dict[str, nn.Parameter] = {}  # those that are trained
        self.buckets: dict[int, Tensor] = {}  # of MPNet's positions, by length
        for name, value in weights.items():
            one = value.to(device).unsqueeze(0)
            if self.shared:
                self.weights[name] = one if self._is_table(name) else one.expand(len(seeds), *value.shape)
            else:
                self._train(name, one.repeat(len(seeds), *(1 for _ in value.shape)))
        for name, value in fresh_classifiers(config, seeds).items():
            self._train(name, value.to(device))
        if lora:
            self._add_adapters(lora["r"], device)

    @staticmethod
    def _is_table(name: str) -> bool:
        return name.removesuffix(".weight") in EMBEDDINGS or name == BIAS

    def _train(self, name: str, value: Tensor) -> None:
        self.weights[name] = self.parameters[name] = nn.Parameter(value.contiguous())

    def _add_adapters(self, rank: int, device) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        for name in list(self.weights):
            value = self.weights[name]
            if value.dim() < 3 or name in self.parameters or self._is_table(name):
                continue
            out, into = value.shape[1:]
            bound = 1 / math.sqrt(into)  # kaiming_uniform_(a=sqrt(5)), as in PEFT
            drawn = [torch.rand(rank, into, generator=one) for one in generators]
            layer = name.removesuffix(".weight")
            self._train(f"{layer}.lora_A", (torch.stack(drawn) * 2 * bound - bound).to(device))
            self._train(f"{layer}.lora_B", torch.zeros(len(self.seeds), out, rank, device=device))

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = _Linear.apply(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
        if (A := self.weights.get(f"{name}.lora_A")) is not None:
            B = self.weights[f"{name}.lora_B"].to(x.dtype)
            y = y + self.scaling * torch.bmm(torch.bmm(x, A.to(x.dtype).transpose(1, 2)), B.transpose(1, 2))
        return y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_eps)
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return torch.addcmul(bias.unsqueeze(1), y, weight.unsqueeze(1))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.hidden_dropout_prob, self.training)

    def __call__(self, batch: "Batch") -> Tensor:
        """Logits, float32, (seeds, rows, labels)."""
        x = self._embed(batch)
        mask = self._mask(batch)
        for number in range(self.config.num_hidden_layers):
            x = self._layer(x, f"encoder.layer.{number}.", mask, batch)
        first = x.flatten(0, 1).index_select(0, batch.first).view(len(self.seeds), batch.rows, -1)
        return self._classify(first)

    def _embed(self, batch: "Batch") -> Tensor:
        indices = zip(EMBEDDINGS, (batch.ids, batch.positions, batch.types), strict=True)
        tables = [(self.weights.get(f"{name}.weight"), index) for name, index in indices]
        found = [F.embedding(index, table.flatten(0, 1)) for table, index in tables if table is not None]
        total = found[0] if len(found) == 1 else sum(found[1:], found[0])
        total = total.view(len(self.seeds), batch.tokens, -1)
        return self._drop(self._norm(total, "embeddings.LayerNorm"))

    def _mask(self, batch: "Batch") -> Tensor:
        """What attention adds to its scores, or where it may look: (seeds * rows, heads or 1, length or 1, length)."""
        inside = torch.arange(batch.length, device=batch.lengths.device) < batch.lengths.view(-1, 1, 1, 1)
        if (table := self.weights.get(BIAS)) is None:
            return inside
        if batch.length not in self.buckets:
            chosen = position_buckets(batch.length, table.shape[1]).to(table.device)
            self.buckets[batch.length] = F.one_hot(chosen.flatten(), table.shape[1]).float()
        # A product, as the gradient of indexing by so few rows is slow.
        bias = torch.matmul(self.buckets[batch.length], table)  # (seeds or 1, length * length, heads)
        bias = bias.transpose(1, 2).unflatten(2, (batch.length, batch.length)).to(self.dtype)
        bias = bias.expand(len(self.seeds), *bias.shape[1:]).unsqueeze(1)
        bias = bias.expand(-1, batch.rows, -1, -1, -1).flatten(0, 1)
        return bias.masked_fill(~inside, -math.inf)

    def _layer(self, x: Tensor, at: str, mask: Tensor, batch: "Batch") -> Tensor:
        seeds, heads, names = len(self.seeds), self.config.num_attention_heads, self.names
        half = x.to(self.dtype)
        parts = []
        for part in ("query", "key", "value"):
            y = self._linear(half, at + names[part])
            padded = _Rows.apply(y.flatten(0, 1), batch.padded, batch.packed)
            parts.append(padded.view(seeds * batch.rows, batch.length, heads, -1).transpose(1, 2))
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        y = F.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=dropout)
        y = _Rows.apply(y.transpose(1, 2).flatten(2).flatten(0, 1), batch.packed, batch.padded)
        y = self._linear(y.view(seeds, batch.tokens, -1), at + names["out"])
        x = self._norm(self._drop(y) + x, at + names["first_norm"])
        y = F.gelu(self._linear(x.to(self.dtype), f"{at}intermediate.dense"))
        y = self._drop(self._linear(y, f"{at}output.dense"))
        return self._norm(y + x, f"{at}output.LayerNorm")

    def _classify(self, first: Tensor) -> Tensor:
        first = first.to(self.dtype)
        if self.config.model_type == "mpnet":
            first = torch.tanh(self._linear(self._drop(first), "classifier.dense"))
            return self._linear(self._drop(first), "classifier.out_proj").float()
        pooled = torch.tanh(self._linear(first, "pooler.dense"))
        return self._linear(self._drop(pooled), "classifier").float()


def position_buckets(length: int, count: int, farthest: int = 128) -> Tensor:
    """MPNet's relative positions, (length, length), as rows of a table of `count`: half for each direction."""
    place = torch.arange(length)
    distance = place[:, None] - place[None, :]  # of a query from a key
    half, near = count // 2, count // 4
    away = distance.abs()
    steps = torch.log(away.clamp_min(1).float() / near) / math.log(farthest / near) * (half - near)
    far = (near + steps.long()).clamp_max(half - 1)
    return (distance < 0).long() * half + torch.where(away < near, away, far)


class Rows:
    """Tokenized rows of one split: ids and types flat, with the length and label of each row."""

    def __init__(self, file, prefix: str, limit: int | None = None):
        self.lengths = file[f"{prefix}_lengths"][:limit].astype(np.int64)
        self.labels = file[f"{prefix}_labels"][:limit].astype(np.int64)
        self.ids = file[f"{prefix}_ids"].astype(np.int64)
        self.types = file[f"{prefix}_types"].astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)


INDICES = ("ids", "positions", "types", "padded", "packed", "first", "lengths", "labels")


class Batch(SimpleNamespace):
    """Rows of each seed: their sizes, and the indices of INDICES.

    The last token of each seed, and the last column of each padded row, belong to no row: gathers of padding read
    the one, gathers of tokens that are none the other, and no gradient ever comes from either.
    """


def index_batch(data: Rows, chosen: np.ndarray, config: SimpleNamespace, shared: bool) -> Batch:
    """The batch of `chosen`, row numbers as (seeds, rows), in numpy; `shared` where the seeds share embeddings."""
    seeds, rows = chosen.shape
    lengths, starts = data.lengths[chosen], data.starts[chosen]
    tokens, length = _up(lengths.sum(1).max() + 1, 64), _up(lengths.max() + 1, 8)
    column, seed = np.arange(length), np.arange(seeds)
    inside = column < lengths[..., None]
    first = np.cumsum(lengths, 1) - lengths + seed[:, None] * tokens
    padded = np.where(inside, first[..., None] + column, (seed * tokens + tokens - 1)[:, None, None])
    packed = np.repeat(seed * rows * length + length - 1, tokens)
    at = padded[inside]
    packed[at] = np.flatnonzero(inside)
    source = (starts[..., None] + column)[inside]
    stride = 0 if shared else 1
    seed_of = np.repeat(seed, tokens) * stride
    # Positions start at 0 for BERT, behind the padding token's row for MPNet.
    ids, positions, types = (np.zeros(seeds * tokens, dtype=np.int64) for _ in range(3))
    ids[at], types[at] = data.ids[source], data.types[source]
    positions[at] = np.broadcast_to(column, inside.shape)[inside]
    behind = config.pad_token_id + 1 if config.model_type == "mpnet" else 0
    return Batch(
        rows=rows,
        tokens=tokens,
        length=length,
        ids=ids + seed_of * config.vocab_size,
        positions=positions + behind + seed_of * config.max_position_embeddings,
        types=types + seed_of * getattr(config, "type_vocab_size", 0),
        padded=padded.ravel(),
        packed=packed,
        first=first.ravel(),
        lengths=lengths.ravel(),
        labels=data.labels[chosen].ravel(),
    )


def _up(number: int, multiple: int) -> int:
    return int(-(-number // multiple) * multiple)


def on_device(batches: list[Batch], device) -> list[Batch]:
    """The same batches as int32 tensors: slices of one that moves to the device in one copy."""
    arrays = [getattr(batch, name) for batch in batches for name in INDICES]
    whole = torch.from_numpy(np.concatenate(arrays).astype(np.int32)).to(device)
    pieces = iter(whole.split([array.size for array in arrays]))
    return [Batch(**{**vars(batch), **{name: next(pieces) for name in INDICES}}) for batch in batches]
