"""A notebook that imports foam_hf twice: the names, pickles and classes are those of the last import."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.test_trainer import python

pytestmark = pytest.mark.long

AGAIN = {
    "purged": "for name in ours(): del sys.modules[name]\nimport foam_hf",
    "reloaded": "for name in ours(): importlib.reload(sys.modules[name])",
    "autoreloaded": "importlib.reload(sys.modules['foam_hf.trainer.names'])",
}

CODE = """
import copy, importlib, pickle, sys
import foam_hf, foam_hf.trainer.callback, foam_hf.int8.quantizer
from transformers import Trainer, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.training_args import OptimizerNames

def ours():
    return [name for name in sys.modules if name.split(".")[0] == "foam_hf"]

def arguments(**more):
    return TrainingArguments(sys.argv[1], optim="foam", report_to="none", use_cpu=True, max_steps=1, disable_tqdm=True,
                             save_strategy="no", **more)

before = arguments()
pickled = pickle.dumps(before)
AGAIN
try:
    arguments(optim_args="lvl=8")
    raise SystemExit("a bad key went through")
except ValueError:
    pass
args = arguments()
for one in (before, args, pickle.loads(pickled), pickle.loads(pickle.dumps(before)), copy.deepcopy(args)):
    assert one.optim is OptimizerNames.FOAM
assert len(set(OptimizerNames)) == len(list(OptimizerNames))
assert AUTO_QUANTIZATION_CONFIG_MAPPING["foam_int8"] is foam_hf.Int8Config
from tests.support.tiny_models import classification_data, tiny_roberta
report = foam_hf.OptimizerMemoryCallback()
run = Trainer(tiny_roberta(), args, train_dataset=classification_data(8), callbacks=[report])
depth, train = 0, Trainer.train
while hasattr(train, "__wrapped__"):
    depth, train = depth + 1, train.__wrapped__
assert depth == 1, depth
run.train()
assert type(run.optimizer.optimizer) is foam_hf.FOAM
assert any("optim/state_bytes" in entry for entry in run.state.log_history)
pickle.loads(pickle.dumps([run.optimizer.optimizer, report]))
print("all there")
"""


@pytest.mark.parametrize("how", list(AGAIN))
def test_the_last_import_is_the_one_that_works(tmp_path: Path, how: str) -> None:
    done = python(CODE.replace("AGAIN", AGAIN[how]), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "all there"
