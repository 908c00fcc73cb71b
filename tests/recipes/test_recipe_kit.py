"""What the recipes' scripts share: hints, configs found, and what a run says that it replaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from foam_hf import recipe_kit as recipe_helpers

ROOT = Path(__file__).resolve().parents[2]


def test_the_nearest_names_are_those_that_begin_with_what_was_typed():
    names = ["data_seed", "dataset_path", "dataset_name", "output_dir"]
    assert recipe_helpers.nearest("dataset", names) == ["dataset_name", "dataset_path"]
    assert recipe_helpers.nearest("path", names) == ["dataset_path"]
    assert recipe_helpers.nearest("ouput_dir", names) == ["output_dir"]


def test_optim_args_that_drop_nothing_need_no_word():
    assert recipe_helpers.replaced_optim_args("level=2", None, "c.yaml") is None
    assert recipe_helpers.replaced_optim_args("level=2,scale=1", "level=8", "c.yaml") is None
    said = recipe_helpers.replaced_optim_args("level=2", "level=8,gradient_release=true", "c.yaml")
    assert said == (
        "--optim_args level=2 replaces all optim_args of c.yaml: without gradient_release=true from now on."
    )


def test_results_are_kept_and_checkpoints_told_of(tmp_path):
    said: list[str] = []
    recipe_helpers.keep_earlier(tmp_path / "none", False, said.append)
    assert said == []
    for content in ("first", "second"):
        (tmp_path / "results.json").write_text(content)
        recipe_helpers.keep_earlier(tmp_path, True, said.append)
    assert [(tmp_path / f"results-{n}.json").read_text() for n in (1, 2)] == ["first", "second"]
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    recipe_helpers.keep_earlier(tmp_path, False, said.append)
    assert "newest of step 20: this one starts at step 0; --resume_from_checkpoint true" in said[-1]


@pytest.mark.parametrize("name", ["quantized/smollm2-135m-int8.yaml", "smollm2-135m-int8.yaml", "qwen3-0.6b.yaml"])
def test_a_config_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_helpers.find_config(Path(name), ROOT / "recipes" / "instruct").is_file()
    assert recipe_helpers.find_config(Path("none.yaml"), ROOT / "recipes" / "instruct") == Path("none.yaml")


@pytest.mark.parametrize("missing", ["trl", "datasets"])
def test_a_missing_package_is_one_line_with_the_fix(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.path.insert(0, 'recipes/instruct'); "
        "import runpy; sys.argv = ['train.py']; runpy.run_path('recipes/instruct/train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "This recipe needs TRL, PEFT and datasets (pip install trl peft datasets)" in done.stderr
