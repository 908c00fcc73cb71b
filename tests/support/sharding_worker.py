"""Checks of FOAM on DTensors that every rank of tests/optimizer/test_sharding.py runs, over gloo on a CPU."""

from __future__ import annotations

import copy
import itertools
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from foam_hf import FOAM, foam_param_groups
from foam_hf.optimizer.clipping import ClipByAll
from foam_hf.optimizer.sharding import pieces_of
from foam_hf.rules.block import BLOCK
from foam_hf.tensors.places import local
from tests.support.rules import SHARDED
from tests.support.tolerances import TOLERANCES, error

BF16 = torch.bfloat16
Case = tuple[tuple[int, ...], tuple[Any, ...]]


FUSED = [(7, 37), (1, 24), (33,), (3, 5, 24)]


class CountedCollectives(TorchDispatchMode):
    """Counts the collectives in a `with` block, as torch's CommDebugMode does, which takes as long as the steps."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor first turns it into plain operators and collectives
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.count += 1
        return func(*args, **(kwargs or {}))


def full_tensor(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def cases(world: int, factored: bool) -> list[tuple[DeviceMesh, list[Case]]]:
    """Each mesh with the shapes and placements to test on it."""
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
    """Compare sharded parameters with whole ones after three steps. Returns the largest error of each kind of case."""
    worst: dict[str, float] = {}
    plain = [
        ("reference", rule, dtype, state_dtype)
        for rule, dtype, state_dtype in itertools.product(SHARDED, [torch.float32, BF16], [torch.float32, BF16])
        if world == 2 or dtype == state_dtype
    ]
    fused = itertools.product(["triton"], SHARDED, [BF16], [BF16]) if world == 2 else ()
    for kernel, rule, dtype, state_dtype in (*plain, *fused):
        os.environ["FOAM_HF_KERNEL"] = kernel
        for mesh, found in cases(world, rule == "factored"):
            if kernel == "triton":  # slow in its interpreter
                found = [case for case in found if case[0] in FUSED]
            torch.manual_seed(0)
            full = [nn.Parameter(torch.randn(shape).to(dtype)) for shape, _ in found]
            split = [
                nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements))
                for p, (_, placements) in zip(full, found, strict=True)
            ]
            options = {"level": 3, "second_moment": rule, "weight_decay": 0.1, "lr": 0.01, "state_dtype": state_dtype}
            one, many = FOAM(full, **options), FOAM(split, **options)
            for _ in range(2 if kernel == "triton" else 3):
                for p, q, (_, placements) in zip(full, split, found, strict=True):
                    p.grad = torch.randn(p.shape).to(dtype)
                    q.grad = distribute_tensor(p.grad, mesh, placements)
                one.step()
                with CountedCollectives() as counted:
                    many.step()
                expected = 0 if rule == "block" else 2 * sum(size > 1 for size in mesh.shape)
                assert counted.count == expected, (rule, mesh, counted.count)
            if kernel == "triton" and rule == "block":
                assert len(many._prepared.launches) > 0
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
                    a, b = torch.as_tensor(full_tensor(mine)).detach(), torch.as_tensor(theirs).detach()
                    if rule == "block":
                        assert torch.equal(a, b), (kernel, kind, case, name)
                    else:
                        worst[kind] = max(worst.get(kind, 0.0), error(a, b))
                        assert error(a, b) < 1e-2, (kernel, kind, case, name, error(a, b))
    return worst


def round_trips(world: int) -> None:
    """Save and load by torch.distributed.checkpoint, before and after a step, and by the state dict of one process."""
    mesh = init_device_mesh("cpu", (world,))

    def make() -> tuple[nn.Module, FOAM]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(24, 7), nn.Linear(7, 1))
        fully_shard(model, mesh=mesh)
        return model, FOAM(model.parameters(), lr=0.01, level=2, second_moment="factored", state_dtype=BF16)

    def step(model: nn.Module, optimizer: FOAM) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 24)).square().sum().backward()
        optimizer.step()

    for options in (
        StateDictOptions(),
        StateDictOptions(full_state_dict=True),
        StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
        StateDictOptions(flatten_optimizer_state_dict=True),
    ):
        model, optimizer = make()
        before = [full_tensor(p).clone() for p in model.parameters()]
        set_optimizer_state_dict(
            model, optimizer, get_optimizer_state_dict(model, optimizer, options=options), options=options
        )
        assert all(torch.equal(full_tensor(p), q) for p, q in zip(model.parameters(), before, strict=True))
        step(model, optimizer)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        other, loaded = make()
        set_model_state_dict(other, weights, options=StateDictOptions(full_state_dict=True))
        set_optimizer_state_dict(other, loaded, saved, options=options)
        assert {group["state_dtype"] for group in loaded.param_groups} == {BF16}
        step(model, optimizer)
        step(other, loaded)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(full_tensor(p), full_tensor(q))
            assert type(loaded.state[q]["step"]) is int and loaded.state[q]["step"] == optimizer.state[p]["step"]
            for name, x in optimizer.state[p].items():
                y = loaded.state[q][name]
                assert torch.equal(torch.as_tensor(full_tensor(x)), torch.as_tensor(full_tensor(y))), name
                assert name == "step" or (y.dtype == BF16 and y.placements == x.placements)

    model, optimizer = make()
    step(model, optimizer)
    plain = [nn.Parameter(full_tensor(p).detach().clone()) for p in model.parameters()]
    one = FOAM(plain, lr=0.01, level=2, second_moment="factored", state_dtype=BF16)
    one.load_state_dict(optimizer.state_dict())  # DTensors become whole
    other, loaded = make()
    with CommDebugMode() as counted:  # torch's counter; the counts above agree with it
        loaded.load_state_dict(one.state_dict())  # whole tensors are cut
    assert counted.get_total_counts() == 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name, x in optimizer.state[p].items():
            assert name == "step" or torch.equal(local(x), local(loaded.state[q][name])), name


def refusals(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))

    def sharded(shape: tuple[int, ...], placement: Any) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [placement]))

    def refused(message: str, p: nn.Parameter, **options: Any) -> None:
        try:
            FOAM([p], **options)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"not refused: {message}")

    refused(f"split at {[96 * i // world for i in range(1, world)]}", sharded((4, 96), Shard(1)), level=6)
    refused("whole row one block of 64 columns", sharded((4, 64), Shard(1)), level="row")
    partial = nn.Parameter(DTensor.from_local(torch.randn(4, 8), mesh, [Partial()], run_check=False))
    refused("placement Partial", partial, level=2)
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2))
        both = nn.Parameter(distribute_tensor(torch.randn(4, 16), grid, [Shard(0), Shard(1)]))
        refused("split both", both, level=2, second_moment="factored")


def other_gradients(world: int) -> None:
    """Gradients that are partial sums are added up first, and an overflow on one rank skips the step on all ranks."""
    mesh = init_device_mesh("cpu", (world,))
    p = nn.Parameter(distribute_tensor(torch.zeros(4, 8), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.full((4, 8), float(dist.get_rank())), mesh, [Partial()], run_check=False)
    one = nn.Parameter(torch.zeros(4, 8))
    one.grad = torch.full((4, 8), world * (world - 1) / 2)
    for q in (p, one):
        FOAM([q], lr=0.1, level=2).step()
    assert torch.equal(full_tensor(p), one)

    q = nn.Parameter(distribute_tensor(torch.zeros(world, 8), mesh, [Shard(0)]))
    optimizer = FOAM([q], lr=0.1, level=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value, moved in ((float("inf"), False), (1.0, True)):
        local_grad = torch.full((1, 8), value if dist.get_rank() == world - 1 else 1.0)
        scaler.scale(torch.ones(()))
        q.grad = DTensor.from_local(local_grad, mesh, [Shard(0)], run_check=False)
        scaler.step(optimizer)
        scaler.update()
        assert bool((full_tensor(q) != 0).all()) is moved and not (bool((full_tensor(q) != 0).any()) and not moved)


def safe_steps(world: int) -> None:
    """Steps are bounded on shards too: for columns without gradients, rows that seldom have any, and spikes."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(3)
    kernels = ("reference", "triton") if world == 2 else ("reference",)  # the interpreter is slow
    for rule, kind, kernel in itertools.product(SHARDED, (torch.float32, BF16), kernels):
        os.environ["FOAM_HF_KERNEL"] = kernel
        p = nn.Parameter(distribute_tensor(torch.zeros(9, 32), mesh, [Shard(0)]))
        optimizer = FOAM([p], lr=1e-3, scale=2.0, level=4, second_moment=rule, state_dtype=kind)
        for t in range(4):
            before = full_tensor(p).detach().clone()
            grad = torch.randn(9, 32)
            grad[:, 3] = 0.0
            grad[:4] *= t in (0, 3)
            grad[7, 8] *= 1e5 if t == 2 else 1.0
            p.grad = distribute_tensor(grad, mesh, [Shard(0)])
            optimizer.step()
            moved = (full_tensor(p) - before).abs().max().item() / 2e-3
            case = f"largest step in units of lr * scale, {rule}"
            assert moved <= TOLERANCES[case].allowed * (1 + 1e-5), (case, kind, kernel, moved)
            optimizer.state[p]["step"] += 1000 if t == 0 else 0  # late, where a square hardly counts in its own moment
        assert rule == "block" or not full_tensor(p)[:, 3].any()
    os.environ.pop("FOAM_HF_KERNEL")


