"""2,000 random settings: each trains a step, or is refused in our own words. The generator has a fixed seed."""

from __future__ import annotations

import math
import random
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import foam_hf
from foam_hf import FOAM
from foam_hf.optim_args import FOAM_NAMES, foam_options, names_of
from tests.support.rules import FOLDING

OURS = Path(foam_hf.__file__).parent
LEGAL: dict[str, list[Any]] = {
    "level": [0, 1, 2, 3, 8, 16, "row"],
    "scale": [0.25, 1, 1e-30, 1e30],
    "second_moment": FOLDING,
    "residual_scale": [0, 1.0, 0.5, 1e-20],
    "stochastic_rounding": ["auto", True, False],
    "state_dtype": ["float32", "bfloat16", "torch.bfloat16", "bf16"],
    "nonfinite": ["error", "skip", "ignore"],
    "fold_embeddings": ["true", "false"],
    "embedding_scale": [0.5, 1, 6],
    "embedding_rule": ["block", "factored"],
    "fold_head": ["True", "FALSE"],
    "gradient_release": ["true", "false"],
    "clip_by": ["all", "weight"],
    "momentum": [0, 0.9],
    "plain_state": ["full", "8bit"],
    "seed": [0, 1, 2**63, 2**64 - 1],
}
ODD_TEXT = [
    "",
    " ",
    "=",
    ",",
    "==",
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e999",
    "9" * 5000,
    "1_0",
    "０",
    "八",
    "ｒｏｗ",
    "row ",
    "ROW",
    "8.0",
    "0x8",
    "\x00",
    "\ud800",
    "true\n",
    "None",
    "ß",
    "İ",
    "é" * 50,
    "level",
    "torch.torch.float32",
    "+3",
    "1e-400",
    "٣",
    "½",
]
ODD_KEYS = [
    "Level",
    "lvl",
    "levels",
    "level ",
    "scal",
    "seed\u200b",
    "ſeed",
    "lr",
    "betas",
    "",
    "K",
    "__class__",
    "x" * 300,
]
HUGE = 10**400
ODD_VALUES = [
    None,
    True,
    -1,
    17,
    2.5,
    math.nan,
    math.inf,
    -math.inf,
    HUGE,
    -HUGE,
    1e308,
    "",
    "row",
    "8",
    b"8",
    (),
    [],
    {},
    [1, 2],
    {"a": 1},
    object(),
    1j,
    torch.tensor(1.0),
    torch.tensor([1.0, 2.0]),
    torch.tensor(math.nan),
    torch.tensor(1j),
    torch.float16,
    torch.int8,
    numpy.float32(0.5),
    numpy.int64(3),
    numpy.array([1.0, 2.0]),
    numpy.array(3),
    "error ",
    float,
    len,
    ("0.9", "0.99"),
    (0.9, None),
    (0.9, 0.99, 0.999),
    "auto",
]
FIELDS = ["lr", "betas", "eps", "weight_decay", "level", "scale", "second_moment", "residual_scale"]
FIELDS += ["stochastic_rounding", "state_dtype", "nonfinite", "momentum", "mini_rows", "plain_state", "seed"]
SHAPES = [(4, 8), (3, 5), (2, 3, 4), (7,), (), (1, 1), (0, 4), (4, 0), (1, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOOD = {
    "lr": [0.0, 1e-3, torch.tensor(0.1)],
    "betas": [(0.9, 0.999), (0, 0), [0.5, 0.9]],
    "eps": [0, 1e-8, 1],
    "weight_decay": [0, 0.1],
    "level": LEGAL["level"],
    "scale": [0.25, 1],
    "second_moment": LEGAL["second_moment"],
    "residual_scale": [0, 1.0, 2],
    "stochastic_rounding": ["auto", False],
    "state_dtype": [torch.float32, torch.bfloat16],
    "nonfinite": LEGAL["nonfinite"],
    "momentum": LEGAL["momentum"],
    "mini_rows": [0, 1, 2],
    "plain_state": LEGAL["plain_state"],
    "seed": LEGAL["seed"],
}


def random_text(chance: random.Random) -> str | dict[Any, Any]:
    pieces: list[tuple[Any, Any]] = []
    for _ in range(chance.randrange(5)):
        key = chance.choice(names_of(lambda option: option.key))
        value: Any = chance.choice(LEGAL[key])
        if chance.random() < 0.15:
            value = chance.choice(ODD_TEXT)
        if chance.random() < 0.05:
            key = chance.choice(ODD_KEYS)
        pieces.append((key, value))
    if chance.random() < 0.2:
        return {key: chance.choice(ODD_VALUES) if chance.random() < 0.1 else value for key, value in pieces}
    text = chance.choice([",", ", ", " ,"]).join(f"{key}{chance.choice(['=', ' = '])}{value}" for key, value in pieces)
    if chance.random() < 0.1:
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice([",", "=", " ", "\t", "é", "\x00"]) + text[at:]
    return text


def train(params: Any, **options: Any) -> None:
    optimizer = FOAM(params, **options)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape).to(p.dtype)
    optimizer.step()


def of_text(chance: random.Random) -> Any:
    given = random_text(chance)
    options = foam_options(chance.choice([*FOAM_NAMES]), given)
    for name in names_of(lambda option: option.key and not option.field):
        options.pop(name, None)
    if "state_dtype" in options:
        options["state_dtype"] = getattr(torch, options["state_dtype"])
    train([torch.nn.Parameter(torch.randn(s).to(chance.choice(DTYPES))) for s in chance.sample(SHAPES, 2)], **options)
    return given


def of_groups(chance: random.Random) -> None:
    groups: list[Any] = []
    shared = torch.nn.Parameter(torch.randn(2, 2))
    for _ in range(chance.randrange(1, 4)):
        params: list[Any] = [
            torch.nn.Parameter(torch.randn(chance.choice(SHAPES)).to(chance.choice(DTYPES)))
            for _ in range(chance.randrange(1, 3))
        ]
        if chance.random() < 0.03:
            params.append(chance.choice([shared, params[0]]))
        if chance.random() < 0.04:
            params.append(chance.choice(ODD_PARAMETERS)())
        group: dict[Any, Any] = {"params": params}
        for name in chance.sample(FIELDS, chance.randrange(5)):
            group[name] = chance.choice(ODD_VALUES if chance.random() < 0.12 else GOOD[name])
        if chance.random() < 0.04:
            group[chance.choice(["levle", "Lr", "nonfinit", "tag", 3, None, ("a",), "weight-decay"])] = 1
        groups.append(group)
    options = {}
    for name in chance.sample(FIELDS, chance.randrange(4)):
        options[name] = chance.choice(ODD_VALUES if chance.random() < 0.1 else GOOD[name])
    train(groups, **options)


ODD_PARAMETERS = [
    lambda: torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)),
    lambda: torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)),
    lambda: torch.zeros(2, dtype=torch.int32),
    lambda: torch.randn(2, requires_grad=True) * 2,
    lambda: 3,
    lambda: "weight",
    lambda: None,
]


