"""Runs of the Trainer under DDP and FSDP2, for tests/optimizer/test_sharding.py, in one process or in several.

Every process sees the same batches, so that sums and means over 2 or 4 processes are exact.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

import foam_hf  # registers optim="foam"
from foam_hf.memory import expected_state_bytes, state_bytes
from foam_hf.tensors.places import local
from foam_hf.tensors.rows import PLAIN, kind_of
from tests.support import gathering_worker
from tests.support.devices import DEVICE
from tests.support.interpreter import patch_once
from tests.support.sharding_worker import check_all
from tests.support.tiny_models import language_data, tiny_llama
from tests.support.torchrun import launch

BATCH = 2
STEPS, OTHER, MUON_STEPS, SHORT = 50, 20, 12, 3
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}
BF16 = torch.bfloat16
# Larger steps amplify the rounding of sums in another order. The factored rule adds up over the rows of an embedding,
# which FSDP2 divides; blocks alone have the bits of one process.
DEFAULT = "level=3,scale=0.25"
BLOCKS = f"{DEFAULT},embedding_rule=block"


def allow_fsdp_on_cpus() -> None:
    """Let accelerate use FSDP on CPUs, which only its check of the device prevents."""
    original = AcceleratorState.__init__

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = __init__


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({"ACCELERATE_MIXED_PRECISION": "no", **values})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def stored(p: Tensor) -> list[Tensor]:
    """What this rank stores of a weight: one tensor, or codes and scales."""
    weight: Any = local(p.detach())
    return [weight] if kind_of(weight) == PLAIN else [weight.codes, weight.scales]


class Record(TrainerCallback):
    """Copies this rank's part of all weights after every step."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []
        self.sharded: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.sharded = [isinstance(p, DTensor) for p in model.parameters() for _ in stored(p)]
        self.steps.append([part.cpu().clone() for p in model.parameters() for part in stored(p)])

    def full_weights(self) -> list[Tensor]:
        """All weights as one vector, for every step, on rank 0. Other ranks get an empty list."""
        ranks: list[Any] = [self.steps]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
            dist.gather_object(self.steps, ranks or None)
        return [
            torch.cat(
                [
                    torch.cat(parts).flatten() if sharded else parts[0].flatten()
                    for sharded, *parts in zip(self.sharded, *step, strict=True)
                ]
            )
            for step in zip(*ranks, strict=True)
        ]


def run(
    folder: Path,
    *,
    world: int = 1,
    same_data: bool = True,
    fsdp: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    model: Any = None,
    resume: Path | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    **settings: Any,
) -> tuple[Trainer, list[Tensor]]:
    """Train for ``max_steps`` steps. ``fsdp`` has environment variables for accelerate; None is DDP or one process."""
    steps = settings.setdefault("max_steps", SHORT)
    assert steps * settings.get("gradient_accumulation_steps", 1) <= STEPS
    count = STEPS * BATCH
    data = language_data(2 * count)
    if same_data:  # accelerate deals batches out to the processes in turn
        order = [i for b in range(0, count, BATCH) for _ in range(world) for i in range(b, b + BATCH)]
        data = Subset(data, order)
    record = Record()
    with environment({**FSDP, **fsdp} if fsdp is not None else {}):
        defaults = {
            "output_dir": str(folder),
            "optim": "foam",
            "optim_args": BLOCKS,
            "learning_rate": 5e-3,
            "per_device_train_batch_size": BATCH,
            "weight_decay": 0.1,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": DEVICE == "cpu",
            "disable_tqdm": True,
            "logging_steps": 1000,
        }
        trainer = InOrder(
            model=tiny_llama().to(dtype) if model is None else model,
            args=TrainingArguments(**{**defaults, **settings}),
            train_dataset=data,
            callbacks=[record, *callbacks],
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, record.full_weights()


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


# Embeddings and the head get AdamW, whose bits do not depend on the number of processes, instead of the factored rule.
PLAIN_TABLES = "fold_embeddings=false,fold_head=false"
MUON = {"optim": "foam_muon", "optim_args": f"level=3,{PLAIN_TABLES}"}
# Settings of runs of SHORT steps, each compared with the same run in one process.
FEATURES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "accumulation": ({}, {"gradient_accumulation_steps": 2}),
    "clipping": ({}, {"max_grad_norm": 0.05}),
    "checkpointing": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}),
    "lora": ({}, {"model": lora}),
    "default": ({}, {"optim_args": DEFAULT}),
    "default, gradient release": ({}, {"optim_args": f"{DEFAULT},gradient_release=true", "max_grad_norm": 1e9}),
    "default, mini": ({}, {"optim": "foam_mini", "optim_args": "scale=0.25"}),
    "mini": ({}, {"optim": "foam_mini", "optim_args": "scale=0.25,embedding_rule=block"}),
    "factored": ({}, {"optim_args": "level=3,second_moment=factored"}),
    "release, accumulation": (
        {},
        {"optim_args": "level=3,gradient_release=true", "gradient_accumulation_steps": 2, "max_grad_norm": 1e9},
    ),
    "gradient release": ({}, {"optim_args": f"{BLOCKS},gradient_release=true", "max_grad_norm": 1e9}),
    "muon": ({}, {"optim": "foam_muon", "optim_args": "level=3"}),
    "muon, gradient release": ({}, {**MUON, "optim_args": f"{MUON['optim_args']},gradient_release=true"}),
}


RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "sharded": ("SHARDED_STATE_DICT", {}),
    "full": ("FULL_STATE_DICT", {}),
    "default": ("SHARDED_STATE_DICT", {"optim_args": DEFAULT}),
    "muon": ("SHARDED_STATE_DICT", MUON),
}


def feature(folder: Path, name: str, **more: Any) -> list[Tensor]:
    variables, settings = FEATURES[name]
    settings = {key: value() if callable(value) else value for key, value in settings.items()}
    if "fsdp" in more:
        more["fsdp"] = variables
    return run(folder, **settings, **more)[1]


def saved(folder: Path, kind: str, **more: Any) -> list[Tensor]:
    save_steps = more["max_steps"]
    variables = {"FSDP_STATE_DICT_TYPE": kind}
    return run(folder / kind, fsdp=variables, save_strategy="steps", save_steps=save_steps, **more)[1]


def steps_of(kind: str, dtype: torch.dtype, world: int) -> int:
    """STEPS once for DDP, in bfloat16, and once for FSDP2, in float32; what differs shows in fewer steps elsewhere."""
    if world == 2 and dtype == {"ddp": BF16, "fsdp": torch.float32}[kind]:
        return STEPS
    return OTHER if world == 2 else 10


def main(folder: Path, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    same = {"world": world}
    for name, (kind, settings) in RESUMED.items():  # 2 -> 1 -> 4 processes
        if world == 2:
            saved(folder / name / "two", kind, max_steps=4, **same, **settings)
        if world == 1:
            resume = folder / name / f"two/{kind}/checkpoint-4"
            saved(folder / name / "one", kind, max_steps=8, resume=resume, **same, **settings)
        if world == 4:
            resume = folder / name / f"one/{kind}/checkpoint-8"
            steps = saved(folder / name / "four", kind, max_steps=12, resume=resume, **same, **settings)
            found[f"resumed {name}"] = steps
    if world == 1:
        return found
    for dtype in (torch.float32, BF16):
        if world == 2:
            found[f"ddp {dtype}"] = run(folder, dtype=dtype, max_steps=steps_of("ddp", dtype, world), **same)[1]
        steps = steps_of("fsdp", dtype, world)
        found[f"fsdp {dtype}"] = run(folder, dtype=dtype, fsdp={}, max_steps=steps, **same)[1]
        steps = MUON_STEPS if world == 2 else SHORT
        found[f"muon {dtype}"] = run(folder, dtype=dtype, fsdp={}, max_steps=steps, **same, **MUON)[1]
    if world == 2:
        for name in FEATURES:
            found[name] = feature(folder, name, fsdp=True, **same)
        for dtype in (torch.float32, BF16):
            other: dict[str, Any] = {"world": 2, "same_data": False, "fsdp": {}, "max_steps": OTHER}
            found[f"other data {dtype}"] = run(folder, dtype=dtype, **other)[1]
        found["mixed"] = mixed_precision(folder)
    found["worst"] = check_all(world)
    gathering_worker.check_all(world)
    return found


def mixed_precision(folder: Path) -> dict[str, Any]:
    """bf16 mixed precision of accelerate, which keeps float32 weights in the shards."""
    callbacks = (foam_hf.OptimizerMemoryCallback(),)
    variables = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    trainer, steps = run(folder, fsdp=variables, dtype=BF16, world=2, callbacks=callbacks)
    optimizer = trainer.optimizer.optimizer
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    assert all(isinstance(x, DTensor) for x in states)
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {torch.float32}
    return {
        "steps": steps,
        "measured": state_bytes(trainer.optimizer),
        "expected": expected_state_bytes(optimizer.param_groups),
        "whole": sum(x.numel() * 4 for x in states),
    }


def as_one_rank(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    allow_fsdp_on_cpus()
    world = int(os.environ["WORLD_SIZE"])
    results = main(folder, world)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / f"results{world}.pt")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_once()
    for processes in (2, 1, 4):
        launch(processes, as_one_rank, Path(sys.argv[1]))
