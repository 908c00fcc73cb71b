"""What goes wrong between the passes of gradient release that averages, for release_accumulation_worker.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from foam_hf import FOAM, enable_gradient_release
from tests.support.devices import DEVICE, placed
from tests.support.release_worker import refused
from tests.support.tiny_models import HIDDEN


def linear(**options: Any) -> tuple[Any, FOAM, Any]:
    """Two layers, their optimizer, and the handle of gradient release."""
    torch.manual_seed(0)
    model = placed(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)))
    optimizer = FOAM(model.parameters(), lr=0.0, level=3)
    return model, optimizer, enable_gradient_release(model, optimizer, process_group=dist.group.WORLD, **options)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("failed")


def a_pass_that_fails() -> None:
    """Two micro-batches, and before them half of one: what it has sent counts, and no gradient after it is lost."""
    torch.manual_seed(dist.get_rank())
    inputs = placed(torch.randn(4, HIDDEN))
    found = []
    for fails in (True, False):
        model, optimizer, handle = linear(accumulation=3)
        first, second = model
        if fails:
            refused("failed", second(Fails.apply(first(inputs))).sum().backward)
            handle.finish()
        else:
            second(first(inputs).detach()).sum().backward()
        for _ in range(2):
            model(inputs).sum().backward()
        optimizer.step()
        found.append([optimizer.state[p] for p in model.parameters()])
        handle.remove()
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(other[name])) for name, x in one.items())
    model, _, handle = linear(accumulation=3)
    refused("failed", model[1](Fails.apply(model[0](inputs))).sum().backward)
    refused("the one before did not reach its end", model(inputs).sum().backward)
    handle.remove()


def two_optimizers_of_one_model() -> None:
    """When the first one's release ends, FSDP2 goes on to reduce each pass for the second."""
    model = placed(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)))
    fully_shard(model)
    params = [*model.parameters()]
    first, second = (
        enable_gradient_release(model, FOAM(some, level=3), accumulation=2) for some in (params[:2], params[2:])
    )
    first.remove()
    model.set_requires_gradient_sync(False)
    model(placed(torch.ones(2, HIDDEN))).sum().backward()
    assert second.unfinished == 1
    second.remove()
    assert not any(name.startswith("set_") for name in vars(model))


def a_weight_that_left_the_optimizer() -> None:
    model, optimizer, _ = linear(accumulation=2)
    removed = optimizer.param_groups[0]["params"].pop(2)
    for _ in range(2):
        model(placed(torch.ones(2, HIDDEN))).sum().backward()
    optimizer.step()
    assert removed not in optimizer.state and len(optimizer.state) == 3


def ranks_that_make_other_numbers_of_passes() -> None:
    """The second rank updates by another number of passes, or goes on to its next step.

    The answer of a GPU comes later, when ranks are in other steps, so only one of these runs there.
    """
    inputs = placed(torch.randn(4, HIDDEN))
    for other_number in (True, False) if DEVICE == "cpu" else (False,):
        model, optimizer, handle = linear(accumulation=3)
        handle.accumulation = 3 if other_number and dist.get_rank() == 1 else 2
        optimizer.param_groups[0]["lr"] = 0.1
        if not other_number:
            model(inputs).square().sum().backward()
            if dist.get_rank() == 1:
                optimizer.step()
        before = [p.detach().clone() for p in model.parameters()]

        def go_on(model: Any = model, optimizer: FOAM = optimizer) -> None:
            for _ in range(4):
                model(inputs).square().sum().backward()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                optimizer.step()

        refused("made different numbers of backward passes before optimizer.step()", go_on)
        assert DEVICE == "cuda" or all(map(torch.equal, model.parameters(), before))
