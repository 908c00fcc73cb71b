"""Checkpoints that earlier versions wrote under their defaults: refused with what continues them, and then continued.

`data/checkpoint-VERSION.tar.gz` has checkpoints 2 and 4 of `trainer(...).train()` under that version. By default 0.1.0
had scale 0.25 and plain embeddings and heads, and 0.3.0 embeddings and heads in the groups of other matrices.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import foam_hf
from tests.support.tiny_models import tiny_llama

DATA = Path(__file__).resolve().parents[1] / "data"
PAPER = "scale=0.25,fold_embeddings=false,fold_head=false"


class Counting(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i}


def trainer(folder: Path, around: Any = None, **settings: Any) -> Trainer:
    settings = {"optim": "foam", "learning_rate": 1e-3, "save_steps": 2, "max_steps": 4, **settings}
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, **{"per_device_train_batch_size": 4, **settings}
    )
    model = tiny_llama(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    return Trainer(model=around(model) if around else model, args=args, train_dataset=Counting())


def checkpoint_of(version: str, folder: Path) -> Path:
    with tarfile.open(DATA / f"checkpoint-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "checkpoint-2"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return checkpoint_of("0.1.0", tmp_path)


def test_under_the_new_defaults_it_is_refused_with_the_arguments_that_continue_it(old: Path) -> None:
    run = trainer(old.parent, optim_args="gradient_release=true")
    words = f"To go on with this checkpoint: optim='foam', optim_args='{PAPER},gradient_release=true'"
    with pytest.raises(ValueError, match=re.escape(words)):
        run.train(resume_from_checkpoint=str(old))
    assert run.state.global_step == 2, "no step was made"


@pytest.mark.parametrize("optim_args", [PAPER, "fold_embeddings=false,fold_head=false"])
def test_with_these_it_goes_on_as_it_did(old: Path, optim_args: str) -> None:
    expected = load_file(old.parent / "checkpoint-4" / "model.safetensors")
    run = trainer(old.parent, optim_args=optim_args)
    if optim_args == PAPER:
        run.train(resume_from_checkpoint=str(old))
    else:  # everything but the scale fits: the checkpoint's counts, and that is said
        with pytest.warns(
            UserWarning, match=r"goes on with the hyperparameters of its checkpoint: scale=0\.25, not 6"
        ):
            run.train(resume_from_checkpoint=str(old))
    assert run.state.global_step == 4
    for name, weight in run.model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optim_args", ["", "gradient_release=true"])
def test_one_of_version_0_3_0_goes_on_with_the_block_rule_of_embeddings(tmp_path: Path, optim_args: str) -> None:
    old = checkpoint_of("0.3.0", tmp_path)
    run = trainer(tmp_path, optim_args=optim_args)
    words = ",".join(filter(None, ["embedding_rule=block", optim_args]))
    with pytest.raises(ValueError, match=re.escape(f"optim='foam', optim_args='{words}'.")):
        run.train(resume_from_checkpoint=str(old))
    assert run.state.global_step == 2, "no step was made"
    expected = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    run = trainer(tmp_path, optim_args=words)
    run.train(resume_from_checkpoint=str(old))
    assert run.state.global_step == 4
    if optim_args:  # release clips by what the norm is expected to be
        return
    for name, weight in run.model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-5, atol=1e-6)


def test_one_of_version_0_3_0_with_release_and_accumulation_goes_on_as_it_is(tmp_path: Path) -> None:
    old = checkpoint_of("0.3.0", tmp_path)
    accumulating = {"optim_args": "gradient_release=true", "gradient_accumulation_steps": 2}
    run = trainer(tmp_path, per_device_train_batch_size=2, **accumulating)
    run.train(resume_from_checkpoint=str(old))
    assert run.state.global_step == 4


def test_release_with_accumulation_cannot_go_on_from_factored_embeddings_and_says_with_what_it_can(
    tmp_path: Path,
) -> None:
    trainer(tmp_path, optim_args="gradient_release=true", max_steps=2).train()
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = trainer(tmp_path, optim_args="gradient_release=true", **batches)
    words = "optim_args='gradient_release=true', gradient_accumulation_steps=1."
    with pytest.raises(ValueError, match=re.escape(words)):
        run.train(resume_from_checkpoint=True)
    trainer(tmp_path, optim_args="gradient_release=true").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("level=row", "level=row"),
        ("second_moment=factored,fold_head=false", "second_moment=factored,fold_head=false"),
        (f"second_moment=muon,{PAPER}", f"second_moment=muon,{PAPER}"),
        ("second_moment=muon", "second_moment=muon"),
        ("embedding_rule=block", "embedding_rule=block"),
        ("embedding_rule=block,embedding_scale=6", "embedding_rule=block"),  # the scale of all matrices
        ("embedding_rule=block,scale=8,embedding_scale=1", "embedding_rule=block,scale=8.0,embedding_scale=1.0"),
        ("embedding_rule=block,fold_embeddings=false", "embedding_rule=block,fold_embeddings=false"),
        ("embedding_rule=block,fold_embeddings=false,fold_head=false", "fold_embeddings=false,fold_head=false"),
        ("embedding_scale=0.5,fold_head=false", "embedding_scale=0.5,fold_head=false"),
        ("embedding_scale=1,scale=2", "scale=2.0"),
        ("embedding_rule=factored,embedding_scale=6", "embedding_scale=6.0"),
        ("level=row,embedding_rule=factored,embedding_scale=4", "level=row,embedding_scale=4.0"),
        ("", ""),
    ],
)
def test_any_other_choice_is_named_too(tmp_path: Path, before: str, after: str) -> None:
    trainer(tmp_path, optim_args=before, max_steps=2).train()
    run = trainer(tmp_path, optim_args="level=3,fold_embeddings=true")
    with pytest.raises(ValueError, match="To go on with this checkpoint: optim='foam', optim_args='(.*)'") as error:
        run.train(resume_from_checkpoint=True)
    (words,) = re.findall("optim_args='(.*)'", str(error.value))
    assert set(words.split(",")) == set(after.split(","))
    trainer(tmp_path, optim_args=words).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("optim_args", ["level=3", "level=3,residual_scale=1"])
def test_options_that_are_in_use_are_no_advice(tmp_path: Path, optim_args: str) -> None:
    """Something else made other groups than these options make."""
    trainer(tmp_path, optim_args="level=3", max_steps=2).train()
    run = trainer(tmp_path, optim_args=optim_args)
    run.optimizer = foam_hf.FOAM(foam_hf.foam_param_groups(run.model), lr=1e-3, level=4)
    with pytest.raises(ValueError, match=r"with level=3 in param group 0.*; expected the same") as error:
        run.train(resume_from_checkpoint=True)
    assert "To go on with this checkpoint" not in str(error.value)


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("embedding_rule=block", "level=8"),
        ("", "embedding_rule=block"),
        ("embedding_scale=1.0,embedding_rule=block", "embedding_rule=block"),
    ],
)
def test_groups_that_fsdp2_would_mix_up_are_refused_and_named(
    tmp_path: Path, kind: str, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's files of FSDP2 name weights: torch gives merged groups one scale, and a split one no fields."""
    first = trainer(tmp_path, optim_args=before, max_steps=2)
    first.train()
    folder = tmp_path / "checkpoint-2"
    saved = get_optimizer_state_dict(first.model, first.optimizer.optimizer)
    if kind == "full":
        torch.save(saved, folder / "optimizer.bin")
    else:
        dcp.save({"optimizer": saved}, checkpoint_id=folder / "optimizer_0", no_dist=True)
    (folder / "foam_checkpoint.json").unlink()
    state = (folder / "optimizer.pt").rename(tmp_path / "optimizer.pt")
    monkeypatch.setattr("foam_hf.trainer.checkpoints.is_fsdp_enabled", lambda trainer: True)
    run = trainer(tmp_path, optim_args=after)
    words = re.escape(f"To go on with this checkpoint: optim='foam', optim_args='{before}'")
    with pytest.raises(ValueError, match=words):
        run.train(resume_from_checkpoint=str(folder))
    assert run.state.global_step == 2, "no step was made"
    state.rename(folder / "optimizer.pt")  # in one process Trainer goes on with this
    trainer(tmp_path, optim_args=before).train(resume_from_checkpoint=str(folder))


