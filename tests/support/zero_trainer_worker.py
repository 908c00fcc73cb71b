"""Runs of the Trainer under DeepSpeed's ZeRO, for tests/zero, in one process or in several.

Every process sees the same batches, so that sums and means over 2 or 4 processes are exact.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import SequentialSampler, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.support.tiny_models import language_data, tiny_llama

deepspeed.ops.__compatible_ops__.clear()  # else every test run compiles C++ for collectives over shared memory
BATCH = 2
STEPS, SHORT = 50, 3
BF16 = torch.bfloat16


def config(stage: int, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config as users have it: everything that Trainer knows is "auto"."""
    zero = {"stage": stage, **more.pop("zero", {})}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        **more,
    }


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def whole_weights(model: Any) -> Tensor | None:
    """All weights as one vector on rank 0: DeepSpeed's float32 copies if it has them."""
    from deepspeed.utils import safe_get_full_fp32_param

    parts = []
    for p in model.parameters():
        full = safe_get_full_fp32_param(p) if p.requires_grad else None
        parts.append((p if full is None else full).detach().float().flatten().cpu())
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.cat(parts).clone() if rank == 0 else None


class Record(TrainerCallback):
    """Copies all weights after every step, on rank 0."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = whole_weights(model)
        if found is not None:
            self.steps.append(found)


def data_for(world: int) -> Any:
    count = STEPS * BATCH
    order = [i for b in range(0, count, BATCH) for _ in range(world) for i in range(b, b + BATCH)]
    return Subset(language_data(2 * count), order)  # accelerate deals batches out to the processes in turn


def run(
    folder: Path,
    *,
    world: int = 1,
    deepspeed: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    model: Any = None,
    resume: Path | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    environment: dict[str, str] | None = None,
    **settings: Any,
) -> tuple[Trainer, list[Tensor]]:
    """Train for ``max_steps`` steps. ``deepspeed`` is a config; None is DDP or one process."""
    steps = settings.setdefault("max_steps", SHORT)
    assert steps * settings.get("gradient_accumulation_steps", 1) <= STEPS
    record = Record()
    with _environment({"ACCELERATE_MIXED_PRECISION": "no", **(environment or {})}):
        defaults = {
            "output_dir": str(folder),
            "optim": "foam",
            "optim_args": "level=3,scale=0.25",
            "learning_rate": 5e-3,
            "per_device_train_batch_size": BATCH,
            "weight_decay": 0.1,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1000,
            "deepspeed": copy.deepcopy(deepspeed),
        }
        arguments = TrainingArguments(**{**defaults, **settings})  # before the model: ZeRO 3 cuts it when it is made
        trainer = InOrder(
            model=(model or tiny_llama)().to(dtype),
            args=arguments,
            train_dataset=data_for(world),
            callbacks=[record, *callbacks],
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, record.steps
