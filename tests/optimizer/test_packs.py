"""Packs of gradients: what is copied before processes add it up, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from foam_hf.optimizer.packs import flat_gradients, references

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [*([pytest.mark.gpu] if DEVICE == "cuda" else [])]


def loss_of_views(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    return ((x @ q) + p.unsqueeze(0)).square().sum()  # the gradient of p is a view of one that q still needs


def loss_of_products(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    return nn.functional.linear(nn.functional.linear(x, q), p).square().sum()


@pytest.mark.parametrize("in_hook", [True, False], ids=["in its hook", "later"])
@pytest.mark.parametrize(("loss", "shared"), [(loss_of_views, True), (loss_of_products, False)])
def test_only_a_gradient_whose_memory_is_shared_is_copied(
    loss: Callable[..., Tensor], shared: bool, in_hook: bool
) -> None:
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.randn(8, 8, device=DEVICE)) for _ in range(2))
    x = torch.randn(1, 8, 8, device=DEVICE)
    found: list[bool] = []

    def pack(p: Any) -> None:
        at = p.grad.data_ptr()
        flat, (part,) = flat_gradients([p], references()[in_hook])
        found.append(flat.data_ptr() == at)
        assert p.grad is None and torch.equal(flat.view(8, 8), part)
        flat.zero_()

    (expected,) = torch.autograd.grad(loss(p, q, x), q)
    if in_hook:
        p.register_post_accumulate_grad_hook(pack)
    loss(p, q, x).backward()
    if not in_hook:
        other: Any = p.grad.view(-1) if shared and p.grad is not None else None
        pack(p)
        assert other is None or bool((other != 0).all())
    assert found == [not shared]
    assert torch.equal(cast(Tensor, q.grad), expected)
