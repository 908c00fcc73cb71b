"""The kernels of INT8 weights against the plain path: on a GPU, or by Triton's interpreter without one."""

from __future__ import annotations

import pytest
import torch

from foam_hf import FOAM
from foam_hf.int8 import dequantize_kernel
from foam_hf.int8.weight import Int8Weight
from tests.support.tolerances import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Whole segments, a tail of whole blocks, three dimensions, a vector.
SHAPES = [(3, 512), (5, 384), (2, 2, 128), (256,)]

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)


def quantized(x, block_size=128):
    return Int8Weight.from_float(x.to(DEVICE), block_size)


def train(monkeypatch, kernel, weights, gradients, fused=True, **options):
    """Weights and optimizer after a step for each list of gradients."""
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = FOAM(params, **{"lr": 0.01, "weight_decay": 0.1, "scale": 1.0, **options})
    for step in gradients:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    assert kernel == "reference" or bool(optimizer._prepared.plain) is not fused
    return params, optimizer


def drawn(dtype=torch.float32, steps=3, shapes=SHAPES, block_size=128, size=1.0):
    weights = [quantized(size * torch.randn(shape).to(dtype), block_size) for shape in shapes]
    return weights, [[torch.randn(shape).to(DEVICE, dtype) for shape in shapes] for _ in range(steps)]


def assert_same_steps(a, b):
    """Equal codes and scales, but for a sum that rounds its last bit the other way: rarely, and then by one code."""
    for (p, q), (one, other) in zip(
        zip(*(x[0] for x in (a, b)), strict=True), [(a[1], b[1])] * len(a[0]), strict=True
    ):
        apart = (p.codes.int() - q.codes.int()).abs()
        assert apart.max().item() <= 1 and (apart > 0).float().mean().item() < 0.01
        assert torch.allclose(p.scales, q.scales, rtol=1e-5)
        for name, x in one.state[p].items():
            if name != "step":
                assert_within(x.float(), other.state[q][name].float(), "kernel state against the plain path's")


