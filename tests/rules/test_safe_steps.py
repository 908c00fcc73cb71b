"""No element moves further than a stated multiple of the learning rate in a step, whatever its gradients were."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foam_hf.rules.by_rows
import foam_hf.rules.factored
from foam_hf import FOAM
from foam_hf.int8.weight import Int8Weight
from foam_hf.rules.all import rule_named
from tests.support.rules import FOLDING, OPTIONS
from tests.support.tolerances import TOLERANCES, assert_within

LR, SCALE = 1e-3, 2.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (32, 128)
SETTINGS: dict[str, dict[str, Any]] = {name: {"level": 5, **options} for name, options in OPTIONS.items()} | {
    "block, row": {"level": "row"},
    "factored, level 0": {"level": 0, "second_moment": "factored"},
    "adam_mini, level 0, whole tensors": {"level": 0, "second_moment": "adam_mini", "mini_rows": 0},
}
CASES = [(setting, "float32") for setting in SETTINGS]
CASES += [(rule, kind) for rule in OPTIONS if rule != "8bit" for kind in ("bfloat16 state", "INT8 weight")]


def noise(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape)


def dense() -> Iterator[Tensor]:
    yield from (noise() for _ in range(30))


def correlated() -> Iterator[Tensor]:
    """As behind inputs that are all positive: a row's gradients have one sign."""
    yield from (torch.randn(SHAPE[0], 1) * (1 + 0.1 * noise()) for _ in range(30))


def dead_rows_and_columns() -> Iterator[Tensor]:
    for _ in range(40):
        grad = noise()
        grad[3] = grad[:, 5] = grad[:, 64:96] = 0.0
        yield grad


def rare_rows() -> Iterator[Tensor]:
    for t in range(80):
        grad = noise() * (torch.rand(SHAPE[0], 1) < 0.01)
        grad[0] *= t > 60
        yield grad


def rare_columns() -> Iterator[Tensor]:
    yield from (noise() * (torch.rand(SHAPE[1]) < 0.01) for _ in range(80))


def rare_elements() -> Iterator[Tensor]:
    alive = torch.rand(SHAPE) < 0.01
    yield from (noise() * alive for _ in range(20))
    yield from (noise() * (torch.rand(SHAPE) < 0.01) for _ in range(50))


def one_element() -> Iterator[Tensor]:
    grad = torch.zeros(SHAPE)
    grad[1, 2] = 1.0
    yield from [grad] * 30


def diagonal() -> Iterator[Tensor]:
    yield from [torch.eye(*SHAPE)] * 30


def spikes() -> Iterator[Tensor]:
    for t in range(60):
        grad = noise()
        if t == 30:
            grad[1, 2] *= 1e5
            grad[9] *= 1e5
            grad[:, 11] *= 1e5
        yield grad * (1e5 if t == 50 else 1.0)


def rises_for_good() -> Iterator[Tensor]:
    yield from (noise() * (1.0 if t < 30 else 1e5) for t in range(50))
    yield from ((1 + noise()) * 1e10 for _ in range(20))


def zero_and_then_alive() -> Iterator[Tensor]:
    """Between its first two steps, ``largest_step`` lets 250 more have been, of zeros too."""
    yield torch.zeros(SHAPE)
    yield from (noise() + 1.0 for _ in range(25))


def first_of_lora() -> Iterator[Tensor]:
    """B is zero at first, so A has no gradient in the first step."""
    yield from (noise() * 1e-3 * t for t in range(40))


def idle_experts() -> Iterator[Tensor]:
    for t in range(50):
        grad = noise((4, 8, SHAPE[1]))
        grad[0] = 0.0
        grad[1] *= t % 20 == 0
        grad[2] *= t > 40
        yield grad


def one_row() -> Iterator[Tensor]:
    yield from (noise((1, 4096)) * (torch.rand(4096) < 0.05) for _ in range(40))


def one_column() -> Iterator[Tensor]:
    yield from (noise((4096, 1)) * (torch.rand(4096, 1) < 0.05) for _ in range(40))


