"""Gradient release with several backward passes a step: the rule, what adds up exactly, and what no loop may break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foam_hf import FOAM, enable_gradient_release, foam_param_groups
from foam_hf.int8.weight import Int8Weight
from tests.support.reference import MicroReference
from tests.support.tiny_models import tiny_llama
from tests.support.tolerances import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [*([pytest.mark.gpu] if DEVICE == "cuda" else [])]
LR = 1e-2


def made(weights: list[Tensor], k: int, clip: float | None = None, **options: Any) -> Any:
    """Parameters, their optimizer and its release."""
    model = nn.ParameterList(weights).to(DEVICE)
    optimizer = FOAM(model.parameters(), **{"lr": LR, **options})
    return [*model], optimizer, enable_gradient_release(model, optimizer, accumulation=k, max_grad_norm=clip)


def backward(p: Tensor, grad: Tensor | None) -> None:
    """A backward pass that gives ``p`` this gradient."""
    if grad is not None:
        (p * grad.to(DEVICE, p.dtype)).sum().backward()


def gradients(shape: tuple[int, ...], steps: int, k: int) -> list[list[Tensor]]:
    """Some micro-batches are alike, some are not, and a block of one has no residual."""
    torch.manual_seed(0)
    found = []
    for step in range(steps):
        common, parts = torch.randn(shape) * step, [torch.randn(shape) * (i + 1) for i in range(k)]
        parts[0][0] = 1.0
        found.append([common + part for part in parts])
    return found


SHAPES = {"level 2": (2, (3, 24)), "level row": ("row", (3, 40)), "a shorter last block": (3, (2, 37))}


@pytest.mark.parametrize(("level", "shape"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_each_micro_batch_moves_a_weight_as_the_slow_reference_says(
    monkeypatch: pytest.MonkeyPatch, kernel: str, level: Any, shape: tuple[int, ...]
) -> None:
    """The last step lacks two of its four micro-batches."""
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    weight = torch.randn(shape)
    options = {"level": level, "weight_decay": 0.1, "residual_scale": 0.7}
    (p,), optimizer, _ = made([weight.clone()], 4, **options)
    slow = MicroReference(weight, lr=LR, k=4, **options)
    for step, parts in enumerate(gradients(shape, 4, 4)):
        for grad in parts[: 2 if step == 3 else 4]:
            backward(p, grad)
            slow.micro(grad)
            assert p.grad is None
        optimizer.step()
        slow.end()
    assert_within(p.detach().cpu(), slow.weight.float(), "micro-batches against float64, 4 steps")
    for name, expected in (("folded_exp_avg", slow.m), ("folded_exp_avg_sq", slow.v)):
        found = optimizer.state[p][name].cpu()
        assert_within(found, expected.float(), "micro-batches against float64, 4 steps")


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "INT8"])
@pytest.mark.parametrize("clip", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_do_as_the_plain_path(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, clip: float | None, int8: bool
) -> None:
    """Rounding is stochastic, by the same bits. A block of the second micro-batch has a NaN."""
    found = []
    for kernel in ("reference", "triton"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        torch.manual_seed(1)
        weight = torch.randn(4, 64).to(dtype)
        weights = [Int8Weight.from_float(weight, 16) if int8 else weight, torch.randn(3, 36).to(dtype)]
        params, optimizer, _ = made(weights, 3, clip, level=4, weight_decay=0.1, nonfinite="skip")
        for step, (first, second) in enumerate(zip(gradients((4, 64), 3, 3), gradients((3, 36), 3, 3), strict=True)):
            for i in range(3):
                if (step, i) == (1, 1) and clip is None:
                    first[i][2, 20] = float("nan")
                for p, grad in zip(params, (first[i], second[i]), strict=True):
                    backward(p, grad)
            optimizer.step()
        found.append([p.dequantize() if isinstance(p, Int8Weight) else p.detach().float() for p in params])
        found[-1] += [x for p in params for x in optimizer.state[p].values() if torch.is_tensor(x)]
    for one, other in zip(*found, strict=True):
        assert bool(one.isfinite().all())
        assert_within(other, one, "kernel steps against the plain path's")


def test_what_the_micro_batches_move_adds_up_to_the_step(k: int = 5) -> None:
    """With eps far above the gradients a step is as long as its numerators, which are linear in the gradient.

    One weight has a gradient in each micro-batch, one in two of them, and one in none of the second step.
    """
    torch.manual_seed(0)
    weights = [torch.randn(4, 32) for _ in range(3)]
    options = {"level": 3, "eps": 1e9, "lr": 1e7, "weight_decay": 1e-9}
    params, optimizer, _ = made([w.clone() for w in weights], k, **options)
    wholes = [nn.Parameter(w.clone().to(DEVICE)) for w in weights]
    plain = FOAM(wholes, **options)
    for step, parts in enumerate(gradients((4, 32), 3, k)):
        for i, grad in enumerate(parts):
            for number, (p, q) in enumerate(zip(params, wholes, strict=True)):
                if number == 0 or (number == 1 and i in (1, 3)) or (number == 2 and step != 1):
                    backward(p, grad)
                    backward(q, grad)
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
    for p, q, w in zip(params, wholes, weights, strict=True):
        before = w.to(DEVICE)
        assert_within(p.detach() - before, q.detach() - before, "what micro-batches move against the step")
        assert_within(
            optimizer.state[p]["folded_exp_avg"],
            plain.state[q]["folded_exp_avg"],
            "five steps against float64, float32 weights",
        )
        assert optimizer.state[p]["step"] == plain.state[q]["step"]


def test_clipping_makes_a_step_the_same_however_large_the_gradients_are() -> None:
    """Also that of a weight without a gradient in some micro-batches, whose first moment goes on."""
    found = []
    for size in (1.0, 1024.0):
        torch.manual_seed(0)
        weights = [torch.randn(4, 32), torch.randn(4, 32)]
        params, optimizer, _ = made([w.clone() for w in weights], 3, 0.01, level=3)
        for step, parts in enumerate(gradients((4, 32), 5, 3)):
            for i, grad in enumerate(parts):
                for number, p in enumerate(params):
                    if number == 0 or i == step % 3:
                        backward(p, size * grad)
            optimizer.step()
        found.append([p.detach().cpu() - w for p, w in zip(params, weights, strict=True)])
    for small, large in zip(*found, strict=True):
        assert_within(large, small, "clipped micro-batches, gradients of another size")


def test_the_norm_of_all_gradients_is_known_without_them() -> None:
    """Micro-batches that agree, that cancel and that are independent; 4,096 blocks, so within a tenth."""
    torch.manual_seed(0)
    weight, base = torch.zeros(256, 256), torch.randn(256, 256)
    for parts in ([base, base], [base, -base, 0.1 * torch.randn(256, 256)], [torch.randn(256, 256) for _ in range(8)]):
        (p, vector), optimizer, release = made([weight.clone(), torch.zeros(8)], 8, 1e9, level=4, lr=0.0)
        for grad in parts:
            backward(p, grad)
            backward(vector, torch.full((8,), 50.0))
        whole = torch.cat([sum(parts).flatten(), torch.full((8,), 50.0 * len(parts))])
        assert float(release.grad_norm) == pytest.approx(float(whole.norm()), rel=0.1)
        optimizer.step()
        assert release.grad_norm is None


def test_gradients_that_were_clipped_leave_the_moments_that_true_clipping_leaves() -> None:
    """Without accumulation, and in the middle of it: the norm is exact where there is one backward pass."""
    torch.manual_seed(0)
    weights = [torch.randn(16, 64) for _ in range(3)] + [torch.randn(5)]
    for second_moment in ("block", "factored", "adam_mini", "muon"):
        options = {"level": 4, "second_moment": second_moment}
        params, optimizer, release = made([w.clone() for w in weights], 1, 1.0, **options)
        wholes = [nn.Parameter(w.clone().to(DEVICE)) for w in weights]
        plain = FOAM(wholes, **{"lr": LR, **options})
        for step in range(4):
            for p, q in zip(params, wholes, strict=True):
                grad = torch.randn(p.shape) * (1e-3, 10.0, 1e4, 1e-3)[step]
                backward(p, grad)
                backward(q, grad)
            norm = torch.nn.utils.clip_grad_norm_(wholes, 1.0)
            assert float(release.grad_norm) == pytest.approx(float(norm), rel=1e-5)
            for each in (optimizer, plain):
                each.step()
                each.zero_grad()
            for p, q in zip(params, wholes, strict=True):
                for name, x in plain.state[q].items():
                    if torch.is_tensor(x):
                        assert_within(optimizer.state[p][name], x, "moments after clipping in the hook")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_survive_spikes_and_expectations_that_were_far_off(state_dtype: torch.dtype) -> None:
    """The first weight's gradient is 1e8 times as large, then 1e-4 times. A bfloat16 moment may be two steps off."""
    torch.manual_seed(0)
    weights = [torch.randn(16, 64) for _ in range(2)]
    options = {"level": 4, "state_dtype": state_dtype}
    params, optimizer, _ = made([w.clone() for w in weights], 1, 1.0, **options)
    wholes = [nn.Parameter(w.clone().to(DEVICE)) for w in weights]
    plain = FOAM(wholes, **{"lr": LR, **options})
    for factor in (1.0, 1e8, 1e-4, 1.0):
        for i, (p, q) in enumerate(zip(params, wholes, strict=True)):
            grad = torch.randn(p.shape) * (factor if i == 0 else 1.0)
            backward(p, grad)
            backward(q, grad)
        torch.nn.utils.clip_grad_norm_(wholes, 1.0)
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
        for p, q in zip(params, wholes, strict=True):
            found, expected = (each.state[w]["folded_exp_avg_sq"].float() for each, w in ((optimizer, p), (plain, q)))
            assert float(found.min()) > 0
            if state_dtype == torch.float32:
                assert_within(found, expected, "moments after clipping in the hook")
            else:
                assert float((found / expected - 1).abs().max()) < 4 * 2**-7