@pytest.mark.parametrize("level", [0, 1, 3, 8, "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_gives_the_codes_and_scales_of_the_plain_path(monkeypatch, dtype, level):
    weights, gradients = drawn(dtype)
    both = [train(monkeypatch, kernel, weights, gradients, level=level) for kernel in ("triton", "reference")]
    assert_same_steps(*both)
    assert any(not torch.equal(p.scales, w.scales) for p, w in zip(both[0][0], weights, strict=True))


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("level", [0, 2, 5, 8])
def test_blocks_of_scales_and_of_moments_need_not_be_the_same(monkeypatch, level, block_size):
    weights, gradients = drawn(torch.bfloat16, 2, [(3, 192), (4, 256), (2, 80 * block_size // 16)], block_size)
    assert_same_steps(*(train(monkeypatch, k, weights, gradients, level=level) for k in ("triton", "reference")))


@pytest.mark.parametrize(
    "options",
    [
        {"stochastic_rounding": False},
        {"weight_decay": 0.0},
        {"state_dtype": torch.bfloat16},
        {"residual_scale": 0.5, "seed": 2**40 + 7},
        {"lr": 1e-4, "scale": 0.25},
        {"lr": 3.0},  # every block leaves its range
    ],
    ids=str,
)
def test_options_reach_the_kernel(monkeypatch, options):
    weights, gradients = drawn(torch.bfloat16, 2)
    assert_same_steps(
        *(train(monkeypatch, k, weights, gradients, level=3, **options) for k in ("triton", "reference"))
    )


def test_a_zero_update_changes_nothing(monkeypatch):
    weights, _ = drawn(torch.bfloat16)
    weights[0].copy_(torch.cat([torch.zeros(1, 512), torch.randn(2, 512)]))
    zeros = [[torch.zeros(w.shape, dtype=w.dtype, device=DEVICE) for w in weights]] * 3
    trained, _ = train(monkeypatch, "triton", weights, zeros, weight_decay=0.0)
    for p, w in zip(trained, weights, strict=True):
        assert torch.equal(p.codes, w.codes) and torch.equal(p.scales, w.scales)


def test_blocks_that_shrink_and_blocks_of_zeros_get_finer_scales(monkeypatch):
    codes = torch.randint(-20, 21, (4, 256), dtype=torch.int8, device=DEVICE)
    codes[1] = 0
    weights = [Int8Weight(codes, torch.rand(4, 2, device=DEVICE) + 0.5)]
    gradients = [[torch.randn(4, 256).to(DEVICE, torch.bfloat16)] for _ in range(2)]
    both = [train(monkeypatch, kernel, weights, gradients, lr=1e-3, level=3) for kernel in ("triton", "reference")]
    assert_same_steps(*both)
    assert bool((both[0][0][0].codes.view(4, 2, 128).abs().amax(-1) >= 64).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_hidden_where_it_is_ignored(monkeypatch, bad):
    weights, gradients = drawn(steps=1, shapes=[(4, 512)])
    gradients[0][0][1, 5] = bad
    (p,), _ = train(monkeypatch, "triton", weights, gradients, level=3, nonfinite="ignore")
    values = p.dequantize()
    assert bool(values[1, 5].isnan()) and bool(values[[0, 2, 3]].isfinite().all())


def test_scaled_gradients_are_unscaled_in_the_kernel(monkeypatch):
    weights, gradients = drawn(torch.float16, 1)
    plain, _ = train(monkeypatch, "triton", weights, gradients, level=3)
    monkeypatch.setattr(FOAM, "grad_scale", torch.tensor(8.0, device=DEVICE), raising=False)
    scaled, _ = train(monkeypatch, "triton", weights, [[8 * g for g in step] for step in gradients], level=3)
    assert all(torch.equal(p.codes, q.codes) for p, q in zip(plain, scaled, strict=True))


def test_it_writes_all_of_a_tensor_and_nothing_else(monkeypatch):
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    for shape, pad in (((6, 512), 16), ((5, 384), 3)):
        numel, blocks = shape[0] * shape[1], shape[0] * shape[1] // 128
        codes = torch.full((numel + 2 * pad,), 77, dtype=torch.int8, device=DEVICE)
        scales = torch.full((blocks + 2 * pad,), 0.5, device=DEVICE)
        inner = codes[pad:-pad].view(shape).fill_(100), scales[pad:-pad].view(shape[0], -1).fill_(0.01)
        p = torch.nn.Parameter(Int8Weight(*inner, torch.float32))
        p.grad = torch.randn(shape, device=DEVICE)
        FOAM([p], lr=1.0, level=2, scale=1.0).step()
        assert bool((inner[0] != 100).any(-1).all()) and bool((inner[1] != 0.01).all())
        for x, value in ((codes, 77), (scales, 0.5)):
            assert bool((x[:pad] == value).all()) and bool((x[-pad:] == value).all())


def test_weights_that_missed_steps_share_a_launch(monkeypatch):
    weights, gradients = drawn(torch.bfloat16, 2, [(3, 128)] * 3)
    runs = []
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        optimizer = FOAM(params, lr=0.01, weight_decay=0.1, scale=1.0, level=3)
        for t, step in enumerate(gradients):
            for i, (p, grad) in enumerate(zip(params, step, strict=True)):
                p.grad = None if t == 0 and i == 1 else grad.clone()
            optimizer.step()
        runs.append((params, optimizer))
        assert kernel == "reference" or len(optimizer._prepared.launches) == 1
    assert_same_steps(*runs)


def test_equal_geometry_is_one_launch_beside_that_of_plain_weights(monkeypatch):
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    params = [torch.nn.Parameter(quantized(torch.randn(rows, 512))) for rows in (3, 4, 20)]
    params += [torch.nn.Parameter(torch.randn(rows, 512, device=DEVICE)) for rows in (2, 3)]
    optimizer = FOAM(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, device=DEVICE)
        optimizer.step()
    kinds = [type(each.launch).__name__ for each in optimizer._prepared.launches]
    assert sorted(kinds) == ["BlockLaunch", "Int8Launch"] and not optimizer._prepared.plain


def test_what_no_kernel_takes_still_trains(monkeypatch):
    weights, gradients = drawn(shapes=[(4, 96)], block_size=24)
    assert_same_steps(*(train(monkeypatch, k, weights, gradients, fused=False) for k in ("triton", "reference")))
    weights, gradients = drawn(shapes=[(4, 256)])
    options = {"second_moment": "factored", "fused": False}
    assert_same_steps(*(train(monkeypatch, k, weights, gradients, **options) for k in ("triton", "reference")))


def test_gradients_that_move_are_followed(monkeypatch):
    weights, gradients = drawn(steps=3, shapes=[(4, 256)])
    plain, _ = train(monkeypatch, "reference", weights, gradients, level=3)
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    p = torch.nn.Parameter(weights[0].clone())
    optimizer, kept, prepared = FOAM([p], lr=0.01, weight_decay=0.1, scale=1.0, level=3), [], set()
    for step in gradients:
        p.grad = step[0].clone()
        kept.append(p.grad)
        optimizer.step()
        prepared.add(id(optimizer._prepared))
    assert len(prepared) == 1 and torch.equal(p.codes, plain[0].codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "block_size"), [((7, 384), 128), ((3, 5, 64), 16), ((2, 100), 4), ((1, 8192), 8192)]
)
def test_dequantization_gives_the_bits_of_the_plain_one(monkeypatch, shape, block_size, dtype):
    weight = quantized(torch.randn(shape), block_size)
    found = []
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        found.append(weight.dequantize(dtype))
    assert found[0].dtype == dtype and torch.equal(*found)
    assert dequantize_kernel.fits_kernels(block_size)


def test_linear_takes_the_kernel_both_ways(monkeypatch):
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    calls = []
    original = dequantize_kernel.dequantize_into
    monkeypatch.setattr(dequantize_kernel, "dequantize_into", lambda *a: calls.append(a) or original(*a))
    layer = torch.nn.Linear(256, 8, device=DEVICE)
    layer.weight = torch.nn.Parameter(Int8Weight.from_float(layer.weight))
    x = torch.randn(2, 256, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    assert len(calls) == 2
    assert_within(x.grad, layer.weight.dequantize().sum(0).expand(2, 256), "one step against float64, float32 weights")
