"""Checks of gradient release under FSDP2 that every rank of tests/optimizer/test_release_processes.py runs, over gloo.

Every rank trains on batches of its own, once with release and once without, and compares all bits.
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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from foam_hf import FOAM, enable_gradient_release, foam_param_groups
from foam_hf.tensors.places import local
from tests.support.devices import DEVICE, kernel, placed, start_group
from tests.support.interpreter import patch_once
from tests.support.rules import SHARDED
from tests.support.tiny_models import VOCAB, tiny_llama, tiny_lora_llama, tiny_qwen2
from tests.support.torchrun import launch

BF16 = torch.bfloat16


@dataclass
class Case:
    """A run, and how it differs from a float32 LLaMA under FSDP2.

    Attributes:
        options: of FOAM.
        shard: arguments of ``fully_shard``.
        micro: backward passes a step, all but the last without a reduction.
        clip: ``max_grad_norm``.
        kernel: of FOAM_HF_KERNEL.
    """

    build: Callable[[], nn.Module] = tiny_llama
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    shard: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    frozen: str = "nothing"
    micro: int = 1
    clip: float | None = None
    kernel: str = "reference"
    steps: int = 3


def shared_layer() -> nn.Module:
    model = tiny_llama(num_hidden_layers=3)
    model.model.layers[2] = model.model.layers[0]
    return model


FSDP2_CASES = {
    "block": Case(),
    "bfloat16, a bound that is never reached": Case(dtype=BF16, clip=1e9),
    "many layers": Case(build=lambda: tiny_llama(num_hidden_layers=6)),
    "default": Case(options={"embedding_rule": None}),
    "row": Case(options={"level": "row"}),
    "factored": Case(options={"second_moment": "factored"}),
    "factored, bfloat16": Case(dtype=BF16, options={"second_moment": "factored", "state_dtype": BF16}),
    "tied embeddings": Case(build=tiny_qwen2, dtype=BF16),
    "mixed precision": Case(shard={"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)}),
    "bfloat16 reduction": Case(shard={"mp_policy": MixedPrecisionPolicy(param_dtype=BF16)}),
    "weights that stay whole": Case(shard={"reshard_after_forward": False}),
    "checkpointing": Case(dtype=BF16, checkpointing=True),
    "a layer that is called twice": Case(build=shared_layer),
    "frozen embeddings": Case(frozen="embed_tokens"),
    "LoRA": Case(build=tiny_lora_llama),
    "two backward passes, one reduction": Case(micro=2),
}


# Those in which shards that are smaller, or none, may matter.
MORE_RANKS = ("block", "many layers", "row", "factored, bfloat16", "LoRA", "two backward passes, one reduction")


def least_llama() -> nn.Module:
    """For kernels, which are slow in their interpreter."""
    return tiny_llama(hidden_size=16, intermediate_size=8, num_hidden_layers=1)


KERNEL_CASES = {
    rule: Case(build=least_llama, dtype=BF16, options={"second_moment": rule}, kernel="triton", steps=1)
    for rule in SHARDED
}


def batch(step: int, micro: int = 0, rank: int | None = None) -> dict[str, Tensor]:
    """Another one for each rank."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
    ids = placed(torch.randint(3, VOCAB, (2, 8), generator=generator))
    return {"input_ids": ids, "labels": ids}


def sharded(case: Case, mesh: Any) -> tuple[nn.Module, FOAM]:
    os.environ["FOAM_HF_KERNEL"] = kernel(case.kernel)
    model = placed(case.build().to(case.dtype))
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and case.frozen not in name)
    layers = layers_of(model)
    if case.checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, **case.shard)
    fully_shard(model, mesh=mesh, **case.shard)
    options = dict(case.options)
    rule = options.pop("embedding_rule", "block")
    groups = foam_param_groups(model, weight_decay=0.1, level=3, embedding_rule=rule)
    for group in groups:
        group.update(options)
    return model, FOAM(groups, lr=1e-2)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]


class LiveGradients:
    """The most bytes of shards' gradients that were alive at one time, storages counted once."""

    def __init__(self, model: nn.Module) -> None:
        self.most, self._params = 0, list(model.parameters())
        for p in self._params:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._count)

    def _count(self, _: Tensor) -> None:
        storages = [local(p.grad).untyped_storage() for p in self._params if p.grad is not None]
        self.most = max(self.most, sum({x.data_ptr(): x.nbytes() for x in storages}.values()))


def train(model: nn.Module, optimizer: FOAM, case: Case, first: int = 0, end: int | None = None) -> None:
    for step in range(first, case.steps if end is None else end):
        for micro in range(case.micro):
            if case.micro > 1:
                model.set_requires_gradient_sync(micro == case.micro - 1)
            (model(**batch(step, micro)).loss / case.micro).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(name: str, mine: tuple[nn.Module, FOAM], other: tuple[nn.Module, FOAM]) -> None:
    for (weight, p), q in zip(mine[0].named_parameters(), other[0].parameters(), strict=True):
        assert torch.equal(local(p), local(q)), (name, weight)
        state, theirs = mine[1].state[p] if p.requires_grad else {}, other[1].state.get(q, {})
        assert state.keys() == theirs.keys(), (name, weight)
        for key, value in state.items():
            same = torch.equal(local(torch.as_tensor(value)), local(torch.as_tensor(theirs[key])))
            assert same, (name, weight, key)


