"""Tiny models and data sets with random weights, for tests; nothing is downloaded.

Every builder seeds torch first, so two calls give equal weights. Builders import transformers and peft, so that this
module can be imported where they are missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

VOCAB = 64
HIDDEN = 32
LAYERS = 2
SEQUENCE = 12

SHORT_RUN: dict[str, Any] = {  # arguments of a Trainer that trains a tiny model for ten steps
    "optim": "foam",
    "optim_args": "level=3",
    "learning_rate": 5e-3,
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def tiny_roberta(num_labels: int = 2, seed: int = 0, **config: Any) -> nn.Module:
    """RoBERTa with a classification head: biases and LayerNorms everywhere, absolute positions."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 34,
        "type_vocab_size": 1,
        "num_labels": num_labels,
    }
    return RobertaForSequenceClassification(RobertaConfig(**{**settings, **config}))


def _decoder_settings() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def tiny_qwen2(seed: int = 0, **config: Any) -> nn.Module:
    """Qwen2 causal LM: biases on q, k and v only; the LM head is tied to the embedding, as in the 0.5B model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**{**_decoder_settings(), "tie_word_embeddings": True, **config}))


def tiny_llama(seed: int = 0, **config: Any) -> nn.Module:
    """LLaMA causal LM: no bias anywhere, an LM head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**_decoder_settings(), **config}))


def tiny_gpt2(seed: int = 0, **config: Any) -> nn.Module:
    """GPT-2 causal LM: weights in `Conv1D`, transposed against `nn.Linear`; the LM head is tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2LMHeadModel(GPT2Config(**{**settings, **config}))


def tiny_mixtral(seed: int = 0, **config: Any) -> nn.Module:
    """Mixtral causal LM: a mixture of four experts, fused into 3-D weights from transformers 5 on."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    settings = {**_decoder_settings(), "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**{**settings, **config}))


def tiny_t5(seed: int = 0, **config: Any) -> nn.Module:
    """T5 with an untied LM head, which is part of transformers' `base_model`."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "decoder_start_token_id": 0,
    }
    t5_config = T5Config(**{**settings, **config})
    t5_config.tie_word_embeddings = False  # transformers 5 overrules the argument
    model = T5ForConditionalGeneration(t5_config)
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared  # as in 4.57, and as in real checkpoints
    return model


def tiny_lora_llama(seed: int = 0, **lora: Any) -> nn.Module:
    """LLaMA under LoRA on q_proj, v_proj and the embedding, with a trainable copy of the LM head."""
    from peft import LoraConfig, get_peft_model

    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
        "task_type": "CAUSAL_LM",
    }
    model = tiny_llama(seed)
    return get_peft_model(model, LoraConfig(**{**settings, **lora}))


def tiny_mlp(seed: int = 0) -> nn.Module:
    """An nn.Module without transformers: embedding, two linear layers, norm, and a 2-D parameter in no layer."""

    class TinyMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, HIDDEN)
            self.input = nn.Linear(HIDDEN, 48)
            self.norm = nn.LayerNorm(48)
            self.output = nn.Linear(48, 2)
            self.mixing = nn.Parameter(torch.randn(2, 2) * 0.1)

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            hidden = torch.relu(self.norm(self.input(self.embedding(input_ids).mean(dim=1))))
            logits = self.output(hidden) @ self.mixing
            if labels is None:
                return {"logits": logits}
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(seed)
    return TinyMLP()


def quantized(model: nn.Module, block_size: int = 16) -> nn.Module:
    """`model` with the weights of its linear layers inside `base_model` in INT8."""
    from foam_hf.int8.weight import Int8Weight

    for module in model.base_model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8Weight.from_float(module.weight, block_size))
    return model


class _Examples(Dataset):
    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def classification_data(size: int = 32, seed: int = 0, num_labels: int = 2) -> Dataset:
    """`size` sequences of SEQUENCE random tokens; the label is the first token's remainder, so it can be learned."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (size, SEQUENCE), generator=generator)
    labels = input_ids[:, 0] % num_labels
    return _Examples({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels})


def language_data(size: int = 32, seed: int = 0) -> Dataset:
    """`size` sequences of SEQUENCE random tokens that are their own labels."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (size, SEQUENCE), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    return _Examples({"input_ids": input_ids, "attention_mask": attention_mask, "labels": input_ids.clone()})


# Every builder by name, for tests that run over all kinds of models.
BUILDERS = {
    "roberta": tiny_roberta,
    "qwen2": tiny_qwen2,
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
    "t5": tiny_t5,
    "lora_llama": tiny_lora_llama,
    "mlp": tiny_mlp,
}


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step on random gradients; they stay in place."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, dtype=p.dtype, device=p.device) * 0.01
    optimizer.step()
