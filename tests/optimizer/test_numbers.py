"""Numbers at the edges of what is legal: betas, sizes, default dtypes, fields of other optimizers, steps not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from foam_hf import FOAM
from foam_hf.int8.weight import Int8Weight
from foam_hf.tensors.step import Member
from tests.support.rules import FOLDING, FUSED, OPTIONS
from tests.support.tolerances import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")]


def weight(int8: bool) -> Any:
    values = torch.linspace(-1, 1, 128, dtype=torch.float32, device=DEVICE).view(4, 32)
    return Int8Weight.from_float(values, 32) if int8 else values.clone()


def train(gradients: list[torch.Tensor], int8: bool = False, **options: Any) -> torch.Tensor:
    p = nn.Parameter(weight(int8))
    optimizer = FOAM([p], **{"lr": 1e-3, "scale": 1.0, "level": 2, **options})
    for grad in gradients:
        p.grad = grad.to(DEVICE)
        optimizer.step()
    return p.dequantize() if isinstance(p, Int8Weight) else p.detach()


@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.0, 0.0), (0.0, 0.999), (0.4, 0.3), (0.9, 0.9999999)])
@pytest.mark.parametrize(
    "options", [*({"second_moment": rule} for rule in FUSED), {"level": 0}, {"int8": True}], ids=str
)
def test_kernels_follow_the_plain_path_at_any_betas(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], betas: tuple[float, float]
) -> None:
    """After a spike too: a moment that forgets at once must hold the small gradient, not the rounding of the large."""
    gradients = [size * torch.randn(4, 32) for size in (1.0, 1e5, 1e-4, 1e-4)]
    found = []
    for kernel in ("reference", "triton"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        found.append(train(gradients, betas=betas, **options))
    if "int8" in options:
        assert (found[1] - found[0]).abs().max() < 0.02 * max(1.0, found[0].abs().max().item() / 127)  # a code
    else:
        assert_within(found[1] - weight(False), found[0] - weight(False), "kernel steps against the plain path's")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=str)
def test_a_beta_of_one_that_somebody_sets_later_is_refused(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.zeros(4, 32))
    optimizer = FOAM([p], **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    name = "momentum" if options.get("second_moment") == "muon" else "betas"
    optimizer.param_groups[0][name] = 1.0 if name == "momentum" else (0.9, 1.0)
    with pytest.raises(
        ValueError, match=r"(momentum|betas) is out of range: got .*1\.0\)?; expected .* from 0 to below 1"
    ):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rule", FOLDING)
def test_the_default_dtype_changes_nothing(rule: str, int8: bool, default: torch.dtype) -> None:
    gradients = [torch.randn(4, 32) for _ in range(3)]
    gradients[1][0, 0] = float("inf")  # what is left out is made by other lines
    options = {"int8": int8, "second_moment": rule, "nonfinite": "skip"}
    expected = train(gradients, **options)
    torch.set_default_dtype(default)
    try:
        found = train(gradients, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(2**31,), (2**31 + 7,), (2, 2**31), (2**31, 2)], ids=str)
@pytest.mark.parametrize("rule", FUSED)
def test_what_int32_cannot_count_goes_the_plain_way(rule: str, shape: tuple[int, ...]) -> None:
    from foam_hf.kernels.tables import Entry
    from foam_hf.optimizer.members import member_of

    p = nn.Parameter(torch.empty(shape, device="meta"))
    optimizer = FOAM([p], second_moment=rule)
    p.grad = torch.empty_like(p)
    member = member_of(optimizer._owned, p, optimizer.param_groups[0], 0)
    assert isinstance(member, Member) and not Entry.of(member).fits()


FOREIGN = {"maximize": True, "amsgrad": True, "nesterov": True, "foreach": True, "fused": True, "capturable": True}


@pytest.mark.parametrize(
    ("name", "value"), [*FOREIGN.items(), ("differentiable", True), ("decoupled_weight_decay", False)]
)
def test_fields_of_other_optimizers_that_ask_for_something_are_refused(name: str, value: bool) -> None:
    with pytest.raises(ValueError, match=f"FOAM has no {name}: got {name}={value} in a param group; expected "):
        FOAM([{"params": [nn.Parameter(torch.zeros(2, 2))], name: value}])


def test_groups_of_torch_adamw_and_of_its_schedulers_stay_legal() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    adamw = torch.optim.AdamW([p], lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(adamw, max_lr=0.1, total_steps=10)
    (group,) = adamw.param_groups
    assert group["maximize"] is False and "initial_lr" in group
    optimizer = FOAM([group])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert bool((p != 0).all())


def test_a_step_that_a_loss_scaler_skips_does_not_move_the_schedule() -> None:
    accelerator = Accelerator(cpu=True)
    p = nn.Parameter(torch.zeros(4, 32))
    inner = FOAM([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    scheduler = accelerator.prepare_scheduler(torch.optim.lr_scheduler.LambdaLR(inner, lambda t: 0.5**t))
    scheduler.optimizers = [optimizer]
    for value, rate, scale in ((float("inf"), 0.1, 2.0), (2.0, 0.05, 2.0)):
        scaler.scale(torch.ones(()))
        p.grad = torch.full_like(p, value)
        accelerator.gradient_state._set_sync_gradients(True)
        optimizer.step()
        scheduler.step()
        assert optimizer.step_was_skipped is (value == float("inf")) and bool((p != 0).any()) is (value == 2.0)
        assert inner.param_groups[0]["lr"] == rate and scaler.get_scale() == scale
    assert inner.state[p]["step"] == 1
