"""Runs of the Trainer under DeepSpeed's ZeRO, for tests/zero, in one process or in several.

Every process sees the same batches, so that sums and means over 2 or 4 processes are exact.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", os.environ.get("FOAM_HF_TEST_DEVICE", "cpu"))

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import SequentialSampler, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

import foam_hf  # registers optim="foam"
from foam_hf.folders import MANIFEST
from foam_hf.trainer.manifest import check
from tests.support.devices import DEVICE
from tests.support.tiny_models import language_data, tiny_llama
from tests.support.torchrun import launch

deepspeed.ops.__compatible_ops__.clear()  # else every process compiles C++ for collectives, or waits for it
BATCH = 2
STEPS, SHORT = 10, 3
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
    resume: Path | bool | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    environment: dict[str, str] | None = None,
    evaluate: bool = False,
    **settings: Any,
) -> tuple[Trainer, list[Tensor]]:
    """Train for ``max_steps`` steps. ``deepspeed`` is a config; None is DDP or one process."""
    if os.environ.get("FOAM_HF_TEST_TRACE"):
        print(os.environ.get("RANK"), deepspeed, settings, flush=True)
    steps = settings.setdefault("max_steps", SHORT)
    assert steps * settings.get("gradient_accumulation_steps", 1) <= STEPS
    record = Record()
    with _environment({"ACCELERATE_MIXED_PRECISION": "no", **(environment or {})}):
        defaults = {
            "output_dir": str(folder),
            "optim": "foam",
            # What ZeRO decides by itself is asked for where one process would decide otherwise.
            "optim_args": "level=3,scale=0.25" + (",embedding_rule=block" if world == 1 else ""),
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
            "deepspeed": copy.deepcopy(deepspeed),
        }
        arguments = TrainingArguments(**{**defaults, **settings})  # before the model: ZeRO 3 cuts it when it is made
        trainer = InOrder(
            model=(model or tiny_llama)().to(dtype),
            args=arguments,
            train_dataset=data_for(world),
            eval_dataset=language_data(4) if evaluate else None,
            callbacks=[record, *callbacks],
        )
        trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return trainer, record.steps


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def pretrained(folder: Path) -> Any:
    """The same model from a folder, which under ZeRO 3 is cut up while it is loaded."""
    from transformers import LlamaForCausalLM

    return lambda: LlamaForCausalLM.from_pretrained(folder)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# ZeRO stages, more of their config, and settings of runs of SHORT steps, each compared with the run in one process.
FEATURES: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "accumulation": ((1, 2, 3), {}, {"gradient_accumulation_steps": 2}),
    "clipping": ((1, 2, 3), {}, {"max_grad_norm": 0.05}),
    "checkpointing": ((3,), {}, {"gradient_checkpointing": True}),
    "offload": ((1, 2, 3), OFFLOAD, {}),
    "lora": ((1, 2, 3), {}, {"model": lora}),
    "mini": ((3,), {}, {"optim": "foam_mini", "optim_args": "scale=0.25,embedding_rule=block"}),
}


def feature(folder: Path, name: str, stage: int | None, **more: Any) -> list[Tensor]:
    _, zero, settings = FEATURES[name]
    if stage is not None:
        more["deepspeed"] = config(stage, zero=exact(stage, **zero))
    return run(folder, **settings, **more)[1]


def exact(stage: int, **more: Any) -> dict[str, Any]:
    """More ZeRO config: for ZeRO 3 without its own linear layer, whose gradients have other bits than torch's."""
    return {**({"memory_efficient_linear": False} if stage == 3 else {}), **more}


