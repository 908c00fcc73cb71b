"""What DeepSpeed holds in every process, for tests/planner/test_zero.py: measured after a step of a tiny LLaMA."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from foam_hf import FOAM, foam_param_groups
from foam_hf.memory import state_bytes
from foam_hf.memory.storages import storages, total
from tests.support.tiny_models import SEQUENCE, VOCAB, tiny_llama
from tests.support.torchrun import launch

deepspeed.ops.__compatible_ops__.clear()  # else every test run compiles C++ for collectives over shared memory
WORLD, LEVEL = 2, 4
ODD = {"hidden_size": 40, "intermediate_size": 50}  # no block ends where a part ends
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = {  # name -> stage, dtype, more of "zero_optimization"
    "1 bfloat16": (1, "bfloat16", {}),
    "2 float32": (2, "float32", {}),
    "2 bfloat16 round robin": (2, "bfloat16", {"round_robin_gradients": True}),
    "2 bfloat16 offload": (2, "bfloat16", {"offload_optimizer": {"device": "cpu"}}),
    "3 float32": (3, "float32", {}),
    "3 bfloat16 sub-groups": (3, "bfloat16", {"sub_group_size": 2000}),
    "3 bfloat16 offload": (3, "bfloat16", {"offload_optimizer": {"device": "cpu"}}),
}
OPTIMIZERS = ("foam", "adamw_torch")
BUCKET = 10_000  # elements


def config(case: str) -> dict[str, Any]:
    """The DeepSpeed config of a case."""
    stage, dtype, more = CASES[case]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, **more},
    }


def model_of(case: str) -> nn.Module:
    return tiny_llama(**ODD).to(DTYPES[CASES[case][1]])


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    groups = foam_param_groups(model, weight_decay=0.1, level=LEVEL)
    if name == "foam":
        return FOAM(groups, lr=1e-3)
    decay = [p for group in groups if group["weight_decay"] for p in group["params"]]
    rest = [p for group in groups if not group["weight_decay"] for p in group["params"]]
    return torch.optim.AdamW([{"params": decay}, {"params": rest}], lr=1e-3)


def measure(case: str, name: str) -> dict[str, int]:
    """The bytes that this process holds after a step."""
    model = model_of(case)
    optimizer = optimizer_of(model, name)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(case))
    tokens = torch.arange(SEQUENCE).view(1, -1) % VOCAB
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    zero = engine.optimizer
    if CASES[case][0] == 3:
        masters, weights = zero.fp32_partitioned_groups_flat, [zero.lp_param_buffer]
    else:
        masters, weights = zero.single_partition_of_fp32_groups, zero.bit16_groups_flat
    weights = storages([*weights, *model.buffers()])
    found = {
        "weights": total(weights),
        "masters": total({key: size for key, size in storages(masters).items() if key not in weights}),
        "state": state_bytes(optimizer),
    }
    engine.destroy()
    return found


def as_one_rank(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    deepspeed.init_distributed("gloo")
    mine = {f"{case}, {name}": measure(case, name) for case in CASES for name in OPTIMIZERS}
    everything: list[Any] = [None] * WORLD
    dist.all_gather_object(everything, mine)
    if dist.get_rank() == 0:
        torch.save(everything, folder / "zero.pt")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(WORLD, as_one_rank, Path(sys.argv[1]))
