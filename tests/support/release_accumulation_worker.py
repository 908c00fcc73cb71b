"""Checks of gradient release with several backward passes a step in several processes, for test_release_processes.py.

The first process trains each case alone. Then all ranks do, on the same batches, under DDP, with a process group in
its place, and under FSDP2, and compare all bits. With ``FOAM_HF_TEST_DEVICE=cuda`` each rank has a GPU, over NCCL.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from foam_hf import FOAM, enable_gradient_release, foam_param_groups
from foam_hf.int8.models import convert_
from tests.support.devices import DEVICE, choose_gpu, kernel, placed, start_group
from tests.support.int8_sharding_worker import stored_in
from tests.support.interpreter import patch_once
from tests.support.release_troubles import (
    a_pass_that_fails,
    a_weight_that_left_the_optimizer,
    ranks_that_make_other_numbers_of_passes,
    two_optimizers_of_one_model,
)
from tests.support.release_worker import BF16, LiveGradients, batch, layers_of, least_llama, refused
from tests.support.sharding_worker import full_tensor
from tests.support.tiny_models import HIDDEN, tiny_llama, tiny_lora_llama, tiny_qwen2
from tests.support.tolerances import assert_within
from tests.support.torchrun import launch

PASSES = (3, 2, 3)  # of each step; the second one has fewer, and says so
WAYS = ("DDP", "process group", "FSDP2")


@dataclass
class Case:
    """A model and its options.

    A ``lr`` of 0 is for a bound that is reached: weights are updated by expected norms, which depend on what came
    before in that process, and the next gradients would be others.
    """

    build: Callable[[], nn.Module] = tiny_llama
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    clip: float | None = None
    lr: float = 1e-2
    reentrant: bool | None = None  # how gradient checkpointing is done, if it is
    kernel: str = "reference"
    passes: tuple[int, ...] = PASSES
    ways: tuple[str, ...] = WAYS


def int8_llama() -> nn.Module:
    model = tiny_llama().to(BF16)
    for module in [*model.model.modules()]:
        if isinstance(module, nn.Linear):
            convert_(module, 16)
    return model


CASES = {
    "float32": Case(),
    "bfloat16": Case(dtype=BF16, options={"state_dtype": BF16}, clip=1e9),
    "INT8": Case(build=int8_llama, dtype=BF16),
    "row": Case(dtype=BF16, options={"level": "row"}, ways=("process group", "FSDP2")),
    "LoRA": Case(build=tiny_lora_llama),
    "checkpointing": Case(reentrant=False),
    "reentrant checkpointing": Case(dtype=BF16, reentrant=True, ways=("process group",)),
    "tied embeddings": Case(build=tiny_qwen2, ways=("process group", "FSDP2")),
    "clipping": Case(clip=0.02, lr=0.0),
    "clipping, one pass": Case(clip=0.02, lr=0.0, passes=(1, 1), ways=("process group", "FSDP2")),
    "INT8, clipping": Case(build=int8_llama, dtype=BF16, clip=0.02, lr=0.0, ways=("DDP", "FSDP2")),
    "kernels": Case(build=least_llama, dtype=BF16, kernel="triton", passes=(2,), ways=("process group", "FSDP2")),
}
IN_FOUR = {"bfloat16": ("process group", "FSDP2", "HSDP"), "INT8": ("FSDP2",)}


def make(case: Case) -> tuple[nn.Module, Any]:
    """A model, and a function that makes its optimizer when it is wrapped."""
    os.environ["FOAM_HF_KERNEL"] = kernel(case.kernel)
    model = placed(case.build().to(case.dtype)).train()
    if case.reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.reentrant})
        model.enable_input_require_grads()
    return model, lambda: optimizer_of(model, case)


def optimizer_of(model: nn.Module, case: Case) -> FOAM:
    groups = foam_param_groups(model, weight_decay=0.1, level=3)
    for group in groups:
        level = case.options.get("level") if group["level"] else None
        group.update({**case.options, "level": level or group["level"]})
    return FOAM(groups, lr=case.lr)


def wrapped(case: Case, way: str) -> tuple[nn.Module, FOAM, Any]:
    """The model that is called, its optimizer, and the handle of gradient release."""
    model, optimizer = make(case)
    if way in ("FSDP2", "HSDP"):
        shape = (2, dist.get_world_size() // 2) if way == "HSDP" else (dist.get_world_size(),)
        mesh = init_device_mesh(DEVICE, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for module in (*layers_of(model), model):
            fully_shard(module, mesh=mesh)
    outer = DDP(model) if way == "DDP" else model
    group = dist.group.WORLD if way == "process group" else None
    made = optimizer()
    settings = {"max_grad_norm": case.clip, "process_group": group}
    return outer, made, enable_gradient_release(outer, made, accumulation=max(case.passes), **settings)


def train(model: Any, optimizer: FOAM, handle: Any, passes: tuple[int, ...], first: int = 0) -> list[Tensor]:
    """Train on the same batches in every process; all passes but the last of a step ask for no reduction."""
    norms = []
    for step, count in enumerate(passes[first:], first):
        handle.accumulation = count
        for micro in range(count):
            last = micro == count - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
                model.set_requires_all_reduce(last)
                model.set_is_last_backward(last)
                assert model._get_fsdp_state()._state_ctx.is_last_backward, "updates would race with the next pass"
            with model.no_sync() if isinstance(model, DDP) and not last else nullcontext():
                (model(**batch(step, micro, rank=0)).loss / count).backward()
            assert handle.unfinished
        handle.finish()
        if handle.grad_norm is not None:
            norms.append(handle.grad_norm.reshape(1).clone())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def found_in(model: nn.Module, optimizer: FOAM, norms: list[Tensor]) -> dict[str, Tensor]:
    """Weights, moments and norms, each whole, on the CPU."""
    inner: Any = model.module if isinstance(model, DDP) else model
    found = {f"weight {name}": x for name, x in stored_in(inner).items()}
    for name, p in inner.named_parameters():
        for key, x in optimizer.state.get(p, {}).items():
            found[f"{key} {name}"] = full_tensor(x).detach().clone() if isinstance(x, Tensor) else torch.tensor(x)
    found |= {f"norm {i}": x for i, x in enumerate(norms)}
    return {name: x.cpu() for name, x in found.items()}


def alone(names: list[str]) -> dict[str, dict[str, Tensor]]:
    """What one process finds, before there is a process group."""
    results = {}
    for name in names:
        case = CASES[name]
        model, optimizer = make(case)
        made = optimizer()
        handle = enable_gradient_release(model, made, max_grad_norm=case.clip, accumulation=max(case.passes))
        results[name] = found_in(model, made, train(model, made, handle, case.passes))
        handle.remove()
    return results


def compare(expected: dict[str, dict[str, Tensor]]) -> None:
    for name, one in expected.items():
        case = CASES[name]
        for way in case.ways if dist.get_world_size() == 2 else IN_FOUR[name]:
            model, optimizer, handle = wrapped(case, way)
            live = LiveGradients(model)
            mine = found_in(model, optimizer, train(model, optimizer, handle, case.passes))
            assert_same(mine, one, not case.lr, (name, way))
            largest = max(p.nbytes for p in model.parameters() if p.requires_grad)
            small = sum(p.nbytes for p in model.parameters() if p.dim() < 2)
            assert name != "float32" or 0 < live.most <= 3 * largest + 2 * small, (
                name,
                way,
                live.most,
                largest,
                small,
            )
            handle.remove()


def check_each(expected: dict[str, dict[str, Tensor]]) -> None:
    """Compare each case, and raise the errors of all at the end."""
    errors = []
    for name, one in expected.items():
        try:
            compare({name: one})
        except Exception:  # the next case may tell why
            errors.append(traceback.format_exc())
            print(f"rank {dist.get_rank()}: {name}: {errors[-1][-2000:]}", file=sys.stderr, flush=True)
    assert not errors, f"{len(errors)} of {len(expected)} cases"


def assert_same(mine: dict[str, Tensor], one: dict[str, Tensor], clips: bool, where: tuple[str, str]) -> None:
    """The bits of one process on all ranks, but for norms, sums over shards, and moments if it ``clips``."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)  # first, as an error on one rank must not leave the others waiting
    for other in gathered:
        assert all(torch.equal(x, mine[key]) for key, x in other.items()), where
    assert mine.keys() == one.keys()
    others = [key for key, x in one.items() if not torch.equal(mine[key], x)]
    for key in others:
        assert clips or (key.startswith("norm") and where[1] in ("FSDP2", "HSDP")), (where, others)
        if key.startswith("norm") or "_exp_avg" in key:
            kind = "norms" if key.startswith("norm") else "moments"
            assert_within(mine[key], one[key], f"{kind} of a clipped step, several processes against one")