def compare_fsdp2(mesh: Any, cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        plain, released = sharded(case, mesh), sharded(case, mesh)
        before = [local(p).clone() for p in plain[0].parameters()]
        handle = enable_gradient_release(*released, max_grad_norm=case.clip)
        live = LiveGradients(released[0])  # after the release's hooks: what they left
        train(*plain, case)
        train(*released, case)
        assert_same(name, released, plain)
        assert any(not torch.equal(local(p), q) for p, q in zip(released[0].parameters(), before, strict=True))
        assert all(p.grad is None for p in released[0].parameters())
        # FSDP2 hands out a module's gradients in one storage, which lives as long as one of them.
        layer, largest = _bytes(layers_of(released[0])[0]), max(local(p).nbytes for p in released[0].parameters())
        assert 0 < live.most <= 2 * largest + 2 * layer, (name, live.most, largest, layer)
        assert name != "many layers" or live.most < _bytes(released[0]) / 2, (live.most, _bytes(released[0]))
        handle.remove()
        if name == "block":
            train(*plain, case, case.steps, case.steps + 1)
            train(*released, case, case.steps, case.steps + 1)
            assert_same("after remove()", released, plain)


def _bytes(module: nn.Module) -> int:
    return sum(local(p).nbytes for p in module.parameters())


def norms(mesh: Any) -> None:
    """The logged norm is that of all ranks' shards, and clipping by weight uses the whole weight's norm."""
    case = Case()
    for bound in (1e9, 0.02):
        model, optimizer = sharded(case, mesh)
        clip_by = "all" if bound == 1e9 else "weight"
        handle = enable_gradient_release(model, optimizer, max_grad_norm=bound, clip_by=clip_by)
        plain, its_optimizer = sharded(case, mesh)
        for step in range(2):
            model(**batch(step)).loss.backward()
            plain(**batch(step)).loss.backward()
            found = [torch.nn.utils.clip_grad_norm_([p], bound).full_tensor() for p in plain.parameters()]
            expected = torch.stack(found).norm()
            assert torch.allclose(handle.grad_norm, expected, rtol=1e-5), (handle.grad_norm, expected)
            gathered = [placed(torch.zeros(1)) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, handle.grad_norm.reshape(1))
            assert all(torch.equal(x, gathered[0]) for x in gathered)
            optimizer.step()
            its_optimizer.step()
            its_optimizer.zero_grad()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(local(p), local(q), rtol=0, atol=1e-4), bound


def resume(mesh: Any) -> None:
    """A checkpoint goes on with the bits of the uninterrupted run, with release before it, after it, or both."""
    case = Case(dtype=BF16)
    whole = sharded(case, mesh)
    train(*whole, case)
    for first, second in ((True, True), (True, False), (False, True)):
        model, optimizer = sharded(case, mesh)
        if first:
            enable_gradient_release(model, optimizer)
        train(model, optimizer, case, 0, 2)
        saved = get_state_dict(model, optimizer)
        model, optimizer = sharded(case, mesh)
        if second:
            enable_gradient_release(model, optimizer)
        set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
        train(model, optimizer, case, 2)
        assert_same(f"resumed {first} {second}", (model, optimizer), whole)


def refused(message: str, function: Callable[[], Any]) -> None:
    try:
        function()
    except (RuntimeError, ValueError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def refusals(mesh: Any) -> None:
    def two_passes() -> None:
        model, optimizer = sharded(Case(), mesh)
        enable_gradient_release(model, optimizer)
        for step in range(2):
            model(**batch(step)).loss.backward()

    def left_out() -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        fully_shard(model[0], mesh=mesh)
        enable_gradient_release(model, FOAM(model.parameters(), level=1))

    refused("got a second gradient before optimizer.step()", two_passes)
    refused("got 2 of the optimizer's 4 parameters, 1.weight the first; expected all in fully_shard", left_out)


def check_all(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    world = int(os.environ["WORLD_SIZE"])
    start_group()
    mesh = init_device_mesh(DEVICE, (world,))
    some = FSDP2_CASES if world == 2 else {name: FSDP2_CASES[name] for name in MORE_RANKS}
    compare_fsdp2(mesh, some)
    norms(mesh)
    if world == 2:
        compare_fsdp2(mesh, KERNEL_CASES)
        resume(mesh)
        refusals(mesh)
    else:
        compare_fsdp2(init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard")), {"hybrid": Case()})
    (folder / f"done {world} {os.environ['RANK']}").touch()


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_once()
    for processes in map(int, sys.argv[2:]):
        launch(processes, check_all, Path(sys.argv[1]))
