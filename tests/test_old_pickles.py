"""Files that version 0.2.0 pickled name modules and functions of this package, which must stay where they are.

`data/training_args-0.2.0.bin` is what Trainer wrote beside a checkpoint. `data/int8_weight-0.2.0.pt` has the INT8
weight of an `nn.Linear` as a parameter, and the state dict of that module. `data/int8_model-0.2.0.pt` has a Llama
model of INT8 weights with its logits, an `Int8Config`, what `estimate_memory` returned, and an
`OptimizerMemoryCallback` that had measured a step.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.test_trainer import python

pytestmark = pytest.mark.long

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


WEIGHTS_ONLY = """
import os
import sys
import torch  # once, for all of the processes below
import foam_hf

assert "foam_hf.int8.weight" not in sys.modules
for line in sys.argv[2:]:
    if (child := os.fork()) == 0:
        exec(line)
        assert "transformers" not in sys.modules, line
        assert torch.load(sys.argv[1], weights_only=True)["weight"].shape == (2, 32)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, line
print("trained")
"""

MODEL = """
import sys
import torch

saved = torch.load(sys.argv[1], weights_only=False)
import foam_hf
from transformers import TrainerControl, TrainerState, TrainingArguments

config, plan, report, model = (saved[name] for name in ("config", "plan", "callback", "model"))
assert type(config) is foam_hf.Int8Config
assert config.choice() == {"block_size": 32, "head": True, "modules_to_not_convert": None}
assert (plan.label, plan.parameters, plan.weights, plan.state) == ("foam", 2352, 9472, 1536)
assert plan.total == 9472 + 9408 + 1536 + 67117888 and plan.activations_note

ids = torch.arange(8).view(1, 8)
assert torch.allclose(model(input_ids=ids).logits, saved["logits"], atol=0.01)
assert type(model.config.quantization_config) is foam_hf.Int8Config
assert len(model.hf_quantizer.plan.blocks) == 7
state_dict = model.state_dict()  # the hooks are pickled by name
codes = "model.layers.0.mlp.up_proj.weight_codes"
state_dict[codes] = torch.zeros_like(state_dict[codes])
model.load_state_dict(state_dict)
assert not model.model.layers[0].mlp.up_proj.weight.dequantize().any()

args = TrainingArguments(output_dir=sys.argv[2], use_cpu=True, report_to="none")
optimizer = foam_hf.FOAM(model.parameters(), lr=0.01, level=1)
events, given = (args, TrainerState(), TrainerControl()), {"model": model, "optimizer": optimizer}
assert type(report) is foam_hf.OptimizerMemoryCallback and report.plot.name == "memory.png"
report.plot = None
report.on_train_begin(*events, **given)
report.on_step_begin(*events, **given)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
report.on_step_end(*events, **given)  # of a loop that has no event for the optimizer's step
report.on_train_end(*events, **given)
(logged,) = events[1].log_history
assert logged["optim/state_bytes"] == sum(
    tensor.nbytes for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)
), logged
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


def test_every_import_of_the_optimizer_allows_int8_weights_to_load_with_weights_only() -> None:
    imports = [
        "from foam_hf import foam_param_groups",
        "from foam_hf import enable_gradient_release",
        "from foam_hf import estimate_memory",
        "from foam_hf.optimizer import FOAM",
        "from foam_hf.memory import breakdown",
    ]
    check(WEIGHTS_ONLY, str(DATA / "int8_weight-0.2.0.pt"), *imports)


def test_an_int8_model_a_plan_and_a_callback_of_version_0_2_load_and_work(tmp_path: Path) -> None:
    check(MODEL, str(DATA / "int8_model-0.2.0.pt"), str(tmp_path))
