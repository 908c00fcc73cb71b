"""What the recipes' scripts share: hints, configs found, and what a run says that it replaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foam_hf import recipe_config, recipe_kit

ROOT = Path(__file__).resolve().parents[2]


def test_the_nearest_names_are_those_that_begin_with_what_was_typed():
    names = ["data_seed", "dataset_path", "dataset_name", "output_dir"]
    assert recipe_config.nearest("dataset", names) == ["dataset_name", "dataset_path"]
    assert recipe_config.nearest("path", names) == ["dataset_path"]
    assert recipe_config.nearest("ouput_dir", names) == ["output_dir"]


def test_optim_args_that_drop_nothing_need_no_word():
    assert recipe_config.replaced_optim_args("level=2", None, "c.yaml") is None
    assert recipe_config.replaced_optim_args("level=2,scale=1", "level=8", "c.yaml") is None
    said = recipe_config.replaced_optim_args("level=2", "level=8,gradient_release=true", "c.yaml")
    assert said == (
        "--optim_args level=2 replaces all optim_args of c.yaml: without gradient_release=true from now on."
    )


def test_results_are_kept_and_checkpoints_told_of(tmp_path):
    said: list[str] = []
    recipe_kit.keep_earlier(tmp_path / "none", False, said.append)
    assert said == []
    for content in ("first", "second"):
        (tmp_path / "results.json").write_text(content)
        recipe_kit.keep_earlier(tmp_path, True, said.append)
    assert [(tmp_path / f"results-{n}.json").read_text() for n in (1, 2)] == ["first", "second"]
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    recipe_kit.keep_earlier(tmp_path, False, said.append)
    assert "newest of step 20: this one starts at step 0; --resume_from_checkpoint true" in said[-1]


def test_results_are_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "results.json"
    recipe_kit.write_json(file, {"loss": 1.0})
    with pytest.raises(ValueError):
        recipe_kit.write_json(file, {"loss": [1, float("nan")]})
    assert json.loads(file.read_text()) == {"loss": 1.0}
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_page_without_marks_is_left_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- b -->\nafter\n")
    recipe_kit.renew_page(page, "<!-- a -->", "<!-- b -->", "new")
    assert page.read_text() == "before\n<!-- a -->\nnew\n<!-- b -->\nafter\n"
    for start, end in (("<!-- a -->", "<!-- c -->"), ("<!-- c -->", "<!-- b -->")):
        with pytest.raises(SystemExit, match="page.md: expected a page with the lines <!-- . --> and <!-- . -->"):
            recipe_kit.renew_page(page, start, end, "none")
    assert "new" in page.read_text()


@pytest.mark.parametrize("name", ["quantized/smollm2-135m-int8.yaml", "smollm2-135m-int8.yaml", "qwen3-0.6b.yaml"])
def test_a_config_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_config.find_config(Path(name), ROOT / "recipes" / "instruct").is_file()
    assert recipe_config.find_config(Path("none.yaml"), ROOT / "recipes" / "instruct") == Path("none.yaml")


@pytest.mark.parametrize("missing", ["trl", "datasets"])
def test_a_missing_package_is_one_line_with_the_fix(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.path.insert(0, 'recipes/instruct'); "
        "import runpy; sys.argv = ['train.py']; runpy.run_path('recipes/instruct/train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "This recipe needs TRL, PEFT and datasets (pip install trl peft datasets)" in done.stderr
