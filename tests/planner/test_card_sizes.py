"""Which card a config of 7 or 8 B parameters fits, as its comment and the README of recipes/quantized say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from foam_hf.optim_args import split_optim_args
from foam_hf.planner import Planner

QUANTIZED = Path(__file__).resolve().parents[2] / "recipes" / "quantized"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-7b-int8", "llama-3.1-8b-int8"])
def test_the_card_that_a_config_names_is_what_the_estimate_says(name):
    text = (QUANTIZED / f"{name}.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    options = dict(split_optim_args(settings["optim_args"]))
    said = re.search(r"estimate`: ([\d.]+) GB, a card of (\d+) GB.*\n# line; ([\d.]+) GB, a card of (\d+) GB", text)
    assert said, "the config's comment names both sizes and both cards"
    row = next(line for line in (QUANTIZED / "README.md").read_text().splitlines() if line.startswith(f"| `{name}"))
    batch, length = settings["per_device_train_batch_size"], settings["max_length"]
    planner = Planner(name.removesuffix("-int8"), sequence=length, gradient_checkpointing=True)
    plan = planner.plan("foam", options, int8_weights=True)
    assert plan.gradient_release and settings["gradient_checkpointing"]
    cells = [float(cell.split()[0]) for cell in row.split("|")[2:-1]]
    sizes = [planner.with_batch(plan, size).total / 1e9 for size in (1, 2, 4, batch)]
    short = Planner(name.removesuffix("-int8"), sequence=512, gradient_checkpointing=True)
    sizes.insert(0, short.plan("foam", options, int8_weights=True).total / 1e9)
    assert cells == [round(size, 1) for size in sizes]
    assert [float(said[1]), float(said[3])] == [cells[0], cells[-1]]
    assert sizes[0] < float(said[2]) and sizes[-1] < float(said[4])
