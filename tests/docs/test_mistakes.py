"""docs/mistakes.md: every message that it quotes is one that the package gives, and each is quoted."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from foam_hf import FOAM, foam_param_groups, recipe_config, recipe_kit
from foam_hf.cli import command as cli
from foam_hf.optim_args import foam_options
from foam_hf.trainer.refusals import refuse_kept_gradients, refuse_sharding

pytestmark = pytest.mark.long

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "mistakes.md").read_text(encoding="utf-8")


def error_of(action: Callable[..., Any], *args: Any, **settings: Any) -> Callable[..., str]:
    def message(*_: Any) -> str:
        with pytest.raises((ValueError, TypeError, ArithmeticError)) as raised:
            action(*args, **settings)
        return str(raised.value)

    return message


def options(optim_args: str) -> Callable[..., str]:
    return error_of(foam_options, "foam", optim_args)


def arguments(**settings: Any) -> Callable[..., str]:
    from transformers import TrainingArguments

    return error_of(TrainingArguments, output_dir="unused", use_cpu=True, **{"optim": "foam", **settings})


def run_of(**variables: str) -> Callable[..., str]:
    """What the Trainer would say of a run that a launcher has set up by `variables`."""

    def message(monkeypatch: pytest.MonkeyPatch, *_: Any) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return error_of(refuse_sharding, SimpleNamespace(optim="foam", optim_args=None))()

    return message


def release(**settings: Any) -> Callable[..., str]:
    return error_of(
        refuse_kept_gradients,
        SimpleNamespace(
            **{"optim": "foam", "optim_args": None, "gradient_accumulation_steps": 1, "fp16": False, **settings}
        ),
    )


def command(*words: str) -> Callable[..., str]:
    def message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *_: Any) -> str:
        assert cli.main(words) == 2
        return capsys.readouterr().err

    return message


def without_import(*_: Any) -> str:
    code = "from transformers import TrainingArguments; TrainingArguments('unused', optim='foam')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    return done.stderr


def step(parameter: nn.Parameter, grad: torch.Tensor) -> Callable[..., str]:
    def take() -> None:
        optimizer = FOAM([parameter])
        parameter.grad = grad
        optimizer.step()

    return error_of(take)


def adamw_checkpoint(*_: Any) -> str:
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(2, 8))])
    return error_of(FOAM([nn.Parameter(torch.ones(2, 8))]).load_state_dict, adamw.state_dict())()


def foam_checkpoint(*_: Any) -> str:
    weight = nn.Parameter(torch.ones(2, 8))
    weight.grad = torch.ones(2, 8)
    foam, adamw = FOAM([weight]), torch.optim.AdamW([weight])
    foam.step()
    adamw.load_state_dict(foam.state_dict())
    with pytest.raises(KeyError) as raised:
        adamw.step()
    return f"KeyError: {raised.value}"


def other_scale(*_: Any) -> str:
    saved = FOAM([nn.Parameter(torch.ones(2, 8))], scale=0.25).state_dict()
    with pytest.warns(UserWarning) as warned:
        FOAM([nn.Parameter(torch.ones(2, 8))]).load_state_dict(saved)
    return str(warned[0].message)


def earlier_run(monkeypatch: pytest.MonkeyPatch, capsys: Any, folder: Path) -> str:
    (folder / "checkpoint-5").mkdir()
    recipe_kit.keep_earlier(folder, resumes=False, say=print)
    return capsys.readouterr().out


def source(path: str) -> Callable[..., str]:
    """The texts in a file, of those that take a whole run to show: other tests make them appear."""

    def texts(*_: Any) -> str:
        tree = ast.parse((REPO / path).read_text(encoding="utf-8"))
        parts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        return "\n".join(parts)

    return texts


WEIGHT = nn.Parameter(torch.ones(2, 8))
MESSAGES: dict[str, Callable[..., str]] = {
    "foam is not a valid OptimizerNames": without_import,
    "... has transformers but not foam_hf, so optim=foam is unknown to it": source(
        "foam_hf/_sitecustomize/sitecustomize.py"
    ),
    "optim='FOAM' is no optimizer of the Trainer; did you mean 'foam'?": arguments(optim="FOAM"),
    "put -- before the command, got python train.py": command("run", "python", "train.py"),
    "--optim 'FOAM' is no optimizer of the Trainer; did you mean 'foam'?": command(
        "run", "--", "python", "train.py", "--optim", "FOAM"
    ),
    "... this run trains with optim=... not with FOAM": source("foam_hf/trainer/unused.py"),
    "... is not used: ... was given ... or makes it itself": source("foam_hf/trainer/unused.py"),
    "no action 'glue'; did you mean `foam-hf recipes copy glue`?": command("recipes", "glue"),
    "learning_rate=1e-4 is TrainingArguments' own": options("learning_rate=1e-4"),
    "pairs are separated by commas, got 'level=8;scale=1'": options("level=8;scale=1"),
    "unknown key 'levle'. Did you mean 'level'?": options("levle=8"),
    "level must be an integer from 0 to 16, or row, got '256'": options("level=256"),
    "momentum=0.9 is Muon's, and optim='foam' has Adam's adam_beta1": options("momentum=0.9"),
    "... matches no weight that folds": error_of(
        foam_param_groups, nn.Sequential(nn.Linear(4, 4)), target_modules=["attention"]
    ),
    "... no trainable weight of ... folds, so this run keeps AdamW's state": source("foam_hf/trainer/build.py"),
    "--optim_args ... replaces all optim_args of ...": lambda *_: str(
        recipe_config.replaced_optim_args("level=2", "level=8,seed=1", "c.yaml")
    ),
    "... Expected finite gradients: a lower learning rate, other data or clipping may help": step(
        WEIGHT, torch.full((2, 8), torch.nan)
    ),
    "... cannot train INT8 weights": source("foam_hf/trainer/refusals.py"),
    "the model predicts ... for all ... rows": source("recipes/glue/metrics.py"),
    "... by the block rule alone: got gradient_accumulation_steps=4 with second_moment=factored": release(
        gradient_accumulation_steps=4, optim_args="second_moment=factored"
    ),
    "INT8 weights that are offloaded ... are updated in the backward pass: got ...": source(
        "foam_hf/trainer/offload.py"
    ),
    "... before a loss scaler could look for overflows in all of them: got fp16=True": release(fp16=True),
    "... does not run with this DeepSpeed config: ...": source("foam_hf/trainer/deepspeed.py"),
    "... and accelerate would replace FOAM by DeepSpeed's CPU Adam": source("foam_hf/trainer/deepspeed.py"),
    "... does not run with FSDP version 1": run_of(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"),
    "FOAM has no amsgrad: got amsgrad=True in a param group": error_of(FOAM, [{"params": [WEIGHT], "amsgrad": True}]),
    "FOAM needs dense real gradients: got torch.sparse_coo": step(WEIGHT, torch.ones(2, 8).to_sparse()),
    "... To go on with this checkpoint: optim='foam', optim_args=...": source("foam_hf/trainer/training.py"),
    "the checkpoint is of another optimizer: ...": adamw_checkpoint,
    "KeyError: 'exp_avg'": foam_checkpoint,
    "... goes on with the hyperparameters of its checkpoint: scale=...": other_scale,
    "... has other contents than were saved": source("foam_hf/trainer/manifest.py"),
    "... its save did not finish": source("foam_hf/trainer/manifest.py"),
    "... will not resume: ...": source("foam_hf/trainer/weights.py"),
    "... is being saved here while another save of it has not finished": source("foam_hf/trainer/saving.py"),
    "... a collective failed, as another process has ended or hangs, ...": source("foam_hf/trainer/lost_process.py"),
    "... holds checkpoints of an earlier run, ...: this one starts at step 0": earlier_run,
}


def quoted() -> list[str]:
    """The messages in the first column of the page's tables: what stands in backticks at the start of a cell."""
    return [code or plain for code, plain in re.findall(r"^\| (?:``(.+?)``(?!`)|`([^`]+)`)", PAGE, re.MULTILINE)]


def test_the_page_quotes_these_messages_and_no_others() -> None:
    assert quoted() == list(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_what_is_said(
    message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = MESSAGES[message](monkeypatch, capsys, tmp_path)
    place = 0
    for piece in filter(None, map(str.strip, message.split("..."))):
        found = said.find(piece, place if "\n" not in said else 0)
        assert found >= 0, f"{piece!r} is not in: {said}"
        place = found + len(piece)
