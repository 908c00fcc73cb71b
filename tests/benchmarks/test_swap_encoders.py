"""The swap test on encoders: stacked seeds compute what separate runs would, and its queue from data to tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from foam_hf import FOAM
from foam_hf.rules.adam_mini import rows_of_blocks
from recipes.benchmarks.quality import stacked, stacked_models, stacked_optim, swap_encoders, swap_table
from tests.support.tolerances import assert_within

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
QUALITY = ROOT / "recipes" / "benchmarks" / "quality"
KINDS = ("bert", "mpnet")
RULES = {
    "block": {"level": 3, "scale": 4.0, "second_moment": "block"},
    "row": {"level": "row", "scale": 4.0, "second_moment": "block"},
    "factored": {"level": 3, "scale": 1.0, "second_moment": "factored"},
    "adam_mini": {"level": 3, "scale": 1.0, "second_moment": "adam_mini"},
    "embeddings factored": {"level": 3, "scale": 4.0, "second_moment": "block", "embeddings": "factored"},
    "embeddings plain": {"level": 3, "scale": 0.25, "second_moment": "block", "embeddings": "plain"},
}


def tiny(kind: str) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification, MPNetConfig, MPNetForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 210, "num_labels": 2, "initializer_range": 0.3}
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**sizes))
    return MPNetForSequenceClassification(MPNetConfig(**sizes))


def base_of(model: nn.Module) -> tuple[SimpleNamespace, dict[str, torch.Tensor]]:
    kind = model.config.model_type
    weights = {name.removeprefix(f"{kind}."): p.detach().clone() for name, p in model.named_parameters()}
    weights = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    return SimpleNamespace(**model.config.to_dict()), weights


def stack_of(kind: str, seeds: list[int], **options: Any) -> stacked_models.Stack:
    return stacked_models.Stack(*base_of(tiny(kind)), seeds, torch.float32, "cpu", **options)


def arrays(rows: int = 20, longest: int = 190) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, longest, rows)
    found = {"lengths": lengths, "labels": draw.integers(0, 2, rows), "types": draw.integers(0, 2, lengths.sum())}
    found["ids"] = draw.integers(5, 64, lengths.sum())
    return {
        f"cola_{split}_{name}": value.astype(np.uint16)
        for split in ("train", "validation")
        for name, value in found.items()
    }


def batch_for(stack: stacked_models.Stack, data: stacked_models.Rows, chosen: np.ndarray) -> stacked_models.Batch:
    batch = stacked_models.index_batch(data, chosen, stack.config, stack.shared)
    return stacked_models.on_device([batch], "cpu")[0]


def inputs(kind: str, data: stacked_models.Rows, row: int) -> dict[str, torch.Tensor]:
    at = slice(data.starts[row], data.starts[row] + data.lengths[row])
    found = {"input_ids": torch.tensor(data.ids[at])[None], "labels": torch.tensor(data.labels[row : row + 1])}
    return {**found, "token_type_ids": torch.tensor(data.types[at])[None]} if kind == "bert" else found


def assert_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """All at once, over the largest of a model: that of a key's bias is zero but for rounding."""
    assert actual.keys() == expected.keys()
    ours, theirs = (torch.cat([found[name].flatten() for name in expected]) for found in (actual, expected))
    assert_within(ours, theirs, "gradients of a stack of seeds against separate ones")


