"""`optim="foam"` under DeepSpeed's ZeRO: Trainers in two processes over gloo follow those in one, step by step."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.training_args import OptimizerNames

import tests.support.zero_trainer_worker as worker
from foam_hf import FOAM
from foam_hf.int8.weight import Int8Weight
from foam_hf.memory import expected_state_bytes, headline
from foam_hf.optimizer.groups import foam_param_groups
from foam_hf.trainer.refusals import refuse_sharding
from tests.support.tiny_models import tiny_llama
from tests.support.tolerances import assert_within
from tests.support.zero_runs import run_worker

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights after every step of runs in two processes, which have checked more themselves."""
    folder = tmp_path_factory.mktemp("zero")
    run_worker("zero_trainer_worker", folder)
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return worker.run(tmp_path_factory.mktemp("alone"), max_steps=worker.STEPS)[1]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    assert [i for i, pair in enumerate(zip(actual, expected, strict=True)) if not torch.equal(*pair)] == []


@pytest.mark.parametrize("name", ["zero 1", "zero 2", "launched"])
def test_every_step_has_the_bits_of_one_process(runs: Any, alone: Any, name: str) -> None:
    """The last run is one of `accelerate launch`, with CPU offload."""
    assert len(runs[name]) == (worker.SHORT if name == "launched" else worker.STEPS)
    assert_same_bits(runs[name], alone[: len(runs[name])])


def test_zero_3_follows_one_process_within_the_rounding_of_its_gradients(runs: Any, alone: Any) -> None:
    """From equal gradients it has equal bits: tests/zero/test_engine.py."""
    assert len(runs["zero 3"]) == worker.STEPS
    for mine, theirs in zip(runs["zero 3"], alone, strict=True):
        assert_within(mine, theirs, "ZeRO 3 against one process, 10 steps")


@pytest.mark.parametrize(
    ("name", "like"), [("resumed 2", "zero 2"), ("resumed 3", "zero 3"), ("zero3_init", "zero 3")]
)
def test_a_checkpoint_and_a_model_that_is_cut_up_while_it_is_loaded_change_nothing(
    runs: Any, name: str, like: str
) -> None:
    first = 2 if "resumed" in name else 0
    assert len(runs[name]) == 3
    assert_same_bits(runs[name], runs[like][first : first + 3])


