"""INT8 weights under FSDP2, by hand and in the Trainer, in 1 to 4 processes, for tests/int8/test_sharding.py."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import fsdp_utils
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from foam_hf import FOAM, Int8Config, enable_gradient_release, estimate_memory, foam_param_groups
from foam_hf.int8.layers import Int8Linear, int8_of, parts_of
from foam_hf.int8.models import convert_, dequantize_
from foam_hf.int8.quantizer import quantize_model_
from foam_hf.memory import state_bytes
from foam_hf.memory.storages import storages, total
from foam_hf.planner.fsdp2 import _gathered
from tests.support.devices import DEVICE, placed
from tests.support.sharding_trainer_worker import BLOCKS, FSDP, allow_fsdp_on_cpus, environment, run
from tests.support.sharding_worker import full_tensor
from tests.support.tiny_models import tiny_llama, tiny_qwen2
from tests.support.torchrun import launch

ROWS = 67  # of the head: neither 2 nor 4 processes divide them
STEPS, SHORT = 12, 3
BF16, F32 = torch.bfloat16, torch.float32


# By hand


class Net(nn.Module):
    """Rows that many processes do not divide, and fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 48, bias=False), nn.Linear(48, 32)
        self.seven, self.one = nn.Linear(32, 7), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.wide(x).relu())
        return self.seven(x).square().sum() + self.one(x).sum()