class WithValues(nn.Module):
    """A value head around a model, as TRL has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.v_head = model, nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        out = self.model(input_ids=input_ids, labels=labels, output_hidden_states=True)
        return {"loss": out.loss + self.v_head(out.hidden_states[-1]).square().mean()}


@pytest.mark.parametrize("optim_args", [None, PAPER])
def test_heads_around_a_model_folded_once_and_that_is_said(tmp_path: Path, optim_args: str | None) -> None:
    """Version 0.1.0 took the whole of such a module for a base model: all matrices but embeddings folded."""
    first = trainer(tmp_path, WithValues, max_steps=2)
    embedding = first.model.model.model.embed_tokens.weight
    parameters = list(first.model.parameters())
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.dim() > 1 and p is not embedding]}]
    plain = {"level": 0, "scale": 1.0, "second_moment": "block"}
    groups += [{"params": [p], **plain} for p in parameters if p.dim() < 2 or p is embedding]
    first.optimizer = foam_hf.FOAM(groups, lr=1e-3, scale=0.25)
    first.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        del group["param_names"]  # which came later
    torch.save(saved, tmp_path / "checkpoint-2" / "optimizer.pt")
    (tmp_path / "checkpoint-2" / "foam_checkpoint.json").unlink()
    run = trainer(tmp_path, WithValues, optim_args=optim_args)
    with pytest.raises(ValueError, match=r"heads around a model too, as those of this WithValues, .* weights alone"):
        run.train(resume_from_checkpoint=True)
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / "checkpoint-2" / name).unlink()
    run.train(resume_from_checkpoint=True)


def test_one_of_another_model_is_refused_as_such(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    run = trainer(tmp_path)
    run.model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="param groups of") as error:
        run.train(resume_from_checkpoint=True)
    assert "To go on" not in str(error.value)


def test_an_optimizer_made_by_hand_is_told_what_differs_and_no_arguments(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    run = trainer(tmp_path, optim="adafactor", optim_args="any=thing")
    run.optimizer = foam_hf.FOAM(run.model.parameters(), lr=1e-3, level=2)
    with pytest.raises(ValueError, match="level=8 in param group 0") as error:
        run.train(resume_from_checkpoint=True)
    assert "To go on" not in str(error.value)
