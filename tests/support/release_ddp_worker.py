"""Checks of gradient release that averages over processes, as DDP does, for tests/optimizer/test_release_processes.py.

Every rank trains three times: under DDP, under DDP with release, and with release on a model without wrapper. All bits
are compared. The sum of two numbers does not depend on their order, so two ranks have data of their own; three ranks,
where DDP divides by a number that is no power of two, have the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from foam_hf import FOAM, enable_gradient_release, foam_param_groups
from foam_hf.optimizer import ddp as ddp_names
from tests.support.devices import kernel, placed, start_group
from tests.support.interpreter import patch_once
from tests.support.release_worker import BF16, assert_same, batch, least_llama, refused
from tests.support.tiny_models import HIDDEN, quantized, tiny_llama, tiny_lora_llama, tiny_qwen2
from tests.support.torchrun import launch


class Sometimes(nn.Module):
    """Layers that some ranks use, all, or none; BatchNorm, whose buffers differ between ranks; a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.never, self.first, self.always = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = nn.functional.one_hot(input_ids[:, :4].flatten() % HIDDEN, HIDDEN).float()
        x = checkpoint(self.always, x, use_reentrant=False)
        x = self.first(x) if dist.get_rank() == 0 else x
        x = self.head(self.norm(x))
        return ModelOutput(loss=nn.functional.cross_entropy(x, input_ids[:, :4].flatten() % 4))


@dataclass
class Case:
    """A model, and how DDP wraps it."""

    build: Callable[[], nn.Module] = tiny_llama
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool | None = None  # its use_reentrant
    frozen: str = "nothing"
    clip: float | None = None
    kernel: str = "reference"
    steps: int = 3


CASES = {
    "float32": Case(),
    "bfloat16": Case(dtype=BF16, clip=1e9),
    "INT8": Case(build=lambda: quantized(tiny_llama()), dtype=BF16),
    "tied embeddings": Case(build=tiny_qwen2, dtype=BF16),
    "default": Case(options={"embedding_rule": None}),
    "factored": Case(options={"second_moment": "factored"}),
    "checkpointing": Case(checkpointing=False),
    "reentrant checkpointing": Case(dtype=BF16, checkpointing=True),
    "a static graph": Case(ddp={"static_graph": True}, checkpointing=True),
    "frozen embeddings": Case(frozen="embed_tokens"),
    "LoRA": Case(build=tiny_lora_llama),
    "layers that not all ranks use": Case(build=Sometimes, ddp={"find_unused_parameters": True}, clip=1e9),
    "gradients in buckets": Case(ddp={"gradient_as_bucket_view": True}),
}
KERNEL_CASE = {"kernels": Case(build=least_llama, dtype=BF16, kernel="triton", steps=1)}


def make(case: Case) -> tuple[nn.Module, FOAM]:
    os.environ["FOAM_HF_KERNEL"] = kernel(case.kernel)
    model = placed(case.build().to(case.dtype)).train()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and case.frozen not in name)
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing})
        model.enable_input_require_grads()
    options = dict(case.options)
    rule = options.pop("embedding_rule", "block")
    groups = foam_param_groups(model, weight_decay=0.1, level=3, embedding_rule=rule)
    for group in groups:
        group.update(options)
    return model, FOAM(groups, lr=1e-2)


