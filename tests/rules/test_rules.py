"""The arithmetic against float64, and its independence of everything that must not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foam_hf.rules.by_rows
import foam_hf.tensors.rows
from foam_hf.optimizer import FOAM
from tests.support.reference import Reference
from tests.support.rules import BY_BLOCK
from tests.support.tolerances import assert_within

LEVELS = [0, 1, 2, 3, 8, 16, "row"]
SHAPES = [(4, 16), (5, 37), (1, 1), (3, 2, 11), (2, 2, 3, 5), (7,), ()]


def train(weight, grads, **options):
    """The weight after one step for each gradient."""
    p = torch.nn.Parameter(weight.clone())
    optimizer = FOAM([p], **options)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer


def check(weight, steps, case, **options):
    grads = [torch.randn(weight.shape).to(weight.dtype) for _ in range(steps)]
    reference = Reference(weight, **options)
    trained, _ = train(weight, grads, stochastic_rounding=False, **options)
    for grad in grads:
        expected = reference.step(grad)
        reference.weight = expected.to(weight.dtype).double()  # rounds as the weight does
    assert_within(trained.float(), reference.weight, case)


@pytest.mark.parametrize("second_moment", BY_BLOCK)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_follows_the_float64_reference(shape, level, second_moment):
    options = {"lr": 0.01, "weight_decay": 0.1, "level": level, "second_moment": second_moment}
    check(torch.randn(shape), 5, "five steps against float64, float32 weights", **options)


@pytest.mark.parametrize("second_moment", BY_BLOCK)
@pytest.mark.parametrize("level", [0, 2, "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_to_nearest_follow_the_float64_reference(dtype, level, second_moment):
    options = {"lr": 0.01, "weight_decay": 0.1, "level": level, "second_moment": second_moment}
    case = f"five steps against float64, {str(dtype).removeprefix('torch.')} weights to nearest"
    check(torch.randn(6, 21).to(dtype), 5, case, **options)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    level=st.one_of(st.integers(0, 16), st.just("row")),
    second_moment=st.sampled_from(BY_BLOCK),
    scale=st.floats(0.01, 2),
    rho=st.floats(0, 2),
    decay=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.9999)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_setting_follows_the_reference(shape, level, second_moment, scale, rho, decay, betas, seed):
    torch.manual_seed(seed)
    check(torch.randn(shape), 1, "one step against float64, float32 weights", lr=0.01, level=level, betas=betas,
          second_moment=second_moment, scale=scale, residual_scale=rho, weight_decay=decay)  # fmt: skip


def test_level_0_scale_1_is_torch_adamw_over_200_steps():
    shapes = [(32, 48), (7, 13), (5,), (), (3, 4, 10)]
    weights = [torch.randn(shape) for shape in shapes]
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    foam = FOAM(ours, lr=1e-2, weight_decay=0.1, level=0, scale=1.0)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(200):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        foam.step()
        adamw.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_within(p, q, "level 0 against torch AdamW, 200 steps, float32")


@pytest.mark.parametrize("second_moment", BY_BLOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 40, 100])
def test_chunks_change_nothing(monkeypatch, chunk, dtype, second_moment):
    weight, grads = torch.randn(3, 5, 19).to(dtype), [torch.randn(3, 5, 19).to(dtype) for _ in range(3)]
    options = {"lr": 0.01, "level": 2, "second_moment": second_moment, "state_dtype": torch.bfloat16}
    whole, _ = train(weight, grads, **options)
    monkeypatch.setattr(foam_hf.tensors.rows, "CHUNK_CPU", chunk)
    chunked, _ = train(weight, grads, **options)
    if second_moment == "block":
        assert torch.equal(whole, chunked)
    else:  # the order in which a column's squares are added is all that may differ
        assert_within(chunked.float(), whole.float(), "five steps against float64, bfloat16 weights to nearest")


@pytest.mark.parametrize("second_moment", BY_BLOCK)
@pytest.mark.parametrize("level", [0, 2, "row"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "permuted 3-D"])
def test_strides_of_weight_and_gradient_change_nothing(layout, level, second_moment):
    def laid_out(x):
        if layout == "transposed":
            return x.t().contiguous().t()
        if layout == "strided":
            return torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    shape = (3, 4, 10) if layout == "permuted 3-D" else (6, 21)
    weight, grads = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    expected, _ = train(weight, grads, level=level, second_moment=second_moment)
    p = torch.nn.Parameter(laid_out(weight))
    assert not p.is_contiguous()
    optimizer = FOAM([p], level=level, second_moment=second_moment)
    for grad in grads:
        p.grad = laid_out(grad)
        optimizer.step()
    assert_within(p, expected, "one step against float64, float32 weights")


@pytest.mark.parametrize("second_moment", BY_BLOCK)
def test_zero_gradients_decay_and_nothing_else(second_moment):
    weight = torch.randn(4, 10)
    trained, optimizer = train(weight, [torch.zeros(4, 10)] * 3, lr=0.1, weight_decay=0.5, second_moment=second_moment)
    assert_within(trained, weight * 0.95**3, "one step against float64, float32 weights")
    (state,) = optimizer.state.values()
    assert all(bool(torch.as_tensor(x).isfinite().all()) for x in state.values())


def test_fold_of_short_blocks_matches_mean():
    for width in (1, 2, 3, 4, 5):
        x = torch.randn(3, 7, width)
        assert_within(
            foam_hf.rules.by_rows.fold(x), x.mean(-1, keepdim=True), "one step against float64, float32 weights"
        )


def test_stochastic_rounding_moves_a_weight_by_updates_that_nearest_loses():
    # One spacing of bfloat16 at 1.0 is 2**-7; each step asks for a hundredth of it.
    weight, steps = torch.ones(64, 64, dtype=torch.bfloat16), 100
    grads = [torch.ones(64, 64, dtype=torch.bfloat16)] * steps
    options = {"lr": 2.0**-7 / 100, "level": "row", "scale": 1.0}
    nearest, _ = train(weight, grads, stochastic_rounding=False, **options)
    stochastic, _ = train(weight, grads, **options)
    assert torch.equal(nearest, weight)
    moved = (1 - stochastic.float()).mean().item() / 2.0**-7
    assert moved == pytest.approx(1.0, abs=0.05)


def test_stochastic_rounding_covers_weight_decay():
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    decayed, _ = train(weight, [torch.zeros_like(weight)] * 100, lr=1e-3, weight_decay=0.05)
    assert 1 - decayed.float().mean().item() == pytest.approx(100 * 1e-3 * 0.05, rel=0.1)


def test_bfloat16_state_keeps_moving_at_a_slow_beta():
    # To nearest, v would stand still: 0.001 of it is less than half a spacing.
    weight, grads = torch.randn(8, 64), [torch.full((8, 64), 2.0)] + [torch.zeros(8, 64)] * 300
    _, optimizer = train(weight, grads, level=3, state_dtype=torch.bfloat16)
    (state,) = optimizer.state.values()
    assert state["folded_exp_avg_sq"].dtype == torch.bfloat16
    assert state["folded_exp_avg_sq"].float().mean().item() == pytest.approx(4e-3 * 0.999**300, rel=0.05)


@pytest.mark.parametrize("second_moment", BY_BLOCK)
def test_bfloat16_state_stays_near_the_reference(second_moment):
    weight, grads = torch.randn(6, 40), [torch.randn(6, 40) for _ in range(5)]
    trained, _ = train(weight, grads, lr=0.01, level=2, second_moment=second_moment, state_dtype=torch.bfloat16)
    reference = Reference(weight, lr=0.01, level=2, second_moment=second_moment)
    for grad in grads:
        expected = reference.step(grad)
    assert_within(trained - weight, expected - weight.double(), "five steps against float64, bfloat16 state")


def test_the_residual_reaches_the_weights_and_its_scale_weighs_it():
    grad = torch.randn(4, 16)
    weight = torch.zeros(4, 16)
    without, _ = train(weight, [grad], level="row", residual_scale=0.0)
    assert bool((without == without[:, :1]).all())  # one value a row
    within, _ = train(weight, [grad], level="row", residual_scale=1.0)
    assert bool((within.sign() != -within.sign()[:, :1]).any()) and not bool((within == within[:, :1]).all())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_mix_of_weight_and_gradient_dtypes(weight_dtype, grad_dtype):
    weight, grad = torch.randn(4, 20).to(weight_dtype), torch.randn(4, 20).to(grad_dtype)
    p = torch.nn.Parameter(weight.clone())
    p.grad_dtype = None  # lets a gradient keep its own dtype
    p.grad = grad.clone()
    FOAM([p], lr=0.01, level=2, stochastic_rounding=False).step()
    expected = Reference(weight, lr=0.01, level=2).step(grad).to(weight_dtype)
    exact = weight_dtype == torch.float32
    weights = "float32 weights" if exact else "bfloat16 weights to nearest"
    assert_within(p.float(), expected, f"{'one step' if exact else 'five steps'} against float64, {weights}")
