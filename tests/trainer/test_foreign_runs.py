"""Runs that do not use FOAM: what is imported beside them changes nothing, however odd their parts are."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from foam_hf.trainer import patches
from foam_hf.trainer.checkpoints import refuse_other_weights
from tests.support.tiny_models import classification_data, tiny_roberta
from tests.trainer.test_trainer import ROOT, make_args

pytestmark = pytest.mark.long


class OddSGD(torch.optim.Optimizer):
    """No defaults, and an attribute that wrappers are known by."""

    def __init__(self, params: Any, rate: float) -> None:
        super().__init__(params, {"lr": rate})
        self.optimizer = "not one"

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


class OddCallback(TrainerCallback):
    """Answers to every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _sgd(model: Any, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **kwargs)


def _factory() -> Any:
    return _sgd


class Factory:
    """A callable object."""

    def __call__(self) -> Any:
        return _sgd


def run(tmp_path: Path, model: Any = None, **settings: Any) -> Trainer:
    args = make_args(tmp_path, optim="adamw_torch", max_steps=2, disable_tqdm=True, save_strategy="no")
    model = tiny_roberta() if model is None else model
    return Trainer(
        model=model, args=args, train_dataset=classification_data(16), callbacks=[OddCallback()], **settings
    )


@pytest.mark.parametrize(
    "made",
    [_factory, Factory(), functools.partial(_factory), lambda: _sgd, OddSGD],
    ids=lambda made: type(made).__name__,
)
def test_whatever_makes_an_optimizer_may_make_it(tmp_path: Path, made: Any) -> None:
    settings = {"rate": 1e-3} if made is OddSGD else {"lr": 1e-3}
    trainer = run(tmp_path, optimizer_cls_and_kwargs=(made, settings))
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_ready_made_odd_optimizer_trains(tmp_path: Path) -> None:
    model = tiny_roberta()
    optimizer = OddSGD(model.parameters(), 1e-3)
    trainer = run(tmp_path, model, optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)))
    trainer.train()
    assert trainer.state.global_step == 2


class OwnOptimizer(Trainer):
    def create_optimizer(self, *args: Any) -> Any:
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        return self.optimizer


def test_foam_that_another_optimizer_replaces_is_told_of_once(tmp_path: Path, caplog: Any) -> None:
    def begin(kind: type[Trainer], optim: str, **settings: Any) -> list[str]:
        caplog.clear()
        args = make_args(tmp_path, optim=optim, max_steps=1, disable_tqdm=True, save_strategy="no")
        trainer = kind(model=tiny_roberta(), args=args, train_dataset=classification_data(16), **settings)
        trainer.train()
        return [each.getMessage() for each in caplog.records if each.name == "foam_hf" and each.levelname == "WARNING"]

    (said,) = begin(Trainer, "foam", optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3}))
    assert said.startswith(
        "optim='foam' is not used: Trainer was given AdamW or makes it itself; expected no optimizer"
    )
    assert len(begin(OwnOptimizer, "foam")) == 1
    assert begin(Trainer, "foam") == begin(OwnOptimizer, "adamw_torch") == []


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, True),
        ({"FOAM_HF_REPORT_MEMORY": "1"}, False),
        ({"FOAM_HF_REPORT_MEMORY": "1", "FOAM_HF_SUMMARY": "1"}, True),
    ],
    ids=["run", "report", "summary"],
)
def test_foam_hf_run_without_foam_says_so(
    tmp_path: Path, asked: dict[str, str], told: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script whose optimizer was left as it is; `--report-memory` alone also measures other optimizers."""
    for name, value in {"FOAM_HF_RUN_PREFIX": sys.prefix, **asked}.items():
        monkeypatch.setenv(name, value)
    run(tmp_path).train()
    line = "foam-hf run: this run trains with optim='adamw_torch' (AdamW), not with FOAM; for FOAM: --optim foam, "
    assert capsys.readouterr().err.count(line) == told


def test_a_trainer_whose_parts_are_odd_passes_every_wrapper(tmp_path: Path) -> None:
    """Each wrapped method of `Trainer` on objects that lack what a Trainer has."""
    bare = types.SimpleNamespace(args=types.SimpleNamespace(optim=["no", "name"]), model=object(), state=None)
    rows = [row for row in patches.TABLE if row.owner == "Trainer" and row.wrapper and hasattr(Trainer, row.name)]
    names = [row.name for row in rows if row.name != "get_optimizer_cls_and_kwargs"]  # static
    assert "_save_checkpoint" in names
    for args in (bare.args, types.SimpleNamespace(), None):
        bare.args = args
        for name in names:
            heard: list[Any] = []
            through = _rewrapped(name, lambda *given, heard=heard, **named: heard.append((given, named)))
            through(bare, None, odd="value")
            assert len(heard) == 1 and heard[0][0][:2] == (bare, None) and heard[0][1] == {"odd": "value"}, name


def _rewrapped(name: str, original: Any) -> Any:
    original.__name__ = name
    (row,) = (row for row in patches.TABLE if row.owner == "Trainer" and row.name == name)
    return patches._wrapper(row.wrapper)(original)


@pytest.mark.parametrize("config", [[], "text", {"quantization_config": "awq"}, {"quantization_config": [1]}, None])
def test_a_checkpoint_with_an_odd_config_is_transformers_business(tmp_path: Path, caplog: Any, config: Any) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    refuse_other_weights(object(), str(tmp_path))
    assert not caplog.records


def test_importing_changes_no_bit_of_a_run(tmp_path: Path) -> None:
    """The same script, with the package and without it, in fresh processes."""
    code = (
        "import sys, hashlib, torch\n"
        "if sys.argv[1] == 'with': import foam_hf, foam_hf.trainer.callback\n"
        "from transformers import Trainer, TrainingArguments\n"
        "from tests.support.tiny_models import classification_data, tiny_roberta\n"
        "args = TrainingArguments(sys.argv[2], max_steps=3, save_steps=2, report_to='none', use_cpu=True,\n"
        "                         disable_tqdm=True, optim='adamw_torch')\n"
        "run = Trainer(tiny_roberta(), args, train_dataset=classification_data(16))\n"
        "run.train()\n"
        "resumed = Trainer(tiny_roberta(), args, train_dataset=classification_data(16))\n"
        "resumed.train(resume_from_checkpoint=True)\n"
        "for trained in (run, resumed):\n"
        "    bits = b''.join(p.detach().numpy().tobytes() for p in trained.model.parameters())\n"
        "    print(hashlib.sha256(bits).hexdigest())\n"
        "import os; print(sorted(os.listdir(sys.argv[2] + '/checkpoint-2')))\n"
    )
    printed = []
    for kind in ("with", "without"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-c", code, kind, str(tmp_path / kind)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines()[-3:])
    assert printed[0] == printed[1] and printed[0][0] == printed[0][1]


def test_arguments_of_other_optimizers_are_nobodys_to_judge(tmp_path: Path) -> None:
    class More(TrainingArguments):
        pass

    args = More(str(tmp_path), optim="sgd", optim_args="any=thing, at all", report_to="none", use_cpu=True)
    assert args.optim == "sgd"
