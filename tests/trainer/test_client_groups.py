"""Clients of the Trainer that make param groups of their own: each weight keeps what was decided for it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from foam_hf import FOAM
from foam_hf.optimizer.decided import Decided
from foam_hf.optimizer.groups import foam_param_groups
from tests.support.tiny_models import classification_data, language_data, tiny_lora_llama, tiny_roberta
from tests.trainer.test_trainer import make_args, make_trainer

pytestmark = pytest.mark.compat


def decided(optimizer: Any) -> dict[int, tuple[Any, ...]]:
    """By parameter: the fields that decide its rule."""
    fields = ("level", "scale", "second_moment", "mini_rows")
    return {id(p): tuple(group[name] for name in fields) for group in optimizer.param_groups for p in group["params"]}


def expected(trainer: Trainer) -> dict[int, tuple[Any, ...]]:
    """The same as the Trainer decides alone, for the trainer's model."""
    kwargs = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)[1]
    groups = kwargs.pop("decided").groups
    return decided(FOAM(groups, **kwargs))


def split(trainer: Any, rate: float) -> list[dict[str, Any]]:
    """Groups as swift and LLaMA-Factory make them: by weight decay and by learning rate."""
    decay = Trainer.get_decay_parameter_names(None, trainer.model)  # type: ignore[arg-type]
    named = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    special = {id(p) for name, p in named if "embed" in name or "lora_B" in name}
    return [
        {
            "params": [p for name, p in named if (name in decay) is decays and (id(p) in special) is fast],
            "weight_decay": trainer.args.weight_decay if decays else 0.0,
            "lr": rate if fast else trainer.args.learning_rate,
        }
        for decays in (True, False)
        for fast in (True, False)
    ]


class Swift(Trainer):
    """ms-swift's `--vit_lr` and `lorap`: the static method with or without a model, kwargs passed on whole."""

    names_the_model = True

    def create_optimizer(self, model: Any = None) -> Any:
        given = (self.args, self.model) if self.names_the_model else (self.args,)
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(*given)
        self.optimizer = cls(split(self, 1e-4), **kwargs)
        return self.optimizer


class LlamaFactory(Swift):
    """LLaMA-Factory's `loraplus_lr_ratio`, and unsloth's embedding rate: no model is named."""

    names_the_model = False


class Axolotl(Trainer):
    """axolotl's `embedding_lr` and `lr_groups`: its own groups, unless the kwargs bring others."""

    def create_optimizer(self, model: Any = None) -> Any:
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model if model is None else model)
        groups = split(self, 1e-4)
        for name in ("params", "model", "optimizer_dict"):
            groups = kwargs.pop(name, groups)
        self.optimizer = cls(groups, **kwargs)
        return self.optimizer


class SentenceTransformers(Trainer):
    """sentence-transformers' `learning_rate_mapping`: groups taken apart, matching weights in new ones."""

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, self.model)
        if not {"params", "model", "optimizer_dict"} & set(kwargs):
            kwargs["optimizer_dict"] = [{"params": list(self.model.parameters()), "weight_decay": 0.0}]
        (key,) = {"params", "model", "optimizer_dict"} & set(kwargs)
        matching = [
            p for name, p in self.model.named_parameters() if "word_embeddings" in name or "classifier" in name
        ]
        for group in kwargs[key]:
            group["params"] = [p for p in group["params"] if all(p is not other for other in matching)]
        kwargs[key].append({"params": matching, "lr": 1e-4, "weight_decay": 0.0})
        return cls, kwargs


@pytest.mark.parametrize("client", [Swift, LlamaFactory, Axolotl, SentenceTransformers])
@pytest.mark.parametrize("optim", ["foam", "foam_muon", "foam_adam_mini"])
def test_weights_keep_their_rule_in_groups_of_a_client(tmp_path: Path, client: type[Trainer], optim: str) -> None:
    trainer = make_trainer(tmp_path, client, optim=optim, weight_decay=0.1, learning_rate=1e-3, max_steps=2)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert decided(optimizer) == expected(trainer)
    rates = {group["initial_lr"] for group in optimizer.param_groups}
    assert rates == {1e-3, 1e-4}  # the client's own


def test_loraplus_gives_adapters_its_rates_and_they_fold(tmp_path: Path) -> None:
    args = make_args(tmp_path, weight_decay=0.1, learning_rate=1e-3, max_steps=1, disable_tqdm=True)
    trainer = LlamaFactory(model=tiny_lora_llama(), args=args, train_dataset=language_data(8))
    trainer.train()
    assert decided(trainer.optimizer.optimizer) == expected(trainer)
    by_rate = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["level"] == 8}
    assert by_rate == {1e-3, 1e-4}