def places(world: int) -> None:
    """A piece's place is where torch says that the shard begins, for strided shards too."""
    mesh = init_device_mesh("cpu", (world // 2, 2)) if world > 2 else init_device_mesh("cpu", (1, 2))
    for shape, placements in (
        ((16, 8), (_StridedShard(0, split_factor=2), Shard(0))),
        ((7, 8), (Shard(0), Replicate())),
        ((9, 16), (Shard(0), Shard(1))),
        ((5, 8), (Shard(0), Shard(0))),
    ):
        size, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
        local_tensor = torch.zeros(size)
        p = DTensor.from_local(
            local_tensor, mesh, placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
        )
        (piece,) = pieces_of(p, BLOCK, 2)
        if local_tensor.numel():
            assert (piece.place.first_row, piece.place.first_column) == tuple(offset), (shape, placements)


def expected_shares(world: int) -> None:
    """Of the norm, what clipping under gradient release expects of each weight, on every rank as on one process."""
    mesh = init_device_mesh("cpu", (world,))
    shapes = [((7, 4 * world - 1), Shard(1)), ((4 * world - 1, 7), Shard(0)), ((5, 12), Replicate())]
    for rule in ("block", "factored"):
        found = []
        for sharded in (False, True):
            torch.manual_seed(3)
            weights = [torch.randn(shape) for shape, _ in shapes]
            grads = [torch.randn(shape) * (1 + 2 * i) for i, (shape, _) in enumerate(shapes)]
            if sharded:
                places = [[placement] for _, placement in shapes]
                weights = [distribute_tensor(x, mesh, place) for x, place in zip(weights, places, strict=True)]
                grads = [distribute_tensor(x, mesh, place) for x, place in zip(grads, places, strict=True)]
            params = [nn.Parameter(x) for x in weights]
            optimizer = FOAM(params, level=0 if rule == "block" else 1, second_moment=rule)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
            clip = ClipByAll(optimizer, 1.0)
            clip.begin(params, 1)
            found.append(clip._shares)
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def embeddings_cut_in_both_dimensions(world: int) -> None:
    """Where the rule was left open, the block rule takes what the factored one cannot."""
    if world < 4:
        return
    mesh = init_device_mesh("cpu", (2, world // 2))
    model = nn.Embedding(8, 4 * world)
    placements = [Shard(0), Shard(1)]
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, placements))
    group = foam_param_groups(model, level=2)
    assert FOAM(group).param_groups[0]["second_moment"] == "block"
    try:
        FOAM(foam_param_groups(model, level=2, embedding_rule="factored"))
    except ValueError as error:
        assert "embedding_rule='block'" in str(error)
    else:
        raise AssertionError("a factored matrix that is cut along rows and columns was not refused")


def check_all(world: int) -> dict[str, float]:
    found = compare_with_one_process(world)
    os.environ.pop("FOAM_HF_KERNEL")
    round_trips(world)
    refusals(world)
    other_gradients(world)
    safe_steps(world)
    places(world)
    expected_shares(world)
    embeddings_cut_in_both_dimensions(world)
    return found
