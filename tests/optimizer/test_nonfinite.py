"""Gradients that are NaN or infinite: what they leave alone, and how a user hears of them."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from foam_hf import FOAM, enable_gradient_release
from foam_hf.int8.weight import Int8Weight
from foam_hf.optimizer import nonfinite
from foam_hf.optimizer.nonfinite import NonfiniteGradientError
from foam_hf.rules.all import RULES
from tests.support.reference import Reference
from tests.support.rules import BY_BLOCK, OPTIONS
from tests.support.tiny_models import tiny_roberta
from tests.support.tolerances import assert_within
from tests.trainer.test_runs import make_trainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)


def train(weight, gradients, **options):
    p = torch.nn.Parameter(copy.deepcopy(weight))
    optimizer = FOAM([p], **{"lr": 0.01, "weight_decay": 0.1, "nonfinite": "skip", **options})
    for grad in gradients:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer


def poisoned(shape, bad, dtype=torch.float32):
    """Three gradients, the second with ``bad`` in the first row and near the end of the last."""
    gradients = [torch.randn(shape).to(DEVICE, dtype) for _ in range(3)]
    gradients[1].view(-1)[0] = gradients[1].view(-1)[-2] = bad
    return gradients


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("second_moment", BY_BLOCK)
@pytest.mark.parametrize("level", [0, 3, "row"])
def test_blocks_keep_weight_and_moments_and_all_others_follow_the_reference(monkeypatch, level, second_moment, kernel):
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    for shape, bad in (((3, 20), math.nan), ((2, 2, 9), math.inf), ((9,), 3e38)):
        weight, gradients = torch.randn(shape, device=DEVICE), poisoned(shape, bad)
        options = {"level": level, "second_moment": second_moment}
        trained, optimizer = train(weight, gradients, **options)
        reference = Reference(weight.cpu(), lr=0.01, weight_decay=0.1, **options)
        for grad in gradients:
            expected = reference.step(grad.cpu())
        assert_within(trained.cpu(), expected, "five steps against float64, float32 weights")
        (state,) = optimizer.state.values()
        assert all(bool(torch.as_tensor(x).isfinite().all()) for x in state.values())
        before, _ = train(weight, gradients[:1], **options)
        after, _ = train(weight, gradients[:2], **options)
        assert torch.equal(after.view(-1)[0], before.view(-1)[0])  # no decay either


@pytest.mark.parametrize("level", [0, 3, "row"])
def test_int8_weights_keep_their_codes_on_both_paths(monkeypatch, level):
    weight, gradients = Int8Weight.from_float(torch.randn(4, 64).to(DEVICE), 16), poisoned((4, 64), math.nan)
    runs = []
    for kernel in ("reference", "triton"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        runs.append(train(weight, gradients, level=level)[0])
        before, after = (train(weight, gradients[:count], level=level, lr=1e-6)[0] for count in (1, 2))
        assert after.codes[0, 0] == before.codes[0, 0] and bool(after.dequantize().isfinite().all())
    assert torch.equal(runs[0].codes, runs[1].codes)


@pytest.mark.parametrize("second_moment", BY_BLOCK)
def test_chunks_change_nothing(monkeypatch, second_moment):
    weight, gradients = torch.randn(6, 19), [g.cpu() for g in poisoned((6, 19), math.nan)]
    options = {"level": 2, "second_moment": second_moment, "state_dtype": torch.bfloat16}
    whole, _ = train(weight, gradients, **options)
    monkeypatch.setattr("foam_hf.tensors.rows.CHUNK_CPU", 40)
    chunked, _ = train(weight, gradients, **options)
    assert_within(chunked, whole, "five steps against float64, float32 weights")


def test_row_sums_that_overflow_leave_the_means_finite():
    for second_moment in BY_BLOCK:
        gradient = torch.full((4, 8), 1e19)  # each square is finite, the sum of a row is not
        _, optimizer = train(torch.zeros(4, 8), [gradient], level=0, second_moment=second_moment)
        (state,) = optimizer.state.values()
        assert all(bool(torch.as_tensor(x).isfinite().all()) for x in state.values())


def test_an_error_says_which_parameter_and_step_and_is_the_default():
    fine, bad = torch.nn.Parameter(torch.ones(2, 4)), torch.nn.Parameter(torch.ones(3, 4))
    optimizer = FOAM([fine, bad])
    for t in range(2):
        fine.grad, bad.grad = torch.ones(2, 4), torch.ones(3, 4)
        if t == 1:
            bad.grad[0, 0] = math.nan
            with pytest.raises(NonfiniteGradientError, match=r"step 2: gradients of 1 of 2 .* 1 of shape \(3, 4\)"):
                optimizer.step()
        else:
            optimizer.step()
    assert isinstance(NonfiniteGradientError("", []), FloatingPointError)
    assert bool(bad.isfinite().all()) and optimizer.state[fine]["step"] == 2
    optimizer.state_dict()  # reported once


def test_skip_warns_ever_more_rarely_and_ignore_is_adamws_behaviour(caplog):
    weight, bad = torch.ones(2, 4), torch.full((2, 4), math.nan)
    with caplog.at_level(logging.WARNING, "foam_hf"):
        kept, _ = train(weight, [bad] * 9)
    assert torch.equal(kept, weight)
    assert [record.message.split("gradients: ")[1].split(";")[0] for record in caplog.records] == ["1", "2", "4", "8"]
    assert bool(train(weight, [bad], nonfinite="ignore")[0].isnan().all())


def test_state_that_was_cleared_begins_to_count_and_to_tell_anew():
    p = torch.nn.Parameter(torch.ones(2, 4, device=DEVICE))
    optimizer = FOAM([p])
    for _ in range(2):
        p.grad = torch.full_like(p, math.nan)
        with pytest.raises(NonfiniteGradientError, match="step 1"):
            optimizer.step()
            optimizer.check_gradients()
        optimizer.state.clear()


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_a_step_count_that_was_set_back_hides_no_gradient(monkeypatch, kernel):
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    weight, (good, bad, _) = torch.randn(3, 8, device=DEVICE), poisoned((3, 8), math.nan)
    _, optimizer = train(weight, [good, good, bad])
    (group,) = optimizer.param_groups
    (p,) = group["params"]
    optimizer.check_gradients()
    group["nonfinite"] = "error"
    for count in (2, 0):  # before the step that left a block out, which is taken once more; from the start
        optimizer.state[p]["step"] = count
        p.grad = bad.clone()
        with pytest.raises(NonfiniteGradientError, match=f"step {count + 1}: "):
            optimizer.step()
            optimizer.check_gradients()


def test_groups_have_their_own_word():
    skipping, raising = (torch.nn.Parameter(torch.ones(2, 4)) for _ in range(2))
    optimizer = FOAM([{"params": [skipping], "nonfinite": "skip"}, {"params": [raising]}])
    skipping.grad, raising.grad = torch.full((2, 4), math.inf), torch.ones(2, 4)
    optimizer.step()
    raising.grad = torch.full((2, 4), math.inf)
    with pytest.raises(NonfiniteGradientError, match="1 of 2 parameters"):
        optimizer.step()


def test_what_arrives_late_is_told_late_but_before_a_state_dict(monkeypatch):
    """As on a GPU, where the host runs ahead: a copy arrives when the test says so."""
    original, sent = nonfinite.DeviceRecord.__init__, []

    def with_a_copy(self, device, size):
        original(self, device, size)
        self._host = self.steps.clone()
        self._now = self._host.numpy()

    monkeypatch.setattr(nonfinite.DeviceRecord, "__init__", with_a_copy)
    monkeypatch.setattr(nonfinite.DeviceRecord, "send", lambda self: sent.append(self))
    for arrived in (True, False):
        sent.clear()
        p = torch.nn.Parameter(torch.ones(2, 4))
        optimizer = FOAM([p])
        p.grad = torch.full((2, 4), math.nan)
        optimizer.step()
        if arrived:
            (record,) = sent
            record._host.copy_(record.steps)
        p.grad = torch.ones(2, 4)
        with pytest.raises(NonfiniteGradientError, match="step 1"):
            optimizer.step() if arrived else optimizer.state_dict()
        assert torch.equal(p, torch.ones(2, 4))


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU is ahead of its host")
def test_on_a_gpu_a_step_does_not_wait_and_a_state_dict_tells():
    p = torch.nn.Parameter(torch.ones(8, 512, device=DEVICE))
    optimizer = FOAM([p])
    p.grad = torch.full_like(p, math.nan)
    with pytest.raises(NonfiniteGradientError, match="step 1"):  # a fast device may tell within the step
        optimizer.step()
        torch.cuda.synchronize()
        p.grad = torch.ones_like(p)
        optimizer.step()
    p.grad = torch.full_like(p, math.nan)
    with pytest.raises(NonfiniteGradientError):
        optimizer.step()
        optimizer.state_dict()
    optimizer.state_dict()  # reported once


def test_gradient_release_leaves_out_the_same(caplog):
    found = []
    for release in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 4)
        optimizer = FOAM(model.parameters(), level=2, nonfinite="error")
        if release:
            enable_gradient_release(model, optimizer)
        x = torch.ones(2, 16)
        x[0, 3] = math.nan
        model(x)[:, 1].sum().backward()
        with pytest.raises(NonfiniteGradientError, match="step 1"):
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_clipping_by_an_infinite_norm_leaves_out_the_whole_weight(caplog):
    model = torch.nn.Linear(8, 4, bias=False)
    before = model.weight.detach().clone()
    optimizer = FOAM(model.parameters(), level=2, nonfinite="skip", weight_decay=0.5)
    enable_gradient_release(model, optimizer, max_grad_norm=1.0)
    x = torch.ones(1, 8)
    x[0, 0] = math.inf
    model(x).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before)


class Poison(Trainer):
    """A gradient of NaN in the third step."""

    calls = 0

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.calls += 1
        if self.calls == 3:
            next(p for p in model.classifier.parameters()).grad.view(-1)[0] = math.nan
        return loss


def test_a_trainer_stops_with_the_weights_name_before_it_saves(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, trainer_class=Poison)
    with pytest.raises(FloatingPointError, match=r"step 3: .*in the model: roberta\."):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_that_stopped_goes_on_from_its_checkpoint_and_skips(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "trainer_class": Poison}
    with pytest.raises(FloatingPointError, match="step 3"):
        make_trainer(tmp_path, **settings).train()
    trainer = make_trainer(tmp_path, optim_args="level=3,nonfinite=skip", **settings)
    trainer.calls = 2
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and trainer.optimizer.param_groups[0]["nonfinite"] == "skip"
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_the_weights_of_a_model_that_training_makes_are_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_class=Poison, max_steps=3)
    trainer.model_init, first = (lambda: tiny_roberta()), trainer.model
    with pytest.raises(FloatingPointError, match=r"step 3: .*in the model: roberta\."):
        trainer.train()
    assert trainer.model is not first


def test_a_trainer_leaves_out_a_whole_step_that_clipping_made_nan(tmp_path: Path) -> None:
    options = {"optim_args": "level=3,nonfinite=skip", "lr_scheduler_type": "constant"}
    trained = []
    for steps in (2, 3):
        torch.manual_seed(0)
        trained.append(make_trainer(tmp_path, max_steps=steps, trainer_class=Poison, **options))
        trained[-1].train()
    two, three = (trainer.model.parameters() for trainer in trained)
    assert all(torch.equal(p, q) for p, q in zip(two, three, strict=True))


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("rule", [rule.name for rule in RULES if rule.unit == "tensor"])
def test_rules_of_whole_tensors_leave_out_the_whole(monkeypatch, rule, kernel):
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    weight, gradients = torch.randn(64, 64, device=DEVICE), poisoned((64, 64), math.inf)
    options = {"level": 3, **OPTIONS[rule]}
    trained, optimizer = train(weight, gradients, **options)
    (state,) = optimizer.state.values()
    assert all(bool(torch.as_tensor(x).float().isfinite().all()) for x in state.values()) and state["step"] == 3
    before, after = (train(weight, gradients[:count], **options)[0] for count in (1, 2))
    assert torch.equal(after, before) and not torch.equal(trained, after)
    with pytest.raises(NonfiniteGradientError):
        train(weight, gradients[:2], nonfinite="error", **options)[1].check_gradients()  # a GPU's word comes later
    assert not bool(train(weight, gradients, nonfinite="ignore", **options)[0].isfinite().all())


def test_the_error_comes_back_from_another_process() -> None:
    p = torch.nn.Parameter(torch.ones(2, 4))
    p.grad = torch.full((2, 4), math.nan)
    with pytest.raises(NonfiniteGradientError) as caught:
        FOAM([p]).step()
    back = pickle.loads(pickle.dumps(caught.value))
    assert type(back) is NonfiniteGradientError and str(back) == str(caught.value) and back.parameters == []
