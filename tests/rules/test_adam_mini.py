"""FOAM with Adam-mini: the package's trajectory at level 0, the folded rule against float64, the blocks of models."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import foam_hf.tensors.rows
from foam_hf import FOAM, foam_param_groups
from foam_hf.int8.weight import Int8Weight
from foam_hf.rules.adam_mini import rows_of_blocks
from tests.support import tiny_models
from tests.support.reference import MiniReference
from tests.support.tolerances import assert_within


def train(weight, grads, **options):
    """The weight after one step for each gradient, and the optimizer."""
    p = nn.Parameter(weight.clone())
    optimizer = FOAM([p], **{"lr": 0.01, "second_moment": "adam_mini", **options})
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer


def blocks(model, **options):
    """Name -> (mini_rows, or None for plain Adam, and whether it folds)."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in foam_param_groups(model, second_moment="adam_mini", **options):
        rows = group["mini_rows"] if group["second_moment"] == "adam_mini" else None
        found.update({names[id(p)]: (rows, "level" not in group) for p in group["params"]})
    return found


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_level_0_follows_the_package_on_a_llama(kv_heads):
    from adam_mini import Adam_mini

    models = [tiny_models.tiny_llama(num_key_value_heads=kv_heads) for _ in range(2)]
    groups = foam_param_groups(models[0], weight_decay=0.1, second_moment="adam_mini", level=0, scale=1.0)
    ours = FOAM(groups, lr=1e-2, betas=(0.9, 0.95))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "dim": 32, "n_heads": 4}
    theirs = Adam_mini(models[1].named_parameters(), **settings, n_kv_heads=kv_heads, verbose=False)
    for _ in range(20):
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_within(p, q, "level 0 against Adam-mini, 20 steps, float32")
    held = {id(p): state for p, state in theirs.state.items()}
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert ours.state[p]["row_block_exp_avg_sq"].numel() == held[id(q)]["vmean"].numel()


@pytest.mark.parametrize("mini_rows", [1, 3, 0])
@pytest.mark.parametrize("level", [0, 2, "row"])
@pytest.mark.parametrize("shape", [(6, 37), (3, 4, 10), (12, 1)], ids=str)
def test_the_folded_rule_follows_the_float64_reference(shape, level, mini_rows):
    weight, grads = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    options = {"lr": 0.01, "weight_decay": 0.1, "level": level, "mini_rows": mini_rows, "residual_scale": 0.7}
    trained, optimizer = train(weight, grads, **options)
    reference = MiniReference(weight, **options)
    for grad in grads:
        expected = reference.step(grad)
    assert_within(trained, expected, "five steps against float64, float32 weights")
    (state,) = optimizer.state.values()
    assert state.keys() == {"step", "folded_exp_avg", "row_block_exp_avg_sq"}
    assert_within(state["row_block_exp_avg_sq"], reference.v, "five steps against float64, float32 weights")


@pytest.mark.parametrize("mini_rows", [1, 5])
@pytest.mark.parametrize("chunk", [1, 40, 100])
def test_chunks_and_strides_change_nothing(monkeypatch, chunk, mini_rows):
    weight, grads = torch.randn(15, 19).bfloat16(), [torch.randn(15, 19).bfloat16() for _ in range(3)]
    options = {"level": 2, "mini_rows": mini_rows, "state_dtype": torch.bfloat16}
    whole, _ = train(weight, grads, **options)
    transposed, _ = train(weight.t().contiguous().t(), [grad.t().contiguous().t() for grad in grads], **options)
    assert torch.equal(whole, transposed)
    monkeypatch.setattr(foam_hf.tensors.rows, "CHUNK_CPU", chunk)
    chunked, _ = train(weight, grads, **options)
    assert torch.equal(whole, chunked)


def test_int8_weights_follow_float32_ones():
    weight, grads = torch.randn(24, 256) * 0.02, [torch.randn(24, 256) for _ in range(10)]
    options = {"lr": 0.02, "level": 4, "mini_rows": 8}
    exact, _ = train(weight, grads, **options)
    quantized, _ = train(Int8Weight.from_float(weight), grads, **options)
    away, moved = (quantized.dequantize() - exact).norm(), (exact - weight).norm()
    assert away < 0.2 * moved


def test_vectors_of_a_group_of_whole_tensors_share_one_value_and_others_have_adam():
    vector, matrix = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4, 6))
    for mini_rows, kept in (
        (0, {"step", "folded_exp_avg", "row_block_exp_avg_sq"}),
        (1, {"step", "exp_avg", "exp_avg_sq"}),
    ):
        optimizer = FOAM([vector, matrix], level=2, second_moment="adam_mini", mini_rows=mini_rows)
        for p in (vector, matrix):
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert optimizer.state[vector].keys() == kept
        assert optimizer.state[matrix]["folded_exp_avg"].shape == (4, 2)
        assert optimizer.state[matrix]["row_block_exp_avg_sq"].numel() == (4 if mini_rows else 1)


# the blocks of models


