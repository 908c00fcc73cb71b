"""Plans for DeepSpeed's ZeRO: how weights are divided, what a config changes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foam_hf import estimate_memory
from foam_hf.planner.zero import STAGES, Zero, flats, zero_settings
from tests.support import tiny_models

SIZE = {"batch": 2, "sequence": 8}
GB = 10**9


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("gpus", [1, 3, 4])
def test_every_element_is_held_once(stage: int, gpus: int) -> None:
    weights = [torch.empty(shape, device="meta") for shape in [(37, 5), (3,), (16, 40), (1,), (7, 129)]]
    for zero in (Zero(stage, gpus), Zero(stage, gpus, round_robin=True, sub_group=200)):
        seen = [torch.zeros(p.numel(), dtype=torch.int) for p in weights]
        sizes = []
        for rank in range(gpus):
            held = flats(weights, zero, rank)
            sizes.append([flat.numel for flat in held])
            for flat in held:
                assert flat.numel >= sum(segment.size for segment in flat.segments)
                for weight, first, size in flat.segments:
                    number = next(i for i, p in enumerate(weights) if p is weight)
                    seen[number][first : first + size] += 1
        assert all(bool((part == 1).all()) for part in seen)
        assert all(each == sizes[0] for each in sizes), "every process has vectors of the same sizes"


def test_stages_divide_more_and_more() -> None:
    plans = {stage: estimate_memory("llama-3.1-8b", zero=stage, gpus=8, sequence=128) for stage in STAGES}
    alone = estimate_memory("llama-3.1-8b", sequence=128, optim_args="embedding_rule=block")  # as under ZeRO
    assert all(plan.masters == plans[1].masters for plan in plans.values())
    assert plans[1].masters == pytest.approx(4 * 8.03 * GB / 8, rel=1e-3)
    assert alone.state / 8 <= plans[1].state < 1.001 * alone.state / 8
    assert plans[1].gradients == alone.gradients
    assert plans[2].gradients < plans[1].gradients / 4
    assert plans[1].weights == plans[2].weights == pytest.approx(alone.weights, rel=1e-6)
    assert plans[3].weights == pytest.approx(alone.weights / 8, rel=1e-4)
    assert plans[3].total < plans[2].total < plans[1].total
    for plan in plans.values():
        kinds = (plan.weights, plan.masters, plan.gradients, plan.state, plan.buffers, plan.activations)
        assert plan.total == sum(kinds) and plan.gpus == 8 and plan.host == 0


def test_offload_moves_what_it_moves_to_host_memory() -> None:
    here, there = (estimate_memory("llama-60m", "adamw_torch", zero=3, gpus=2, offload=on, **SIZE) for on in (0, 1))
    assert (there.masters, there.state) == (0, 0)
    assert there.host > here.masters + here.state
    assert there.total < here.total


def test_a_deepspeed_config_is_read(tmp_path: Path) -> None:
    section: dict[str, Any] = {"stage": 3, "reduce_bucket_size": "auto", "stage3_max_live_parameters": 1e6}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": section}))
    assert zero_settings(str(path), 4, False, 64) == Zero(3, 4, reduce_bucket=64 * 64, live=10**6)
    small = estimate_memory("llama-60m", zero=str(path), gpus=4, **SIZE)
    assert small.buffers < estimate_memory("llama-60m", zero=3, gpus=4, **SIZE).buffers
    section |= {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert zero_settings({"zero_optimization": section}, 4, False, 64).offload
    section = {"stage": 2, "overlap_comm": True, "round_robin_gradients": True, "reduce_bucket_size": 1000}
    found = zero_settings({"zero_optimization": section}, 4, False, None)
    assert found == Zero(2, 4, reduce_bucket=1000, overlap=True, round_robin=True)
    section = {"stage": 3, "offload_param": {"device": "cpu"}, "zero_hpz_partition_size": 4}
    found = zero_settings({"zero_optimization": section}, 4, False, None)
    assert found.not_planned == ("offload_param", "zero_hpz_partition_size")
    section = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}, "cpu_offload": True}
    found = zero_settings({"zero_optimization": section}, 4, False, None)
    assert found.not_planned == ("cpu_offload", "offload_optimizer.ratio")
    assert zero_settings({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}, 4, False, None) == (
        Zero(3, 4)
    )


def test_auto_and_0_mean_what_they_mean_to_deepspeed() -> None:
    section: dict[str, Any] = {"stage": 3, "sub_group_size": "auto", "stage3_max_live_parameters": 0}
    section |= {"overlap_comm": "auto", "round_robin_gradients": "auto", "offload_optimizer": None}
    assert zero_settings({"zero_optimization": section, "data_types": None}, 4, False, None) == Zero(3, 4, live=0)


def test_a_configs_bf16_casts_the_model_as_an_argument_does() -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    asked = estimate_memory("roberta-base", autocast="bfloat16", zero=2, gpus=2, **SIZE)
    assert estimate_memory("roberta-base", zero=config, gpus=2, **SIZE) == asked
    config["bf16"] = {"enabled": "auto"}
    plain = estimate_memory("roberta-base", zero=2, gpus=2, **SIZE)
    assert estimate_memory("roberta-base", zero=config, gpus=2, **SIZE) == plain
    assert estimate_memory("roberta-base", autocast="bfloat16", zero=config, gpus=2, **SIZE) == asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "3"}, "has zero_optimization.stage='3'; expected 1, 2 or 3"),
        ({"stage": True}, "has zero_optimization.stage=True; expected 1, 2 or 3"),
        ({"reduce_bucket_size": "5e8"}, "has reduce_bucket_size='5e8'; expected a number of elements, 1 or more"),
        ({"reduce_bucket_size": None}, "has reduce_bucket_size=None"),
        ({"reduce_bucket_size": float("inf")}, "has reduce_bucket_size=inf"),
        ({"stage3_max_live_parameters": -1}, "has stage3_max_live_parameters=-1"),
        ({"reduce_bucket_size": "auto"}, "has reduce_bucket_size='auto', which this model does not fill in"),
        ({"offload_optimizer": True}, "has offload_optimizer=True; expected a section"),
        ({"offload_param": "cpu"}, "has offload_param='cpu'; expected a section"),
        ({"offload_optimizer": {"device": "gpu"}}, "offload_optimizer.device='gpu'; expected one of none, cpu, nvme"),
    ],
)
def test_a_value_that_its_key_cannot_have_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        zero_settings({"zero_optimization": {"stage": 3, **change}}, 2, False, None)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "null", '{"zero_optimization": 3}', "{", '{"bf16": true}'])
def test_a_file_that_is_no_config_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"zero: .*{path}"):
        zero_settings(str(path), 2, False, None)


def test_deepspeed_casts_the_model_where_autocast_would_not() -> None:
    plain = estimate_memory("roberta-base", autocast="bfloat16", **SIZE)
    zero = estimate_memory("roberta-base", autocast="bfloat16", zero=1, gpus=2, **SIZE)
    assert zero.weights == pytest.approx(plain.weights / 2, rel=1e-3)
    assert zero.masters == pytest.approx(plain.weights / 2, rel=1e-3)


def test_adapters_are_divided_and_frozen_weights_are_not_until_stage_3() -> None:
    model = tiny_models.tiny_llama()
    one, three = (estimate_memory(model, lora_rank=4, zero=stage, gpus=2, **SIZE) for stage in (1, 3))
    assert 0 < one.masters < 4 * one.trainable
    assert three.weights < 0.6 * one.weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zero": 2}, "zero=2 needs the number of GPUs"),
        ({"gpus": 4}, "gpus and offload are FSDP2's and ZeRO's, got gpus=4"),
        ({"offload": True}, "gpus and offload are FSDP2's and ZeRO's"),
        ({"zero": 4, "gpus": 2}, "zero is no stage, got 4; expected 1, 2, 3, or the .json file"),
        ({"zero": 2.0, "gpus": 2}, "zero is no stage, got 2.0"),
        (
            {"zero": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "gpus": 2, "autocast": "float16"},
            "computes in bfloat16, got autocast='float16'; expected one of them",
        ),
        ({"zero": 2, "gpus": 0}, "gpus is not a count, got 0"),
        ({"zero": "ds.json", "gpus": 2}, "zero: cannot read ds.json"),
        (
            {"zero": {"zero_optimization": {"stage": 0}}, "gpus": 2},
            "has zero_optimization.stage=0; expected 1, 2 or 3",
        ),
        ({"zero": {"train_batch_size": 8}, "gpus": 2}, "has zero_optimization.stage=None"),
        ({"zero": 2, "gpus": 2, "optim": "galore_adamw"}, "'galore_adamw' needs whole matrices"),
        ({"zero": 2, "gpus": 2, "optim": "foam_muon"}, "second_moment='muon' needs whole matrices"),
        ({"zero": 2, "gpus": 2, "optim_args": "second_moment=factored"}, "second_moment='factored' needs"),
        ({"zero": 2, "gpus": 2, "optim_args": "embedding_rule=factored"}, "expected embedding_rule='block', or DDP"),
        ({"zero": 2, "gpus": 2, "gradient_release": True}, "gradient_release does not run under DeepSpeed's ZeRO"),
        ({"zero": 2, "gpus": 2, "int8_weights": True}, "int8_weights does not run under DeepSpeed's ZeRO"),
    ],
)
def test_errors_say_what_would_be_right(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        estimate_memory("llama-60m", **arguments)
    assert message in str(caught.value)