def dies_late() -> Iterator[Tensor]:
    """Between its steps 20 and 21, ``largest_step`` lets 15,000 more have been, in which these had no gradient."""
    for t in range(45):
        grad = noise()
        if t >= 20:
            grad[:, DEAD] = 0.0
            grad[7] = 0.0
        if t >= 35:  # revived
            grad = noise()
        yield grad


PATTERNS = [dense, correlated, dead_rows_and_columns, dies_late, rare_rows, rare_columns, rare_elements, one_element]
PATTERNS += [diagonal, spikes, rises_for_good, zero_and_then_alive, first_of_lora, idle_experts, one_row, one_column]
HARDEST = [dies_late, rare_rows, rare_elements, spikes, zero_and_then_alive, idle_experts]
DEAD = list(range(5, 20))


@functools.cache
def drawn(pattern: Callable[[], Iterator[Tensor]]) -> list[Tensor]:
    torch.manual_seed(0)
    return [grad.to(DEVICE) for grad in pattern()]


def largest_step(pattern: Callable[[], Iterator[Tensor]], kind: str, **options: Any) -> float:
    """The furthest that an element moved in a step, in units of ``lr * scale``."""
    gradients = drawn(pattern)
    weight: Any = torch.zeros(gradients[0].shape, device=DEVICE)
    block = min(32, weight.shape[-1])
    p = nn.Parameter(Int8Weight.from_float(weight, block) if kind == "INT8 weight" else weight)
    state_dtype = torch.bfloat16 if kind == "bfloat16 state" else torch.float32
    optimizer = FOAM([p], lr=LR, scale=SCALE, state_dtype=state_dtype, **options)
    largest, before = 0.0, values(p).clone()
    for t, grad in enumerate(gradients):
        if pattern is dies_late and t == 20:
            let_die(optimizer.state[p])
        if pattern is zero_and_then_alive and t == 1:
            optimizer.state[p]["step"] += 250
        p.grad = grad
        scales = p.scales.clone() if isinstance(p, Int8Weight) else None
        optimizer.step()
        after = values(p).clone()
        moved = (after - before).abs_()
        if isinstance(p, Int8Weight):  # an element may round to the further of the two nearest codes, old or new
            moved -= torch.maximum(scales, p.scales).repeat_interleave(block, -1)
        largest, before = max(largest, moved.max().item() / (LR * SCALE)), after
    return largest


def values(p: Tensor) -> Tensor:
    return p.dequantize().double() if isinstance(p, Int8Weight) else p.detach().double()


def let_die(state: dict[str, Any]) -> None:
    """15,000 steps without a gradient in row 7, and 1,000 to 15,000 in one of each of the dead columns."""
    steps = torch.arange(1, len(DEAD) + 1, device=DEVICE) * 1000
    state["step"] += 15_000
    for name, x in state.items():
        if name in ("exp_avg_sq", "col_exp_avg_sq"):
            x[..., DEAD] *= 0.999**steps
        if name in ("exp_avg_sq", "folded_exp_avg_sq", "row_exp_avg_sq"):
            x[7] *= 0.999**15_000
        if name in ("exp_avg", "folded_exp_avg"):
            x[7] = 0.0
        if name == "exp_avg":
            x[..., DEAD] = 0.0


def stated(rule: str) -> float:
    """By the rule itself and, with what was measured, by the table of tolerances."""
    name = rule.split(",")[0]
    largest = TOLERANCES[f"largest step in units of lr * scale, {name}"].allowed
    assert largest == rule_named(name).largest_step
    return largest


@pytest.mark.parametrize(("rule", "kind"), CASES)
def test_no_pattern_of_gradients_moves_an_element_further_than_stated(rule: str, kind: str) -> None:
    options, found = SETTINGS[rule], {}
    for pattern in PATTERNS if kind == "float32" else HARDEST:
        found[pattern.__name__] = largest_step(pattern, kind, **options)
    print({name: round(size, 2) for name, size in found.items()})  # pytest -rP shows it
    assert max(found.values()) <= stated(rule) * (1 + 1e-5), found


