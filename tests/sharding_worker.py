"""What each rank of tests/test_sharding.py does; started by torchrun, over gloo on a CPU."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from foam_hf import FOAM
from foam_hf.places import local
from foam_hf.sharding import _range, _cuts
from tests.tolerances import assert_within, error

BF16 = torch.bfloat16
Case = tuple[tuple[int, ...], tuple[Any, ...]]


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def cases(world: int, factored: bool) -> list[tuple[DeviceMesh, list[Case]]]:
    """Meshes, and the shapes and placements on them."""
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("rows",))
    rows, columns = (Shard(0),), (Shard(1),)
    found: list[Case] = [
        ((8, 64), rows),
        ((7, 37), rows),  # uneven, with a tail
        ((1, 24), rows),  # ranks without rows
        ((5, 16), (Replicate(),)),
        ((33,), rows),
        ((3,), rows),
        ((5,), (Replicate(),)),
        ((6, 64), columns),
        ((3, 8 * world - 1), columns),  # the last block is shorter
        ((5, 3, 24), rows),
        ((3, 5, 24), columns),
        ((2, 3, 16 * world), (Shard(2),)),
    ]
    meshes = [(line, found)]
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        both = [
            ((7, 16), (Replicate(), Shard(0))),
            ((9, 16), (Shard(0), Replicate())),
            ((3, 5, 8), (Shard(0), Shard(1))),
        ]
        if not factored:
            both.append(((6, 32), (Shard(0), Shard(1))))
        meshes.append((grid, both))
    return meshes


def compare_with_one_process(world: int) -> dict[str, float]:
    """Sharded parameters after four steps, beside the same in one process. Returns the greatest error by kind."""
    worst: dict[str, float] = {}
    settings = itertools.product(("reference", "triton"), ("block", "factored"), (torch.float32, BF16))
    for kernel, rule, dtype in settings:
        os.environ["FOAM_HF_KERNEL"] = kernel
        for (mesh, found), state_dtype in itertools.product(cases(world, rule == "factored"), (torch.float32, dtype)):
            torch.manual_seed(0)
            full = [nn.Parameter(torch.randn(shape).to(dtype)) for shape, _ in found]
            split = [
                nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements))
                for p, (_, placements) in zip(full, found, strict=True)
            ]
            options = {"level": 3, "second_moment": rule, "weight_decay": 0.1, "lr": 0.01, "state_dtype": state_dtype}
            one, many = FOAM(full, **options), FOAM(split, **options)
            for _ in range(4):
                for p, q, (_, placements) in zip(full, split, found, strict=True):
                    p.grad = torch.randn(p.shape).to(dtype)
                    q.grad = distribute_tensor(p.grad, mesh, placements)
                one.step()
                with CommDebugMode() as counted:
                    many.step()
                expected = 0 if rule == "block" else sum(size > 1 for size in mesh.shape)
                assert counted.get_total_counts() == expected, (rule, mesh, counted.get_comm_counts())
            if kernel == "triton" and rule == "block":
                assert len(many._plan._launches) > 0
            kind = f"{rule} {dtype} {state_dtype}"
            for p, q, case in zip(full, split, found, strict=True):
                assert one.state[p].keys() == many.state[q].keys()
                for name, mine in {"weight": q, **many.state[q]}.items():
                    theirs = p if name == "weight" else one.state[p][name]
                    if name != "step":
                        assert (
                            isinstance(mine, DTensor)
                            and mine.device_mesh == q.device_mesh
                            and mine.shape == theirs.shape
                        )
                        assert local(mine).is_contiguous()
                    a, b = torch.as_tensor(whole(mine)).detach(), torch.as_tensor(theirs).detach()
                    if rule == "block":
                        assert torch.equal(a, b), (kernel, kind, case, name)
                    else:
                        worst[kind] = max(worst.get(kind, 0.0), error(a, b))
                        assert error(a, b) < 1e-2, (kernel, kind, case, name, error(a, b))
    return worst


if __name__ == "__main__":
    dist.init_process_group("gloo")
    world, folder = dist.get_world_size(), Path(sys.argv[1])
    found = compare_with_one_process(world)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
