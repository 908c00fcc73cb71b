"""Trainers with a `train` of their own and callbacks that get other things: what was asked for works or is refused."""

from __future__ import annotations

import logging
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

import foam_hf
from foam_hf import FOAM
from foam_hf.optimizer.groups import foam_parameter_names
from foam_hf.trainer.callback import OptimizerMemoryCallback
from tests.support.tiny_models import classification_data, tiny_mlp, tiny_roberta
from tests.trainer.test_trainer import make_args, make_trainer


class OwnLoop(Trainer):
    """As the PPO trainers: `Trainer.train` is not called; which events callbacks get is up to it."""

    events: tuple[str, ...] = ()

    def train(self, *args: Any, **kwargs: Any) -> None:
        if self.optimizer is None:
            self.create_optimizer_and_scheduler(2)
        self.callback_handler.optimizer = self.optimizer
        for step, batch in enumerate(self.get_train_dataloader()):
            if step == 0:
                self.tell("on_train_begin")
            self.model(**batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.tell("on_step_end")
        self.tell("on_train_end")

    def tell(self, event: str) -> None:
        if event in self.events:
            getattr(self.callback_handler, event)(self.args, self.state, self.control)


class WithEvents(OwnLoop):
    events = ("on_train_begin", "on_step_end", "on_train_end")


def test_gradient_release_that_no_loop_arms_is_told_at_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, OwnLoop, optim_args="gradient_release=true")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(RuntimeError, match="gradient_release=true was asked for, and at the first step no hook"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))


def test_the_step_by_which_torch_creates_state_before_it_loads_is_no_first_step(tmp_path: Path) -> None:
    """Resuming under FSDP2 makes this step, with learning rates of 0, before training begins."""
    trainer = make_trainer(tmp_path, OwnLoop, optim_args="gradient_release=true")
    optimizer = trainer.create_optimizer()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert get_optimizer_state_dict(trainer.model, optimizer)["state"]
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="at the first step no hook"):
        trainer.train()


def test_gradient_release_that_a_loop_arms_itself_trains(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, OwnLoop, optim_args="gradient_release=true")
    trainer.create_optimizer_and_scheduler(2)
    handle = foam_hf.enable_gradient_release(trainer.model, trainer.optimizer)
    trainer.train()
    handle.remove()
    assert trainer.state.global_step == 2
    trainer.train()  # the expectation was of the first step


def test_no_report_is_missed_in_the_step_by_which_torch_creates_state(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, OwnLoop)
    trainer.add_callback(OptimizerMemoryCallback())
    assert get_optimizer_state_dict(trainer.model, trainer.create_optimizer())["state"]
    with pytest.raises(RuntimeError, match="a report on optimizer memory was asked for"):
        trainer.train()


@pytest.mark.parametrize("optim", ["foam", "adamw_torch"])
@pytest.mark.parametrize("asked", ["environment", "callback"])
def test_a_report_that_no_event_reaches_is_told_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, asked: str
) -> None:
    trainer = make_trainer(tmp_path, OwnLoop, optim=optim)
    if asked == "environment":
        monkeypatch.setenv("FOAM_HF_REPORT_MEMORY", "1")
    else:
        trainer.add_callback(OptimizerMemoryCallback())
    with pytest.raises(RuntimeError, match="no event of training has reached OptimizerMemoryCallback: OwnLoop"):
        trainer.train()