def test_an_optimizer_made_before_a_trainer_is_there_is_refused_for_its_reader(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LlamaFactory)
    told = "no model was given.* outside of Trainer.train, as LLaMA-Factory's PPO does. Expected"
    with pytest.raises(ValueError, match=told):
        trainer.create_optimizer()


@pytest.mark.parametrize("optim", ["foam", "foam_muon", "foam_adam_mini"])
def test_trainers_own_groups_are_those_of_foam_param_groups(tmp_path: Path, optim: str) -> None:
    """In the same order, which checkpoints of every version rely on."""
    trainer = make_trainer(tmp_path, optim=optim, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    rule = {} if optim == "foam" else {"second_moment": optim.removeprefix("foam_")}
    groups = foam_param_groups(trainer.model, weight_decay=0.1, **rule)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in group["params"]] for group in groups
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [group["weight_decay"] for group in groups]


@pytest.mark.parametrize("how", ["create_optimizer", "create_optimizer_and_scheduler", "train"])
def test_decay_names_of_a_subclass_are_heard_wherever_the_optimizer_is_made(tmp_path: Path, how: str) -> None:
    class OnlyClassifier(Trainer):
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return [name for name, _ in model.named_parameters() if "classifier" in name]

    trainer = make_trainer(tmp_path, OnlyClassifier, weight_decay=0.1)
    {"create_optimizer": trainer.create_optimizer, "train": trainer.train}.get(
        how, lambda: trainer.create_optimizer_and_scheduler(1)
    )()
    decaying = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decaying == {id(p) for p in trainer.model.classifier.parameters()}
    # also where a client only asks for the class and its arguments, through its trainer
    said = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)[1]["decided"].groups
    assert {id(p) for group in said if group["weight_decay"] for p in group["params"]} == decaying


def test_weights_that_nobody_decided_on_are_refused() -> None:
    model, other = tiny_roberta(), torch.nn.Linear(8, 3)
    known = Decided(foam_param_groups(model), "RobertaForSequenceClassification")
    with pytest.raises(
        ValueError, match=r"1 trainable weights that are not of RobertaFor.*\(3, 8\).*expected groups of"
    ):
        FOAM([{"params": [*model.parameters(), other.weight]}], decided=known)
    other.requires_grad_(False)
    FOAM([{"params": [*model.parameters(), other.weight]}], decided=known)  # frozen: nothing to decide


def test_what_a_group_says_itself_holds() -> None:
    model = tiny_roberta()
    known = Decided(foam_param_groups(model, weight_decay=0.1, level=4), "model")
    query = model.roberta.encoder.layer[0].attention.self.query
    optimizer = FOAM([{"params": query.weight, "level": 2}, {"params": [("bias", query.bias)][0][1]}], decided=known)
    assert [(group["level"], group["weight_decay"]) for group in optimizer.param_groups] == [(2, 0.1), (0, 0.0)]
    named = FOAM(list(model.named_parameters()), decided=known)
    assert {name for group in named.param_groups for name in group["param_names"]} == {
        name for name, _ in model.named_parameters()
    }
    assert pickle.loads(pickle.dumps(named)).state_dict()["param_groups"] == named.state_dict()["param_groups"]


def test_groups_of_a_client_resume_with_the_same_bits(tmp_path: Path) -> None:
    def run(**settings: Any) -> Trainer:
        trainer = make_trainer(tmp_path, Axolotl, optim="foam_muon", save_strategy="steps", save_steps=2, **settings)
        trainer.train_dataset = classification_data(32)
        return trainer

    whole = run(max_steps=4)
    whole.train()
    resumed = run(max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_with_embeddings_among_other_matrices_says_how_groups_differ(tmp_path: Path) -> None:
    """Groups of a client are not made from optim_args alone, so no optim_args are named."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, SentenceTransformers, optim_args="embedding_rule=block", **saving).train()
    run = make_trainer(tmp_path, SentenceTransformers, max_steps=3)
    with pytest.raises(
        ValueError, match=r"param groups are of \[14, 1, .* here of \[12, 2, 1, .*embedding_rule, block"
    ):
        run.train(resume_from_checkpoint=True)
    run = make_trainer(tmp_path, SentenceTransformers, max_steps=3, optim_args="embedding_rule=block")
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