@pytest.mark.parametrize("nonfinite", ["error", "ignore"])
def test_weights_whose_gradient_was_zero_so_far_can_come_first(nonfinite: str) -> None:
    """As behind a gate that begins at zero. A third weight never has a gradient."""
    torch.manual_seed(0)
    weights = [torch.randn(8, 64) for _ in range(3)]
    params, optimizer, _ = made([w.clone() for w in weights], 1, 1.0, level=4, nonfinite=nonfinite)
    for step in range(4):
        before = params[0].detach().clone()
        backward(params[0], torch.randn(8, 64) * (step == 3))
        backward(params[1], torch.randn(8, 64))
        optimizer.step()
        moved = (params[0].detach() - before).abs().mean().item()
        assert (moved > 0.05 * LR) if step == 3 else moved == 0.0


def test_the_norm_can_be_asked_for_in_the_middle_of_a_step() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(64, 64) * size for size in (1e-3, 10.0)]
    found = []
    for asks in (False, True):
        (p, vector), optimizer, release = made([torch.zeros(64, 64), torch.zeros(64)], 2, 1.0, level=4)
        for grad in grads:
            if asks:
                assert release.grad_norm is None or float(release.grad_norm) < 1.0
            backward(p, grad)
            backward(vector, grad[0])
        norm = release.grad_norm
        optimizer.step()
        found.append([norm, p.detach(), vector.detach(), *optimizer.state[p].values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("k", [1, 4])
def test_no_micro_batches_move_an_element_further_than_stated(k: int) -> None:
    """Spikes in one micro-batch, in all, ever larger ones, and blocks that were silent for long."""
    torch.manual_seed(0)
    scale, shape = 2.0, (8, 64)
    (p,), optimizer, _ = made([torch.zeros(shape)], k, level=4, lr=1e-3, scale=scale)
    largest = 0.0
    for step in range(40):
        before = p.detach().clone()
        spiky = torch.randn(shape)
        for i in range(k):
            grad = spiky if step % 3 == 0 else torch.randn(shape)
            grad = grad * (10.0 ** (2 * i) if step in (7, 20) else 1e5 if step == 12 or (step == 25 and i == 1) else 1)
            grad[3] *= step in (0, 30)
            backward(p, grad)
        optimizer.step()
        largest = max(largest, (p.detach() - before).abs().max().item() / (1e-3 * scale))
        if step == 15:
            optimizer.state[p]["step"] += 10_000
    assert 0.5 < largest <= 16.0 * (1 + 1e-5)


def test_random_bits_of_micro_batches_are_independent() -> None:
    """Updates of a hundredth of a bfloat16 spacing, a thousand of them: they add up, and not to whole spacings."""
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    (p,), optimizer, _ = made([weight], 16, level=3, lr=1e-3, eps=1e3, scale=1.0)
    for _ in range(16):
        for _ in range(16):
            backward(p, torch.full((64, 64), -1e3))
        optimizer.step()
    moved = p.detach().float() - 1
    exact = nn.Parameter(torch.ones(64, 64, device=DEVICE))
    plain = FOAM([exact], level=3, lr=1e-3, eps=1e3, scale=1.0)
    for _ in range(16):
        exact.grad = torch.full((64, 64), -16e3, device=DEVICE)
        plain.step()
    assert float(moved.mean()) == pytest.approx(float((exact.detach() - 1).mean()), rel=0.1)
    assert len(moved.unique()) > 4


def test_a_checkpoint_in_the_middle_of_a_step_is_warned_about_and_loading_begins_a_new_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    (p,), optimizer, release = made([torch.randn(4, 32)], 3, level=3)
    for _ in range(3):
        backward(p, torch.randn(4, 32))
    optimizer.step()
    saved = optimizer.state_dict()
    assert not caplog.records
    backward(p, torch.randn(4, 32))
    optimizer.state_dict()
    assert "a checkpoint in the middle of a step" in caplog.text
    optimizer.load_state_dict(saved)
    assert release.unfinished == 0
    for _ in range(3):
        backward(p, torch.zeros(4, 32))
    optimizer.step()
    for name, b in (("folded_exp_avg", 0.9), ("folded_exp_avg_sq", 0.999)):
        assert_within(
            optimizer.state[p][name], saved["state"][0][name] * b, "five steps against float64, float32 weights"
        )


@pytest.mark.parametrize("k", [1, 2])
def test_a_norm_that_is_not_finite_leaves_moments_as_they_were(k: int) -> None:
    """Also those of a weight that was updated before the NaN came."""
    for state_dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        options = {"level": 3, "nonfinite": "skip", "state_dtype": state_dtype}
        params, optimizer, release = made([torch.randn(4, 32) for _ in range(2)] + [torch.randn(5)], k, 1.0, **options)
        for spoilt in (False, True):
            before = [x.clone() for p in params for x in optimizer.state[p].values() if torch.is_tensor(x)]
            for i in range(k):
                for number, p in enumerate(params):
                    grad = torch.randn(p.shape)
                    if spoilt and (number, i) == (1, k - 1):
                        grad[2, 20] = float("nan")
                    backward(p, grad)
            assert bool(release.grad_norm.isnan()) == spoilt
            optimizer.step()
        after = [x for p in params for x in optimizer.state[p].values() if torch.is_tensor(x)]
        assert len(before) == len(after) > 4
        assert all(map(torch.equal, before, after))


def test_large_gradients_that_must_be_kept_are_said(caplog: pytest.LogCaptureFixture) -> None:
    made([torch.randn(8, 32), torch.randn(32)], 2, level=3)
    assert not caplog.records
    made([torch.randn(8, 32), torch.randn(8, 32)], 2, level=0)
    assert "the gradients of 2 parameters, 0.0 MiB, are kept until optimizer.step()" in caplog.text


# what a loop may not do


def test_more_backward_passes_than_said_are_an_error() -> None:
    (p,), optimizer, _ = made([torch.randn(4, 32)], 2, level=3)
    for cleared in (False, True):
        for _ in range(2):
            backward(p, torch.ones(4, 32))
        with pytest.raises(
            RuntimeError, match=r"got 3; expected at most accumulation=2 backward passes for each step"
        ):
            backward(p, torch.ones(4, 32))
        if not cleared:
            with pytest.raises(RuntimeError, match=r"one too many for this step.*expected optimizer.zero_grad"):
                optimizer.step()
        optimizer.zero_grad()
    optimizer.step()
    backward(p, torch.ones(4, 32))
    optimizer.step()
    assert optimizer.state[p]["step"] == 3


def test_numbers_of_micro_batches_and_rules_that_cannot_be_are_refused() -> None:
    weight = nn.Parameter(torch.randn(4, 32))
    model = nn.ParameterList([weight])
    for rule in ("factored", "muon", "adam_mini"):
        with pytest.raises(ValueError, match=f"got second_moment='{rule}' with accumulation=4; expected"):
            enable_gradient_release(model, FOAM([weight], second_moment=rule), accumulation=4)
    optimizer = FOAM([weight])
    for count, error in ((0, ValueError), (2**20, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="accumulation"):
            enable_gradient_release(model, optimizer, accumulation=count)
    with pytest.raises(ValueError, match="expected 'all' or 'weight'"):
        enable_gradient_release(model, optimizer, max_grad_norm=1.0, clip_by="each")
    with pytest.raises(ValueError, match="expected clip_by='all', or accumulation=1"):
        enable_gradient_release(model, optimizer, max_grad_norm=1.0, clip_by="weight", accumulation=2)
    release = enable_gradient_release(model, optimizer)
    with pytest.raises(ValueError, match="with the largest N there will be"):
        release.accumulation = 2


def test_embeddings_whose_rule_was_left_open_get_the_block_rule_and_others_are_refused_by_name() -> None:
    rules = {}
    for accumulation in (1, 2):
        model = tiny_llama()
        optimizer = FOAM(foam_param_groups(model), scale=3.0)
        enable_gradient_release(model, optimizer, accumulation=accumulation)
        rules[accumulation] = {(g["second_moment"], g["scale"]) for g in optimizer.param_groups if g["level"]}
    assert rules == {1: {("block", 3.0), ("factored", 1.0)}, 2: {("block", 3.0)}}
    asked, begun = tiny_llama(), tiny_llama()
    optimizers = FOAM(foam_param_groups(asked, embedding_rule="factored")), FOAM(foam_param_groups(begun))
    language_loss(begun).backward()
    optimizers[1].step()  # its state is that of the factored rule
    for model, optimizer in zip((asked, begun), optimizers, strict=True):
        with pytest.raises(ValueError, match=r"expected .* \(for embeddings and heads embedding_rule='block'\)"):
            enable_gradient_release(model, optimizer, accumulation=2)


def language_loss(model: nn.Module) -> Any:
    tokens = torch.arange(24).view(2, 12)
    return model(input_ids=tokens, labels=tokens).loss
