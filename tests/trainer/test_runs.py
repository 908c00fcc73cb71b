"""Whole runs of the real Trainer with `optim="foam"`, on tiny models: learning, resuming, schedules, two processes."""

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
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import foam_hf
from tests.support.tiny_models import SHORT_RUN, classification_data, language_data, tiny_llama, tiny_roberta
from tests.support.tolerances import assert_within
from tests.support.torchrun import launch

pytestmark = [pytest.mark.long, pytest.mark.compat, pytest.mark.usefixtures("forget_mixed_precision")]

ROOT = Path(__file__).resolve().parents[2]


def make_trainer(
    folder: Path, dtype: torch.dtype = torch.float32, trainer_class: type[Trainer] = Trainer, **settings: Any
) -> Trainer:
    given = {
        name: settings.pop(name)
        for name in ("model", "train_dataset", "compute_metrics", "callbacks")
        if name in settings
    }
    return trainer_class(
        args=TrainingArguments(**{"output_dir": str(folder), **SHORT_RUN, **settings}),
        **{
            "model": tiny_roberta().to(dtype),
            "train_dataset": classification_data(32),
            "eval_dataset": classification_data(16, seed=1),
            **given,
        },
    )


def language_trainer(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Trainer:
    """For comparing trajectories: no dropout, and no gradient that is rounding noise alone, as a key bias has."""
    return make_trainer(folder, model=tiny_llama().to(dtype), train_dataset=language_data(32), **settings)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert different == []


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], case: str) -> None:
    """All weights as one vector, as single biases may be all but zero."""
    assert actual.keys() == expected.keys()
    assert_within(*(torch.cat([t.double().flatten() for t in side.values()]) for side in (actual, expected)), case)


def optimizer_of(trainer: Trainer) -> foam_hf.FOAM:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, foam_hf.FOAM)
    return optimizer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": True},
        {"dtype": torch.bfloat16},
        {"optim": "foam_mini", "optim_args": None},
        {"optim_args": "level=3,second_moment=factored"},
        {"optim_args": "level=3,embedding_rule=factored", "learning_rate": 6e-3},
        {"optim": "foam_muon"},
        {"optim": "foam_adam_mini"},
    ],
    ids=[
        *("float32", "autocast", "bfloat16 weights", "foam_mini", "factored", "factored embeddings", "foam_muon"),
        "foam_adam_mini",
    ],
)
def test_run_learns(tmp_path: Path, settings: dict[str, Any]) -> None:
    rate = {"foam_muon": 1e-2, "foam_mini": 6e-3}.get(
        settings.get("optim", ""), 2e-3
    )  # Adam's rules have a scale of 6
    trainer = make_trainer(tmp_path, **{"max_steps": 60, "learning_rate": rate, **settings})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 60 and sum(losses[-8:]) < 0.7 * sum(losses[:8])
    assert {group["level"] for group in optimizer_of(trainer).param_groups} > {0}


# checkpoints


@pytest.mark.parametrize(
    ("dtype", "optim_args"),
    [
        (torch.float32, "level=3"),
        (torch.float32, "level=row,second_moment=factored"),
        (torch.bfloat16, "level=3,stochastic_rounding=false"),
        (torch.bfloat16, "level=3"),
        (torch.bfloat16, "level=3,state_dtype=bf16"),
        (torch.bfloat16, "level=3,second_moment=muon"),
        (torch.bfloat16, "level=3,second_moment=adam_mini"),
    ],
)
def test_resumed_run_has_the_bits_of_the_uninterrupted_one(
    tmp_path: Path, dtype: torch.dtype, optim_args: str
) -> None:
    settings = {"optim_args": optim_args, "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(tmp_path / "whole", dtype, **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", dtype, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.state.global_step == 10 and resumed.state.log_history[-2]["step"] == 10
    assert_same_bits(weights(resumed), weights(whole))
    pairs = zip(optimizer_of(resumed).state.values(), optimizer_of(whole).state.values(), strict=True)
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(theirs[name])), name


def test_stochastic_rounding_is_on_for_bfloat16_weights(tmp_path: Path) -> None:
    """At this learning rate, rounding to nearest loses most updates."""
    moved = {}
    for choice in ("auto", "false"):
        settings = {"optim_args": f"level=3,stochastic_rounding={choice}", "learning_rate": 1e-5, "max_steps": 4}
        trainer = make_trainer(tmp_path, torch.bfloat16, **settings)
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        moved[choice] = sum(int((after[name] != before[name]).sum()) for name in before)
    assert moved["auto"] > 1.5 * moved["false"]


class CountSteps(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    ("saved_with", "message"),
    [
        ({"optim": "adamw_torch", "optim_args": None}, "another optimizer.*train without resume_from_checkpoint"),
        ({"optim_args": "level=2"}, "level=2"),
        ({"optim_args": "level=3,second_moment=factored"}, "second_moment='factored'"),
        ({"optim": "foam_muon"}, "second_moment='muon'"),
        ({"optim_args": "level=3,fold_embeddings=false"}, "optim_args='level=3,fold_embeddings=false'"),
    ],
    ids=["adamw", "level", "rule", "muon", "embeddings"],
)
def test_checkpoint_of_another_optimizer_is_refused_before_the_first_step(
    tmp_path: Path, saved_with: dict[str, Any], message: str
) -> None:
    make_trainer(tmp_path / "saved", **saved_with, max_steps=2, save_strategy="steps", save_steps=2).train()
    count = CountSteps()
    trainer = make_trainer(tmp_path / "resumed", callbacks=[count])
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-2"))
    assert count.steps == 0


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.1])
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    loaded = weights(trainer)
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (4, 10))
    assert_same_bits({name: loaded[name] for name in best}, best)
    assert any(not torch.equal(best[name], last[name]) for name in best)