def test_blocks_of_a_llama_are_heads_rows_and_norms():
    found = blocks(tiny_models.tiny_llama())  # 4 heads of 8, 2 of keys
    layer = "model.layers.0."
    assert found[f"{layer}self_attn.q_proj.weight"] == found[f"{layer}self_attn.k_proj.weight"] == (8, True)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert found[f"{layer}{name}.weight"] == (1, True)
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == (1, True)
    assert found[f"{layer}input_layernorm.weight"] == found["model.norm.weight"] == (0, False)
    assert blocks(tiny_models.tiny_llama(), fold_head=False)["lm_head.weight"] == (1, False)


def test_a_head_size_of_the_config_goes_before_hidden_size_over_heads():
    found = blocks(tiny_models.tiny_llama(head_dim=16))
    assert found["model.layers.0.self_attn.q_proj.weight"] == (16, True)
    assert found["model.layers.0.self_attn.k_proj.weight"] == (16, True)


def test_each_part_of_a_model_has_the_heads_of_its_own_config():
    vision = CLIPVisionConfig(hidden_size=32, num_attention_heads=8, num_hidden_layers=1, intermediate_size=32)
    text = LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=64)
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=3)
    found = blocks(LlavaForConditionalGeneration(config))
    sizes = {name: size for name, (size, _) in found.items() if name.endswith("q_proj.weight")}
    assert sorted(sizes.values()) == [4, 16] and all((size == 4) == ("vision" in name) for name, size in sizes.items())


def test_blocks_of_encoders_and_their_biases():
    found = blocks(tiny_models.tiny_roberta())
    layer = "roberta.encoder.layer.0."
    assert found[f"{layer}attention.self.query.weight"] == found[f"{layer}attention.self.key.weight"] == (8, True)
    assert found[f"{layer}attention.self.value.weight"] == found[f"{layer}intermediate.dense.weight"] == (1, True)
    assert found[f"{layer}attention.self.query.bias"] == (None, False)
    assert found[f"{layer}output.LayerNorm.weight"] == (0, False)
    assert found["roberta.embeddings.word_embeddings.weight"] == (1, True)
    assert found["classifier.dense.weight"] == (1, False)
    assert blocks(tiny_models.tiny_t5())["encoder.block.0.layer.0.SelfAttention.q.weight"] == (8, True)


def test_weights_without_heads_of_their_own_get_a_value_a_row_and_the_log_says_why(caplog):
    with caplog.at_level(logging.INFO, "foam_hf"):
        found = blocks(tiny_models.tiny_gpt2())
    assert found["transformer.h.0.attn.c_attn.weight"] == found["transformer.h.0.mlp.c_fc.weight"] == (1, True)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "for 2 weights, as query, key and value are one weight: transformer.h.0.attn.c_attn.weight" in said
    assert "for 6 weights, as the weight is transposed" in said

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.conv = nn.Linear(8, 12), nn.Conv2d(3, 5, 2)

    with caplog.at_level(logging.INFO, "foam_hf"):
        assert blocks(Odd())["q_proj.weight"] == (1, True) and blocks(Odd())["conv.weight"] == (6, True)
    assert "the config gives no head size that divides 12 rows" in caplog.text


def test_adapters_have_a_value_for_each_row():
    found = blocks(tiny_models.tiny_lora_llama(r=4))
    assert {rows for name, (rows, _) in found.items() if "lora_" in name} == {1}


def test_rows_that_no_block_divides_are_refused():
    p = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(ValueError, match=r"mini_rows=4 does not divide the 6 rows of a parameter of shape \(6, 4\)"):
        FOAM([p], second_moment="adam_mini", mini_rows=4)
    with pytest.raises(ValueError, match="mini_rows is out of range: got -1"):
        FOAM([p], second_moment="adam_mini", mini_rows=-1)
    FOAM([p], mini_rows=4)  # another rule


def test_biases_of_a_recurrent_layer_have_adam():
    found = blocks(nn.Sequential(nn.LSTM(4, 4)))
    assert {name for name, (size, _) in found.items() if size is None} == {"0.bias_ih_l0", "0.bias_hh_l0"}


def test_heads_have_their_own_layers_size_where_layers_differ() -> None:
    """As in Gemma 4: its config raises for what differs by the layer."""

    class Config:
        def get_text_config(self) -> Config:
            return self

        def __getattr__(self, name: str) -> int:
            raise RuntimeError(f"{name} is a per-layer attribute")

    class Attention(nn.Module):
        def __init__(self, head_dim: int) -> None:
            super().__init__()
            self.head_dim = head_dim
            self.q_proj, self.k_proj = nn.Linear(8, 32), nn.Linear(8, 32)

    model = nn.ModuleList([Attention(8), Attention(16), Attention(12)])
    model.config = Config()
    rows = rows_of_blocks(model, [name for name, _ in model.named_parameters()], model.config)
    assert [rows[f"{layer}.q_proj.weight"] for layer in range(3)] == [8, 16, 1]  # 12 does not divide 32
