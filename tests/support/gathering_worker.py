"""Checks of Muon on matrices that ranks share, which every rank runs: over gloo on CPUs, or over NCCL on GPUs.

Weights and state must have the bits of one process, whatever the cut, the packs and the code path.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from foam_hf import FOAM, enable_gradient_release
from foam_hf.int8.layers import int8_of, parts_of
from foam_hf.int8.models import convert_
from foam_hf.rules import muon, products_kernel

BF16, F32 = torch.bfloat16, torch.float32
ROWS = (Shard(0),)
SHAPES = [
    (8, 32),
    (7, 37),  # uneven, with a tail
    (1, 24),  # ranks without rows
    (32, 8),
    (8, 32),
    (8, 32),
    (8, 32),
    (33,),
    (5, 3, 24),  # whole matrices on each rank, of one tensor
    (1, 6, 8),  # on one rank alone
]
CUT_INSIDE = (3, 6, 8)  # each matrix of a stack is cut
OPTIONS: dict[str, Any] = {"lr": 0.02, "level": 3, "second_moment": "muon", "weight_decay": 0.1, "nonfinite": "skip"}


def full(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_same_state(one: FOAM, many: FOAM, what: Any) -> None:
    """The weights and state of ``many`` are those of ``one``, and they are sharded as the weight is."""
    for i, (p, q) in enumerate(zip(one.param_groups[0]["params"], many.param_groups[0]["params"], strict=True)):
        assert torch.equal(full(q), p), (what, i)
        assert one.state[p].keys() == many.state[q].keys()
        for name, expected in one.state[p].items():
            mine = many.state[q][name]
            if name == "step":
                assert mine == expected, (what, i)
            else:
                assert mine.placements == q.placements and torch.equal(full(mine), expected), (what, i, name)


def cases(meshes: list[DeviceMesh], few: bool) -> list[tuple[tuple[int, ...], DeviceMesh, Any]]:
    found = [(shape, meshes[i % 2], ROWS) for i, shape in enumerate(SHAPES)]
    found = [*found[:3], found[-2]] if few else found
    found.append((CUT_INSIDE, meshes[0], (Shard(1),)))
    if len(meshes) > 2:  # replicas of shards
        found += [(shape, meshes[2], (Replicate(), Shard(0))) for shape in ((9, 16), (2, 8, 8))]
    return found


def shards(world: int, device: str) -> None:
    """Three steps: with a gradient that is missing, one that is not finite on one rank, and scaled gradients."""
    meshes = [init_device_mesh(device, (world,)) for _ in range(2)]
    if world == 4:
        meshes.append(init_device_mesh(device, (2, 2), mesh_dim_names=("replicas", "shards")))
    kinds = [("reference", F32), ("reference", BF16)]
    if world == 2:
        kinds += [("triton", BF16)] if device == "cpu" else [("triton", F32), ("triton", BF16)]
    for kernel, dtype in kinds:
        os.environ["FOAM_HF_KERNEL"] = kernel
        found = cases(meshes, few=kernel == "triton" and device == "cpu")  # slow in Triton's interpreter
        torch.manual_seed(0)
        whole = [nn.Parameter(torch.randn(shape).to(device, dtype)) for shape, *_ in found]
        split = [
            nn.Parameter(distribute_tensor(p.detach().clone(), mesh, how))
            for p, (_, mesh, how) in zip(whole, found, strict=True)
        ]
        one, many = (FOAM(params, state_dtype=dtype, **OPTIONS) for params in (whole, split))
        for step in range(3):
            for i, (p, q, (_, mesh, how)) in enumerate(zip(whole, split, found, strict=True)):
                grad = torch.randn(p.shape).to(device, dtype)
                p.grad = q.grad = None
                if step == 1 and i == 0:
                    continue
                if step == 1 and i in (1, len(found) - 1):
                    grad.view(-1)[3] = float("nan")
                p.grad, q.grad = grad, distribute_tensor(grad.clone(), mesh, how)
            for optimizer in (one, many):
                if step == 2:
                    optimizer.grad_scale = torch.tensor([3.0], device=device)
                optimizer.step()
            assert_same_state(one, many, (kernel, dtype, step))
        prepared: Any = many._prepared
        lines = prepared._gathering._lines
        assert [line for line in lines if len(line) > 1], "matrices did not travel in several packs"
        names = {type(pack._halves).__name__ for line in lines for pack in line}
        assert names == {"Halves" if kernel == "triton" else "TorchHalves"}
    os.environ.pop("FOAM_HF_KERNEL")


class Net(nn.Module):
    """Rows that many processes do not divide, and fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.seven, self.one = nn.Linear(32, 48, bias=False), nn.Linear(48, 7), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x).relu()
        return self.seven(x).square().sum() + self.one(x).sum()