# the training loop's other features


def test_level_zero_and_scale_one_follow_trainers_adamw(tmp_path: Path) -> None:
    foam = language_trainer(tmp_path / "foam", optim_args="level=0,scale=1", max_steps=20)
    adamw = language_trainer(tmp_path / "adamw", optim="adamw_torch", optim_args=None, max_steps=20)
    before = weights(foam)
    foam.train()
    adamw.train()
    assert_close(weights(foam), weights(adamw), "level 0 in Trainer against adamw_torch, 20 steps")
    assert any(not torch.equal(weights(foam)[name], before[name]) for name in before)


def test_gradient_accumulation_equals_the_bigger_batch(tmp_path: Path) -> None:
    whole = language_trainer(tmp_path / "whole", per_device_train_batch_size=8)
    pieces = language_trainer(tmp_path / "pieces", gradient_accumulation_steps=2)
    whole.train()
    pieces.train()
    assert pieces.state.global_step == whole.state.global_step == 10
    assert_close(weights(pieces), weights(whole), "gradient accumulation against one batch, 10 steps")


def test_clipping_reaches_the_update(tmp_path: Path) -> None:
    """With eps far above the clipped gradient, the step shrinks with it."""
    moved = {}
    for norm in (1.0, 1e-6):
        trainer = make_trainer(tmp_path, max_grad_norm=norm, adam_epsilon=1e-3, weight_decay=0.0, max_steps=3)
        before = weights(trainer)
        trainer.train()
        moved[norm] = sum(float((weights(trainer)[name] - before[name]).abs().sum()) for name in before)
        assert all("grad_norm" in entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < moved[1e-6] < 0.05 * moved[1.0]


def test_cosine_schedule_drives_every_group(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lr_scheduler_type="cosine")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([5e-3 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    groups = optimizer_of(trainer).param_groups
    assert len(groups) >= 3 and all(float(group["lr"]) == pytest.approx(0, abs=1e-12) for group in groups)


def test_reduce_on_plateau_lowers_every_group(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "threshold": 100.0, "threshold_mode": "abs"},
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    assert {group["lr"] for group in optimizer_of(trainer).param_groups} == {5e-3 * 0.5**4}


def test_smaller_batch_is_found_after_running_out_of_memory(tmp_path: Path) -> None:
    class Tight(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            if inputs["input_ids"].shape[0] == 8:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = make_trainer(
        tmp_path, trainer_class=Tight, auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=6
    )
    trainer.train()
    assert trainer.state.global_step == 6 and trainer._train_batch_size < 8
    parameters = {id(p) for p in trainer.model.parameters()}
    assert {id(p) for group in optimizer_of(trainer).param_groups for p in group["params"]} == parameters


def test_second_train_goes_on_from_the_first(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lr_scheduler_type="constant", max_steps=15)
    first = trainer.train().training_loss
    second = trainer.train().training_loss
    assert second < first
    assert optimizer_of(trainer).state[next(trainer.model.classifier.parameters())]["step"] == 30


def test_two_processes_follow_one(tmp_path: Path) -> None:
    """DDP over gloo, as torchrun sets it up: float32 like one process, bfloat16 with the same bits on both ranks."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "USE_TF": "0"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for dtype in ("float32", "bfloat16", "bfloat16, muon"):
        assert_same_bits(ranks[0][dtype], ranks[1][dtype])

    single = language_trainer(tmp_path / "single", per_device_train_batch_size=8)
    single.train()
    assert_close(ranks[0]["float32"], weights(single), "two processes against one, 10 steps")


def test_adapters_in_bfloat16_resume_as_they_were(tmp_path: Path) -> None:
    """PEFT makes float32 ones of them as it loads: without stochastic rounding the run would be another."""
    from peft import LoraConfig, get_peft_model

    def trainer() -> Trainer:
        torch.manual_seed(0)
        config = LoraConfig(r=4, task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
        settings = {"model": model, "train_dataset": language_data(), "save_strategy": "steps", "save_steps": 4}
        return make_trainer(tmp_path, max_steps=8, **settings)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert p.dtype == q.dtype == torch.bfloat16 and torch.equal(p, q), name
    assert any(p.requires_grad for p in resumed.model.parameters())


def _train_as_one_rank(folder: Path) -> None:
    found = {}
    runs: dict[str, dict[str, Any]] = {
        "float32": {"dtype": torch.float32},
        "bfloat16": {"dtype": torch.bfloat16},
        "bfloat16, muon": {"dtype": torch.bfloat16, "optim": "foam_muon"},
    }
    for name, settings in runs.items():
        trainer = language_trainer(folder / name, ddp_backend="gloo", **settings)
        assert trainer.args.world_size == 2
        trainer.train()
        found[name] = weights(trainer)
    torch.save(found, folder / f"rank{trainer.args.process_index}.pt")


if __name__ == "__main__":
    launch(2, _train_as_one_rank, Path(sys.argv[1]))
