"""INT8 weights: a tensor that behaves as an ordinary parameter, and updates that keep what is smaller than a code."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foam_hf import FOAM
from foam_hf.int8.codes import MAX_CODE, MIN_SCALE
from foam_hf.int8.layers import Int8Linear, accept_codes
from foam_hf.int8.rows import add_to_codes, uniform
from foam_hf.int8.weight import Int8Weight
from foam_hf.memory import summarize
from foam_hf.memory.storages import storages, total, without
from foam_hf.tensors.step import Hyper
from tests.support.rules import BY_BLOCK

pytestmark = pytest.mark.long

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def hyper(**overrides) -> Hyper:
    numbers = {
        "lr": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "c1": 0.1,
        "c2": 0.001,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "scale": 1.0,
    }
    return Hyper(**{**numbers, "rho": 1.0, "stochastic": True, "seed": 11, "step": 1, "stream": 2, **overrides})


def int8_linear(rows=24, columns=256, dtype=torch.float32, bias=True) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    layer.weight = nn.Parameter(Int8Weight.from_float(layer.weight))
    return layer


def same_bits(a: Int8Weight, b: Int8Weight) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


# Quantizing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block_size"), [((5, 256), 128), ((3, 2, 96), 32), ((7, 10), 5), ((40,), 8)])
def test_quantizing_is_to_nearest_with_the_largest_of_a_block_at_127(shape, block_size, dtype):
    x = torch.randn(shape).to(dtype)
    weight = Int8Weight.from_float(x, block_size)
    assert weight.shape == x.shape and weight.dtype == dtype and weight.block_size == block_size
    blocks = x.float().unflatten(-1, (-1, block_size))
    assert torch.equal(weight.scales, blocks.abs().amax(-1) / 127)
    assert bool((weight.codes.unflatten(-1, (-1, block_size)).abs().amax(-1) == 127).all())
    away = (weight.dequantize(torch.float32).view(blocks.shape) - blocks).abs()
    assert bool((away <= weight.scales.unsqueeze(-1) * 0.5001).all())
    assert same_bits(Int8Weight.from_float(weight.dequantize(), block_size), weight)


def test_a_width_that_no_block_divides_is_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks of 128 columns do not divide .* width 200; expected a block_size"):
        Int8Weight.from_float(torch.randn(4, 200))
    with pytest.raises(ValueError, match="block_size is out of range: got 0"):
        Int8Weight.from_float(torch.randn(4, 200), 0)
    with pytest.raises(TypeError, match=r"cannot quantize torch.float64"):
        Int8Weight.from_float(torch.randn(4, 128, dtype=torch.float64))


def test_parts_that_do_not_fit_are_refused():
    codes, scales = torch.zeros(4, 128, dtype=torch.int8), torch.ones(4, 1)
    with pytest.raises(TypeError, match=r"codes torch.uint8"):
        Int8Weight(codes.to(torch.uint8), scales)
    with pytest.raises(TypeError, match=r"scales of an INT8 weight are torch.bfloat16"):
        Int8Weight(codes, scales.bfloat16())
    with pytest.raises(ValueError, match=r"codes \(4, 128\) .* scales \(4, 3\) .* do not make an INT8 weight"):
        Int8Weight(codes, torch.ones(4, 3))


def test_zeros_nan_and_empty_weights():
    x = torch.zeros(2, 128)
    x[1, 3] = float("nan")
    weight = Int8Weight.from_float(x)
    assert weight.scales[0].item() == pytest.approx(MIN_SCALE) and not bool(weight.dequantize()[0].any())
    assert bool(weight.dequantize()[1].isnan().all())  # as loud as a plain weight's NaN
    assert Int8Weight.from_float(torch.zeros(0, 128)).dequantize().shape == (0, 128)


# An ordinary parameter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 256), (2, 3, 256), (256,)])
def test_linear_and_its_gradients_are_those_of_the_dequantized_weight(shape, dtype):
    layer = int8_linear(dtype=dtype)
    plain = nn.Linear(256, 24, dtype=dtype)
    plain.load_state_dict({"weight": layer.weight.dequantize(), "bias": layer.bias})
    x = torch.randn(shape).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((layer, plain), inputs, strict=True)]
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(direction)
    assert torch.equal(*outputs) and torch.equal(*(x.grad for x in inputs))
    assert type(layer.weight.grad) is torch.Tensor and layer.weight.grad.dtype == dtype
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert torch.allclose(layer.bias.grad, plain.bias.grad, rtol=1e-2 if dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(256,), (3, 256), (2, 3, 256), (2, 3, 4, 256)], ids=str)
def test_what_linear_gives_can_be_changed_in_place(shape, bias):
    """As DeBERTa and Longformer do with their queries."""
    layer, plain = int8_linear(bias=bias), nn.Linear(256, 24, bias=bias)
    plain.load_state_dict({"weight": layer.weight.dequantize(), **({"bias": layer.bias} if bias else {})})
    x = torch.randn(shape)
    gradients = []
    for module in (layer, plain):
        out = module(x).movedim(-1, 0)
        out /= 3
        out += 1
        out.square().sum().backward()
        gradients.append(module.weight.grad)
    assert torch.equal(*gradients)


def test_a_layer_computes_as_the_function_and_refuses_a_second_derivative():
    layer, x = int8_linear(), torch.randn(3, 256, requires_grad=True)
    accept_codes(layer)
    assert type(layer) is Int8Linear and torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert torch.equal(first, plain)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_autocast_computes_in_its_dtype_and_gives_gradients_of_the_outer_one():
    layer, x = int8_linear(), torch.randn(6, 256, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == layer.bias.grad.dtype == torch.float32
    expected = F.linear(x.bfloat16(), layer.weight.dequantize(torch.bfloat16), layer.bias.bfloat16())
    assert torch.equal(y, expected)


def alive():
    gc.collect()
    return storages([x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)])


def test_no_floating_copy_of_the_weight_lives_between_forward_and_backward():
    layer, x = int8_linear(512, 256, torch.bfloat16), torch.randn(2, 256, dtype=torch.bfloat16)
    before, saved = alive(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert total(without(alive(), before)) <= y.nbytes
    assert total(without(storages(saved), before)) == 0  # the input, the codes and the scales
    y.sum().backward()
    assert layer.weight.grad is not None


def test_a_frozen_weight_passes_gradients_on_and_keeps_no_input():
    layer, x = int8_linear(), torch.randn(3, 256, requires_grad=True)
    layer.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert saved == []
    y.sum().backward()
    assert x.grad is not None and layer.weight.grad is None


def test_a_weight_made_in_inference_mode_multiplies():
    with torch.inference_mode():
        layer, x = int8_linear(), torch.randn(3, 256)
        expected = torch.nn.functional.linear(x, layer.weight.dequantize(), layer.bias)
        assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


def test_it_is_named_counted_clipped_and_frozen_as_any_parameter():
    layer = int8_linear(dtype=torch.bfloat16)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    weight = layer.weight
    assert isinstance(weight, nn.Parameter) and weight.is_leaf and weight.is_floating_point()
    assert weight.numel() == 24 * 256 and weight.dtype == torch.bfloat16 and weight.dim() == 2
    layer(torch.randn(5, 256, dtype=torch.bfloat16)).sum().backward()
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
    assert norm > 0.5 and nn.utils.clip_grad_norm_(layer.parameters(), 0.5).item() == pytest.approx(0.5, rel=0.05)
    layer.zero_grad()
    assert weight.grad is None
    assert not layer.requires_grad_(False).weight.requires_grad
    other = int8_linear()
    assert weight.data_ptr() == weight.codes.data_ptr() != other.weight.data_ptr()
    assert total(storages([weight])) == 24 * 256 + 24 * 2 * 4


def test_what_is_made_like_it_is_plain():
    weight = int8_linear(dtype=torch.bfloat16).weight
    for like in (
        torch.zeros_like(weight),
        torch.empty_like(weight),
        weight.new_zeros(24, 256, dtype=torch.float32).to(torch.bfloat16),
        torch.ones_like(weight),
    ):
        assert type(like) is torch.Tensor and like.shape == weight.shape and like.dtype == torch.bfloat16
    assert torch.zeros_like(weight, dtype=torch.float32).dtype == torch.float32
    assert torch.zeros_like(weight).is_contiguous() and not bool(torch.zeros_like(weight).any())


def test_ranges_of_rows_share_codes_and_scales():
    """FSDP2 makes shards by these, and they must not hold floating copies."""
    layer = int8_linear()
    weight = layer.weight.detach()
    plain = weight.dequantize()
    views = {
        "slice": (weight[2:7], plain[2:7]),
        "narrow": (weight.narrow(0, 20, 4), plain[20:24]),
        "chunk": (weight.chunk(5)[4], plain.chunk(5)[4]),
        "sizes": (weight.split([3, 21])[1], plain[3:]),
        "flat": (weight.view(-1), plain.view(-1)),
        "matrices": (weight.view(2, -1, 256), plain.view(2, 12, 256)),
        "strided": (torch.as_strided(weight, (5, 256), (256, 1)), plain[:5]),
        "none": (weight.narrow(0, 0, 0), plain[:0]),
    }
    for name, (view, expected) in views.items():
        assert type(view) is Int8Weight and torch.equal(view.dequantize(), expected), name
        assert view.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr(), name
        assert view.scales.untyped_storage().data_ptr() == weight.scales.untyped_storage().data_ptr(), name
    with torch.no_grad():
        layer.weight[2:4].copy_(torch.ones(2, 256))
    assert bool((weight.dequantize()[2:4] == 1).all()) and torch.equal(weight.dequantize()[4:], plain[4:])
    weight.view(-1).zero_()
    assert not weight.dequantize().any()
    padded = weight.new_zeros(30, 256)
    assert type(padded) is Int8Weight and padded.block_size == 128 and not padded.dequantize().any()
    assert type(weight.new_zeros(30, 128)) is torch.Tensor


def test_reading_gives_the_dequantized_values():
    weight = int8_linear().weight.detach()
    plain = weight.dequantize()
    assert torch.equal(weight.norm(), plain.norm()) and torch.equal(weight.abs().sum(0), plain.abs().sum(0))
    assert torch.equal(weight[3, 5:9], plain[3, 5:9]) and torch.equal(weight.view(-1), plain.view(-1))
    x = torch.randn(4, 256)
    assert torch.equal(x @ weight.t(), x @ plain.t())
    assert torch.equal(torch.cat([weight, weight]), torch.cat([plain, plain]))
    assert type(weight + 1) is torch.Tensor and str(weight).startswith("Int8Weight(shape=(24, 256), dtype=float32")


WRITES = {
    "mul_": lambda w: w.mul_(2),
    "add_": lambda w: w.add_(w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "index": lambda w: w.__setitem__(0, 1.0),
    "row": lambda w: w[0].zero_(),
    "view": lambda w: w.view(-1)[:3].fill_(1.0),
    "transposed": lambda w: w.t().mul_(2.0),
    "part of a view": lambda w: w.view(-1).__setitem__(0, 1.0),
    "out": lambda w: torch.add(w, 1.0, out=w),
    "columns": lambda w: w.split(128, dim=1)[1].copy_(torch.zeros(24, 128)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writing_that_would_be_lost_is_refused(write):
    weight = int8_linear().weight.detach()
    before = copy.deepcopy(weight)
    with pytest.raises(NotImplementedError, match="INT8 weight"):
        write(weight)
    assert same_bits(weight, before)


def test_whole_values_can_be_written():
    weight = int8_linear().weight
    new = torch.randn(24, 256)
    with torch.no_grad():
        assert weight.copy_(new) is weight
        assert same_bits(weight, Int8Weight.from_float(new))
        assert not bool(weight.zero_().dequantize().any())
        nn.init.normal_(weight, std=0.5)
        assert weight.std().item() == pytest.approx(0.5, rel=0.05)
        nn.init.constant_(weight, 0.25)
        assert torch.equal(weight.dequantize(), torch.full((24, 256), 0.25))


def test_copying_its_own_values_changes_nothing_though_training_moved_the_largest_code():
    weight = Int8Weight(torch.randint(-100, 100, (24, 256), dtype=torch.int8), torch.rand(24, 2), torch.bfloat16)
    before = copy.deepcopy(weight)
    weight.copy_(weight.dequantize())
    assert same_bits(weight, before)
    changed = weight.dequantize()
    changed[0, 0] += 1
    weight.copy_(changed)
    assert not torch.equal(weight.codes[0, :128], before.codes[0, :128])
    assert torch.equal(weight.codes[0, 128:], before.codes[0, 128:]) and torch.equal(
        weight.codes[1:], before.codes[1:]
    )


def test_copies_between_int8_weights_keep_every_bit():
    weight = Int8Weight(torch.randint(-100, 100, (24, 256), dtype=torch.int8), torch.rand(24, 2))
    other = Int8Weight.from_float(torch.randn(24, 256))
    assert same_bits(other.copy_(weight), weight) and other.codes is not weight.codes
    with pytest.raises(ValueError, match=r"in blocks of 64 into one of .* in blocks of 128"):
        weight.copy_(Int8Weight.from_float(torch.randn(24, 256), 64))
    plain = torch.empty(24, 256)
    assert torch.equal(plain.copy_(weight), weight.dequantize())


def round_trips():
    def saved(layer, **how):
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        fresh = int8_linear()
        fresh.load_state_dict(torch.load(buffer, **how))
        return fresh

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
        "torch.save": lambda layer: saved(layer, weights_only=False),
        "torch.save, weights_only": lambda layer: saved(layer, weights_only=True),
        "torch.save, mapped": lambda layer: saved(layer, weights_only=True, map_location="cpu"),
    }


@pytest.mark.parametrize("trip", round_trips().values(), ids=round_trips().keys())
def test_copies_and_files_keep_every_bit(trip):
    layer = int8_linear()
    with torch.no_grad():
        layer.weight.copy_(Int8Weight(torch.randint(-100, 100, (24, 256), dtype=torch.int8), torch.rand(24, 2)))
    other = trip(layer)
    assert same_bits(other.weight, layer.weight) and other.weight.data_ptr() != layer.weight.data_ptr()
    assert (
        isinstance(other.weight, nn.Parameter) and other.weight.requires_grad and other.weight.dtype == torch.float32
    )
    other(torch.randn(2, 256)).sum().backward()
    assert other.weight.grad is not None


def test_memory_is_shared_between_processes():
    layer = int8_linear()
    assert not layer.weight.is_shared()
    expected = layer.weight.dequantize()
    layer.share_memory()
    assert layer.weight.is_shared() and layer.weight.codes.is_shared() and layer.weight.scales.is_shared()
    assert torch.equal(layer.weight.dequantize(), expected)


def test_a_module_moves_and_changes_dtype_with_its_codes():
    layer = int8_linear()
    codes, scales = layer.weight.codes.clone(), layer.weight.scales.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        assert isinstance(layer.weight, nn.Parameter) and layer.weight.dtype == dtype
        assert torch.equal(layer.weight.codes, codes) and torch.equal(layer.weight.scales, scales)
    assert layer.to("meta").weight.codes.device.type == "meta"


def test_assigning_data_takes_the_codes_along():
    weight, other = int8_linear().weight, Int8Weight.from_float(torch.randn(24, 256), 64).to(torch.bfloat16)
    weight.data = other
    assert same_bits(weight, other) and weight.dtype == torch.bfloat16 and weight.block_size == 64
    assert isinstance(weight, nn.Parameter) and weight.requires_grad
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    assert F.linear(x, weight).dtype == weight.dequantize().dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"cannot make a Tensor the data of an INT8 weight; expected weight.copy_"):
        weight.data = torch.randn(24, 256)
    assert same_bits(weight, other)


# The update


def test_the_mean_of_many_rounded_updates_is_the_update():
    codes, scales = torch.randint(-100, 100, (1, 2, 128), dtype=torch.int8), torch.full((1, 2, 1), 0.01)
    d = torch.randn(1, 2, 128) * torch.logspace(-3, 0.3, 128)
    trials, total_change = 4096, torch.zeros(1, 2, 128, dtype=torch.float64)
    for step in range(trials):
        u = uniform(range(1), 256, hyper(step=step), torch.device("cpu")).view(1, 2, 128)
        new, same = add_to_codes(codes, scales, d * scales, u)
        assert torch.equal(same, scales)
        change = new - codes
        assert bool(((change - d).abs() < 1.0001).all())
        total_change += change.double()
    # A Bernoulli mean of 4096 trials stays within 5 * 0.5 / 64 codes.
    assert bool(((total_change / trials - d.double()).abs() <= 0.04).all())


@pytest.mark.parametrize("size", [2.0**-8, 2.0**-14, 2.0**-18, 2.0**-20])
@pytest.mark.parametrize("sign", [1, -1])
def test_updates_far_below_a_code_and_below_16_bits_are_kept_on_average(size, sign):
    rows, n = 1024, 4096
    found = (
        uniform(range(rows), n, hyper(), torch.device("cpu")).add_(sign * size).floor_().double().sum().item() * sign
    )
    expected = rows * n * size
    assert abs(found - expected) <= 5 * max(expected, 1) ** 0.5  # a Poisson count


def test_a_step_back_undoes_a_step_of_the_same_pair_exactly():
    d = torch.randn(8, 256) * torch.logspace(-4, 0, 256)
    there, back = (uniform(range(8), 256, hyper(step=step), torch.device("cpu")) for step in (6, 7))
    assert torch.equal(there + back, torch.ones(8, 256))
    moved = (d + there).floor()
    assert 0.05 < (moved != 0).float().mean().item() < 0.5
    assert torch.equal(moved + (back - d).floor(), torch.zeros(8, 256))


def test_the_smallest_update_that_is_kept_is_the_documented_one():
    smallest, largest = torch.tensor([2.0**-23]), torch.tensor([1 - 2.0**-23])  # that ``uniform`` gives
    assert (largest + 2.0**-23).floor().item() == 1 and (largest + 2.0**-24).floor().item() == 0
    assert (smallest - 2.0**-22).floor().item() == -1 and (smallest - 2.0**-24).floor().item() == 0
    assert smallest.floor().item() == largest.floor().item() == 0


@pytest.mark.parametrize("stochastic", [True, False])
def test_a_zero_update_changes_nothing(stochastic):
    layer = int8_linear(64, 256)
    optimizer = FOAM(layer.parameters(), stochastic_rounding="auto" if stochastic else False)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.zeros(1, 256), torch.randn(63, 256)]))
    before = copy.deepcopy(layer.weight)
    for _ in range(20):
        layer.weight.grad = torch.zeros(64, 256)
        optimizer.step()
    assert same_bits(layer.weight, before)


@pytest.mark.parametrize("size", [1e-3, 0.3, 3.0, 300.0])
def test_codes_never_wrap_and_stay_near_what_float32_would_hold(size):
    weight = Int8Weight.from_float(torch.randn(16, 256))
    plain = weight.dequantize()
    codes, scales = weight.codes.view(16, 2, 128), weight.scales.view(16, 2, 1)
    for step in range(50):
        delta = torch.randn(16, 2, 128) * size * scales * torch.randint(0, 2, (16, 2, 1))
        u = uniform(range(16), 256, hyper(step=step), torch.device("cpu")).view(16, 2, 128)
        values = codes * scales + delta
        new, new_scales = add_to_codes(codes, scales, delta, u)
        assert new.abs().max() <= MAX_CODE and torch.equal(new, new.floor())
        assert bool(((new * new_scales - values).abs() <= 1.0001 * new_scales).all())
        assert bool((new.abs().amax(-1) >= 64).all())  # no block loses its resolution
        codes, scales = new.to(torch.int8), new_scales
    assert plain.shape == (16, 256)


def test_only_a_block_whose_codes_leave_the_range_gets_another_scale():
    codes = torch.full((1, 3, 8), 120.0).to(torch.int8)
    scales, delta = torch.full((1, 3, 1), 0.5), torch.zeros(1, 3, 8)
    delta[0, 0, 0], delta[0, 1, 0] = 3.0, 4.0  # to 126, to 128
    new, new_scales = add_to_codes(codes, scales, delta, 0.5)
    assert new_scales.flatten().tolist() == [0.5, pytest.approx(64 / 127), 0.5]
    assert new[0, 0].tolist() == [126] + [120] * 7 and new[0, 1].tolist() == [127] + [119] * 7
    assert torch.equal(new[0, 2], codes[0, 2].float())


def test_a_block_that_shrinks_gains_resolution_without_a_rounding():
    codes, scales = torch.tensor([[[100, -3, 2, 0]]], dtype=torch.int8), torch.full((1, 1, 1), 0.7)
    delta = torch.tensor([[[-85 * 0.7, 0, 0, 0]]])
    new, new_scales = add_to_codes(codes, scales, delta, 0.5)
    assert new.flatten().tolist() == [120, -24, 16, 0]
    assert new_scales.item() == pytest.approx(0.7 / 8) and torch.equal(
        new * new_scales, torch.tensor([15, -3, 2, 0]) * scales
    )


def test_a_block_of_zeros_takes_the_scale_of_its_first_update():
    weight = Int8Weight.from_float(torch.zeros(2, 128))
    delta = torch.randn(2, 1, 128) * 1e-6
    new, scales = add_to_codes(weight.codes.view(2, 1, 128), weight.scales.view(2, 1, 1), delta, 0.5)
    assert bool(((new * scales - delta).abs() <= 0.51 * scales).all()) and bool((new.abs().amax(-1) == 127).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad):
    layer = int8_linear()
    optimizer = FOAM([layer.weight], nonfinite="ignore")
    layer.weight.grad = torch.zeros(24, 256)
    layer.weight.grad[3, 5] = bad
    optimizer.step()
    assert bool(layer.weight.dequantize()[3].isnan().all()) and bool(layer.weight.dequantize()[4:].isfinite().all())


def test_the_random_bits_are_a_function_of_place_alone(monkeypatch):
    weight, grad = torch.randn(40, 256), torch.randn(40, 256)

    def trained(rows=slice(None), chunk=None, seed=5, neighbours=0):
        if chunk:
            monkeypatch.setattr("foam_hf.tensors.rows.CHUNK_CPU", chunk)
        params = [nn.Parameter(torch.ones(3)) for _ in range(neighbours)]
        p = nn.Parameter(Int8Weight.from_float(weight[rows]))
        optimizer = FOAM([*params, p], lr=1e-3, level=3, seed=seed)
        for _ in range(3):
            p.grad = grad[rows].clone()
            optimizer.step()
        return p

    whole = trained()
    assert same_bits(whole, trained(chunk=256)) and same_bits(whole, trained(chunk=1000))
    assert torch.equal(whole.codes[:7], trained(slice(7)).codes)
    assert not torch.equal(whole.codes, trained(seed=6).codes)
    assert not torch.equal(whole.codes, trained(neighbours=1).codes)


@pytest.mark.parametrize("second_moment", BY_BLOCK)
@pytest.mark.parametrize("level", [0, 2, 8, "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_that_of_float64_within_one_code(dtype, level, second_moment):
    from tests.support.reference import Reference

    x, grads = torch.randn(12, 96), [torch.randn(12, 96).to(dtype) for _ in range(3)]
    options = {"lr": 0.1, "weight_decay": 0.1, "level": level, "second_moment": second_moment}
    p = nn.Parameter(Int8Weight.from_float(x.to(dtype), 32))
    optimizer = FOAM([p], **options)
    reference = Reference(p.dequantize(torch.float32), **options)
    for grad in grads:
        before = p.dequantize(torch.float32).double()
        reference.weight = before.clone()
        expected = reference.step(grad)
        p.grad = grad.clone()
        optimizer.step()
        away = (p.dequantize(torch.float32).double() - expected).view(12, 3, 32).abs() / p.scales.unsqueeze(-1)
        assert away.max().item() < 1.001
        # Rounded to nearest, nearly all would stand still; stochastically, the mean follows.
        change, wanted = p.dequantize(torch.float32).double() - before, expected - before
        assert (change * wanted).sum().item() / wanted.square().sum().item() == pytest.approx(1, abs=0.06)


def test_to_nearest_hardly_learns_and_stochastically_follows():
    def moved(rounding):
        p = nn.Parameter(Int8Weight.from_float(torch.randn(64, 256)))
        before = p.dequantize()
        optimizer = FOAM([p], lr=1e-4, level="row", scale=1.0, stochastic_rounding=rounding)
        for _ in range(50):
            p.grad = torch.ones(64, 256)
            optimizer.step()
        return (before - p.dequantize()).mean().item() / (50 * 1e-4)

    assert moved("auto") == pytest.approx(1.0, abs=0.1)
    assert abs(moved(False)) < 0.01


def test_a_tiny_model_follows_float32_weights():
    torch.manual_seed(1)
    inputs = torch.randn(512, 64)
    targets = torch.tanh(inputs @ torch.randn(64, 32) / 8) @ torch.randn(32, 8) / 4

    def trained(int8):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        if int8:
            for layer in (model[0], model[2]):
                layer.weight = nn.Parameter(Int8Weight.from_float(layer.weight, 64))
        optimizer = FOAM(model.parameters(), lr=5e-3, level=3, scale=1.0)
        for step in range(300):
            optimizer.zero_grad()
            rows = slice(64 * (step % 8), 64 * (step % 8) + 64)
            F.mse_loss(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            return F.mse_loss(model(inputs), targets).item(), model[0].weight.norm().item()

    (loss, norm), (expected_loss, expected_norm) = trained(True), trained(False)
    assert expected_loss < 0.5
    assert loss == pytest.approx(expected_loss, rel=0.05) and norm == pytest.approx(expected_norm, rel=0.01)


# The optimizer around it


def test_the_optimizer_sees_an_ordinary_parameter():
    layer = int8_linear(dtype=torch.bfloat16)
    optimizer = FOAM(layer.parameters(), level=3, stochastic_rounding=True)
    layer(torch.randn(5, 256, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert state["folded_exp_avg"].shape == (24, 32) and state["folded_exp_avg"].dtype == torch.float32
    assert "INT8 stochastically" in summarize(optimizer)
    assert "INT8 to nearest" in summarize(FOAM([layer.weight], stochastic_rounding=False))
    with pytest.raises(ValueError, match=r"no parameter is bfloat16 or quantized: got \['plain torch.float32'\]"):
        FOAM([nn.Parameter(torch.ones(3))], stochastic_rounding=True)


def test_a_resumed_run_is_bit_identical():
    torch.manual_seed(3)
    data = [torch.randn(8, 256) for _ in range(6)]

    def step(layer, optimizer, x):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    layer = int8_linear()
    start = copy.deepcopy(layer)
    optimizer = FOAM(layer.parameters(), level=3, lr=1e-3)
    for x in data:
        step(layer, optimizer, x)
    half = FOAM(start.parameters(), level=3, lr=1e-3)
    for x in data[:3]:
        step(start, half, x)
    buffer = io.BytesIO()
    torch.save({"model": start.state_dict(), "optimizer": half.state_dict()}, buffer)
    buffer.seek(0)
    checkpoint = torch.load(buffer, weights_only=True)
    resumed = int8_linear()
    resumed.load_state_dict(checkpoint["model"])
    optimizer = FOAM(resumed.parameters(), level=3, lr=1e-3)
    optimizer.load_state_dict(checkpoint["optimizer"])
    for x in data[3:]:
        step(resumed, optimizer, x)
    assert same_bits(resumed.weight, layer.weight) and torch.equal(resumed.bias, layer.bias)