class Routed(nn.Module):
    """Layers of which each process uses another one in each backward pass, and one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.layers[which](x).relu().square().mean()


def layers_that_not_all_ranks_use() -> None:
    """At a learning rate of 0 the moments are those of DDP, which keeps all gradients."""
    rank, found = dist.get_rank(), []
    for released in (False, True):
        model = placed(Routed())
        outer = DDP(model, find_unused_parameters=True) if not released else model
        optimizer = FOAM(model.parameters(), lr=0.0, level=3)
        if released:
            enable_gradient_release(model, optimizer, accumulation=3, process_group=dist.group.WORLD)
        for step in range(3):
            for micro in range(3):
                torch.manual_seed(100 * step + 10 * micro + rank)
                which = micro // 2 if rank else (micro + step) % 3  # only the end of a pass tells which is the next
                outer(placed(torch.randn(8, HIDDEN)), which).div(3).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({name: optimizer.state[p].get("folded_exp_avg") for name, p in model.named_parameters()})
    for name, x in found[0].items():
        assert (x is None) == (found[1][name] is None), name
        if x is not None:
            assert_within(found[1][name], x, "moments of micro-batches of several processes against DDP's")


def resume(expected: dict[str, Tensor]) -> None:
    """A checkpoint of each way goes on with the bits of the uninterrupted run."""
    case = CASES["bfloat16"]
    for way in ("process group", "FSDP2"):
        model, optimizer, handle = wrapped(case, way)
        norms = train(model, optimizer, handle, case.passes[:2])
        saved = get_state_dict(model, optimizer)
        model, optimizer, handle = wrapped(case, way)
        set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
        norms += train(model, optimizer, handle, case.passes, first=2)
        assert_same(found_in(model, optimizer, norms), expected, False, ("resumed", way))


def gives_back_and_refuses() -> None:
    """One pass too many is an error in each way, and so is a step after it; ``remove()`` lets others reduce again."""
    inputs = batch(0, rank=0)
    for way in WAYS:
        model, optimizer, handle = wrapped(Case(passes=(2,)), way)
        for _ in range(2):
            model(**inputs).loss.backward()
        refused("got 3; expected at most accumulation=2 backward passes", model(**inputs).loss.backward)
        refused("of the backward pass that was one too many for this step", optimizer.step)
        handle.remove()
        assert way != "DDP" or isinstance(model.reducer, dist.Reducer)
    model, _, handle = wrapped(Case(), "FSDP2")
    handle.remove()
    model.set_requires_gradient_sync(False)
    model(**inputs).loss.backward()
    assert all(p.grad is None for p in model.parameters())


def check_all(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    names = [*CASES] if world == 2 else [*IN_FOUR]
    choose_gpu()
    if rank == 0:
        torch.save(alone(names), folder / f"alone {world}.pt")
    start_group()
    dist.barrier()
    expected = torch.load(folder / f"alone {world}.pt")
    check_each(expected)
    if world == 2:
        layers_that_not_all_ranks_use()
        resume(expected["bfloat16"])
        gives_back_and_refuses()
        a_pass_that_fails()
        a_weight_that_left_the_optimizer()
        two_optimizers_of_one_model()
        ranks_that_make_other_numbers_of_passes()  # last, as the ranks are then in other steps
    (folder / f"done {world} {rank}").touch()


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_once()
    for processes in map(int, sys.argv[2:]):
        launch(processes, check_all, Path(sys.argv[1]))
