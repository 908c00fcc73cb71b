"""``Family``, a row of the table in docs/models.md, and the configs and examples that many families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, LENGTH, SIDE = 64, 12, 32

Example = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One row of docs/models.md.

    Attributes:
        name: what people call the family.
        group: its heading in the page.
        model: name of the transformers class that is trained.
        config: arguments of its config; a nested config is a dict.
        example: makes a training example from a number.
        limit: why transformers cannot train it with any optimizer; empty if it can.
        error: part of the message of the error that it raises then.
    """

    name: str
    group: str
    model: str
    config: Mapping[str, Any]
    example: Callable[[int], Example]
    limit: str = ""
    error: str = ""

    def make(self) -> nn.Module:
        """A model with the same random weights each time."""
        import transformers

        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        return model_class(model_class.config_class(**self.config))

    def examples(self, count: int) -> list[Example]:
        return [self.example(number) for number in range(count)]


# Training examples


def noise(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def tokens(number: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB - 14, (length,), generator=torch.Generator().manual_seed(number))


def text(number: int) -> Example:
    ids = tokens(number)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def language(number: int) -> Example:
    return {**text(number), "labels": tokens(number)}


def sequences(number: int) -> Example:
    return {**text(number), "labels": tokens(number + 100, 8)}


def sentence(number: int) -> Example:
    return {**text(number), "labels": torch.tensor(number % 2)}


def boxed(number: int) -> Example:
    """A text whose words have boxes on a page."""
    corners = torch.arange(LENGTH)[:, None] + torch.tensor([1, 2, 11, 12])
    return {**sentence(number), "bbox": corners}


# Arguments of configs

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_KV = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
HEAD = {**TEXT, "head_dim": 8}
MOE = {**TEXT, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
