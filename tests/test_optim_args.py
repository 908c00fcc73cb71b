"""What a user may write in --optim_args, and what they read when it is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_hf.optim_args import foam_options, ours_like, parse_optim_args
from tests.support.rules import FOLDING

KEYS = (
    "level",
    "scale",
    "second_moment",
    "residual_scale",
    "stochastic_rounding",
    "state_dtype",
    "nonfinite",
    "fold_embeddings",
    "fold_head",
    "gradient_release",
    "momentum",
    "plain_state",
    "seed",
)


@pytest.mark.parametrize(
    ("given_args", "expected"),
    [
        (None, {}),
        ("", {}),
        ("  ", {}),
        ("level=8", {"level": 8}),
        ("level=row", {"level": "row"}),
        (" level = 0 , scale = 1 ", {"level": 0, "scale": 1.0}),
        ("scale=2.5e-1,residual_scale=0", {"scale": 0.25, "residual_scale": 0.0}),
        ("second_moment=factored", {"second_moment": "factored"}),
        ("stochastic_rounding=auto", {"stochastic_rounding": "auto"}),
        ("stochastic_rounding=False", {"stochastic_rounding": False}),
        ("stochastic_rounding=true", {"stochastic_rounding": True}),
        ("state_dtype=bf16", {"state_dtype": "bfloat16"}),
        ("state_dtype=torch.float32", {"state_dtype": "float32"}),
        ("fold_embeddings=False,gradient_release=false", {"fold_embeddings": False, "gradient_release": False}),
        ("gradient_release=true,fold_head=True", {"gradient_release": True, "fold_head": True}),
        ("second_moment=muon,momentum=0.9", {"second_moment": "muon", "momentum": 0.9}),
        ("plain_state=8bit,second_moment=adam_mini", {"plain_state": "8bit", "second_moment": "adam_mini"}),
        ("seed=7,nonfinite=skip", {"seed": 7, "nonfinite": "skip"}),
        ({"level": 4, "scale": 0.5, "fold_embeddings": True}, {"level": 4, "scale": 0.5, "fold_embeddings": True}),
        ({"level": "row", "stochastic_rounding": "false"}, {"level": "row", "stochastic_rounding": False}),
    ],
)
def test_values_arrive_typed(given_args: Any, expected: dict[str, Any]) -> None:
    parsed = parse_optim_args(given_args)
    assert parsed == expected
    assert {key: type(value) for key, value in parsed.items()} == {key: type(v) for key, v in expected.items()}


@pytest.mark.parametrize(
    ("given_args", "fragments"),
    [
        ("lvel=8", ["'lvel'", "Did you mean 'level'?", *KEYS]),
        ("Scale=1", ["'Scale'", "Did you mean 'scale'?"]),
        ("rank=128", ["'rank'", *KEYS]),
        ("level=17", ["level", "'17'", "0 to 16, or row"]),
        ("level=-1", ["level", "'-1'", "0 to 16, or row"]),
        ("level=8.0", ["level", "'8.0'", "0 to 16, or row"]),
        ("level=rows", ["level", "'rows'", "0 to 16, or row"]),
        ("scale=0", ["scale", "'0'", "above 0"]),
        ("scale=nan", ["scale", "'nan'", "finite"]),
        ("scale=inf", ["scale", "'inf'", "finite"]),
        ("scale=a quarter", ["scale", "'a quarter'"]),
        ("residual_scale=-0.5", ["residual_scale", "'-0.5'", "0 or more"]),
        ("second_moment=row", ["second_moment", "'row'", "block, factored, muon or adam_mini"]),
        ("plain_state=4bit", ["plain_state", "'4bit'", "full or 8bit"]),
        ("momentum=1", ["momentum", "'1'", "from 0 to below 1"]),
        ("stochastic_rounding=maybe", ["stochastic_rounding", "'maybe'", "auto, true or false"]),
        ("state_dtype=float16", ["state_dtype", "'float16'", "float32 or bfloat16"]),
        ("fold_embeddings=2", ["fold_embeddings", "'2'", "true or false"]),
        ("seed=-1", ["seed", "'-1'"]),
        ("nonfinite=raise", ["nonfinite", "'raise'", "error, skip or ignore"]),
        ("gradient_release=1", ["gradient_release", "'1'", "true or false"]),
        ("level=8,level=4", ["'level'", "twice"]),
        ("level", ["'level'", "key=value"]),
        ("level=", ["'level='", "key=value"]),
        ("=8", ["'=8'", "key=value"]),
        ("level=8,", ["''", "key=value"]),
        ("level=8,,scale=1", ["''", "key=value"]),
        ('{"level": 8}', ["key=value"]),
        (8, ["8", "string"]),
        ({"level": None}, ["level", "'None'"]),
    ],
)
def test_error_names_the_key_the_value_and_what_is_legal(given_args: Any, fragments: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse_optim_args(given_args)
    message = str(caught.value)
    assert message.startswith("optim_args")
    for fragment in fragments:
        assert fragment in message
    error = caught.value
    assert error.__cause__ is None and (error.__suppress_context__ or error.__context__ is None)


def test_names_stand_for_options_and_refuse_others() -> None:
    assert foam_options("foam_mini", "scale=1") == {"level": "row", "scale": 1.0}
    assert foam_options("foam_muon", "level=2,momentum=0.9") == {
        "level": 2,
        "momentum": 0.9,
        "second_moment": "muon",
    }
    for optim, given_args, message in (
        ("foam_muon", "second_moment=block", "second_moment=block contradicts optim='foam_muon'"),
        ("foam_mini", "level=2", "level=2 contradicts optim='foam_mini'"),
        ("foam_adam_mini", "momentum=0.9", "momentum=0.9 is Muon's"),
        ("foam_adam_mini", "plain_state=8bit", "plain_state=8bit quantizes AdamW's moments"),
        ("foam", "momentum=0.9", "momentum=0.9 is Muon's.*expected optim='foam_muon'"),
        ("foam_muon", "embedding_scale=2", "embedding_scale=2.0 is the block rule's.*expected optim='foam'"),
        ("foam", "second_moment=factored,embedding_scale=2", "does not read it; expected second_moment=block, or no"),
    ):
        with pytest.raises(ValueError, match=message):
            foam_options(optim, given_args)


pieces = st.one_of(st.text(), st.builds("{}={}".format, st.sampled_from(KEYS), st.text()))


@given(st.lists(pieces).map(",".join))
def test_any_text_parses_or_raises_our_own_error(text: str) -> None:
    try:
        parsed = parse_optim_args(text)
    except ValueError as error:
        assert str(error).startswith("optim_args")
    else:
        assert set(parsed) <= set(KEYS)
        json.dumps(parsed)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "level": st.one_of(st.integers(0, 16), st.just("row")),
            "scale": st.floats(1e-9, 1e9),
            "residual_scale": st.floats(0, 1e9),
            "second_moment": st.sampled_from(FOLDING),
            "plain_state": st.sampled_from(["full", "8bit"]),
            "stochastic_rounding": st.sampled_from(["auto", True, False]),
            "state_dtype": st.sampled_from(["float32", "bfloat16"]),
            "fold_embeddings": st.booleans(),
            "fold_head": st.booleans(),
            "gradient_release": st.booleans(),
            "momentum": st.floats(0, 0.999),
            "seed": st.integers(0, 2**64 - 1),
        },
    )
)
def test_legal_values_survive_the_way_through_text(values: dict[str, Any]) -> None:
    assert parse_optim_args(",".join(f"{key}={value}" for key, value in values.items())) == values
    assert parse_optim_args(values) == values


# wrong moves of a new user


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("learning_rate=1e-4", "learning_rate"),
        ("lr=1e-4", "learning_rate"),
        ("betas=0.9", "adam_beta1 and adam_beta2"),
        ("adam_beta1=0.9", "adam_beta1"),
        ("eps=1e-8", "adam_epsilon"),
        ("weight_decay=0.1", "weight_decay"),
    ],
)
def test_what_belongs_to_the_trainer_names_its_field(given: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"is TrainingArguments' own; expected {field} of TrainingArguments"):
        parse_optim_args(given)


@pytest.mark.parametrize("given", ["level=8;scale=1", "level=8 scale=1", "level=8; scale=1;", "level=8|scale=1"])
def test_pairs_are_separated_by_commas(given: str) -> None:
    said = "pairs are separated by commas, got .*; expected something like 'level=8,scale=1'"
    with pytest.raises(ValueError, match=said):
        parse_optim_args(given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("FOAM", "foam"),
        ("Foam", "foam"),
        ("foam-mini", "foam_mini"),
        ("Foam_Muon", "foam_muon"),
        ("adamw_torch", None),
    ],
)
def test_misspelt_names(given: str, meant: str | None) -> None:
    assert ours_like(given) == meant
