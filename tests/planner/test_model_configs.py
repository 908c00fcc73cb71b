"""Models by name for the planner: built-in, from files, from the hub; on the meta device, with no byte allocated."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from transformers import AutoConfig, AutoModelForCausalLM

from foam_hf.memory import breakdown
from foam_hf.memory.storages import storages, total
from foam_hf.planner.meta_models import config_dtype, meta_model, on_meta, positions, with_adapters
from foam_hf.planner.model_configs import BUILTIN, ModelError, load_config
from tests.support import families_audio, tiny_models

pytestmark = pytest.mark.compat

# As counted in the checkpoints of these models; of the seven without one, by the formula for a LLaMA of their shapes.
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
}

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("was_run").touch()

class OwnConfig(LlamaConfig):
    model_type = "own_code"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def hub(monkeypatch):
    """What the hub answers, without a network."""

    def answer(error: Exception) -> None:
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)

    return answer


def hub_error(kind: type[Exception], *arguments) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "many lines\nof explanation")
    return error


def weights(model: torch.nn.Module) -> int:
    return total(storages([*model.parameters(), *model.buffers()]))


# --- Built-in models ---


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_models_have_the_parameters_of_the_real_ones(name):
    config = load_config(name)
    model = meta_model(config)
    assert all(p.is_meta for p in model.parameters())
    h, v = config.hidden_size, config.vocab_size
    if name in PARAMETERS:
        expected = PARAMETERS[name]
    else:
        layer = 4 * h * h + 3 * h * config.intermediate_size + 2 * h
        expected = config.num_hidden_layers * layer + 2 * v * h + h
    assert sum(p.numel() for p in model.parameters()) == expected
    assert {p.dtype for p in model.parameters()} == {config_dtype(config)}
    assert config_dtype(config) == (torch.float32 if "roberta" in name else torch.bfloat16)


def test_names_of_built_in_models_ignore_case_and_give_way_to_a_local_folder(tmp_path, monkeypatch):
    assert load_config("Qwen2.5-0.5B").hidden_size == 896
    monkeypatch.chdir(tmp_path)
    tiny_models.tiny_llama().config.save_pretrained("llama-7b")
    assert load_config("llama-7b").hidden_size == 32


def test_a_built_in_config_is_not_changed_by_its_users():
    load_config("llama-60m").rope_parameters = None
    assert load_config("llama-3.1-8b").to_dict() == load_config("llama-3.1-8b").to_dict()


# --- Files ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("builder", [tiny_models.tiny_llama, tiny_models.tiny_qwen2, tiny_models.tiny_mixtral])
def test_weights_of_a_saved_model_are_those_of_the_loaded_one(builder, dtype, tmp_path):
    builder().to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for source in (tmp_path, tmp_path / "config.json"):
        planned = meta_model(load_config(str(source)))  # in the dtype of the checkpoint
        assert type(planned) is type(loaded)
        assert weights(planned) == weights(loaded) == breakdown(loaded, torch.optim.SGD(loaded.parameters())).weights
    other = torch.float16
    assert weights(meta_model(load_config(str(tmp_path)), dtype=other)) == weights(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=other)
    )
    assert torch.get_default_dtype() == torch.float32


def test_a_config_without_a_known_architecture_becomes_a_language_model(tmp_path):
    """As in the configs of GaLore's repository: LLaMAForCausalLM is no class of transformers."""
    path = tmp_path / "llama_9m.json"
    path.write_text(json.dumps({"architectures": ["LLaMAForCausalLM"], "model_type": "llama", "hidden_size": 128}))
    assert type(meta_model(load_config(str(path)))).__name__ == "LlamaForCausalLM"
    encoder = AutoConfig.for_model("vit", num_hidden_layers=1)
    assert type(meta_model(encoder)).__name__ == "ViTModel"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not JSON: "),
        ("[]", "config.json is no model's config: it has no model_type"),
        ('{"hidden_size": 4}', "config.json is no model's config: it has no model_type"),
        ('{"model_type": "no_such_kind"}', "cannot read the config of"),
    ],
)
def test_broken_files(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load_config(str(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_contradicts_itself(tmp_path):
    config = AutoConfig.for_model("roberta", hidden_size=30, num_attention_heads=4)
    with pytest.raises(ModelError, match="cannot build RobertaConfig: The hidden size"):
        meta_model(config)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("method", "option"), [("foam_int8", ", with --int8-weights .*"), ("gptq", "")])
def test_a_quantized_checkpoint_is_not_taken_for_a_plain_one(tmp_path, method, option):
    config = tiny_models.tiny_llama().config
    config.quantization_config = {"quant_method": method}
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=f"quantized by {method}; expected the plain model that it was made from{option}$"
    ):
        meta_model(load_config(str(tmp_path)))


def test_missing_files(tmp_path):
    with pytest.raises(ModelError, match="no config.json in the folder"):
        load_config(str(tmp_path))
    for name in ("./nowhere", str(tmp_path / "nowhere"), "nowhere.json", "a/b/c"):
        with pytest.raises(ModelError, match="no such file or folder: .*llama-60m"):
            load_config(name)


# --- Code of a model's own ---


@pytest.fixture
def folder_with_code(tmp_path):
    settings = tiny_models.tiny_llama().config.to_dict()
    settings["model_type"] = "own_code"
    settings["architectures"] = ["OwnModel"]
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(OWN_CODE)
    return tmp_path


def test_code_is_not_run_unless_it_is_trusted(folder_with_code, monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    for source in (folder_with_code, folder_with_code / "config.json"):
        with pytest.raises(ModelError, match="brings its own code, and none of it was run.*--trust-remote-code"):
            load_config(str(source))
    assert not list(cache.rglob("own.py")) and not list(cache.rglob("was_run"))
    config = load_config(str(folder_with_code), trust_remote_code=True)
    model = meta_model(config, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel" and model.lm_head.weight.is_meta
    assert list(cache.rglob("was_run"))


# --- The hub ---


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "the hub gives meta-llama/Llama-3.1-8B only to those who accepted its terms"),
        (errors.RepositoryNotFoundError, "no model 'meta-llama/Llama-3.1-8B'; did you mean 'llama-3.1-8b'?"),
        (errors.EntryNotFoundError, "meta-llama/Llama-3.1-8B has no config.json on the hub"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached; did you mean 'llama-3.1-8b'?"),
        (errors.OfflineModeIsEnabled, "the hub cannot be reached"),
        (ConnectionError, "the hub cannot be reached"),
    ],
)
def test_the_hubs_errors_become_one_line(hub, error, message, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub(hub_error(error))
    with pytest.raises(ModelError) as caught:
        load_config("meta-llama/Llama-3.1-8B")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_a_name_of_the_same_shapes_is_suggested(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    hub(ConnectionError())
    suggestions = {"Qwen/Qwen2.5-7B-Instruct": "'qwen2.5-7b'", "me/roberta-bsae": "'roberta-base'"}
    suggestions |= {"Qwen/Qwen2.5-3B": None, "Qwen/Qwen2.5-72B": None, "meta-llama/Meta-Llama-3-8B": None}
    suggestions |= {"meta-llama/Llama-3.2-1B": None, "FacebookAI/xlm-roberta-large-and-more": None}
    for name, suggested in suggestions.items():
        with pytest.raises(ModelError) as caught:
            load_config(name)
        assert ("did you mean" in str(caught.value)) == (suggested is not None)
        assert suggested is None or f"did you mean {suggested}?" in str(caught.value)


def test_a_name_that_no_model_can_have():
    with pytest.raises(ModelError, match="no model 'qwen 7b'"):
        load_config("qwen 7b")


def test_a_model_of_the_hub_and_a_cached_one_without_network(hub, monkeypatch, tmp_path):
    tiny_models.tiny_qwen2().config.save_pretrained(tmp_path)
    path = str(tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: path)
    assert load_config("somebody/tiny").hidden_size == 32
    hub(ConnectionError("no network"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: path)
    assert load_config("somebody/tiny").hidden_size == 32


# --- On the meta device ---


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_a_model_moves_to_the_meta_device_as_it_is(name):
    model = tiny_models.BUILDERS[name]()
    next(model.parameters()).requires_grad_(False)
    moved = on_meta(model)
    assert weights(moved) == weights(model)
    assert all(p.is_meta for p in moved.parameters())
    own, theirs = ([(n, p.shape, p.requires_grad) for n, p in m.named_parameters()] for m in (model, moved))
    assert own == theirs  # ties included: named_parameters lists a tied weight once
    assert not any(p.is_meta for p in model.parameters())
    assert on_meta(moved) is moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("builder", [tiny_models.tiny_llama, tiny_models.tiny_roberta])
def test_adapters_are_those_of_peft(builder, dtype):
    from peft import LoraConfig, get_peft_model

    task = "SEQ_CLS" if builder is tiny_models.tiny_roberta else "CAUSAL_LM"
    real = get_peft_model(builder().to(dtype), LoraConfig(r=4, target_modules="all-linear", task_type=task))
    planned = with_adapters(on_meta(builder().to(dtype)), 4)
    assert weights(planned) == weights(real)
    own, theirs = ({n: p.dtype for n, p in m.named_parameters() if p.requires_grad} for m in (planned, real))
    assert own == theirs
    assert all(p.is_meta for p in planned.parameters())


def test_positions_that_are_learned_are_limited():
    assert positions(tiny_models.tiny_roberta()) == 32  # 34, two of them for padding
    assert positions(tiny_models.tiny_gpt2()) == 32
    assert positions(tiny_models.tiny_llama()) is None
    whisper = next(family for family in families_audio.FAMILIES if family.name == "Whisper")
    sound, text = whisper.config["max_source_positions"], whisper.config["max_target_positions"]
    assert sound != positions(whisper.make()) == text
