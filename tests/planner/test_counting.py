"""What the planner counts is what the optimizers that Trainer builds hold after a step, to the byte."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import foam_hf  # noqa: F401 - registers optim="foam"
from foam_hf.memory import breakdown, state_bytes
from foam_hf.planner.counting import Counted, count_bytes
from foam_hf.planner.meta_models import on_meta
from tests.support import tiny_models
from tests.support.tiny_models import take_step

pytestmark = [pytest.mark.long, pytest.mark.compat]

# Wide enough for 8-bit states, which begin at 4096 elements, and not a multiple of their blocks of 256.
WIDE = {"hidden_size": 96, "intermediate_size": 148}
MODELS = {
    "roberta": lambda: tiny_models.tiny_roberta(**WIDE),
    "qwen2": lambda: tiny_models.tiny_qwen2(**WIDE),  # tied
    "llama": lambda: tiny_models.tiny_llama(**WIDE),
    "mixtral": tiny_models.tiny_mixtral,
    "gpt2": tiny_models.tiny_gpt2,
    "lora_llama": lambda: tiny_models.tiny_lora_llama(r=8),
}
FOAM_ARGS = [
    "level=0",
    "level=3,scale=0.5",
    "level=8,second_moment=factored",
    "level=row,state_dtype=bfloat16",
    "fold_embeddings=true",
    "fold_head=true,fold_embeddings=true",
    "level=2,second_moment=factored,fold_embeddings=true,state_dtype=bfloat16",
]


@pytest.fixture(autouse=True)
def _bitsandbytes_forgets():
    """Trainer leaves overrides for embeddings in a singleton of the process, by position in the param groups."""
    yield
    if "bitsandbytes" in sys.modules:
        sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()


def trained(model: nn.Module, folder, optim: str, use_cpu: bool = True, **arguments) -> torch.optim.Optimizer:
    """The optimizer that Trainer builds, after one step."""
    arguments = TrainingArguments(str(folder), optim=optim, use_cpu=use_cpu, report_to="none", **arguments)
    trainer = Trainer(model, arguments)
    optimizer = trainer.create_optimizer()
    take_step(model, optimizer)
    return optimizer


def assert_counted(model: nn.Module, optimizer: torch.optim.Optimizer, plan) -> None:
    measured = breakdown(model, optimizer)
    assert plan.state == measured.state == state_bytes(optimizer)
    assert plan.weights == measured.weights
    assert plan.gradients == measured.gradients
    assert plan.trainable == measured.parameters


def count(model: nn.Module, *args, **kwargs) -> Counted:
    """By way of the meta device, where nothing could be read off real memory."""
    return count_bytes(on_meta(model), *args, **kwargs)


# --- Counted is measured ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_peers_that_take_every_weight(optim, name, dtype, tmp_path):
    model = MODELS[name]().to(dtype)
    plan = count(model, optim)
    assert_counted(model, trained(model, tmp_path, optim), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optim_args", [None, *FOAM_ARGS])
def test_foam_in_all_its_modes(optim_args, name, dtype, tmp_path):
    model = MODELS[name]().to(dtype)
    plan = count(model, "foam", optim_args)
    assert_counted(model, trained(model, tmp_path, "foam", optim_args=optim_args), plan)


def test_foam_mini_and_target_modules(tmp_path):
    model = tiny_models.tiny_llama()
    plan = count(model, "foam_mini", target_modules=["mlp"])
    assert_counted(model, trained(model, tmp_path, "foam_mini", optim_target_modules=["mlp"]), plan)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("foam_muon", "level=2"),
        ("foam_muon", "level=row,state_dtype=bfloat16,fold_head=true,plain_state=8bit"),
        ("foam_adam_mini", "level=2"),
        ("foam_adam_mini", "level=0,state_dtype=bfloat16,fold_embeddings=true"),
        ("foam", "plain_state=8bit"),
    ],
)
def test_foam_by_its_other_names(optim, optim_args, name, tmp_path):
    model = MODELS[name]().to(torch.bfloat16)
    plan = count(model, optim, optim_args)
    assert_counted(model, trained(model, tmp_path, optim, optim_args=optim_args), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "optim_args", [None, "rank=4", "rank=200", "rank=8,proj_type=reverse_std", "rank=8,proj_type=right"]
)
@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw"])
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")
def test_projected_peers(optim, optim_args, dtype, tmp_path):
    targets = ["self_attn", "mlp"]
    if optim == "apollo_adamw" and optim_args and "proj_type" in optim_args:
        optim_args += ",scale_type=tensor"  # with one factor a channel, it fails on other projections than its own
    model = tiny_models.tiny_llama(**WIDE).to(dtype)
    plan = count(model, optim, optim_args, target_modules=targets)
    # Without targets: the linear weights inside the base model, and these are all of them.
    assert plan.state == count(model, optim, optim_args).state
    assert_counted(model, trained(model, tmp_path, optim, optim_args=optim_args, optim_target_modules=targets), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("galore_adamw", "rank=8,proj_type=left"),
        ("galore_adamw", "rank=8,proj_type=full"),
        ("apollo_adamw", "rank=8,proj_type=left,scale_type=tensor"),
        ("apollo_adamw", "rank=8,proj=svd"),
    ],
)
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")
def test_other_projections(optim, optim_args, dtype, tmp_path):
    model = tiny_models.tiny_roberta(**WIDE).to(dtype)
    plan = count(model, optim, optim_args, target_modules="all-linear")
    real = trained(model, tmp_path, optim, optim_args=optim_args, optim_target_modules="all-linear")
    assert_counted(model, real, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is not in this torch")
def test_muon_with_adamw_for_the_rest(dtype):
    model = tiny_models.tiny_qwen2().to(dtype)
    plan = count(model, "muon")
    inside = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for p in model.parameters() if all(p is not q for q in inside)]
    optimizers = torch.optim.Muon(inside), torch.optim.AdamW(others)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert plan.state == sum(map(state_bytes, optimizers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_mini(dtype):
    from adam_mini import Adam_mini

    model = tiny_models.tiny_qwen2(num_key_value_heads=4).to(dtype)
    plan = count(model, "adam_mini")
    optimizer = Adam_mini(model.named_parameters(), dim=32, n_heads=4, verbose=False)
    take_step(model, optimizer)
    assert plan.state == state_bytes(optimizer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("adamw_torch", None),
        ("adamw_torch_fused", None),
        ("adamw_8bit", None),
        ("paged_adamw_8bit", None),
        ("adafactor", None),
        ("galore_adamw", "rank=8"),
        ("apollo_adamw", "rank=8"),
        ("foam", None),
        ("foam", "level=2,second_moment=factored,state_dtype=bfloat16"),
        ("foam_mini", "fold_embeddings=true"),
        ("foam_muon", "level=2,plain_state=8bit"),
        ("foam_adam_mini", None),
    ],
)
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")
def test_the_same_on_a_gpu(optim, optim_args, dtype, tmp_path):
    """Where kernels, drivers of the SVD and paged memory are others."""
    model = tiny_models.tiny_llama(**WIDE).to("cuda", dtype)
    arguments = {"optim_args": optim_args, "use_cpu": False}
    if optim in ("galore_adamw", "apollo_adamw"):
        arguments["optim_target_modules"] = ["self_attn", "mlp"]
    plan = count(model, optim, optim_args)
    assert_counted(model, trained(model, tmp_path, optim, **arguments), plan)