class Frozen(TrainerCallback):
    """Stops training after a step, to leave a run unfinished."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def resumed(folder: Path, stage: int, **more: Any) -> list[Tensor]:
    zero = config(stage, zero=exact(stage, stage3_gather_16bit_weights_on_model_save=stage == 3))
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, **more}
    run(folder, deepspeed=zero, world=2, callbacks=(Frozen(2),), **settings)
    found = run(folder, deepspeed=zero, world=2, resume=folder / "checkpoint-2", **settings)[1]
    if dist.get_rank() == 0:
        check(folder / "checkpoint-4", lambda name: True)  # every file, also the parts of other processes
        assert (folder / "checkpoint-4" / "model.safetensors").is_file()
    return found


def refused(message: str, **settings: Any) -> None:
    try:
        run(Path("unused"), world=2, **settings)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def refusals(folder: Path, stage: int) -> None:
    refused("needs whole matrices, and DeepSpeed's ZeRO cuts", deepspeed=config(stage), optim="foam_muon")
    refused("gradient_release=true updates", deepspeed=config(stage), optim_args="gradient_release=true")
    section = {"type": "AdamW", "params": {"lr": 1e-3}}
    refused("would train by 'AdamW' instead of FOAM", deepspeed=config(stage, optimizer=section))
    refused("zero_optimization.stage=0", deepspeed=config(0))
    checkpoint = folder / f"resumed{stage}" / "checkpoint-4"
    refused("with level=3 in param group 0", deepspeed=config(stage), resume=checkpoint, optim_args="level=4")
    dist.barrier()
    if dist.get_rank() == 0:  # as if one process had written it
        (checkpoint / MANIFEST).unlink()
        for part in checkpoint.glob("global_step4/*zero_pp_rank_1_*"):
            part.unlink()
    dist.barrier()
    refused(
        "was written by 1 processes of DeepSpeed's ZeRO, and here are 2", deepspeed=config(stage), resume=checkpoint
    )
    # Trainer alone would start moments anew in silence.
    refused("by 1 processes of DeepSpeed's ZeRO, and this run is without DeepSpeed", resume=checkpoint)


def spoiled() -> Any:
    """A model whose second loss is NaN."""
    model, calls = tiny_llama(), itertools.count(1)

    def spoil(module: Any, args: Any, output: Any) -> Any:
        if next(calls) == 2:
            output["loss"] = output["loss"] * float("nan")
        return output

    model.register_forward_hook(spoil)
    return model


def reports_nan(folder: Path, stage: int, **settings: Any) -> None:
    """DeepSpeed leaves out a step of NaN gradients before FOAM sees it: the run stops, if not told to go on."""
    zero = config(stage)
    try:
        run(folder, deepspeed=zero, world=2, model=spoiled, **settings)
    except FloatingPointError as error:
        assert "step 2: gradients are NaN or infinite, so DeepSpeed left out" in str(error), error
    else:
        raise AssertionError("NaN was not reported")
    args = "level=3,scale=0.25,nonfinite=skip"
    steps = run(folder, deepspeed=zero, world=2, model=spoiled, optim_args=args, **settings)[1]
    if dist.get_rank() == 0:
        first, second, third = steps
        assert torch.equal(first, second) and not torch.equal(second, third)


def best_model(folder: Path, stage: int) -> None:
    """load_best_model_at_end brings back the weights of the best checkpoint, and the final model is whole."""
    settings: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # the first, as the loss falls
        "metric_for_best_model": "eval_loss",
    }
    zero = config(stage, zero=exact(stage, stage3_gather_16bit_weights_on_model_save=stage == 3))
    record = Record()
    trainer, steps = run(folder, deepspeed=zero, world=2, max_steps=2, evaluate=True, **settings)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1"), trainer.state.best_model_checkpoint
    record.on_step_end(None, None, None, model=trainer.model)
    if dist.get_rank() == 0:
        assert torch.equal(record.steps[0], steps[0])
    dist.barrier()


def launched(folder: Path) -> list[Tensor]:
    """As `accelerate launch` with a DeepSpeed config sets it up: by the environment alone."""
    variables = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_GRADIENT_CLIPPING": "1000000",  # accelerate drops 0, and DeepSpeed then clips at 1
    }
    return run(folder, world=2, environment=variables, max_grad_norm=1e6)[1]


def own_loop(offloads: bool) -> None:
    """A loop of one's own over accelerate, whose config is asked for in one sentence where FOAM would be replaced."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    zero: dict[str, Any] = {"stage": 2, **(OFFLOAD if offloads else {})}
    plugin = DeepSpeedPlugin(hf_ds_config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero})
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = tiny_llama()
    optimizer = foam_hf.FOAM(foam_hf.foam_param_groups(model), lr=1e-3)
    try:
        engine, wrapped = accelerator.prepare(model, optimizer)
    except ValueError as error:
        assert offloads and '"zero_force_ds_cpu_optimizer": false' in str(error), error
    else:
        assert not offloads
        tokens = torch.arange(24).view(2, 12)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        accelerator.backward(engine(input_ids=tokens, labels=tokens).loss)
        wrapped.step()
        assert not torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert optimizer.flat_parts
    AcceleratorState._reset_state(reset_partial_state=True)


def main(folder: Path, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for offloads in (False, True):
        with _environment({}):  # accelerate's plugin sets variables
            own_loop(offloads)
    for stage in (1, 2, 3):
        zero = config(stage, zero=exact(stage))
        found[f"zero {stage}"] = run(folder, deepspeed=zero, world=world, max_steps=STEPS)[1]
        found[f"bf16 {stage}"] = run(folder, deepspeed=zero, world=world, bf16=True)[1]
    for name, (stages, *_) in FEATURES.items():
        for stage in stages:
            found[f"{name} {stage}"] = feature(folder, name, stage, world=world)
    for stage in (2, 3):
        found[f"resumed {stage}"] = resumed(folder / f"resumed{stage}", stage)
        best_model(folder / f"best{stage}", stage)
        reports_nan(folder, stage, bf16=stage == 2)
        refusals(folder, stage)
    found["zero3_init"] = run(
        folder, deepspeed=config(3, zero=exact(3)), world=world, model=pretrained(folder / "model")
    )[1]
    found["launched"] = launched(folder)
    found["memory"] = memory(folder)
    return found


def memory(folder: Path) -> dict[str, Any]:
    """The callback's numbers, summed over the processes."""
    trainer, _ = run(
        folder, deepspeed=config(2), world=2, callbacks=(foam_hf.OptimizerMemoryCallback(),), logging_steps=1
    )
    (entry,) = [entry for entry in trainer.state.log_history if "optim/state_bytes" in entry]
    parts = trainer.optimizer.optimizer.optimizer.flat_parts
    numbers = torch.tensor([entry["optim/state_bytes"], sum(each.elements for each in parts)])
    dist.all_reduce(numbers)
    return {"state": int(numbers[0]), "elements": int(numbers[1]), "ratio": entry["optim/adamw_ratio"]}


def as_one_rank(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    torch.set_num_threads(1)
    results = main(folder, int(os.environ["WORLD_SIZE"]))
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    tiny_llama().save_pretrained(Path(sys.argv[1]) / "model")
    launch(2, as_one_rank, Path(sys.argv[1]))