def net(dtype: torch.dtype = BF16, int8: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = Net().to(dtype)
    for layer in made.children() if int8 else ():
        convert_(layer, 16)
    return placed(made)


def sharded(model: Any, **options: Any) -> Any:
    for layer in model.children():
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def stored_in(model: Any) -> dict[str, Tensor]:
    """Codes and scales of INT8 weights, and other weights, each whole."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        parts = parts_of(p) if int8_of(p) is not None else (p,)
        found |= {f"{name} {i}": full_tensor(part).detach().clone() for i, part in enumerate(parts)}
    return found


def assert_same(a: Any, b: Any, what: Any) -> None:
    mine, theirs = stored_in(a), stored_in(b)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == [], what


class GatheredBytes(TorchDispatchMode):
    """The bytes that this rank adds to the all-gathers in a ``with`` block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "allgather_base" in func.__name__:
            self.count += args[1].numel() * args[1].element_size()
        return func(*args, **(kwargs or {}))


def train(model: Any, optimizer: FOAM, steps: int, seed: int = 1) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        loss = model(placed(torch.randn(4, 32, generator=generator)).to(next(model.parameters()).dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def one_process_and_shards(world: int) -> None:
    """Losses, codes and scales of shards are those of whole weights."""
    cases: list[tuple[str, torch.dtype, dict[str, Any], Any]] = [
        ("reference", F32, {}, None),
        ("reference", BF16, {"state_dtype": BF16}, None),
    ]
    if world == 2:
        cases += [("triton", BF16, {"state_dtype": BF16}, None), ("reference", BF16, {"level": 0}, None)]
    else:
        mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicas", "shards"))
        cases += [("reference", BF16, {}, mesh)]
    for kernel, dtype, options, mesh in cases:
        os.environ["FOAM_HF_KERNEL"] = kernel
        shard = {} if mesh is None else {"mesh": mesh}
        one, many, released = net(dtype), sharded(net(dtype), **shard), sharded(net(dtype), **shard)
        options = {"lr": 0.02, "level": 2, "scale": 1.0, "weight_decay": 0.1, **options}
        models = (one, many, released)
        optimizers = [FOAM(model.parameters(), **options) for model in models]
        enable_gradient_release(released, optimizers[2])
        losses = [train(model, optimizer, 3) for model, optimizer in zip(models, optimizers, strict=True)]
        assert losses[0] == losses[1] == losses[2], (kernel, dtype, losses)
        prepared: Any = optimizers[1]._prepared
        assert any("Int8" in type(each.launch).__name__ for each in prepared.launches) == (kernel == "triton")
        assert all(type(p._local_tensor).__name__ == "Int8Weight" for p in many.parameters() if p.dim() > 1)
        assert_same(one, many, (kernel, dtype, options))
        assert_same(one, released, (kernel, dtype, options, "gradient release"))
    os.environ.pop("FOAM_HF_KERNEL")


def traffic(world: int) -> dict[str, int]:
    """Bytes of the all-gathers of a forward pass, for weights alone."""
    found = {}
    for name, dtype, int8 in (("float32", F32, False), ("bfloat16", BF16, False), ("INT8", BF16, True)):
        torch.manual_seed(0)
        layer = nn.Linear(256, 64 * world, bias=False).to(dtype)
        if int8:
            convert_(layer, 128)
        fully_shard(layer)
        with GatheredBytes() as counted:
            layer(torch.ones(1, 256, dtype=dtype))
        found[name] = counted.count
    return found


def state_dicts(world: int) -> None:
    """Every kind of state dict goes back bit for bit, into a model with other weights."""
    for options in (
        StateDictOptions(),
        StateDictOptions(cpu_offload=True),
        StateDictOptions(full_state_dict=True),
        StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
    ):
        model, other = sharded(net()), sharded(net(seed=3))
        train(model, FOAM(model.parameters(), lr=0.02, level=2), 2)
        saved = copy.deepcopy(get_model_state_dict(model, options=options))
        if saved:
            assert "seven.weight" not in saved
            assert saved["seven.weight_codes"].dtype == torch.int8 and saved["seven.weight_scales"].dtype == F32
            assert isinstance(saved["seven.weight_codes"], DTensor) != options.full_state_dict
        set_model_state_dict(other, saved, options=options)
        assert_same(model, other, options)
        optimizers = [FOAM(each.parameters(), lr=0.02, level=2) for each in (model, other)]
        assert train(model, optimizers[0], 2) == train(other, optimizers[1], 2)
        assert_same(model, other, options)

    whole = net(seed=5)
    model = sharded(net())
    words = "set_model_state_dict shards whole tensors"
    expected_error(RuntimeError, words, model.load_state_dict, whole.state_dict())
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, whole.state_dict(), options=options)  # what one process has saved
    assert_same(model, whole, "whole")

    for empty in (False, True):  # from the meta device, by new tensors or by to_empty
        with torch.device("meta"):
            model = sharded(net())
        model = model.to_empty(device="cpu") if empty else model
        set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
        assert_same(model, whole, "meta")
        train(model, FOAM(model.parameters()), 1)

    model = net()
    model.wide.requires_grad_(False)
    model = sharded(model)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    kept = get_model_state_dict(model, options=options)
    assert not [name for name in kept if name.startswith("wide")] and "seven.weight_codes" in kept
    before = stored_in(model)
    set_model_state_dict(model, kept, options=StateDictOptions(full_state_dict=True, strict=False))
    after = stored_in(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def expected_error(kind: type[Exception], words: str, call: Any, *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def refusals(world: int) -> None:
    layer = net().wide
    expected_error(
        ValueError, "INT8 weights are sharded by rows alone", fully_shard, layer, shard_placement_fn=lambda p: Shard(1)
    )
    model = sharded(net())
    assert type(model.wide).__mro__[2] is Int8Linear  # behind what FSDP2 makes of it
    expected_error(ValueError, "that FSDP2 has sharded", dequantize_, model)


def planned(world: int) -> None:
    """The planner's bytes are those of a sharded model, its gradients and its state on the first rank."""
    for int8 in (True, False):
        made = model() if int8 else tiny_llama(vocab_size=ROWS).to(BF16)
        plan = estimate_memory(made, "foam", "level=3", fsdp2=True, gpus=world, batch=1, sequence=8)
        units = [list(unit.parameters()) for unit in made.model.layers]
        gathered = max(sum(_gathered(p, world, None) for p in unit) for unit in units)
        for layer in made.model.layers:
            fully_shard(layer)
        fully_shard(made)
        optimizer = FOAM(foam_param_groups(made, level=3))
        ids = torch.ones(1, 8, dtype=torch.long)
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        grads = [p.grad._local_tensor for p in made.parameters()]  # type: ignore[union-attr]
        outputs = [
            sum(x.numel() * x.element_size() for p in group.fsdp_params for x in p.all_gather_outputs)
            for group in (layer._get_fsdp_state()._fsdp_param_group for layer in made.model.layers)
        ]
        if torch.distributed.get_rank() == 0:
            assert total(storages([*made.parameters(), *made.buffers()])) == plan.weights
            assert sum(grad.numel() * grad.element_size() for grad in grads) == plan.gradients
            assert state_bytes(optimizer) == plan.state
            assert max(outputs) == gathered < plan.buffers


def by_hand(world: int) -> dict[str, int]:
    planned(world)
    one_process_and_shards(world)
    state_dicts(world)
    refusals(world)
    return traffic(world)


# In the Trainer


def model(dtype: torch.dtype = BF16, tied: bool = False) -> Any:
    build = tiny_qwen2 if tied else tiny_llama
    return quantize_model_(build(vocab_size=ROWS).to(dtype), Int8Config(block_size=16, head=not tied))


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def loaded(folder: Path) -> Any:
    """A model that every rank reads from files."""
    return AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=Int8Config(block_size=16), dtype=BF16
    )


# Settings of short runs, each compared with the same run in one process.
FEATURES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "accumulation": ({}, {"gradient_accumulation_steps": 2}),
    "checkpointing": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}),
    "release": ({}, {"optim_args": f"{BLOCKS},gradient_release=true"}),
    "tied": ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer"}, {"model": lambda folder: model(tied=True)}),
    "read by each rank": ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {"model": loaded}),
}


