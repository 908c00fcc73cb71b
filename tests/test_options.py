"""The table of options: one record is all that the parser, the groups, the optimizer, the help and the checks read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foam_hf.optim_args
from foam_hf import FOAM, foam_param_groups
from foam_hf.cli import main
from foam_hf.memory import expected_state_bytes
from foam_hf.optim_args import OPTIONS, RELEASE_KEYS, Numbers, Option, parse_optim_args, written
from foam_hf.planner.counting import option_keys
from tests.support.tiny_models import tiny_mlp

# Of every option a text that optim_args must not have, None without such a key, and a value that Python must not.
ILLEGAL: dict[str, tuple[str | None, Any]] = {
    "lr": (None, -1.0),
    "betas": (None, (0.9, 1.0)),
    "eps": (None, math.inf),
    "weight_decay": (None, 1e10),
    "level": ("17", 17),
    "scale": ("0", 0),
    "second_moment": ("row", "row"),
    "residual_scale": ("nan", math.nan),
    "stochastic_rounding": ("maybe", 1),
    "state_dtype": ("float16", torch.float16),
    "nonfinite": ("raise", "raise"),
    "fold_embeddings": ("2", "false"),
    "fold_head": ("none", 1),
    "embedding_scale": ("0", -1.0),
    "embedding_rule": ("muon", "muon"),
    "gradient_release": ("1", None),
    "momentum": ("1", 1.0),
    "mini_rows": (None, -1),
    "plain_state": ("4bit", "4bit"),
    "seed": ("-1", 0.5),
    "clip_by": ("each", "each"),
}
EVERY = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        action()
    return str(caught.value)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, 8))


def loaded(name: str, value: Any) -> None:
    optimizer = FOAM([parameter()])
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = value
    optimizer.load_state_dict(saved)


@EVERY
def test_an_illegal_text_is_refused_with_it_and_with_what_is_legal(option: Option, tmp_path: Path) -> None:
    text, _ = ILLEGAL[option.name]
    assert (text is not None) == option.key
    if text is None:
        assert option.name in refusal(lambda: parse_optim_args({option.name: "1"}))
        return
    from transformers import TrainingArguments

    expected = f"optim_args: {option.name} must be {option.legal.describe(written)}, got {text!r}."
    assert refusal(lambda: parse_optim_args(f"{option.name}={text}")) == expected
    assert refusal(lambda: parse_optim_args({option.name: text})) == expected
    given = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "foam", "optim_args": f"{option.name}={text}"}
    assert refusal(lambda: TrainingArguments(**given)) == expected


@EVERY
def test_an_illegal_value_is_refused_wherever_python_takes_it(option: Option) -> None:
    name, value = option.name, ILLEGAL[option.name][1]
    doors: list[Callable[[], Any]] = []
    if option.field:
        doors += [
            lambda: FOAM([parameter()], **{name: value}),
            lambda: FOAM([parameter()]).add_param_group({"params": [parameter()], name: value}),
            lambda: expected_state_bytes([{"params": [parameter()], name: value}]),
        ]
    if option.field and option.may_change:  # a checkpoint with another value of the others has a message of its own
        doors.append(lambda: loaded(name, value))
    if option.folded:
        doors.append(lambda: FOAM(foam_param_groups(tiny_mlp(), **{name: value})))
    if name == "weight_decay" or (option.grouping and not option.field):
        doors.append(lambda: foam_param_groups(tiny_mlp(), **{name: value}))
    assert doors or name in RELEASE_KEYS, "an option of optim_args alone"
    for door in doors:
        message = refusal(door)
        assert f"{name} is " in message and f"got {value!r}" in message
        assert f"expected {option.legal.describe(repr)}" in message


@EVERY
def test_a_default_is_legal_and_survives_the_way_through_text(option: Option) -> None:
    if option.default is None:
        option.check(None)
        assert option.decided_by
    elif option.key:
        parsed = parse_optim_args(f"{option.name}={written(option.default)}")
        assert parsed == {option.name: option.default}
        assert type(parsed[option.name]) is type(option.default)


@EVERY
def test_it_is_described_where_python_takes_it(option: Option) -> None:
    assert not option.field or f"\n        {option.name}: " in str(FOAM.__doc__)
    assert not option.folded or f"`{option.name}`" in str(foam_param_groups.__doc__)
    assert not option.grouping or option.name in str(foam_param_groups.__doc__)


def test_the_optimizer_has_an_argument_for_each_field_with_its_default() -> None:
    arguments = {name: p.default for name, p in inspect.signature(FOAM).parameters.items()}
    assert (arguments.pop("params"), arguments.pop("decided")) == (inspect.Parameter.empty, None)
    arguments["state_dtype"] = written(arguments["state_dtype"])
    assert arguments == {option.name: option.default for option in OPTIONS if option.field}
    group = FOAM([parameter()]).param_groups[0]
    assert group.keys() == {"params", *arguments}


def test_a_new_option_is_one_record(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    new = Option(
        "warmth",
        3,
        Numbers("an integer of 2 or more", lambda n: n >= 2, "integer"),
        "how warm a folded weight is",
        folded=True,
        plain=2,
        rule="muon",
        elsewhere=("none", "none"),
    )
    monkeypatch.setattr(foam_hf.optim_args, "OPTIONS", (*OPTIONS, new))
    assert parse_optim_args("warmth=5") == {"warmth": 5}
    assert refusal(lambda: parse_optim_args("warmth=1")) == (
        "optim_args: warmth must be an integer of 2 or more, got '1'."
    )
    assert "Did you mean 'warmth'?" in refusal(lambda: parse_optim_args("warmht=5"))
    assert "warmth=5 is Muon's" in refusal(lambda: foam_hf.optim_args.foam_options("foam", "warmth=5"))
    groups = foam_param_groups(tiny_mlp(), warmth=5)
    assert {group.get("level", "folded"): group["warmth"] for group in groups} == {"folded": 5, 0: 2}
    assert "warmth" in option_keys("foam_muon") and "warmth" not in option_keys("foam")
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "warmth (an integer of 2 or more; default: 3): how warm a folded weight is" in capsys.readouterr().out