# ---- the model ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_computes_transformers_logits_and_gradients_without_padding_in_them(kind: str) -> None:
    model = tiny(kind).eval()
    stack = stack_of(kind, [1, 2])
    stack.training = False
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("classifier"):
                stack.parameters[name].copy_(torch.stack([p, p]))
    data = stacked_models.Rows(arrays(), "cola_train")
    draw = np.random.default_rng(1)
    chosen = np.stack([draw.permutation(20)[:5] for _ in range(2)])  # the seeds see other rows, of other lengths
    logits = stack(batch_for(stack, data, chosen))
    for k in range(2):
        for j, row in enumerate(chosen[k]):
            torch.testing.assert_close(logits[k, j], model(**inputs(kind, data, row)).logits[0], rtol=0, atol=1e-5)
    labels = torch.tensor(data.labels[chosen])
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    sum(model(**inputs(kind, data, row)).loss for row in chosen[1]).backward()
    expected = {name.removeprefix(f"{kind}."): p.grad for name, p in model.named_parameters()}
    assert_gradients({name: p.grad[1] for name, p in stack.parameters.items()}, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_drawn_for_each_seed_as_transformers_draws_them(kind: str) -> None:
    model = tiny(kind)
    stack = stack_of(kind, [5, 6, 5])
    heads = {name: p for name, p in stack.parameters.items() if name.startswith("classifier")}
    assert heads.keys() == {name for name, _ in model.named_parameters() if name.startswith("classifier")}
    for name, p in heads.items():
        assert p.shape[1:] == dict(model.named_parameters())[name].shape
        assert torch.equal(p[0], p[2])
        if name.endswith("weight"):
            assert not torch.equal(p[0], p[1])
            assert 0.2 < p.std() < 0.4  # initializer_range
        else:
            assert not p.any()


def test_adapters_start_as_the_model_and_are_all_that_is_trained() -> None:
    plain, adapted = stack_of("mpnet", [1, 2]), stack_of("mpnet", [1, 2], lora={"r": 2, "lora_alpha": 4})
    data, chosen = stacked_models.Rows(arrays(), "cola_train"), np.array([[0, 1], [2, 3]])
    plain.training = adapted.training = False
    before = adapted(batch_for(adapted, data, chosen))
    torch.testing.assert_close(before, plain(batch_for(plain, data, chosen)), rtol=0, atol=1e-5)
    before.sum().backward()
    assert all(p.grad is not None for p in adapted.parameters.values())
    layers = {name.rsplit(".lora", 1)[0] for name in adapted.parameters if ".lora_" in name}
    assert len(layers) == 2 * 6  # every linear layer of both layers
    assert all(".lora_" in name or name.startswith("classifier") for name in adapted.parameters)


# ---- the optimizers ----


@pytest.mark.parametrize(
    ("optim", "options"),
    [("adamw", {}), ("adafactor", {}), ("apollo_adamw", {"rank": 2}), *(("foam", rule) for rule in RULES.values())],
    ids=["AdamW", "Adafactor", "APOLLO", *RULES],
)
def test_two_stacked_seeds_end_where_two_separate_runs_do(optim: str, options: dict) -> None:
    both, alone = stack_of("bert", [1, 2]), [stack_of("bert", [seed]) for seed in (1, 2)]
    optimizers = [stacked_optim.build_optimizer(stack, optim, options, 1e-2) for stack in (both, *alone)]
    torch.manual_seed(3)
    for _ in range(4):
        for name, p in both.parameters.items():
            p.grad = torch.randn_like(p) * torch.tensor([1.0, 1e-3]).view(2, *[1] * (p.dim() - 1))
            for k, stack in enumerate(alone):
                stack.parameters[name].grad = p.grad[k : k + 1].clone()
        for optimizer in optimizers:
            optimizer.step()
    for k, stack in enumerate(alone):
        for name, p in stack.parameters.items():
            assert_within(both.parameters[name][k], p[0], "a stack of seeds against separate runs")


@pytest.mark.parametrize("lora", [None, {"r": 2, "lora_alpha": 4}], ids=["weights", "adapters"])
def test_the_gradients_of_stacked_seeds_are_those_of_separate_runs(lora: dict | None) -> None:
    data = stacked_models.Rows(arrays(longest=40), "cola_train")
    chosen = np.stack([np.random.default_rng(seed).permutation(20)[:4] for seed in (1, 2)])

    def gradients(seeds: list[int], rows: np.ndarray) -> dict[str, torch.Tensor]:
        stack = stack_of("mpnet", seeds, lora=lora)
        stack.training = False
        batch = batch_for(stack, data, rows)
        nn.functional.cross_entropy(stack(batch).flatten(0, 1), batch.labels.long(), reduction="sum").backward()
        return {name: p.grad for name, p in stack.parameters.items()}

    both = gradients([1, 2], chosen)
    for k, seed in enumerate((1, 2)):
        alone = {name: grad[0] for name, grad in gradients([seed], chosen[k : k + 1]).items()}
        assert_gradients({name: grad[k] for name, grad in both.items()}, alone)


def test_foam_on_a_stack_is_foam_with_the_groups_of_the_models_own_weights() -> None:
    """One seed of a stack against a model's tensors, as a user has them."""
    stack = stack_of("mpnet", [1])
    groups = stacked_optim.foam_groups(stack, **RULES["block"])
    folded = {id(p) for group in groups if group["level"] != 0 for p in group["params"]}
    names = {name for name, p in stack.parameters.items() if id(p) in folded}
    expected = {name for name, p in tiny("mpnet").named_parameters() if p.dim() > 1 and "classifier" not in name}
    assert names == {name.removeprefix("mpnet.") for name in expected}
    own = [nn.Parameter(p.detach()[0].clone()) for p in stack.parameters.values()]
    kinds = [name in names for name in stack.parameters]
    plain = {"params": [p for p, folds in zip(own, kinds, strict=True) if not folds], **stacked_optim.PLAIN}
    folds = {"params": [p for p, folds in zip(own, kinds, strict=True) if folds], **RULES["block"]}
    ours, theirs = FOAM(groups, lr=0.01), FOAM([folds, plain], lr=0.01)
    for _ in range(3):
        for p, mine in zip(stack.parameters.values(), own, strict=True):
            p.grad = torch.randn_like(p)
            mine.grad = p.grad[0].clone()
        ours.step()
        theirs.step()
    for p, mine in zip(stack.parameters.values(), own, strict=True):
        assert_within(p[0], mine, "a stack of seeds against separate runs")


@pytest.mark.parametrize("kind", KINDS)
def test_adam_mini_has_the_products_blocks(kind: str) -> None:
    model, stack = tiny(kind), stack_of(kind, [1, 2])
    groups = stacked_optim.foam_groups(stack, **RULES["adam_mini"])
    found = {id(p): group for group in groups for p in group["params"]}
    names = [name for name, _ in model.named_parameters()]
    for name, rows in rows_of_blocks(model, names, model.config).items():
        group = found[id(stack.parameters[name.removeprefix(f"{kind}.")])]
        if rows is None:
            assert group["second_moment"] == "block" and group["level"] == 0
        else:
            assert group["second_moment"] == "adam_mini"
            assert group["mini_rows"] == (rows or 1)  # a norm is a row of its stack


def test_each_seed_is_clipped_by_its_own_norm() -> None:
    a, b = nn.Parameter(torch.zeros(2, 3, 4)), nn.Parameter(torch.zeros(2, 5))
    a.grad, b.grad = torch.randn(2, 3, 4), torch.randn(2, 5)
    a.grad[1] *= 1e-3
    b.grad[1] *= 1e-3
    separate = [[nn.Parameter(torch.zeros_like(p[k])) for p in (a, b)] for k in range(2)]
    for k, pair in enumerate(separate):
        for mine, p in zip(pair, (a, b), strict=True):
            mine.grad = p.grad[k].clone()
        torch.nn.utils.clip_grad_norm_(pair, 1.0)
    stacked_optim.clip_each_seed([a, b], 2, 1.0)
    for k, pair in enumerate(separate):
        for mine, p in zip(pair, (a, b), strict=True):
            torch.testing.assert_close(p.grad[k], mine.grad)


def test_the_schedule_is_trainers_cosine() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, 21)
    for step in range(21):
        assert stacked.rate_at(step, 21, 0.1) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