def train(model: nn.Module, optimizer: FOAM, steps: range) -> None:
    for step in steps:
        model(**batch(step, rank=None if dist.get_world_size() == 2 else 0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        plain = make(case)
        train(DDP(plain[0], **case.ddp), plain[1], range(case.steps))
        for wrapped in (True, False):
            model, optimizer = make(case)
            if not wrapped and dist.get_rank():  # weights and buffers come from the first rank
                with torch.no_grad():
                    for x in model.parameters():
                        x.mul_(2) if name != "INT8" else x.copy_(x.dequantize() * 2)
            outer = DDP(model, **case.ddp) if wrapped else model
            group = None if wrapped else dist.group.WORLD
            handle = enable_gradient_release(outer, optimizer, max_grad_norm=case.clip, process_group=group)
            most = count_gradients(model, handle)
            train(outer, optimizer, range(case.steps))
            assert_same(f"{name}, wrapped: {wrapped}", (model, optimizer), plain)
            for (key, x), y in zip(model.named_buffers(), plain[0].buffers(), strict=True):
                assert torch.equal(x, y) or wrapped is False and "running" in key, (name, key)
            assert all(p.grad is None for p in model.parameters())
            trained = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
            assert 0 < most() <= 4 * max(trained), (name, most(), max(trained), sum(trained))
            handle.remove()


def count_gradients(model: nn.Module, handle: Any) -> Callable[[], int]:
    """The most bytes of gradients that were alive at one time of a backward pass: those waiting, and those sent."""
    most = 0
    params = [p for p in model.parameters() if p.requires_grad]

    def count(_: Tensor) -> None:
        nonlocal most
        waiting = sum(p.grad.nbytes for p in params if p.grad is not None)
        most = max(most, waiting + handle._processes.averaging.bytes_on_the_way)

    for p in params:
        p.register_post_accumulate_grad_hook(count)
    return lambda: most


def gives_back() -> None:
    """After remove() DDP averages as before; and no_sync, join and hooks are refused while release is on."""
    case = Case()
    plain, released = make(case), make(case)
    outers = [DDP(model) for model, _ in (plain, released)]
    handle = enable_gradient_release(outers[1], released[1])
    assert not isinstance(outers[1].reducer, dist.Reducer)
    train(outers[0], plain[1], range(3))
    train(outers[1], released[1], range(1))
    with outers[1].no_sync():
        refused("got a backward pass inside of DDP's no_sync()", outers[1](**batch(1)).loss.backward)
    refused("cannot use its", lambda: outers[1].register_comm_hook(None, lambda state, bucket: None))
    handle.remove()
    released[1].zero_grad()
    assert isinstance(outers[1].reducer, dist.Reducer)
    train(outers[1], released[1], range(1, 3))
    assert_same("after remove()", released, plain)


def refusals() -> None:
    model, optimizer = make(Case())
    refused("got 2 processes, and a model that neither DDP nor", lambda: enable_gradient_release(model, optimizer))
    outer = DDP(model)
    outer.register_comm_hook(None, lambda state, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future())
    refused("a DistributedDataParallel with a communication", lambda: enable_gradient_release(outer, optimizer))
    some = FOAM([model.lm_head.weight])
    refused(
        "got 20 more trainable parameters in the model, model.embed_tokens.weight the first",
        lambda: enable_gradient_release(model, some, process_group=dist.group.WORLD),
    )
    model, optimizer = make(Case(frozen="norm"))
    enable_gradient_release(model, optimizer, process_group=dist.group.WORLD)
    for p in model.parameters():
        p.requires_grad_(True)
    groups = [
        p for p in model.parameters() if id(p) not in {id(q) for g in optimizer.param_groups for q in g["params"]}
    ]
    optimizer.add_param_group({"params": groups})
    model(**batch(0)).loss.backward()
    refused("has a gradient that was not averaged over the processes", optimizer.step)


def names() -> None:
    ddp = DDP(make(Case())[0])
    missing = [name for name in ddp_names.NAMES if not hasattr(ddp, name)]
    assert not missing, missing


def check_all(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    world = int(os.environ["WORLD_SIZE"])
    start_group()
    if world == 2:
        names()
        compare({**CASES, **KERNEL_CASE})
        gives_back()
        refusals()
    else:
        compare({name: CASES[name] for name in ("float32", "bfloat16", "INT8")})
    (folder / f"done {world} {os.environ['RANK']}").touch()


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_once()
    for processes in map(int, sys.argv[2:]):
        launch(processes, check_all, Path(sys.argv[1]))