def test_muon_does_not_move_the_only_element_of_a_long_matrix_further() -> None:
    p = nn.Parameter(torch.zeros(16384, 2, device=DEVICE))
    optimizer = FOAM([p], lr=LR, scale=SCALE, level=1, second_moment="muon")
    p.grad = torch.zeros_like(p)
    p.grad[5] = 1.0
    optimizer.step()
    assert p.abs().max().item() <= stated("muon") * LR * SCALE * (1 + 1e-5)


def test_a_first_moment_of_8_bits_that_cannot_shrink_moves_nothing_far() -> None:
    """Beside an element that had a spike long ago, another one fell silent, and its first moment stays at its code."""
    p = nn.Parameter(torch.zeros(64, 64, device=DEVICE))
    optimizer = FOAM([p], lr=LR, level=0, scale=1.0, plain_state="8bit")
    largest = 0.0
    for t in range(60):
        before = values(p).clone()
        p.grad = torch.zeros_like(p)
        p.grad[0, 0] = 1e7 if t == 0 else 1.0
        p.grad[0, 1] = float(t < 20)
        optimizer.step()
        largest = max(largest, (values(p) - before).abs().max().item() / LR)
        if t == 50:  # 25,000 steps later
            optimizer.state[p]["step"] += 25_000
            optimizer.state[p]["root_exp_avg_sq_absmax"] *= 0.9995**25_000
    assert largest <= stated("8bit") * (1 + 1e-5)


@pytest.mark.parametrize("level", [3, 5, "row"])
@pytest.mark.parametrize("rule", FOLDING)
@pytest.mark.parametrize("pattern", [dense, correlated])
def test_dense_gradients_are_not_limited(
    monkeypatch: pytest.MonkeyPatch, pattern: Callable[[], Iterator[Tensor]], rule: str, level: Any
) -> None:
    def trained() -> Tensor:
        p = nn.Parameter(torch.zeros(SHAPE, device=DEVICE))
        optimizer = FOAM([p], level=level, second_moment=rule)
        for grad in drawn(pattern):
            p.grad = grad
            optimizer.step()
        return p.detach()

    limited = trained()
    monkeypatch.setattr(foam_hf.rules.by_rows, "LARGEST_STEP", 1e30)
    monkeypatch.setattr(foam_hf.rules.factored, "LARGEST_CENTER", 1e30)
    assert torch.equal(trained(), limited)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("level", [0, 2, 4, "row"])
def test_what_never_has_a_gradient_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, level: Any, kernel: str) -> None:
    """The factored rule alone: with the others an element's block has a moment, and moves it as any other of it."""
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    p = nn.Parameter(torch.zeros(2, 8, 32, device=DEVICE))
    optimizer = FOAM([p], level=level, second_moment="factored")
    for _ in range(4):
        p.grad = noise((2, 8, 32)).to(DEVICE)
        p.grad[..., 3] = p.grad[:, 5] = p.grad[1] = 0.0
        optimizer.step()
    assert not p[..., 3].any() and not p[:, 5].any() and not p[1].any() and bool(p[0, 0, 4:].all())


@pytest.mark.parametrize("level", [0, 2, 4, "row"])
def test_the_kernel_limits_as_the_plain_path_does(monkeypatch: pytest.MonkeyPatch, level: Any) -> None:
    gradients = [noise((8, 32)) * (torch.rand(32) < 0.3) for _ in range(6)]
    gradients[3][1, 2] *= 1e5
    gradients[4][5] *= 1e5
    found = []
    for kernel in ("reference", "triton"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        p = nn.Parameter(torch.zeros(8, 32, device=DEVICE))
        optimizer = FOAM([p], lr=0.01, level=level, second_moment="factored")
        for t, grad in enumerate(gradients):
            p.grad = grad.to(DEVICE)
            optimizer.step()
            if t == 0:  # late, where a square hardly counts in its own second moment
                optimizer.state[p]["step"] = 10_000
        found.append(p.detach())
    assert_within(found[1], found[0], "five steps against float64, float32 weights")
