"""INT8 weights through `from_pretrained`, `save_pretrained`, the Trainer and `foam-hf export`, and every refusal."""

from __future__ import annotations

import copy
import gc
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from foam_hf import Int8Config, foam_param_groups
from foam_hf.int8.quantizer import quantize_model_
from foam_hf.int8.weight import Int8Weight
from recipes.benchmarks.memory.memory_peak import random_int8_model
from tests.support.tiny_models import (
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen2,
    tiny_roberta,
    tiny_t5,
)

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("forget_mixed_precision")]

ROOT = Path(__file__).resolve().parents[2]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA in float32, saved."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_llama().save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder


def load(folder: Path, auto: Any = AutoModelForCausalLM, **config: Any) -> Any:
    return auto.from_pretrained(folder, quantization_config=Int8Config(**config), dtype=torch.float32)


@pytest.fixture
def saved(plain: Path, tmp_path: Path) -> Path:
    """The same with INT8 weights."""
    load(plain, head=True).save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def int8_names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, Int8Weight)]


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that the model holds; codes and scales on their own."""
    assert not any(isinstance(value, Int8Weight) for value in model.state_dict().values())
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [
        name for name in actual if actual[name].dtype != expected[name].dtype or not actual[name].equal(expected[name])
    ]
    assert different == []


# ---- registration ----


ORDERS = [
    "import foam_hf; import transformers.quantizers.auto as auto",
    "import transformers.quantizers.auto as auto; import foam_hf",
    "import foam_hf; foam_hf.Int8Config(); import transformers.quantizers.auto as auto",
    "from foam_hf import Int8Config; import transformers.quantizers.auto as auto; import foam_hf.int8.quantizer",
]
# Each order in a process of its own; they are forked from one that has imported what the orders have in common.
IN_FORKS = """
import os, sys
import huggingface_hub, safetensors.torch, tokenizers, torch, torch._dynamo
assert not {"foam_hf", "transformers"} & sys.modules.keys()
for order in sys.argv[1:]:
    if os.fork() == 0:
        exec(order)
        print(auto.AUTO_QUANTIZER_MAPPING["foam_int8"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["foam_int8"], flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(order)
"""


def test_the_quantizer_is_registered_whatever_is_imported_first() -> None:
    done = subprocess.run([sys.executable, "-c", IN_FORKS, *ORDERS], capture_output=True, text=True, check=False)
    registered = "<class 'foam_hf.int8.quantizer.Int8Quantizer'> <class 'foam_hf.int8.config.Int8Config'>\n"
    assert done.stdout == registered * len(ORDERS), done.stderr


# ---- loading ----


def test_a_loaded_model_has_int8_weights_that_train(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "foam_hf"):
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=Int8Config(), dtype=torch.bfloat16)
    layers = [f"model.layers.{i}" for i in range(2)]
    assert {name.rpartition(".weight")[0] for name in int8_names(model)} == {
        name for name, module in model.named_modules() if name.startswith(tuple(layers)) and name.endswith(LINEAR)
    }
    reference = tiny_llama().to(torch.bfloat16).state_dict()
    for name, p in model.named_parameters():
        assert p.requires_grad and p.dtype == torch.bfloat16 and p.shape == reference[name].shape
        if isinstance(p, Int8Weight):
            expected = Int8Weight.from_float(reference[name], block_size={32: 32, 48: 16}[p.shape[1]])
            assert p.codes.equal(expected.codes) and p.scales.equal(expected.scales)
        else:
            assert p.equal(reference[name])
    said = "INT8: 14 weights of LlamaForCausalLM, 15,360 of 19,616 parameters, in blocks of 32, 16"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_the_widest_block_that_divides_is_taken(tmp_path: Path) -> None:
    tiny_llama(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3).save_pretrained(
        tmp_path
    )
    layer = load(tmp_path).model.layers[0]
    assert (layer.self_attn.q_proj.weight.block_size, layer.mlp.down_proj.weight.block_size) == (64, 128)


@pytest.mark.parametrize(
    ("build", "auto", "inside", "left"),
    [
        (tiny_qwen2, AutoModelForCausalLM, 14, None),
        (tiny_roberta, AutoModelForSequenceClassification, 12, None),
        (tiny_mixtral, AutoModelForCausalLM, 8, "6 in fused 3-D tensors|2 of MixtralTopKRouter"),
    ],
)
def test_heads_embeddings_and_what_is_no_linear_layer_stay(
    build: Any, auto: Any, inside: int, left: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "foam_hf"):
        model = load(tmp_path, auto)
    names = int8_names(model)
    assert len(names) == inside
    assert not any(part in name for name in names for part in ("embed", "head", "classifier", "norm", "experts"))
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (left is not None)
    assert left is None or "stay as they are" in warned[0]
    folded = [p for group in foam_param_groups(model, level=3) if "level" in group for p in group["params"]]
    assert {id(p) for p in model.parameters() if isinstance(p, Int8Weight)} <= {id(p) for p in folded}


def test_t5_inside_whose_base_model_the_head_lies(tmp_path: Path) -> None:
    from transformers import T5ForConditionalGeneration

    tiny_t5().save_pretrained(tmp_path)
    names = int8_names(load(tmp_path, T5ForConditionalGeneration))
    assert len(names) == 2 * (4 + 2) + 2 * (8 + 2) and "lm_head.weight" not in names


def test_an_lm_head_is_int8_on_request_unless_it_is_the_embedding(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "lm_head.weight" in int8_names(load(plain, head=True))
    tiny_qwen2().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "foam_hf"):
        model = load(tmp_path, head=True)
    assert len(int8_names(model)) == 14 and model.lm_head.weight is model.model.embed_tokens.weight
    assert "the LM head of Qwen2ForCausalLM is its embedding" in caplog.text


def test_a_head_that_was_resized_is_plain_in_the_checkpoint_and_when_it_is_loaded(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(plain, head=True)
    model.resize_token_embeddings(72)
    assert len(int8_names(model)) == 14
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "foam_hf"):
        assert_same_bits(bits(load(tmp_path, head=True)), bits(model))
    assert "lm_head.weight is no INT8 weight in the checkpoint" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int8Config(dequantize=True))
    assert not int8_names(loaded) and torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_weights_are_dequantized_to_the_dtype_that_they_show(plain: Path, tmp_path: Path) -> None:
    model = load(plain)
    model.save_pretrained(tmp_path)  # the config's dtype is a name from now on
    model.to(torch.bfloat16)
    model.dequantize()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not int8_names(model)
    model(torch.tensor([[1, 2, 3]]))
    assert {p.dtype for p in load(plain).dequantize(torch.float16).parameters()} >= {torch.float16}


def test_a_choice_that_leaves_nothing_is_refused(plain: Path) -> None:
    with pytest.raises(ValueError, match="no weight of LlamaForCausalLM can become INT8: none is left; expected"):
        load(plain, modules_to_not_convert=["model"])


def test_named_modules_stay(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "foam_hf"):
        names = int8_names(load(plain, modules_to_not_convert=["down_proj", r"model\.layers\.1\..*", "no_such"]))
    assert names == [f"model.layers.0.{'mlp' if n[0] in 'gu' else 'self_attn'}.{n}.weight" for n in LINEAR[:-1]]
    assert "'no_such' names no weight" in caplog.text


def test_the_model_never_exists_in_floating_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=3).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    layers = 4 * sum(p.numel() for p in model.model.layers.parameters())
    rest = 4 * sum(p.numel() for p in model.parameters()) - layers
    largest = 4 * 256 * 128
    del model
    alive: list[int] = []
    quantize = Int8Weight.from_float.__func__  # type: ignore[attr-defined]

    def watched(cls: Any, weight: Tensor, block_size: int) -> Int8Weight:
        alive.append(floating_bytes())
        return quantize(cls, weight, block_size)

    before = floating_bytes()
    monkeypatch.setattr(Int8Weight, "from_float", classmethod(watched))
    # Not the dtype of the file, so every weight is cast, and none can be a view of the file.
    load(tmp_path)
    assert len(alive) == 21
    assert max(alive) - before <= rest + 3 * largest < layers / 2


@pytest.mark.gpu
def test_on_a_gpu_no_more_is_allocated_than_the_int8_weights_and_one_of_them_in_floating_point(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=16).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    whole = 2 * sum(p.numel() for p in model.parameters())
    del model
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Int8Config(), dtype=torch.bfloat16, device_map="cuda"
    )
    assert {p.codes.device.type for p in model.parameters() if isinstance(p, Int8Weight)} == {"cuda"}
    assert torch.cuda.memory_allocated() - before < 0.55 * whole
    assert torch.cuda.max_memory_allocated() - before < 0.8 * whole


def floating_bytes() -> int:
    """Bytes of all floating tensors alive."""
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter)]
    storages = {}
    for t in tensors:
        if t.layout == torch.strided and t.is_floating_point() and t.device.type == "cpu":
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


# ---- saving and loading again ----


def test_a_checkpoint_holds_codes_and_scales_as_plain_tensors_and_returns_bit_for_bit(
    plain: Path, tmp_path: Path
) -> None:
    model = load(plain, head=True)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert_same_bits(held, bits(model))
    name = "model.layers.0.mlp.down_proj.weight"
    assert (held[f"{name}_codes"].dtype, held[f"{name}_scales"].dtype) == (torch.int8, torch.float32)
    assert name not in held
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "foam_int8", "block_size": 128, "head": True, "modules_to_not_convert": None}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(bits(again), bits(model))
    assert all(p.requires_grad for p in again.parameters())


def tiny(name: str) -> Any:
    """A model whose `_init_weights` looks at weights of its parts."""
    import transformers as hf

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    image = {"image_size": 16, "patch_size": 4}
    text = {"vocab_size": 64, **sizes, "max_position_embeddings": 16}
    heads = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    if name == "t5":
        return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, **heads))
    if name == "modernbert":
        return hf.ModernBertForSequenceClassification(hf.ModernBertConfig(vocab_size=64, pad_token_id=0, **sizes))
    if name == "dinov2":
        return hf.Dinov2ForImageClassification(hf.Dinov2Config(**sizes, **image))
    if name == "siglip":
        return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config={**sizes, **image}))
    if name == "mamba":
        return hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=16, time_step_rank=16)
        )
    convolutions = {"conv_dim": (16,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(vocab_size=64, **sizes, **convolutions, **positions))


@pytest.mark.parametrize("name", ["t5", "modernbert", "dinov2", "siglip", "mamba", "wav2vec2"])
def test_models_that_look_at_their_weights_as_they_initialize_come_back(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    auto = type(model)
    model.save_pretrained(tmp_path / "plain")
    saved = load(tmp_path / "plain", auto)
    assert int8_names(saved)
    saved.save_pretrained(tmp_path / "int8")
    back = auto.from_pretrained(tmp_path / "int8")
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in saved.named_parameters()]
    assert int8_names(back) == int8_names(saved)
    assert_same_bits(bits(back), bits(saved))
    plain = auto.from_pretrained(tmp_path / "int8", quantization_config=Int8Config(dequantize=True))
    assert not int8_names(plain)
    for (where, p), q in zip(plain.named_parameters(), saved.parameters(), strict=True):
        q = q.dequantize() if isinstance(q, Int8Weight) else q
        assert torch.equal(p, q), where


def test_a_reloaded_model_is_saved_again(saved: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "twice")
    assert_same_bits(load_file(tmp_path / "twice/model.safetensors"), load_file(saved / "model.safetensors"))


def split_codes_from_scales(folder: Path) -> None:
    """Rewrite a checkpoint as two files: scales in the first, everything else in the second."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{2 - name.endswith('_scales')}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_codes_and_scales_may_lie_in_different_files(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    split_codes_from_scales(saved)
    assert_same_bits(bits(AutoModelForCausalLM.from_pretrained(saved)), bits(model))
    model.save_pretrained(tmp_path / "small", max_shard_size="2KB")
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 10
    assert_same_bits(bits(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), bits(model))


def test_a_checkpoint_loads_as_another_kind_of_model(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    base = AutoModel.from_pretrained(saved)
    assert_same_bits(bits(base), bits(model.model))
    classifier = AutoModelForSequenceClassification.from_pretrained(saved)
    assert_same_bits(bits(classifier.model), bits(model.model))
    assert type(classifier.score.weight.data) is Tensor


def test_a_layer_that_the_checkpoint_lacks_is_int8_too(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    pooler = load(tmp_path, BertForSequenceClassification).bert.pooler.dense.weight
    assert isinstance(pooler, Int8Weight) and pooler.dequantize().std() > 0


def test_the_dtype_asked_for_is_that_of_every_weight(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    scales = model.lm_head.weight.scales
    assert scales.dtype == torch.float32 and scales.equal(
        load_file(saved / "model.safetensors")["lm_head.weight_scales"]
    )


@pytest.mark.parametrize("how", ["on loading", "afterwards"])
def test_dequantized_it_is_an_ordinary_model(how: str, saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    expected = {
        name: p.dequantize() if isinstance(p, Int8Weight) else p.detach() for name, p in model.named_parameters()
    }
    if how == "on loading":
        model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=Int8Config(dequantize=True))
    else:
        model.dequantize()
    assert_same_bits(dict(model.state_dict()), expected)
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert_same_bits(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()), expected)


def test_what_a_checkpoint_overrules_is_named(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "foam_hf"):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=Int8Config(head=True))
        assert not caplog.records
        model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=Int8Config(block_size=64))
    assert "its own settings are used: block_size=128 instead of 64, head=True instead of False" in caplog.text
    assert "lm_head.weight" in int8_names(model)


def test_copies_load_checkpoints_like_the_original(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    other.load_state_dict(load_file(saved / "model.safetensors"))
    assert_same_bits(bits(other), bits(model))


# ---- random weights ----


def test_a_random_model_comes_into_being_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama(hidden_size=64, intermediate_size=128)
    alive: list[int] = []
    quantize = Int8Weight.from_float.__func__  # type: ignore[attr-defined]

    def watched(cls: Any, weight: Tensor, block_size: int) -> Int8Weight:
        assert 0.5 < weight.float().std() / source.config.initializer_range < 2
        alive.append(floating_bytes())
        return quantize(cls, weight, block_size)

    before = floating_bytes()
    monkeypatch.setattr(Int8Weight, "from_float", classmethod(watched))
    model = random_int8_model(source.config, Int8Config(head=True), dtype=torch.bfloat16)
    assert len(int8_names(model)) == len(alive) == 15
    layers = 2 * sum(p.numel() for p in source.model.layers.parameters())
    assert max(alive) - before < layers / 2
    loss = model(input_ids=torch.arange(12).view(1, -1), labels=torch.arange(12).view(1, -1)).loss
    assert 3 < loss.item() < 6
    model.save_pretrained(tmp_path)
    assert_same_bits(bits(AutoModelForCausalLM.from_pretrained(tmp_path)), bits(model))


def test_a_model_in_memory_becomes_int8_as_loading_it_would(plain: Path, tmp_path: Path) -> None:
    model = quantize_model_(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
    assert_same_bits(bits(model), bits(load(plain)))
    model.save_pretrained(tmp_path)
    assert_same_bits(bits(AutoModelForCausalLM.from_pretrained(tmp_path)), bits(model))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"block_size": 100}, ValueError, "block_size is not valid, got 100; expected a power of two from 16 to 1024"),
        ({"block_size": 8}, ValueError, "got 8"),
        ({"block_size": "128"}, TypeError, "block_size is not an integer, got '128'"),
        ({"block_size": True}, TypeError, "got True"),
        ({"head": 1}, TypeError, "head is not a bool, got 1"),
        ({"dequantize": "yes"}, TypeError, "dequantize is not a bool"),
        ({"modules_to_not_convert": "q_proj"}, TypeError, "no list of strings, got 'q_proj'"),
        ({"blocksize": 64}, TypeError, "no blocksize, got blocksize=64; did you mean 'block_size'"),
        ({"quant_method": "fp8"}, ValueError, "got 'fp8'; expected 'foam_int8'"),
    ],
)
def test_a_wrong_config_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Int8Config(**arguments)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.0.mlp.up_proj.weight"