def feature(folder: Path, name: str, fsdp: bool = False, **more: Any) -> list[Tensor]:
    variables, settings = FEATURES[name]
    settings = {**settings, **more}
    make = settings.pop("model", lambda folder: model())
    with environment({**FSDP, **variables} if fsdp else {}):  # as `accelerate launch` sets it before the script runs
        made = make(folder)
    settings |= {"fsdp": variables} if fsdp else {}
    with mock.patch.object(fsdp_utils, "fsdp2_load_full_state_dict", wraps=fsdp_utils.fsdp2_load_full_state_dict) as f:
        steps = run(folder, model=made, max_steps=SHORT, **settings)[1]
    assert f.called == (fsdp and name == "read by each rank")
    return steps


def saved(folder: Path, kind: str, steps: int, make: Any = model, **more: Any) -> list[Tensor]:
    settings = {"save_strategy": "steps", "save_steps": steps, "max_steps": steps, **more}
    return run(folder / kind, model=make(), fsdp={"FSDP_STATE_DICT_TYPE": kind}, **settings)[1]


KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


def main(folder: Path, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    same = {"world": world}
    for kind in KINDS:  # 2 -> 1 -> 4 processes
        if world == 2:
            saved(folder / "two", kind, 4, **same)
        if world == 1:
            saved(folder / "one", kind, 8, resume=folder / f"two/{kind}/checkpoint-4", **same)
        if world == 4:
            resume = folder / f"one/{kind}/checkpoint-8"
            found[f"resumed {kind}"] = saved(folder / "four", kind, STEPS, resume=resume, **same)
    if world == 1:
        return found
    if world == 2:
        for name in FEATURES:
            found[name] = feature(folder, name, fsdp=True, **same)
        for kind in KINDS:
            saved(folder / "lora", kind, 2, make=lora, **same)
            resume = folder / f"lora/{kind}/checkpoint-2"
            found[f"lora {kind}"] = saved(folder / "lora more", kind, SHORT, make=lora, resume=resume, **same)
        variables = {"ACCELERATE_MIXED_PRECISION": "bf16"}
        found["mixed"] = run(folder, model=model(), fsdp=variables, max_steps=SHORT, **same)[1]
    found["bytes"] = by_hand(world)
    return found


def as_one_rank(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    allow_fsdp_on_cpus()
    world = int(os.environ["WORLD_SIZE"])
    results = main(folder, world)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / f"results{world}.pt")


if __name__ == "__main__":
    for processes in (2, 1, 4):
        launch(processes, as_one_rank, Path(sys.argv[1]))