# ---- the queue ----

TINY = {
    "models": {"minilm": {"name": "tiny", "gib": 1}},
    "base": "AdamW",
    "settings": {"epochs": 1, "batch": 4, "eval_batch": 8, "dtype": "float32"},
    "tuning_seeds": [101],
    "widen": 1,
    "seeds": [1, 2],
    "tasks": {"cola": {"train_rows": 8}},
    "arms": [
        {"name": "AdamW", "optim": "adamw", "rates": [1.0e-3, 1.0e-2]},
        {"name": "FOAM", "optim": "foam", "optim_args": RULES["block"], "times": 1},
        {"name": "LoRA", "optim": "adamw", "lora": {"r": 2, "lora_alpha": 4}, "times": 5},
        {"name": "nothing", "optim": "no_such_optimizer", "times": 1},
    ],
}


@pytest.fixture
def study(tmp_path: Path) -> list[str]:
    """The words of a study of a tiny model."""
    model = tiny("bert")
    config, weights = base_of(model)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vars(config), default=str), encoding="utf-8")
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "minilm.npz", **arrays(longest=12))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False), encoding="utf-8")
    words = ["--plan", str(tmp_path / "plan.yaml"), "--data", str(tmp_path / "data"), "--jobs", "2"]
    return [*words, "--model", f"minilm={folder}", "--runs", str(tmp_path / "runs.jsonl")]