def words_of(error: Exception) -> str:
    """Where an error was raised: ours, torch's own check of a list of parameters, or somewhere foreign."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if OURS in Path(last.filename).parents and re.search("expected|must be|did you mean|The keys of", str(error)):
        return "ours"
    # torch looks at what a list of parameters is made of before FOAM does, in the words of every torch optimizer.
    known = ("optimizer can only optimize", "can't optimize a non-leaf", "some parameters appear in more than one")
    return "torch's" if any(words in str(error) for words in known) else "foreign"


@pytest.mark.parametrize("make", [of_text, of_groups], ids=["optim_args", "param groups"])
def test_a_thousand_random_settings_train_or_are_refused_in_our_words(make) -> None:
    torch.manual_seed(0)
    outcomes = {"trained": 0, "ours": 0, "torch's": 0}
    for seed in range(1000):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's word on a parameter that is listed twice
                make(random.Random(seed))
            outcomes["trained"] += 1
        except Exception as error:
            where = words_of(error)
            if where == "foreign" or not isinstance(error, ValueError | TypeError) or not str(error):
                raise AssertionError(f"seed {seed}: a foreign error, {type(error).__name__}: {error}") from error
            outcomes[where] += 1
    assert outcomes["trained"] > 250 and outcomes["ours"] > 250
