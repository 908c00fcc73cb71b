"""foam_hf.axolotl_plugin against a stand-in of axolotl; recipes/integrations.md tells of runs with the real one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foam_hf.optim_args import parse_optim_args

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"^```yaml\n(.*?)^```", (ROOT / "recipes" / "integrations.md").read_text(encoding="utf-8"), re.M | re.S
)
YAML = """
plugins: [foam_hf.axolotl_plugin.FoamPlugin]
optimizer: foam
optim_args: {level: 3, scale: 0.25, fold_embeddings: true}
learning_rate: 1.0e-3
max_steps: 2
"""


REFUSED = [
    ("plugins: [foam_hf.axolotl_plugin.FoamPlugin]", "", "Input should be 'adamw_torch'"),  # without the plugin
    ("level: 3", "levl: 3", "unknown key 'levl'. Did you mean 'level'?"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """One process of the stand-in: its folder, what it prints of each YAML, those of REFUSED first, and its errors."""
    folder = tmp_path_factory.mktemp("axolotl")
    (documented,) = [block for block in BLOCKS if "plugins:" in block]
    shorter = documented.replace("optimizer: foam", "optimizer: foam\noptim_args: {level: 3}").replace(
        "output_dir: out", "optim_target_modules: all_linear"
    )
    other = YAML.replace("optimizer: foam", "optimizer: sgd\nembedding_lr: 1.0e-4").replace(
        "optim_args", "# optim_args"
    )
    configs = [*(YAML.replace(old, new) for old, new, _ in REFUSED), shorter + "max_steps: 2\n", other]
    paths = [folder / f"{number}.yaml" for number in range(len(configs))]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(config + f"output_dir: {folder / path.stem}\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "axolotl_stand_in.py"), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.split(r"^config \S+\n", done.stdout, flags=re.M)[1:]
    assert len(said) == len(configs)
    return folder, said, done.stderr


def test_a_yaml_with_the_plugin_trains_with_foam_and_other_optimizers_as_before(runs) -> None:
    _, (*_, foam, other), errors = runs
    assert "trained with FOAM all-linear" in foam
    assert "levels ['0', '3']" in foam
    assert "Optimizer memory: FOAM" in foam + errors
    assert "trained with SGD None" in other and "refused" not in foam + other + errors


def test_what_cannot_work_is_refused_before_a_model_is_loaded(runs) -> None:
    folder, said, _ = runs
    for number, (_, _, message) in enumerate(REFUSED):
        assert "refused: " in said[number] and message in said[number]
        assert not (folder / str(number)).exists()


def test_the_yaml_for_llamafactory_says_what_foam_understands() -> None:
    (documented,) = [yaml.safe_load(block) for block in BLOCKS if "stage: sft" in block]
    assert documented["optim"] == "foam" and documented["finetuning_type"] == "full"
    parse_optim_args(documented.get("optim_args"))
