"""foam_hf.axolotl_plugin against a stand-in of axolotl; recipes/integrations.md tells of runs with the real one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from foam_hf.optim_args import parse_optim_args

TESTS = Path(__file__).resolve().parent
BLOCKS = re.findall(
    r"^```yaml\n(.*?)^```", (TESTS.parent / "recipes" / "integrations.md").read_text(encoding="utf-8"), re.M | re.S
)
YAML = """
plugins: [foam_hf.axolotl_plugin.FoamPlugin]
optimizer: foam
optim_args: {level: 3, scale: 0.25, fold_embeddings: true}
learning_rate: 1.0e-3
max_steps: 2
"""


def axolotl(tmp_path: Path, *configs: str) -> str:
    """What the stand-in prints, given these YAMLs one after the other."""
    paths = [tmp_path / f"{number}.yaml" for number in range(len(configs))]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(config + f"output_dir: {tmp_path / 'out'}\n")
    done = subprocess.run(
        [sys.executable, str(TESTS / "axolotl_stand_in.py"), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_a_yaml_with_the_plugin_trains_with_foam_and_other_optimizers_as_before(tmp_path: Path) -> None:
    (documented,) = [block for block in BLOCKS if "plugins:" in block]
    shorter = documented.replace("level: 8", "level: 3").replace("output_dir: out", "optim_target_modules: all_linear")
    other = YAML.replace("optimizer: foam", "optimizer: sgd\nembedding_lr: 1.0e-4").replace(
        "optim_args", "# optim_args"
    )
    said = axolotl(tmp_path, shorter + "max_steps: 2\n", other)
    assert "trained with FOAM all-linear" in said
    assert "levels ['0', '3']" in said
    assert "Optimizer memory: FOAM" in said
    assert "trained with SGD None" in said and "refused" not in said


def test_what_cannot_work_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    cases = [
        (
            "plugins: [foam_hf.axolotl_plugin.FoamPlugin]",
            "",
            "Input should be 'adamw_torch'",
        ),  # without the plugin
        ("level: 3", "levl: 3", "unknown key 'levl'. Did you mean 'level'?"),
        ("max_steps", "embedding_lr: 1.0e-4\nmax_steps", "embedding_lr: 0.0001 has no effect with optimizer: foam"),
    ]
    said = axolotl(tmp_path, *(YAML.replace(old, new) for old, new, _ in cases)).split("refused: ")[1:]
    assert len(said) == len(cases)
    for text, (_, _, message) in zip(said, cases, strict=True):
        assert message in text
    assert not (tmp_path / "out").exists()


def test_the_yaml_for_llamafactory_says_what_foam_understands() -> None:
    (documented,) = [yaml.safe_load(block) for block in BLOCKS if "stage: sft" in block]
    assert documented["optim"] == "foam" and documented["finetuning_type"] == "full"
    assert parse_optim_args(documented["optim_args"])["level"] == 8
