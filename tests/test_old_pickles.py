"""Files that version 0.2.0 pickled name modules and functions of this package, which must stay where they are.

`data/training_args-0.2.0.bin` is what Trainer wrote beside a checkpoint. `data/int8_weight-0.2.0.pt` has the INT8
weight of an `nn.Linear` as a parameter, and the state dict of that module.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.test_trainer import python

DATA = Path(__file__).resolve().parent / "data"

ARGUMENTS = """
import sys
import torch

args = torch.load(sys.argv[1], weights_only=False)  # imports this package by itself
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from tests.support.tiny_models import classification_data, tiny_roberta

assert type(args) is TrainingArguments and args.optim is OptimizerNames.FOAM, args.optim
assert (args.optim_args, args.output_dir, args.max_steps) == ("level=row,scale=2", "out", 1)
args.output_dir, args.save_strategy = sys.argv[2], "no"
run = Trainer(tiny_roberta(), args, train_dataset=classification_data(8))
run.train()
import foam_hf
optimizer = run.optimizer.optimizer
assert type(optimizer) is foam_hf.FOAM
assert (optimizer.param_groups[0]["level"], optimizer.param_groups[0]["scale"]) == ("row", 2.0)
assert run.state.global_step == 1 and optimizer.state
print("trained")
"""

WEIGHT = """
import sys
import torch
from torch import nn
IMPORTS
saved = torch.load(sys.argv[1], weights_only=WEIGHTS_ONLY)
weight, state_dict = saved["weight"], saved["state_dict"]
assert isinstance(weight, nn.Parameter) and weight.requires_grad and weight.dtype == torch.bfloat16
from foam_hf import FOAM

first = [-127, -123, -119, -115, -111, -107, -103, -99, -95, -91, -87, -83, -78, -74, -70, -66]
first += [-127, -119, -110, -102, -94, -86, -78, -70, -61, -53, -45, -37, -29, -21, -12, -4]
codes = torch.tensor([first, [-code for code in reversed(first)]], dtype=torch.int8)
# The largest magnitudes of the blocks, 1 and 0.4922 in bfloat16, over 127.
scales = torch.tensor([[1.0, 0.4921875], [0.4921875, 1.0]]) / 127
assert type(weight.data).__name__ == "Int8Weight" and repr(weight).startswith("Int8Weight(shape=(2, 32)")
for found in (weight.codes, state_dict["weight_codes"]):
    assert torch.equal(found, codes), found
for found in (weight.scales, state_dict["weight_scales"]):
    assert torch.equal(found, scales), found

layer = nn.Linear(32, 2, bias=False)
layer.weight = weight
optimizer = FOAM(layer.parameters(), lr=0.01, level=3)
layer(torch.linspace(-1, 1, 32, dtype=torch.bfloat16).expand(4, 32)).square().sum().backward()
optimizer.step()
assert weight.codes.dtype == torch.int8 and not torch.equal(weight.codes, codes)
assert (weight.dequantize(torch.float32) - codes.view(2, 2, 16).mul(scales[..., None]).view(2, 32)).abs().max() < 1
print("trained")
"""


def check(code: str, *arguments: str) -> None:
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "trained"


def test_training_arguments_of_version_0_2_train(tmp_path: Path) -> None:
    check(ARGUMENTS, str(DATA / "training_args-0.2.0.bin"), str(tmp_path))


@pytest.mark.parametrize(
    ("imports", "weights_only"), [("", False), ("from foam_hf import FOAM", True)], ids=["whole", "weights_only"]
)
def test_an_int8_weight_of_version_0_2_trains(imports: str, weights_only: bool) -> None:
    code = WEIGHT.replace("IMPORTS", imports).replace("WEIGHTS_ONLY", str(weights_only))
    check(code, str(DATA / "int8_weight-0.2.0.pt"))