@pytest.mark.parametrize("name", [f"{name} {stage}" for name, (some, *_) in worker.FEATURES.items() for stage in some])
def test_features_follow_one_process(runs: Any, tmp_path: Path, name: str) -> None:
    feature, stage = name.split()
    expected = worker.feature(tmp_path, feature, None)
    if feature == "clipping" or stage == "3":
        case = "clipping under ZeRO, sums over ranks" if stage == "2" else "ZeRO 3 against one process, 10 steps"
        for mine, theirs in zip(runs[name], expected, strict=True):
            assert_within(mine, theirs, case)
    else:
        assert_same_bits(runs[name], expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_keeps_float32_copies(runs: Any, alone: Any, stage: int) -> None:
    """As all stages compute the same, and learn as float32 does."""
    steps = runs[f"bf16 {stage}"]
    assert_same_bits(steps, runs["bf16 2"])
    assert any((step != step.bfloat16().float()).any() for step in steps)
    assert_within(steps[-1], alone[len(steps) - 1], "bfloat16 under ZeRO against float32, 3 steps")


def test_the_callback_counts_this_process(runs: Any) -> None:
    """State is divided by the processes; a block that both share counts twice."""
    planned = expected_state_bytes(foam_param_groups(tiny_llama(), level=3, embedding_rule="block"))
    assert planned <= runs["memory"]["state"] <= planned + 4 * 2 * 4
    assert runs["memory"]["elements"] == sum(p.numel() for p in tiny_llama().parameters())
    assert runs["memory"]["ratio"] == pytest.approx(planned / (8 * runs["memory"]["elements"]), rel=0.02)


# refusals at the arguments, before a model is loaded

PROBLEMS: list[tuple[str, dict[str, Any]]] = [
    ("would train by 'AdamW' instead of FOAM", {"optimizer": {"type": "AdamW"}}),
    ("zero_optimization.stage=0; expected 1, 2 or 3", {"zero_optimization": {"stage": 0}}),
    ("zero_optimization.stage=0", {"zero_optimization": {}}),
    ('offload_optimizer.device="nvme"', {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}),
    ('offload_param.device="nvme"', {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}),
    (
        "lets DeepSpeed's Adam update the part that stays on the GPU",
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
    ),
    ("elastic_checkpoint=True", {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}),
    ("load_universal=True", {"zero_optimization": {"stage": 2}, "checkpoint": {"load_universal": True}}),
    ("ZeRO 3 without MiCS", {"zero_optimization": {"stage": 3, "mics_shard_size": 2}}),
    ("zenflow", {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}),
    ("expected autotp_size=1", {"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}),
    (
        'torch_autocast.dtype="float16"',
        {"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True, "dtype": "float16"}},
    ),
]


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(("message", "config"), PROBLEMS, ids=[message for message, _ in PROBLEMS])
def test_configs_that_would_not_train_by_foam_are_refused(
    message: str, config: dict[str, Any], as_file: bool, tmp_path: Path
) -> None:
    given: Any = config
    if as_file:
        given = str(tmp_path / "ds.json")
        Path(given).write_text(json.dumps(config))
    args = types.SimpleNamespace(optim=OptimizerNames.FOAM, optim_args=None, deepspeed=given)
    with pytest.raises(ValueError) as caught:
        refuse_sharding(args)
    assert message in str(caught.value) and "does not run with this DeepSpeed config" in str(caught.value)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("gradient_release=true updates each weight inside", {"optim_args": "gradient_release=true"}),
        ("second_moment='muon' needs whole matrices", {"optim": OptimizerNames.FOAM_MUON}),
        ("second_moment='adam_mini' needs whole matrices", {"optim": OptimizerNames.FOAM_ADAM_MINI}),
        ("expected second_moment='block', or DDP or FSDP2", {"optim_args": "second_moment=factored"}),
        (
            "embedding_rule='factored' needs .* expected embedding_rule='block'",
            {"optim_args": "embedding_rule=factored"},
        ),
        ("plain_state='8bit' needs whole matrices", {"optim_args": "plain_state=8bit"}),
    ],
)
def test_options_that_need_whole_weights_are_refused(message: str, options: dict[str, Any]) -> None:
    fine = {"optim": OptimizerNames.FOAM, "optim_args": None, "deepspeed": {"zero_optimization": {"stage": "auto"}}}
    refuse_sharding(types.SimpleNamespace(**fine))
    with pytest.raises(ValueError, match=message):
        refuse_sharding(types.SimpleNamespace(**{**fine, **options}))


def test_int8_weights_are_refused() -> None:
    model = torch.nn.Linear(32, 4)
    model.weight = torch.nn.Parameter(Int8Weight.from_float(model.weight.detach(), 32))
    args = types.SimpleNamespace(optim=OptimizerNames.FOAM, optim_args=None, deepspeed=worker.config(2))
    with pytest.raises(ValueError, match="DeepSpeed cannot train INT8 weights: Linear has 1, weight the first"):
        refuse_sharding(args, model)


def test_the_first_line_compares_with_adamw_under_zero() -> None:
    """ZeRO keeps AdamW's moments in float32, also those of bfloat16 weights."""
    optimizer = FOAM([nn.Parameter(torch.ones(4, 1000, dtype=torch.bfloat16))])
    assert "AdamW's 32.00 kB, for 4,000 trained parameters, divided by 2 processes" in headline(optimizer, zero=2)
    assert headline(optimizer).endswith("AdamW's 16.00 kB, for 4,000 trained parameters")
