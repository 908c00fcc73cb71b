"""Whole runs of the real Trainer on INT8 weights: learning, resuming, adapters, two processes, every refusal."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from foam_hf import FOAM, Int8Config, foam_param_groups
from foam_hf.folders import MANIFEST
from foam_hf.int8.weight import Int8Weight
from tests.int8.test_quantizer import (
    assert_same_bits,
    bits,
    drop_codes,
    drop_scales,
    fewer_rows,
    half_blocks,
    rewrite,
    split_codes_from_scales,
)
from tests.support.tiny_models import SHORT_RUN, language_data, tiny_llama
from tests.support.tolerances import assert_within
from tests.support.torchrun import launch

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("forget_mixed_precision")]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_llama().save_pretrained(folder)
    return folder


def int8_model(plain: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(plain, quantization_config=Int8Config(**config), dtype=dtype)


def make_trainer(folder: Path, model: Any, optimizers: Any = (None, None), **settings: Any) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(**{"output_dir": str(folder), **SHORT_RUN, **settings}),
        train_dataset=language_data(32),
        eval_dataset=language_data(16, seed=1),
        optimizers=optimizers,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_follows_the_float32_model(dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "optim_args": "level=3,embedding_rule=block",  # an INT8 head has it
        "max_steps": 40,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "eval_strategy": "steps",
        "eval_steps": 20,
    }
    trainer = make_trainer(tmp_path / "int8", int8_model(plain, dtype, head=True), **settings)
    trainer.train()
    reference = make_trainer(tmp_path / "fp32", tiny_llama(), **settings)
    reference.train()
    assert sum(isinstance(p, Int8Weight) for p in trainer.model.parameters()) == 15
    assert losses(reference)[-1] < losses(reference)[0] - 0.3
    assert abs(losses(trainer)[-1] - losses(reference)[-1]) < 0.05
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 40 and all(norm > 0 for norm in norms)
    assert all(math.isfinite(entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry)


@pytest.mark.parametrize("files", ["one", "codes apart from scales", "many", "one, gradients released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_identical(files: str, dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    optim_args = f"level=3,gradient_release={files == 'one, gradients released'}"
    settings = {"optim_args": optim_args, "save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(tmp_path / "whole", int8_model(plain, dtype), **settings)
    whole.train()
    checkpoint = tmp_path / "whole/checkpoint-5"
    if files == "codes apart from scales":
        split_codes_from_scales(checkpoint)
    elif files == "many":
        AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size="8KB")
        (checkpoint / "model.safetensors").unlink()
    (checkpoint / MANIFEST).unlink()  # of the files as they were
    resumed = make_trainer(tmp_path / "resumed", int8_model(plain, dtype), optim_args=optim_args)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    assert_same_bits(bits(resumed.model), bits(whole.model))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-10")
    assert_same_bits(bits(again), bits(whole.model))


def test_files_of_a_sharded_checkpoint_hold_what_the_model_expects(plain: Path, tmp_path: Path) -> None:
    from transformers.trainer_utils import load_sharded_checkpoint

    model = int8_model(plain)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    other = int8_model(plain)
    for p in other.parameters():
        p.data.zero_()
    found = load_sharded_checkpoint(other, tmp_path, strict=True)
    assert found.missing_keys == found.unexpected_keys == []
    assert_same_bits(bits(other), bits(model))


def test_mixed_precision_and_the_best_model(plain: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        int8_model(plain),
        bf16=True,
        learning_rate=0.05,
        max_steps=9,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    best = Path(trainer.state.best_model_checkpoint)
    assert_same_bits(bits(trainer.model), load_file(best / "model.safetensors"))


@pytest.mark.parametrize("resuming", [drop_scales, drop_codes, half_blocks, fewer_rows])
def test_a_damaged_checkpoint_is_not_resumed(resuming: Any, plain: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, int8_model(plain), save_strategy="steps", max_steps=2, save_steps=2).train()
    rewrite(tmp_path / "checkpoint-2", resuming)
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    words = {
        drop_scales: "has its weight_codes without its weight_scales",
        drop_codes: "has its weight_scales without its weight_codes",
        half_blocks: r"model.layers.0.mlp.up_proj.weight: scales are float32 \[48, 2\]",
        fewer_rows: r"scales are float32 \[48, 1\] for codes of int8 \[47, 32\]",
    }[resuming]
    with pytest.raises(RuntimeError, match=words):
        make_trainer(tmp_path, int8_model(plain)).train(resume_from_checkpoint=True)


def test_gradients_released_change_no_bit(plain: Path, tmp_path: Path) -> None:
    everything = "level=3,fold_embeddings=true,fold_head=true"
    ordinary = make_trainer(tmp_path, int8_model(plain, head=True), optim_args=everything, max_grad_norm=0.0)
    ordinary.train()
    released = make_trainer(
        tmp_path, int8_model(plain, head=True), optim_args=f"{everything},gradient_release=true", max_grad_norm=0.0
    )
    released.train()
    assert all(p.grad is None for p in released.model.parameters())
    assert losses(released) == losses(ordinary)
    assert_same_bits(bits(released.model), bits(ordinary.model))


def test_a_checkpoint_goes_on_only_with_weights_of_its_kind(plain: Path, tmp_path: Path) -> None:
    for name, model in (("int8", int8_model(plain)), ("plain", tiny_llama())):
        make_trainer(tmp_path / name, model, save_strategy="steps", max_steps=2, save_steps=2).train()
    checkpoint = str(tmp_path / "int8/checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 holds INT8 weights, and the LlamaForCausalLM .* has none"):
        make_trainer(tmp_path, tiny_llama()).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="Int8Config with head=False, not True as in this run; expected the same"):
        make_trainer(tmp_path, int8_model(plain, head=True)).train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(tmp_path, int8_model(plain))  # a run in floating point goes on in INT8
    trainer.train(resume_from_checkpoint=str(tmp_path / "plain/checkpoint-2"))
    assert trainer.state.global_step == 10 and isinstance(trainer.model.model.layers[0].mlp.up_proj.weight, Int8Weight)


def test_a_compiled_model_trains_to_the_same_losses(plain: Path, tmp_path: Path) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    runs = [make_trainer(tmp_path, int8_model(plain), max_steps=3, **settings) for settings in (compiled, {})]
    for trainer in runs:
        trainer.train()
    assert_within(torch.tensor(losses(runs[0])), torch.tensor(losses(runs[1])), "compiled losses against eager ones")


# ---- adapters ----


def lora(model: Any, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "foam"])
def test_lora_trains_on_frozen_int8_weights(optim: str, plain: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora(int8_model(plain))
    frozen = {name: p.codes.clone() for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    settings = {"optim": optim, "optim_args": None, "learning_rate": 0.05, "weight_decay": 0.0}
    trainer = make_trainer(tmp_path / "a", model, **settings, save_strategy="steps", save_steps=5)
    trainer.train()
    assert len(frozen) == 14 and losses(trainer)[-1] < losses(trainer)[0] - 0.02
    assert all(p.codes.equal(frozen[name]) for name, p in model.named_parameters() if name in frozen)
    held = load_file(tmp_path / "a/checkpoint-5/adapter_model.safetensors")
    assert held and all("lora_" in name for name in held)
    torch.manual_seed(0)
    resumed = make_trainer(tmp_path / "b", lora(int8_model(plain)), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-5"))
    assert losses(resumed)[-5:] == losses(trainer)[-5:]


def test_adapters_merge_into_dequantized_weights(plain: Path, tmp_path: Path) -> None:
    tokens = torch.arange(12).view(1, -1)
    model = lora(int8_model(plain), init_lora_weights=False).eval()
    expected = model(input_ids=tokens).logits
    with pytest.raises(NotImplementedError, match="in place on INT8 weights"):
        model.merge_adapter()
    model.get_base_model().dequantize()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_within(again(input_ids=tokens).logits, expected, "adapters merged into dequantized weights")


# ---- several processes ----


def _train_as_one_rank(folder: Path) -> None:
    rank = os.environ["RANK"]
    model = int8_model(folder / "plain")
    if rank == "1":
        for p in model.parameters():
            p.data.zero_()  # the first process hands out its weights
    trainer = make_trainer(folder / "out", model, per_device_train_batch_size=2, max_steps=5, max_grad_norm=0.5)
    trainer.train()
    torch.save(bits(trainer.accelerator.unwrap_model(trainer.model)), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(plain: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "plain")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same_bits(first, second)
    alone = make_trainer(tmp_path, int8_model(plain), max_steps=5, max_grad_norm=0.5)
    alone.train()
    # The order of a sum differs, and with it, rarely, on which side of a code a value is rounded.
    codes = {name: value for name, value in bits(alone.model).items() if name.endswith("_codes")}
    assert len(codes) == 14
    assert all((first[name].int() - value.int()).abs().max() <= 1 for name, value in codes.items())
    changed = sum((first[name] != value).sum().item() for name, value in codes.items())
    assert changed <= 0.01 * sum(value.numel() for value in codes.values())


# ---- what is refused ----


def test_other_optimizers_are_refused_before_the_first_step(plain: Path, tmp_path: Path) -> None:
    words = "cannot train INT8 weights, and 14 of LlamaForCausalLM are to be trained, model.layers.0.self_attn.q_proj"
    for optim in ("adamw_torch", "sgd", "adafactor"):
        trainer = make_trainer(tmp_path, int8_model(plain), optim=optim, optim_args=None)
        with pytest.raises(ValueError, match=f"optim='{optim}' {words}"):
            trainer.train()
    model = int8_model(plain)
    trainer = make_trainer(tmp_path, model, (torch.optim.AdamW(model.parameters()), None))
    with pytest.raises(ValueError, match=f"the optimizer AdamW {words}"):
        trainer.train()
    trainer = Trainer(model=model, args=trainer.args, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    with pytest.raises(ValueError, match=f"the optimizer SGD {words}"):
        trainer.train()


def test_a_foam_of_ones_own_trains(plain: Path, tmp_path: Path) -> None:
    model = int8_model(plain)
    optimizer = FOAM(foam_param_groups(model, level=3), lr=5e-3)
    trainer = make_trainer(tmp_path, model, (optimizer, None), optim="adamw_torch", optim_args=None, max_steps=2)
    before = bits(model)
    trainer.train()
    trainer.train()  # accelerate has wrapped the optimizer by now
    assert any(not before[name].equal(after) for name, after in bits(model).items() if name.endswith("_codes"))


if __name__ == "__main__":
    launch(2, _train_as_one_rank, Path(sys.argv[1]))
