"""FOAM with Muon: torch's Muon at level 0, the folded rule against float64, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foam_hf.tensors.rows
from foam_hf import FOAM, foam_param_groups
from foam_hf.int8.weight import Int8Weight
from foam_hf.rules.muon import COEFFICIENTS, newton_schulz, orthogonalize
from tests.support.reference import MuonReference
from tests.support.tolerances import assert_within

SHAPES = [(16, 24), (24, 16), (7, 37), (1, 9), (9, 1), (3, 12, 20)]
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is not in this torch")


def train(weight, grads, **options):
    """The weight after one step for each gradient, and the optimizer."""
    p = nn.Parameter(weight.clone())
    optimizer = FOAM([p], **{"lr": 0.02, "second_moment": "muon", **options})
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer


@needs_muon
@pytest.mark.parametrize("momentum", [0.95, 0.0])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2], ids=str)
def test_level_0_has_the_bits_of_torch_muon(shape, momentum):
    weight, grads = torch.randn(shape), [torch.randn(shape) for _ in range(30)]
    p = nn.Parameter(weight.clone())
    muon = torch.optim.Muon([p], lr=0.02, weight_decay=0.1, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        p.grad = grad.clone()
        muon.step()
    ours, _ = train(weight, grads, level=0, scale=1.0, weight_decay=0.1, momentum=momentum)
    assert torch.equal(ours, p)


@needs_muon
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (1, 9), (5, 5)], ids=str)
def test_the_iteration_for_older_torch_has_the_bits_of_the_newer_one(shape):
    assert orthogonalize is not newton_schulz
    for B in (torch.randn(shape), torch.zeros(shape)):
        arguments = (COEFFICIENTS, 5, 1e-7)
        assert torch.equal(newton_schulz(B.clone(), *arguments), orthogonalize(B.clone(), *arguments))


@pytest.mark.parametrize("iteration", [newton_schulz, orthogonalize])
def test_the_iteration_brings_singular_values_near_one(iteration):
    B = torch.randn(40, 24) * 1e3
    values = torch.linalg.svdvals(iteration(B, COEFFICIENTS, 5, 1e-7).float())
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("rho", [1.0, 0.2])
@pytest.mark.parametrize("level", [0, 2, "row"])
@pytest.mark.parametrize("shape", [(7, 37), (24, 16), (1, 9), (3, 4, 10)], ids=str)
def test_the_folded_rule_follows_the_float64_reference(shape, level, rho):
    weight, grads = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    options = {"lr": 0.02, "weight_decay": 0.1, "level": level, "scale": 0.5, "residual_scale": rho}
    trained, optimizer = train(weight, grads, **options)
    reference = MuonReference(weight, **options)
    for grad in grads:
        expected = reference.step(grad)
    assert_within(trained - weight, expected - weight, "four steps of Muon against float64, change of the weights")
    (state,) = optimizer.state.values()
    assert state.keys() == {"step", "folded_momentum"}
    assert_within(state["folded_momentum"], reference.momentum, "five steps against float64, float32 weights")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(96, 256), (2, 256, 96)], ids=str)
def test_a_gpu_follows_the_float64_reference(shape):
    weight, grads = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    trained, _ = train(weight.cuda(), [grad.cuda() for grad in grads], level=2)
    reference = MuonReference(weight, lr=0.02, level=2)
    for grad in grads:
        expected = reference.step(grad)
    assert_within(
        trained.cpu() - weight, expected - weight, "four steps of Muon against float64, change of the weights"
    )


@pytest.mark.parametrize("chunk", [1, 40, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_change_nothing(monkeypatch, dtype, chunk):
    weight, grads = torch.randn(3, 5, 19).to(dtype), [torch.randn(3, 5, 19).to(dtype) for _ in range(3)]
    whole, _ = train(weight, grads, level=2, state_dtype=torch.bfloat16)
    monkeypatch.setattr(foam_hf.tensors.rows, "CHUNK_CPU", chunk)
    chunked, _ = train(weight, grads, level=2, state_dtype=torch.bfloat16)
    assert torch.equal(whole, chunked)


def test_matrices_of_a_stack_are_updated_one_by_one():
    weight, grads = torch.randn(4, 6, 10), [torch.randn(4, 6, 10) for _ in range(3)]
    together, _ = train(weight, grads, level=1)
    for i in range(4):
        alone, _ = train(weight[i], [grad[i] for grad in grads], level=1)
        assert torch.equal(together[i], alone)


def test_strides_of_weight_and_gradient_change_nothing():
    weight, grads = torch.randn(6, 21), [torch.randn(6, 21) for _ in range(3)]
    expected, _ = train(weight, grads, level=2)
    transposed, _ = train(weight.t().contiguous().t(), [grad.t().contiguous().t() for grad in grads], level=2)
    assert not transposed.is_contiguous() and torch.equal(transposed, expected)


def test_bfloat16_weights_follow_float32_ones_on_average():
    """A step of a tenth of the spacing: to nearest, nothing would move."""
    weight, grads = torch.ones(64, 96).bfloat16(), [torch.randn(64, 96) + 1] * 40
    lr = 2.0**-7 / 10 / 0.2
    exact, _ = train(weight.float(), grads, level=2, scale=1.0, lr=lr)
    rounded, _ = train(weight, [grad.bfloat16() for grad in grads], level=2, scale=1.0, lr=lr)
    nearest, _ = train(weight, [g.bfloat16() for g in grads], level=2, scale=1.0, lr=lr / 4, stochastic_rounding=False)
    assert (rounded.float().mean() - 1).item() == pytest.approx((exact.mean() - 1).item(), rel=0.1)
    assert (nearest == weight).float().mean() > 0.9


def test_int8_weights_follow_float32_ones():
    weight, grads = torch.randn(24, 256) * 0.02, [torch.randn(24, 256) for _ in range(10)]
    exact, _ = train(weight, grads, level=4, lr=0.1)
    quantized = nn.Parameter(Int8Weight.from_float(weight))
    optimizer = FOAM([quantized], lr=0.1, level=4, second_moment="muon")
    for grad in grads:
        quantized.grad = grad.clone()
        optimizer.step()
    away, moved = (quantized.dequantize() - exact).norm(), (exact - weight).norm()
    assert away < 0.1 * moved


def test_matrices_go_by_muon_while_kernels_take_the_rest(monkeypatch):
    net = nn.Sequential(nn.Linear(24, 20), nn.LayerNorm(20))
    start = {name: x.clone() for name, x in net.state_dict().items()}
    found = []
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        net.load_state_dict(start)
        optimizer = FOAM(net.parameters(), lr=0.02, level=2, second_moment="muon")
        for t in range(3):
            torch.manual_seed(t)
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        assert kernel == "reference" or [each.member.p for each in optimizer._prepared.plain] == [net[0].weight]
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert_within(*found, "five steps against float64, float32 weights")


def test_convolutions_are_no_matrices():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Conv1d(8, 4, 3, bias=False))
    groups = foam_param_groups(net, second_moment="muon")
    folded = [p for group in groups if group["second_moment"] == "muon" for p in group["params"]]
    assert [p is net[1].weight for p in folded] == [True]
    plain = [p for group in groups if group["second_moment"] == "block" for p in group["params"]]
    assert {id(p) for p in plain} == {id(p) for p in net.parameters()} - {id(net[1].weight)}
    assert len([p for group in foam_param_groups(net) if "level" not in group for p in group["params"]]) == 3


def test_a_parametrized_convolution_is_no_matrix_either():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), nn.Linear(8, 8))
    groups = foam_param_groups(net, second_moment="muon")
    folded = [p for group in groups if group["second_moment"] == "muon" for p in group["params"]]
    assert [p is net[1].weight for p in folded] == [True]


def test_momentum_belongs_to_muon():
    p = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(
        ValueError, match=r"momentum=0\.9 is Muon's, and no param group has .*; expected betas, for the other rules"
    ):
        FOAM([p], momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum is out of range: got 1.0"):
        FOAM([p], second_moment="muon", momentum=1.0)
    FOAM([{"params": [p], "second_moment": "muon"}], momentum=0.9)


def test_a_piece_of_a_matrix_is_refused():
    p = nn.Parameter(torch.zeros(4, 4))
    p.device_mesh = None  # as a DTensor has
    with pytest.raises(ValueError, match=r"'muon' needs whole weights: got a DTensor of shape \(4, 4\)"):
        FOAM([p], second_moment="muon")