def test_a_report_that_hears_of_whole_steps_alone_is_given(tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(tmp_path, WithEvents)
    trainer.add_callback(OptimizerMemoryCallback())
    trainer.train()
    state = sum(v.nbytes for held in trainer.optimizer.state.values() for v in held.values() if torch.is_tensor(v))
    assert trainer.state.log_history[0]["optim/state_bytes"] >= state > 0
    assert "Optimizer memory: FOAM, 19,362 trainable parameters" in capsys.readouterr().out


class SetFit(Trainer):
    """setfit's inner trainer: callbacks get its own arguments, and a model that is no module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shown = types.SimpleNamespace(model_body=self.model)
        handler: Any = self.callback_handler

        def call_event(event: str, args: Any, state: Any, control: Any, **more: Any) -> Any:
            own = types.SimpleNamespace(output_dir=args.output_dir)
            for callback in handler.callbacks:
                given = {"optimizer": handler.optimizer, "st_model": handler.model, "st_args": args, **more}
                theirs = isinstance(callback, OptimizerMemoryCallback)
                result = getattr(callback, event)(
                    own if theirs else args, state, control, model=shown if theirs else handler.model, **given
                )
                control = control if result is None else result
            return control

        handler.call_event = call_event


def test_the_report_sees_the_model_that_trains_where_callbacks_are_shown_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    args = make_args(tmp_path, max_steps=1, disable_tqdm=True)
    run = SetFit(
        model=tiny_roberta(), args=args, train_dataset=classification_data(8), callbacks=[OptimizerMemoryCallback()]
    )
    with caplog.at_level(logging.WARNING, "foam_hf"):
        run.train()
    assert not [record for record in caplog.records if "report" in record.getMessage()]
    assert "Optimizer memory: FOAM, 19,362 trainable parameters" in capsys.readouterr().out


class WithLoss(Trainer):
    """sentence-transformers': the loss has weights, around the model."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = Loss(self.model)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, self.loss)
        kwargs["optimizer_dict"] = [{"params": list(self.loss.parameters())}]
        return cls, kwargs

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.loss(inputs)


class Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.classifier = model, nn.Linear(2, 3)

    def forward(self, inputs: Any) -> Any:
        return self.classifier(self.model(**inputs).logits).square().mean()


def test_weights_of_a_loss_are_counted(tmp_path: Path, capsys: Any) -> None:
    args = make_args(tmp_path, max_steps=1, disable_tqdm=True)
    run = WithLoss(
        model=tiny_roberta(), args=args, train_dataset=classification_data(8), callbacks=[OptimizerMemoryCallback()]
    )
    run.train()
    (line,) = [entry for entry in run.state.log_history if "optim/state_bytes" in entry]
    printed = capsys.readouterr().out
    assert "Optimizer memory: FOAM, 19,371 trainable parameters" in printed  # 9 of them in the loss
    measured, predicted = next(row for row in printed.splitlines() if "optimizer state" in row).split()[2::2][:2]
    assert measured == predicted and line["optim/state_bytes"] > 0


def _folded(model: nn.Module) -> set[str]:
    names = foam_parameter_names(model)
    return {name for group, members in names.items() if group.startswith("folded") for name in members}


def test_heads_of_sentence_transformers_are_heads() -> None:
    import sentence_transformers
    from sentence_transformers import losses, models

    class Words(nn.Module):  # what models.Transformer is, without files
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = tiny_roberta().roberta

        def get_embedding_dimension(self) -> int:
            return 32

    body = {name for name, p in tiny_roberta().roberta.named_parameters() if p.dim() > 1}
    model = sentence_transformers.SentenceTransformer(modules=[Words(), models.Pooling(32), models.Dense(32, 8)])
    assert _folded(model) == {f"0.auto_model.{name}" for name in body}
    loss = losses.SoftmaxLoss(model, 32, num_labels=3)
    assert _folded(loss) == {f"model.0.auto_model.{name}" for name in body}


# mixed precision


def announced(optimizer: Any) -> bool:
    """What torch.amp.GradScaler and Lightning ask."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def test_unscaling_is_announced_only_where_a_scaler_cannot_do_it() -> None:
    for dtype, expected in ((torch.float32, False), (torch.bfloat16, False), (torch.float16, True)):
        assert announced(FOAM(tiny_mlp().to(dtype).parameters())) is expected
    model = tiny_mlp()
    optimizer = FOAM(model.parameters())
    handle = foam_hf.enable_gradient_release(model, optimizer)
    assert announced(optimizer)  # the step refuses in words
    handle.remove()
    assert not announced(optimizer)


def lightning_step(optimizer: Any, scaler: Any, model: nn.Module, clip: float) -> None:
    """What Lightning's MixedPrecision does: its order of closure, unscaling, clipping and step."""
    loss = model(torch.ones(2, model.input.in_features)).square().mean() if hasattr(model, "input") else None
    assert loss is not None
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None and not announced(optimizer):
        scaler.unscale_(optimizer)
    if clip > 0 and announced(optimizer):
        raise RuntimeError("does not allow for gradient clipping because it performs unscaling of gradients")
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def test_lightning_clips_gradients_with_a_scaler_and_without_one() -> None:
    trained = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        torch.manual_seed(0)
        model = nn.Module()
        model.input = nn.Linear(24, 16)
        model.forward = lambda x, model=model: model.input(x)  # type: ignore[method-assign]
        optimizer = FOAM(model.parameters(), level=2)
        for _ in range(3):
            lightning_step(optimizer, scaler, model, clip=0.01)
        trained.append(model.input.weight.detach().clone())
    assert torch.equal(*trained)  # the scale is a power of two


def test_a_scaler_trains_float16_weights() -> None:
    p = nn.Parameter(torch.zeros(4, 16, dtype=torch.float16))
    optimizer, scaler = FOAM([p], lr=0.1, level=2), torch.amp.GradScaler("cpu", init_scale=4.0)
    for value, moved in ((float("inf"), False), (1.0, True)):
        scaler.scale(torch.ones(()))
        p.grad = torch.full_like(p, value)
        scaler.step(optimizer)
        scaler.update()
        assert bool((p != 0).all()) is moved


def test_handler_of_a_trainer_may_come_after_its_optimizer(tmp_path: Path) -> None:
    """TRL's PPO makes its callback handler after its optimizer."""
    trainer = make_trainer(tmp_path, WithEvents)
    handler, trainer.callback_handler = trainer.callback_handler, None
    trainer.create_optimizer()
    assert isinstance(handler, CallbackHandler)
    trainer.callback_handler = handler
    trainer.create_scheduler(2)
    trainer.train()
    assert trainer.state.global_step == 2
