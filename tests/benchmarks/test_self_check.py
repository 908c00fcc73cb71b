"""The speed benchmarks time no kernel that is wrong on the machine at hand."""

from __future__ import annotations

import pytest
import torch

from foam_hf import FOAM, foam_param_groups
from foam_hf.int8.weight import Int8Weight
from foam_hf.kernels import tables
from recipes.benchmarks.common.cases import CASES, Weights, make_weights
from recipes.benchmarks.speed import self_check
from recipes.benchmarks.speed.self_check import LR, check_kernels, check_optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)


def few_weights(dtype: torch.dtype) -> Weights:
    weights = make_weights("tiny", dtype, DEVICE)
    wanted = ("layers.0.attn.q_proj.weight", "layers.0.mlp.down.weight", "layers.0.norm1.weight")
    return Weights({name: weights.named[name] for name in wanted}, weights.heads)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    monkeypatch.setattr(self_check, "ROWS", 5)
    monkeypatch.setattr(self_check, "STEPS", 2)


@pytest.mark.parametrize(("name", "dtype"), [("foam", torch.bfloat16), ("foam-factored", torch.float32)], ids=str)
def test_right_kernels_pass(name, dtype) -> None:
    check_kernels(few_weights(dtype), CASES[name].build, DEVICE)


@pytest.mark.parametrize(("name", "dtype"), [("foam", torch.bfloat16), ("foam-row", torch.float32)], ids=str)
def test_a_kernel_that_moves_weights_by_a_tenth_too_much_is_refused(monkeypatch, name, dtype) -> None:
    right = tables.numbers
    monkeypatch.setattr(tables, "numbers", lambda h: right(h) | {"step_size": 1.1 * h.lr * h.scale})
    with pytest.raises(RuntimeError, match="the kernels are not right on this machine, so nothing is timed: layers.0"):
        check_kernels(few_weights(dtype), CASES[name].build, DEVICE)


def int8(x: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(Int8Weight.from_float(x, 8))


def test_int8_weights_are_compared_by_codes(monkeypatch) -> None:
    weights = few_weights(torch.bfloat16)
    weights.named = {name: p for name, p in weights.named.items() if p.dim() > 1}
    check_kernels(weights, lambda some: [FOAM(list(some.named.values()))], DEVICE, int8)
    right = tables.numbers
    monkeypatch.setattr(tables, "numbers", lambda h: right(h) | {"step_size": 1.5 * h.lr * h.scale})
    with pytest.raises(RuntimeError, match="nothing is timed: layers.0"):
        check_kernels(weights, lambda some: [FOAM(list(some.named.values()))], DEVICE, int8)


def test_an_optimizer_of_a_trainer_is_checked_by_its_groups(monkeypatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 200), torch.nn.Linear(200, 32)).to(DEVICE)
    optimizer = FOAM(foam_param_groups(model, weight_decay=0.1), lr=LR)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    check_optimizer(optimizer, model, DEVICE)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    right = tables.numbers
    monkeypatch.setattr(tables, "numbers", lambda h: right(h) | {"rho": 0.5})
    with pytest.raises(RuntimeError, match="nothing is timed"):
        check_optimizer(optimizer, model, DEVICE)


def test_only_foams_kernels_are_checked() -> None:
    assert CASES["foam-2"].checked and CASES["foam-embeddings"].checked
    assert not CASES["adamw-fused"].checked and not CASES["foam-reference"].checked