def modules(world: int, device: str) -> None:
    """Modules of FSDP2: weights of bf16 and INT8, with gradient release and without it, over five steps."""
    for int8 in (False, True):
        models = []
        for sharded in (False, True, True):
            torch.manual_seed(1)
            model = Net().to(device, BF16)
            for layer in model.children() if int8 else ():
                convert_(layer, 16)
            for layer in model.children() if sharded else ():
                fully_shard(layer)
            models.append(fully_shard(model) if sharded else model)
        optimizers = [FOAM(model.parameters(), **OPTIONS) for model in models]
        enable_gradient_release(models[2], optimizers[2])
        for _ in range(5):
            x = torch.randn(4, 32).to(device, BF16)
            for model, optimizer in zip(models, optimizers, strict=True):
                model(x).backward()
                optimizer.step()
                optimizer.zero_grad()
        expected = [part for p in models[0].parameters() for part in stored(p)]
        for model in models[1:]:
            found = [full(part) for p in model.parameters() for part in stored(p)]
            same = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
            assert all(same), ("INT8" if int8 else "bf16", same)


def stored(p: Any) -> list[Tensor]:
    return [*parts_of(p)] if int8_of(p) is not None else [p.detach()]


def every_rank_reports(world: int, device: str) -> None:
    """An error on every rank, not only on the one that holds the rows; all keep their weights."""
    p = nn.Parameter(distribute_tensor(torch.ones(8, 16, device=device), init_device_mesh(device, (world,)), ROWS))
    optimizer = FOAM([p], second_moment="muon")
    grad = torch.ones(8, 16, device=device)
    grad[0, 0] = float("inf")
    p.grad = distribute_tensor(grad, p.device_mesh, ROWS)
    try:
        optimizer.step()
        optimizer.check_gradients()
    except FloatingPointError:
        pass
    else:
        raise AssertionError("a gradient that is not finite was not reported")
    assert bool((full(p) == 1).all())


def refusals(world: int, device: str) -> None:
    meshes = [(init_device_mesh(device, (world,)), (Shard(1),))]
    if world == 4:
        meshes.append((init_device_mesh(device, (2, 2)), (Shard(0), Shard(0))))
    for mesh, how in meshes:
        p = nn.Parameter(distribute_tensor(torch.ones(8, 16, device=device), mesh, how))
        try:
            FOAM([p], second_moment="muon")
        except ValueError as error:
            assert "gathers rows over one dimension of the mesh: got shape (8, 16)" in str(error), error
            assert "second_moment='block'" in str(error)
        else:
            raise AssertionError(f"not refused: {how}")


def check_all(world: int, device: str = "cpu") -> None:
    # Few elements, so that matrices travel in several packs, and small tiles for Triton's interpreter.
    with mock.patch.object(muon, "BATCH_ELEMENTS", 8 * 32), mock.patch.object(products_kernel, "TILE", 32):
        for check in (shards, modules, every_rank_reports, refusals):
            check(world, device)


def on_gpus() -> None:
    """One of torchrun's processes, each with a GPU."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    check_all(dist.get_world_size(), "cuda")
    Path(sys.argv[1], f"done {dist.get_rank()}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    on_gpus()
