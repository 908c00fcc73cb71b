"""`estimate_memory` and the planner behind it, against real models, real optimizers and each other."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import foam_hf
from foam_hf import FOAM, estimate_memory, foam_param_groups
from foam_hf.memory import breakdown
from foam_hf.planner import Planner
from foam_hf.planner.activations import activation_bytes, optimizer_temporary_bytes
from foam_hf.planner.meta_models import on_meta
from foam_hf.planner.model_configs import BUILTIN, ModelError
from tests.support import families_audio, tiny_models
from tests.support.tiny_models import take_step

pytestmark = [pytest.mark.long, pytest.mark.compat]

SIZE = {"batch": 2, "sequence": 16}
WIDE = {"hidden_size": 128, "intermediate_size": 160}


def foam_after_a_step(model: nn.Module, **options) -> FOAM:
    optimizer = FOAM(foam_param_groups(model), **options)
    take_step(model, optimizer)
    return optimizer


def counts(plan) -> tuple[int, int, int]:
    return plan.weights, plan.gradients, plan.state


# --- Prediction and measurement ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_config_a_folder_and_a_model_give_the_plan_of_the_real_model(dtype, tmp_path):
    model = tiny_models.tiny_llama().to(dtype)
    model.save_pretrained(tmp_path)
    plans = [
        estimate_memory(str(tmp_path), **SIZE),
        estimate_memory(tmp_path / "config.json", **SIZE),
        estimate_memory(model.config, dtype=dtype, **SIZE),
    ]
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    plans.append(estimate_memory(loaded, **SIZE))
    assert all(plan == plans[0] for plan in plans)
    measured = breakdown(loaded, foam_after_a_step(loaded))
    assert counts(plans[0]) == (measured.weights, measured.gradients, measured.state)
    assert plans[0].trainable == plans[0].parameters == measured.parameters
    assert plans[0].total == sum(counts(plans[0])) + plans[0].activations
    assert not any(p.grad is None for p in loaded.parameters()), "the model of the user is left as it is"


@pytest.mark.parametrize("builder", [tiny_models.tiny_llama, tiny_models.tiny_qwen2, tiny_models.tiny_roberta])
def test_int8_weights_are_those_of_a_quantized_model(builder):
    from foam_hf.int8.models import convert_, module_of, plan_int8

    model = builder(**WIDE).bfloat16()
    plan = estimate_memory(model, int8_weights=True, **SIZE)
    plain = estimate_memory(model, **SIZE)
    for name, block in plan_int8(model).blocks.items():
        convert_(module_of(model, name), block)
    measured = breakdown(model, foam_after_a_step(model))
    assert counts(plan) == (measured.weights, measured.gradients, measured.state)
    assert plan.weights < plain.weights and counts(plan)[1:] == counts(plain)[1:]
    assert plan.int8_weights and plan.label == "foam (INT8 weights)"


def test_lora_counts_adapters_as_peft_makes_them():
    from peft import LoraConfig, get_peft_model

    plan = estimate_memory(tiny_models.tiny_llama().bfloat16(), lora_rank=4, **SIZE)
    model = get_peft_model(tiny_models.tiny_llama().bfloat16(), LoraConfig(r=4, target_modules="all-linear"))
    measured = breakdown(model, foam_after_a_step(model))
    assert counts(plan) == (measured.weights, measured.gradients, measured.state)
    assert plan.trainable == measured.parameters < plan.parameters


def test_gradient_release_keeps_one_gradient():
    model = tiny_models.tiny_llama()
    plain, released = (estimate_memory(model, gradient_release=on, **SIZE) for on in (False, True))
    assert released.gradients == max(p.numel() for p in model.parameters()) * 4
    assert (released.weights, released.state) == (plain.weights, plain.state)
    assert released.total <= plain.total
    large = [estimate_memory("llama-60m", batch=1, sequence=8, gradient_release=on).total for on in (False, True)]
    assert large[1] < large[0], "where gradients, and not activations, are the peak"
    by_argument = estimate_memory(model, optim_args="gradient_release=true", **SIZE)
    assert (by_argument.total, by_argument.gradient_release) == (released.total, True)


def test_activations_are_the_traced_ones_unless_the_optimizers_step_is_the_peak():
    model = on_meta(tiny_models.tiny_llama())
    plan = estimate_memory(model, **SIZE)
    assert plan.activations == activation_bytes(model, **SIZE).bytes
    assert plan.activations_note
    large = estimate_memory("llama-7b", "adamw_torch", batch=1, sequence=16)
    assert large.activations == optimizer_temporary_bytes(Planner("llama-7b").model, "adamw_torch")
    assert large.activations > estimate_memory("llama-7b", "adamw_torch_fused", batch=1, sequence=16).activations


def test_the_workload_reaches_the_estimate():
    model = tiny_models.tiny_llama(num_hidden_layers=8, num_key_value_heads=4)
    size = {"batch": 64, "sequence": 64}
    plain = estimate_memory(model, **size).total
    assert estimate_memory(model, gradient_checkpointing=True, **size).total < plain
    assert estimate_memory(model, attention="eager", **size).total > plain
    assert estimate_memory(model, autocast="bfloat16", **size).total != plain
    assert estimate_memory(model, accumulation=True, **size).total > plain
    assert estimate_memory(model, batch=65, sequence=64).total > plain


# --- Many plans ---


def test_largest_batch_is_the_last_that_fits():
    planner = Planner(tiny_models.tiny_llama(), sequence=32)
    plan = planner.plan("foam")
    for limit in (plan.total - 1, plan.total, 200_000_000, 1_000_000_000):
        batch = planner.largest_batch(plan, limit)
        assert batch == 0 or planner.with_batch(plan, batch).total <= limit
        assert planner.with_batch(plan, batch + 1).total > limit
    assert planner.largest_batch(plan, plan.total - 1) == 0
    assert planner.with_batch(plan, 1) == plan


def test_plans_of_one_planner_do_not_disturb_each_other():
    planner = Planner(tiny_models.tiny_llama(**WIDE), **SIZE)
    first = planner.plan("foam", "level=2")
    others = [planner.plan("adafactor"), planner.plan("foam", int8_weights=True, gradient_release=True)]
    assert planner.plan("foam", "level=2") == first
    assert len({first.total, *(plan.total for plan in others)}) == 3
    assert (first.label, others[1].label) == ("foam (level=2)", "foam (gradient release, INT8 weights)")
    checkpointed = planner.variant(batch=3, gradient_checkpointing=True)
    assert checkpointed.plan("foam").batch == 3 and planner.plan("foam", "level=2") == first


@pytest.mark.parametrize("name", BUILTIN)
def test_every_built_in_model_has_a_plan(name):
    plan = estimate_memory(name, sequence=64)
    assert plan.activations > 0 and plan.total > plan.weights + plan.state
    assert (plan.batch, plan.sequence) == (1, 64)


def test_the_default_sequence_is_512_or_what_the_model_has_positions_for():
    assert Planner("llama-60m").sequence == 512
    assert Planner(tiny_models.tiny_roberta()).sequence == 32


def test_a_users_model_is_left_alone():
    model = tiny_models.tiny_lora_llama()
    before = copy.deepcopy(model.state_dict())
    estimate_memory(model, **SIZE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- What cannot be planned ---


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("llama-60m", {"optim": "fome"}, "unknown optimizer 'fome'; did you mean 'foam'"),
        ("llama-60m", {"optim_args": "levle=2"}, "unknown key 'levle'"),
        ("llama-60m", {"optim_args": "level=2", "optim": "foam_mini"}, "level=2 contradicts optim='foam_mini'"),
        ("llama-60m", {"optim_args": "rank=4", "optim": "adafactor"}, "adafactor has no 'rank'; it takes none"),
        ("llama-60m", {"optim_args": "rank=0", "optim": "galore_adamw"}, "rank of galore_adamw must be an integer"),
        (
            "llama-60m",
            {"optim_args": "proj=qr", "optim": "apollo_adamw"},
            "proj of apollo_adamw must be one of random",
        ),
        ("llama-60m", {"optim_args": "stochastic_rounding=true", "dtype": torch.float32}, "no parameter is bfloat16"),
        ("llama-60m", {"optim": "adamw_torch", "gradient_release": True}, "gradient_release is FOAM's, got it with"),
        ("llama-60m", {"optim": "adamw_torch", "int8_weights": True}, "int8_weights are FOAM's, got them with"),
        (
            "llama-60m",
            {"gradient_release": True, "accumulation": True, "optim_args": "second_moment=factored"},
            "by the block rule alone: got second_moment=factored",
        ),
        (
            "llama-60m",
            {"offload_weights": True, "int8_weights": True},
            "lora_rank=None; expected True, True, False and None",
        ),
        ("llama-60m", {"batch": 0}, "batch is not a size, got 0"),
        ("llama-60m", {"sequence": 1.5}, "sequence is not a size, got 1.5"),
        ("llama-60m", {"lora_rank": True}, "lora_rank is not a size, got True"),
        ("llama-60m", {"architecture": "NoSuchClass"}, "transformers has no model class 'NoSuchClass'"),
        ("llama-60m", {"architecture": "BertModel"}, "BertModel does not take a LlamaConfig"),
        ("llama-60m", {"target_modules": "nothing", "optim": "galore_adamw"}, "optim_target_modules matches no"),
        ("roberta-base", {"sequence": 513}, "the model has positions for 512 tokens, got sequences of 513"),
        ("roberta-base", {"optim": "adam_mini"}, "adam_mini takes roberta.embeddings.LayerNorm.weight for a matrix"),
        ("no-such-model.json", {}, "no such file or folder"),
    ],
)
def test_errors_say_what_would_be_right(model, arguments, message):
    with pytest.raises(ValueError) as caught:
        estimate_memory(model, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_length_of_a_text_is_not_all_that_a_model_of_sound_is_asked_for():
    whisper = next(each for each in families_audio.FAMILIES if each.name == "Whisper").make()
    with pytest.raises(ValueError, match="positions for 16 tokens, .*; its main input is input_features, and plans"):
        Planner(whisper, sequence=17)


def test_a_models_own_dtype_is_the_one_that_counts():
    with pytest.raises(ValueError, match="a model is planned as it is"):
        estimate_memory(tiny_models.tiny_llama(), dtype=torch.bfloat16)


def test_another_architecture_of_the_same_config():
    labels = estimate_memory("roberta-base", sequence=16)
    tokens = estimate_memory("roberta-base", sequence=16, architecture="RobertaForMaskedLM")
    assert tokens.parameters == 124_697_433 != labels.parameters
    assert tokens.activations > labels.activations


def test_peft_is_only_needed_for_adapters(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="lora_rank needs peft.*pip install peft"):
        estimate_memory("llama-60m", lora_rank=4)


def test_the_name_is_public_and_costs_nothing_until_it_is_used():
    code = "import sys, foam_hf; assert 'estimate_memory' in dir(foam_hf); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert foam_hf.estimate_memory is estimate_memory


def test_accumulation_with_release_adds_three_numbers_a_block_and_the_gradients_of_vectors() -> None:
    model = tiny_models.tiny_llama()
    size = {"sequence": 64, "batch": 2, "optim_args": "level=3"}
    released = estimate_memory(model, "foam", gradient_release=True, **size)
    both = estimate_memory(model, "foam", gradient_release=True, accumulation=True, **size)
    sums = sum(12 * p.shape[0] * -(-p.shape[1] // 8) for p in model.parameters() if p.dim() > 1)
    vectors = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 1)
    assert both.gradients - released.gradients == sums + vectors
    assert both.activations == released.activations
