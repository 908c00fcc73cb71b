"""State goes to the weights that it was saved of, wherever both sides have names."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import TrainerCallback

from foam_hf import FOAM
from tests.support.tiny_models import language_data, tiny_llama, tiny_mixtral
from tests.trainer.test_runs import assert_same_bits, make_trainer, weights

SAVING = {"save_strategy": "steps", "save_steps": 2, "optim_args": "level=2", "lr_scheduler_type": "constant"}


def trainer_of(folder: Path, **settings: Any) -> Any:
    model = tiny_llama(num_key_value_heads=4)  # all four projections have one shape
    return make_trainer(folder, model=model, train_dataset=language_data(16), **{**SAVING, **settings})


def test_another_choice_of_folded_weights_is_refused_by_the_first_weight_that_differs(tmp_path: Path) -> None:
    trainer_of(tmp_path, max_steps=2, optim_target_modules=[r".*q_proj"]).train()
    again = trainer_of(tmp_path, max_steps=4, optim_target_modules=[r".*o_proj"])  # of the same shape
    first = r"is that of model.layers.0.self_attn.q_proj.weight, .*layers.0.self_attn.o_proj.weight's"
    with pytest.raises(ValueError, match=first) as refusal:
        again.train(resume_from_checkpoint=True)
    assert "To go on with this checkpoint" not in str(refusal.value)  # no optim_args would
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:  # a checkpoint of an earlier version, and what the refusal tells to do
        del group["param_names"]
    torch.save(saved, tmp_path / "checkpoint-2" / "optimizer.pt")
    (tmp_path / "checkpoint-2" / "foam_checkpoint.json").unlink()
    again.train(resume_from_checkpoint=True)


class Groups(TrainerCallback):
    """Adds a weight of its own to the optimizer after a save, as callbacks that unfreeze layers do."""

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        assert not any("param_names" in group for group in optimizer.param_groups)
        if state.global_step == 4:
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "level": 0})


@pytest.mark.parametrize("options", ["level=2", "level=2,gradient_release=true"])
def test_names_are_in_checkpoints_and_nowhere_else(tmp_path: Path, options: str) -> None:
    settings = {"max_steps": 4, "optim_args": options, "max_grad_norm": 0.0}
    first = trainer_of(tmp_path, callbacks=[Groups()], **settings)
    first.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["param_groups"]
    names = [name for group in saved for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in first.model.named_parameters())
    again = trainer_of(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(weights(again), weights(first))


def pair(names: str = "ab", shape: tuple[int, int] = (4, 8)) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.ones(shape))) for name in names]


def stepped(params: Any) -> FOAM:
    optimizer = FOAM(params, level=1)
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.full_like(p, i + 1.0)
    optimizer.step()
    return optimizer


def test_torchs_own_names_live_through_groups_copies_and_checkpoints() -> None:
    optimizer = FOAM(pair(), level=1)
    optimizer.add_param_group({"params": pair("c")})
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [group["param_names"] for group in again.param_groups] == [["a", "b"], ["c"]]
    saved = stepped(pair()).state_dict()
    assert saved["param_groups"][0]["param_names"] == ["a", "b"]
    FOAM(pair(), level=1).load_state_dict(saved)
    with pytest.raises(ValueError, match="number 0 of its group is that of a, and here that place is b's"):
        FOAM(pair("ba"), level=1).load_state_dict(saved)
    FOAM([p for _, p in pair("ba")], level=1).load_state_dict(saved)  # without names on one side, by position
    FOAM(pair(), level=1).load_state_dict(stepped([p for _, p in pair()]).state_dict())
    compiled = [(f"_orig_mod.{name}", p) for name, p in pair()]
    FOAM(compiled, level=1).load_state_dict(saved)


def test_distributed_checkpoints_keep_names() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    optimizer = stepped(model.named_parameters())
    saved = get_optimizer_state_dict(model, optimizer)
    other = copy.deepcopy(model)
    again = FOAM(other.named_parameters(), level=1)
    set_optimizer_state_dict(other, again, saved)
    assert again.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[q][name]))


def test_a_distributed_checkpoint_whose_group_is_two_here_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    saved = get_optimizer_state_dict(model, stepped(model.named_parameters()))
    again = FOAM([{"params": layer.parameters()} for layer in model], level=1)
    with pytest.raises(ValueError, match="left for param group 0, of 2 parameters: .* one group .*embedding_scale"):
        set_optimizer_state_dict(model, again, saved)


def test_an_optimizer_without_names_stays_without_them(tmp_path: Path) -> None:
    """In a training loop of one's own, a checkpoint of the Trainer; then a layer is unfrozen."""
    trained = trainer_of(tmp_path, max_steps=2)
    trained.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    optimizer = FOAM(copy.deepcopy(trained.optimizer.optimizer.param_groups))
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "level": 0})
    assert not any(
        "param_names" in group for group in [*optimizer.param_groups, *optimizer.state_dict()["param_groups"]]
    )


@pytest.mark.parametrize("options", ["level=2", "fold_embeddings=false,fold_head=false"])
def test_a_resized_embedding_is_refused_by_its_name_and_both_shapes(tmp_path: Path, options: str) -> None:
    """The weights of the checkpoint were resized, as for new tokens, and its moments are of the old vocabulary."""
    trainer_of(tmp_path, max_steps=2, optim_args=options).train()
    again = trainer_of(tmp_path, max_steps=4, optim_args=options)
    again.model.resize_token_embeddings(70, mean_resizing=False)
    again.model.save_pretrained(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "foam_checkpoint.json").unlink()
    said = r"\(model.embed_tokens.weight\) .* weight of shape \(64, 32\), and here the weight has shape \(70, 32\); .*"
    with pytest.raises(ValueError, match=f"{said}resize it back"):
        again.train(resume_from_checkpoint=True)
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / "checkpoint-2" / name).unlink()
    again.train(resume_from_checkpoint=True)


def test_a_resized_model_that_is_saved_under_other_names_is_refused_by_both_shapes(tmp_path: Path) -> None:
    settings = {**SAVING, "train_dataset": language_data(16)}
    make_trainer(tmp_path, model=tiny_mixtral(), max_steps=2, **settings).train()
    again = make_trainer(tmp_path, model=tiny_mixtral(vocab_size=70), max_steps=4, **settings)
    with pytest.raises((ValueError, RuntimeError), match=r"lm_head.weight.*64, 32.*70, 32"):
        again.train(resume_from_checkpoint=True)