def drop_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{NAME}_scales"]


def drop_codes(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{NAME}_codes"]


def drop_both(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{NAME}_codes"], tensors[f"{NAME}_scales"]


def half_blocks(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}_scales"] = tensors[f"{NAME}_scales"].repeat_interleave(2, dim=1)


def half_scales(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}_scales"] = tensors[f"{NAME}_scales"].half()


def unsigned(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}_codes"] = tensors[f"{NAME}_codes"].to(torch.uint8)


def fewer_rows(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}_codes"] = tensors[f"{NAME}_codes"][:-1].contiguous()


DAMAGE = [
    (drop_scales, f"holds {NAME}_codes without {NAME}_scales"),
    (drop_codes, f"holds {NAME}_scales without {NAME}_codes"),
    (
        half_blocks,
        r"scales are float32 \[48, 2\] for codes of int8 \[48, 32\]; expected float32 \[48, 1\], for blocks of 32",
    ),
    (half_scales, r"scales are float16 \[48, 1\]"),
    (unsigned, r"codes are uint8 \[48, 32\]; expected int8"),
    (fewer_rows, r"for codes of int8 \[47, 32\]"),
]


@pytest.mark.parametrize(("damage", "words"), [*DAMAGE, (drop_both, f"lacks 1 of 15 INT8 weights, {NAME} the first")])
def test_a_damaged_checkpoint_is_refused_in_one_line(damage: Any, words: str, saved: Path) -> None:
    rewrite(saved, damage)
    with pytest.raises(ValueError, match=words) as caught:
        AutoModelForCausalLM.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_int8_is_refused(tmp_path: Path, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        ValueError, match="no weight of GPT2LMHeadModel can become INT8: 8 of Conv1D, which is no nn.Linear"
    ):
        load(tmp_path / "gpt2")
    tiny_llama(hidden_size=40, num_attention_heads=5, num_key_value_heads=5).save_pretrained(tmp_path / "forty")
    with caplog.at_level(logging.WARNING, "foam_hf"):
        assert len(int8_names(load(tmp_path / "forty"))) == 2
    assert (
        "12 of width 40, which no block of 16 or more divides (model.layers.0.self_attn.q_proj.weight, ...)"
        in caplog.text
    )
    with pytest.raises(ValueError, match="this one is plain already"):
        load(plain, dequantize=True)
    with pytest.raises(ValueError, match="cannot be offloaded, got a device_map with cpu, disk"):
        AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=Int8Config(), device_map={"model": "cpu", "lm_head": "disk"}
        )
    with pytest.raises(TypeError, match="no transformers model, got Linear"):
        quantize_model_(nn.Linear(32, 32))
