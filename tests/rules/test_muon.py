"""FOAM with Muon: beside torch's Muon, the folded rule against float64, its kernels, and what must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import foam_hf.tensors.rows
from foam_hf import FOAM, foam_param_groups
from foam_hf.int8.weight import Int8Weight
from foam_hf.rules import muon_kernel, products_kernel
from foam_hf.rules.orthogonal import SMALLEST_VALUE, orthogonalized
from foam_hf.rules.products_kernel import Orthogonalizer
from tests.support.reference import MuonReference, rounded_values
from tests.support.tolerances import assert_within

SHAPES = [(16, 24), (24, 16), (7, 37), (1, 9), (9, 1), (3, 12, 20)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is not in this torch")


def train(weight, grads, **options):
    """The weight after one step for each gradient, and the optimizer."""
    p = nn.Parameter(weight.clone())
    optimizer = FOAM([p], **{"lr": 0.02, "second_moment": "muon", **options})
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer


def muons_values(x):
    """What the five iterations of torch.optim.Muon make of singular values ``x``, float64."""
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def with_values(values, rows, n):
    """A matrix (rows, n) of these singular values, float32."""
    k = len(values)
    left, right = (torch.linalg.qr(torch.randn(size, k, dtype=torch.float64))[0] for size in (rows, n))
    return (left * values @ right.T).float()


@needs_muon
@pytest.mark.parametrize("momentum", [0.95, 0.0])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2], ids=str)
def test_level_0_goes_where_torch_muon_goes(shape, momentum):
    weight, grads = torch.randn(shape), [torch.randn(shape) for _ in range(30)]
    p = nn.Parameter(weight.clone())
    muon = torch.optim.Muon([p], lr=0.02, weight_decay=0.1, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        p.grad = grad.clone()
        muon.step()
    ours, optimizer = train(weight, grads, level=0, scale=1.0, weight_decay=0.1, momentum=momentum)
    (state,) = optimizer.state.values()
    assert torch.equal(state["folded_momentum"], muon.state[p]["momentum_buffer"])
    moved, expected = (ours - weight).flatten(), (p.detach() - weight).flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.95
    assert 0.8 < moved.norm() / expected.norm() < 1.35


def test_the_rounds_leave_no_singular_value_further_from_one_than_muon_does():
    x = torch.logspace(-6, 0, 20001, dtype=torch.float64)
    ours, muons = rounded_values(x), muons_values(x)
    large = x >= SMALLEST_VALUE
    assert ours[large].min() > 0.8 and ours.max() < 1.2
    assert muons[large].min() < 0.7  # Muon's own
    assert bool((ours[~large] > muons[~large]).all())
    assert rounded_values(torch.tensor(1.002, dtype=torch.float64)) < 1.2  # what rounding may make of a bound


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
def test_a_matrix_comes_closer_to_the_orthogonal_one_than_by_muon(condition, shape):
    values = torch.logspace(0, -math.log10(condition), 48, dtype=torch.float64)
    B = with_values(values, *shape) * 1e3
    U, _, Vh = torch.linalg.svd(B.double(), full_matrices=False)
    exact = U @ Vh
    ours = orthogonalized(B).double()
    muons = U * muons_values(values / values.norm()) @ Vh
    assert (ours - exact).norm() < (muons - exact).norm()
    assert torch.linalg.matrix_norm(ours, 2) < 1.21


def test_a_zero_matrix_stays_zero_and_a_vanishing_one_is_not_blown_up():
    assert orthogonalized(torch.zeros(5, 7)).eq(0).all()
    B = torch.randn(24, 40)
    B /= B.norm()
    small, smaller = orthogonalized(B * 1e-11).norm(), orthogonalized(B * 1e-13).norm()
    assert 0 < smaller < small / 50 and small < orthogonalized(B).norm() / 20


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("shape", [(40, 72), (70, 37), (9, 1), (1, 9)], ids=str)
def test_the_kernels_orthogonalise_as_torch_does_and_each_matrix_by_itself(monkeypatch, shape, by_library):
    monkeypatch.setattr(products_kernel, "TILE", 64)
    monkeypatch.setattr(products_kernel, "LARGE", 0 if by_library else 1 << 40)
    B = torch.randn(3, *shape, device=DEVICE)
    norms = B.flatten(1).norm(dim=1)[:, None, None]
    X = (B * math.sqrt(min(shape)) / norms).half()
    found, scales = Orthogonalizer(*shape, DEVICE)(X.clone())
    for i in range(3):
        expected = orthogonalized(B[i].cpu())
        ours = found[i].float().cpu() * scales[i].item()
        assert_within(ours, expected, "orthogonal matrices of float16 against float32")
    alone, scale = Orthogonalizer(*shape, DEVICE)(X[1:2].clone())
    assert torch.equal(alone[0], found[1]) and torch.equal(scale[0], scales[1])


def test_the_kernels_symmetric_products_are_symmetric(monkeypatch):
    monkeypatch.setattr(products_kernel, "TILE", 64)
    orthogonalizer = Orthogonalizer(80, 112, DEVICE)
    X, ones = torch.randn(2, 80, 112, device=DEVICE).half(), torch.ones(4, device=DEVICE)
    ladder = torch.full((4, 2 * 80 * 80), float("nan"), device=DEVICE).half()
    sums = torch.empty(2 * orthogonalizer._lower, device=DEVICE)
    orthogonalizer._write_gram(X, ladder, ones, sums)
    R = ladder[0].view(2, 80, 80)
    assert torch.equal(R, R.mT)
    assert_within(R.float(), X.float() @ X.float().mT, "products of float16 against float32")
    assert sums.view(2, -1).sum(1).tolist() == pytest.approx(R.float().square().sum((1, 2)).tolist(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_follow_the_plain_path(monkeypatch, dtype):
    """Matrices of three shapes, a stack, one without a gradient at times, and one whose gradient is not finite."""
    monkeypatch.setattr(products_kernel, "TILE", 64)
    shapes = [(24, 40), (40, 24), (24, 40), (2, 12, 20)]
    weights = [(torch.randn(shape) / 10).to(DEVICE, dtype) for shape in shapes]
    grads = [[torch.randn_like(weight) for weight in weights] for _ in range(2)]
    grads[1][2] = None
    grads[1][3][1, 5, 5] = float("nan")
    found = []
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        params = [nn.Parameter(weight.clone()) for weight in weights]
        options = {"level": 2, "weight_decay": 0.1, "nonfinite": "skip", "second_moment": "muon"}
        optimizer = FOAM(params, lr=0.02, state_dtype=dtype, **options)
        for of_step in grads:
            for p, grad in zip(params, of_step, strict=True):
                p.grad = grad
            before = params[3].detach().clone()
            optimizer.step()
        assert torch.equal(params[3], before)  # both matrices of the stack
        assert kernel == "reference" or not optimizer._prepared.plain
        found.append((params, [optimizer.state[p]["folded_momentum"] for p in params]))
    (fused, states), (plain, plain_states) = found
    for p, q, weight, m, k in zip(fused, plain, weights, states, plain_states, strict=True):
        case = "Muon's kernels against the plain path, change of the weights"
        assert_within((p - weight).float(), (q - weight).float(), f"{case}, {dtype}")
        assert_within(m.float(), k.float(), "kernel state against the plain path's")


def test_a_batch_of_the_kernels_changes_no_bit(monkeypatch):
    monkeypatch.setattr(products_kernel, "TILE", 64)
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    weight, grads = torch.randn(3, 24, 40, device=DEVICE), [torch.randn(3, 24, 40, device=DEVICE) for _ in range(2)]
    together, _ = train(weight, grads, level=2)
    monkeypatch.setattr(muon_kernel, "matrices_at_a_time", lambda rows, n: 2)
    in_two, _ = train(weight, grads, level=2)
    assert torch.equal(together, in_two)
    alone, _ = train(weight[1], [grad[1] for grad in grads], level=2)
    assert torch.equal(alone, together[1])


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
@pytest.mark.parametrize("shape", [(96, 256), (2, 256, 96), (1, 24), (24, 1), (1, 1)], ids=str)
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