def test_a_study_swaps_at_the_bases_rate_and_a_failure_leaves_the_others_alone(study: list[str], tmp_path, capsys):
    command = [sys.executable, "-m", "recipes.benchmarks.quality.swap_encoders", *study]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    tuned = [record for record in records if record["part"] == "tuning"]
    assert len(tuned) == 3  # two rates, and one beyond the better
    rates = {record["arm"]: record["rate"] for record in records if record["part"] == "result"}
    assert rates.keys() == {"AdamW", "FOAM", "LoRA"}
    assert rates["FOAM"] == rates["AdamW"] == rates["LoRA"] / 5
    assert all(len(record["scores"]) == len(record["seeds"]) for record in records)
    share = {record["arm"]: record["state_bytes"] / record["adamw_state_bytes"] for record in records}
    assert share["AdamW"] == pytest.approx(1, abs=0.01)
    assert share["FOAM"] < 0.3  # blocks of 8 in rows of 32 and 48, and AdamW's state for the rest
    assert share["LoRA"] < 0.3
    failed = [json.loads(line) for line in (tmp_path / "runs.jsonl.failed").read_text().splitlines()]
    assert len(failed) == 1 and "no_such_optimizer" in failed[0]["log"]
    assert "| FOAM | " in ran.stdout and "6 jobs, 1 failed, 0 not run" in ran.stdout
    before = (tmp_path / "runs.jsonl").read_text()
    swap_encoders.main([*study, "--arms", "2,3"])  # all is there already
    assert (tmp_path / "runs.jsonl").read_text() == before
    swap_table.main([str(tmp_path / "runs.jsonl"), "--plan", str(tmp_path / "plan.yaml"), "--seeds"])
    assert "cola, FOAM" in capsys.readouterr().out


def test_the_plan_names_only_what_there_is() -> None:
    plan = swap_encoders.read_plan(QUALITY / "swap_encoders.yaml")
    for arm in plan["arms"]:
        assert arm["optim"] in stacked_optim.OPTIMIZERS
        if arm["optim"] == "foam":
            stacked_optim.foam_groups(stack_of("mpnet", [1]), **arm["optim_args"])
        if "rates" in arm:
            assert arm["rates"].keys() == plan["models"].keys()


def test_differences_are_taken_seed_by_seed() -> None:
    def record(arm: str, task: str, scores: list[float | None]) -> dict:
        fixed = {"part": "result", "model": "minilm", "rate": 1e-4, "seeds": [1, 2], "key": ""}
        return {**fixed, "arm": arm, "task": task, "scores": scores, "state_bytes": 1, "adamw_state_bytes": 200}

    plan = {**TINY, "tasks": {"cola": {}, "mrpc": {}}}
    records = [record("AdamW", "cola", [0.5, 0.7]), record("AdamW", "mrpc", [0.8, 0.8])]
    records += [record("FOAM", "cola", [0.52, 0.70]), record("FOAM", "mrpc", [0.82, 0.80])]
    records += [record("LoRA", "cola", [None, 0.70]), record("LoRA", "mrpc", [0.82, 0.80])]
    table = swap_table.summary(plan, records)
    assert "| FOAM | +1.00 ± 1.00 | 0.50% |" in table
    assert "| LoRA | +0.00 | 0.50% |" in table  # the seed that diverged is in no average
