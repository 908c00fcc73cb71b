"""The instruct recipe's data: every layout and file format, what is left out, what is held out, and the errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.instruct_runs import load_script, sums, write_jsonl

load_script()

import instruct_data  # noqa: E402


def load(path: Path | None, whole: bool = False, **settings) -> instruct_data.Instructions:
    recipe = {
        "dataset_path": str(path) if path else None,
        "dataset_name": None,
        "dataset_config": None,
        "eval_samples": 2,
        "train_samples": None,
        "split_seed": 0,
        "template_kwargs": {},
    }
    return instruct_data.load_instructions(SimpleNamespace(**{**recipe, **settings}), whole_conversations=whole)


def rows_of(found: instruct_data.Instructions) -> list[tuple[str, str]]:
    """Last question and answer of every example, in one order."""
    rows = [*found.train, *found.held_out]
    return sorted((row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in rows)


EXPECTED = sorted((f"Add {i}" + (f"\n\nand {i}" if i % 2 else ""), f"Sum.\n#### {2 * i}") for i in range(12))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_file_format_gives_the_same_examples(kind, tmp_path):
    path, rows = tmp_path / f"data.{kind}", sums()
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "csv":
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = load(path)
    assert rows_of(found) == EXPECTED
    assert found.train[0]["prompt"][0]["role"] == "user" and found.train[0]["completion"][0]["role"] == "assistant"
    assert found.counts["train"]["layout"] == "alpaca" and found.counts["train"]["columns_not_used"] == []


QUESTION, ANSWER = "What is 1 + 1?", "2"
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}


@pytest.mark.parametrize(
    ("row", "layout", "unused"),
    [
        ({"instruction": QUESTION, "output": ANSWER, "text": "both"}, "alpaca", ["text"]),
        ({"messages": [USER, ASSISTANT], "prompt": QUESTION, "prompt_id": "7"}, "messages", ["prompt", "prompt_id"]),
        (
            {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}], "id": 1},
            "conversations",
            ["id"],
        ),
        ({"conversations": [USER, ASSISTANT]}, "conversations", []),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt/completion", []),
    ],
)
def test_layouts_are_told_apart_by_their_columns(row, layout, unused, tmp_path):
    found = load(write_jsonl(tmp_path / "data.jsonl", [row] * 5))
    assert rows_of(found) == [(QUESTION, ANSWER)] * 5
    assert (found.counts["train"]["layout"], found.counts["train"]["columns_not_used"]) == (layout, unused)
    assert (len(found.train), len(found.held_out)) == (3, 2)


def test_plain_prompts_stay_as_they_are(tmp_path):
    found = load(write_jsonl(tmp_path / "data.jsonl", [{"prompt": " 1 + 1 =", "completion": " 2"}] * 5))
    assert found.train[0] == {"prompt": " 1 + 1 =", "completion": " 2"}


def test_conversations_give_an_example_an_answer_or_stay_whole(tmp_path):
    later = [{"role": "system", "content": "Count."}, USER, ASSISTANT, USER, ASSISTANT, USER]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": later}] * 4)
    found = load(path)
    assert found.counts["train"]["examples"] == 8 and len(found.train) + len(found.held_out) == 8
    assert sorted({len(row["prompt"]) for row in [*found.train, *found.held_out]}) == [2, 4]
    whole = load(path, whole=True)
    assert whole.train[0]["messages"] == later and len(whole.train) == 2


@pytest.mark.parametrize(
    "empty",
    [
        {"instruction": "", "input": " ", "output": "4"},
        {"instruction": "Add", "input": "", "output": " \n"},
        {"instruction": "Add", "input": "", "output": None},
        {"messages": []},
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        {"messages": [ASSISTANT]},
        {"prompt": "", "completion": "2"},
        {"prompt": "1 + 1", "completion": None},
        {"prompt": [], "completion": [ASSISTANT]},
    ],
)
def test_rows_without_question_or_answer_are_left_out_and_counted(empty, tmp_path):
    good = sums(4)
    if "messages" in empty:
        good = [{"messages": [USER, ASSISTANT]}] * 4
    elif "prompt" in empty:
        plain = isinstance(empty["prompt"], str)
        good = [{"prompt": QUESTION if plain else [USER], "completion": ANSWER if plain else [ASSISTANT]}] * 4
    found = load(write_jsonl(tmp_path / "data.jsonl", [good[0], empty, *good[1:]]))
    assert sum(found.counts["train"]["rows_left_out"].values()) == 1
    assert len(found.train) + len(found.held_out) == 4
    said = {"used": 2, "longest": 9, "too_long": 0, "dropped_without_answer": 0}
    assert "of which 1 without a" in instruct_data.describe({"train": {**found.counts["train"], **said}}, 99)


def test_what_is_held_out_depends_on_the_split_seed_alone(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", sums(40))

    def held_out(**settings) -> list:
        return load(path, **settings).held_out.to_list()

    assert held_out(eval_samples=8) == held_out(eval_samples=8, train_samples=3) == held_out(eval_samples=0.2)
    assert held_out(eval_samples=8) != held_out(eval_samples=8, split_seed=1)
    found = load(path, eval_samples=8, train_samples=5)
    assert len(load(path, eval_samples=0.001).held_out) == 1
    assert len(found.train) == 5 and not {str(r) for r in found.train} & {str(r) for r in found.held_out}


def test_a_folder_brings_its_own_held_out_file(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", sums(6))
    write_jsonl(tmp_path / "test.jsonl", [{"instruction": "Last", "input": "", "output": str(i)} for i in range(3)])
    found = load(tmp_path, eval_samples=0.5)
    assert (len(found.train), len(found.held_out)) == (6, 3)
    assert found.counts["held_out"]["rows"] == 3
    assert len(load(tmp_path, eval_samples=2).held_out) == 2


def test_arguments_of_the_template_reach_every_row(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", sums())
    found = load(path, template_kwargs={"enable_thinking": False})
    assert {str(row["chat_template_kwargs"]) for row in found.train} == {"{'enable_thinking': False}"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"question": "1 + 1", "answer": "2"}], ["found the columns question, answer", "Alpaca", "messages"]),
        (
            [{"instruction": "Add", "response": "2"}],
            ["columns instruction, response", "prompt and completion"],
        ),
        ([{"messages": "text"}], ["row 1", "role and content", "got 'text'"]),
        ([{"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "add"}]}]}], ["row 1", "no tool calls"]),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], ["row 1", "expected text as content"]),
        ([{"prompt": [USER], "completion": ANSWER}], ["row 1", "both as text, or both as messages"]),
        ([{"messages": [{"speaker": "me", "text": "x"}]}], ["row 1", "role and content"]),
        ([{"instruction": "Add", "output": ""}] * 3, ["no example is left of 3 rows"]),
        ("{broken\n", ["Cannot read", "data.jsonl"]),
        ("", ["Cannot read", "data.jsonl"]),
    ],
)
def test_data_that_cannot_be_used_is_one_sentence(content, words, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(content) if isinstance(content, str) else write_jsonl(path, content)
    with pytest.raises(SystemExit) as caught:
        load(path)
    assert all(word in caught.value.code for word in words), caught.value.code
    assert "\n" not in caught.value.code


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["--dataset_path", "--dataset_name", "got neither"]),
        ({"dataset_name": "no-such/data-set"}, ["Cannot read no-such/data-set"]),
    ],
)
def test_a_source_that_is_missing_is_one_sentence(settings, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as caught:
        load(None, **settings)
    assert all(word in caught.value.code for word in words), caught.value.code


def test_files_of_another_kind_and_empty_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit, match=r"\.json, \.jsonl, \.csv, \.parquet"):
            load(path)
    write_jsonl(tmp_path / "only" / "test.jsonl", sums(3))
    with pytest.raises(SystemExit, match="expected one called train"):
        load(tmp_path / "only")


def test_answers_of_one_conversation_are_never_on_both_sides(tmp_path):
    rows = []
    for i in range(10):
        turns = [({"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"})] * 4
        rows.append({"messages": [message for turn in turns for message in turn]})
    found = load(write_jsonl(tmp_path / "data.jsonl", rows), eval_samples=0.2)
    sides = [{row["prompt"][0]["content"] for row in side} for side in (found.train, found.held_out)]
    assert (len(found.train), len(found.held_out)) == (32, 8)
    assert (len(sides[0]), len(sides[1])) == (8, 2) and not sides[0] & sides[1]


def test_a_number_is_an_answer_and_an_empty_cell_makes_no_other_of_it(tmp_path):
    rows = [{"instruction": f"{i} - {i}", "output": 0} for i in range(4)]
    assert rows_of(load(write_jsonl(tmp_path / "data.jsonl", rows))) == [(f"{i} - {i}", "0") for i in range(4)]
    (tmp_path / "data.csv").write_text("instruction,output\na,12\nb,NA\nc,\nd,None\n")
    found = load(tmp_path / "data.csv", eval_samples=1)
    assert rows_of(found) == [("a", "12"), ("b", "NA"), ("d", "None")]
    assert found.counts["train"]["rows_left_out"] == {"without an answer": 1}
    pairs = load(write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "1 + 1 =", "completion": 2}] * 5))
    assert pairs.train[0] == {"prompt": "1 + 1 =", "completion": "2"}


@pytest.mark.parametrize(("content", "words"), [("", "there are no rows"), ('{"a": 1}\n{"a": \n', "JSON")])
def test_a_file_that_is_empty_or_cut_off_is_named_with_the_reason(content, words, tmp_path):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=f"Cannot read .*data.jsonl: .*{words}"):
        load(tmp_path / "data.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize(
    "answers",
    [["1969-07-20", "1989-11-09"], ["007", "010"], ["1.50", "2.00"], ["true", "FALSE"], ["12:30", "13:45"], ["NaN"]],
    ids=lambda answers: answers[0],
)
def test_an_answer_is_what_stands_in_the_file(kind, answers, tmp_path):
    rows = [{"instruction": f"question {i}", "output": answer} for i, answer in enumerate(answers * 2)]
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        path.write_text("instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in rows))
    else:
        path.write_text(json.dumps(rows)) if kind == "json" else write_jsonl(path, rows)
    assert [answer for _, answer in rows_of(load(path, eval_samples=1))] == answers * 2


def test_a_number_of_json_keeps_its_spelling(tmp_path):
    (tmp_path / "data.json").write_text(
        '\n [{"instruction": "a", "output": 1.50}, {"instruction": "b", "output": 1e3},'
        '{"instruction": "c", "output": true}]'
    )
    assert rows_of(load(tmp_path / "data.json", eval_samples=1)) == [("a", "1.50"), ("b", "1e3"), ("c", "true")]


def test_a_column_may_begin_in_a_later_row(tmp_path):
    rows = [{"instruction": f"{i}?", "output": f"{i}!"} for i in range(3)] + [
        {"instruction": "3?", "output": "3!", "input": "late", "note": {"deep": 1}}
    ]
    found = load(write_jsonl(tmp_path / "data.jsonl", rows), eval_samples=1)
    assert rows_of(found)[-1] == ("3?\n\nlate", "3!") and found.counts["train"]["columns_not_used"] == ["note"]


@pytest.mark.parametrize("role", ["Assistant", "model", "bot", "gpt", "ASSISTANT"])
def test_roles_in_other_spellings_are_those_of_the_template(role, tmp_path):
    rows = [{"messages": [{"role": "Human", "content": QUESTION}, {"role": role, "content": ANSWER}]}] * 4
    found = load(write_jsonl(tmp_path / "data.jsonl", rows), eval_samples=1)
    assert rows_of(found) == [(QUESTION, ANSWER)] * 4 and found.counts["train"]["rows_left_out"] == {}
    unknown = [{"messages": [USER, {"role": "narrator", "content": ANSWER}]}] * 4
    with pytest.raises(SystemExit, match="row 1: unknown role 'narrator'; expected one of user"):
        load(write_jsonl(tmp_path / "other.jsonl", unknown))


def test_every_row_that_is_left_out_is_counted_with_its_reason(tmp_path):
    good = [{"instruction": f"{i}?", "output": f"{i}!"} for i in range(4)]
    rows = [*good, {"instruction": "?", "output": ""}, {"instruction": "", "output": "!"}, {"instruction": "?"}]
    counts = load(write_jsonl(tmp_path / "data.jsonl", rows), eval_samples=1).counts["train"]
    assert counts["rows_left_out"] == {"without an answer": 2, "without a question": 1}
    said = {"used": 2, "longest": 9, "too_long": 0, "dropped_without_answer": 0}
    line = instruct_data.describe({"train": {**counts, **said}}, 99)
    assert "of which 2 without an answer and 1 without a question are left out" in line


def test_a_long_text_and_a_carriage_return_stay_whole_in_csv(tmp_path):
    text = "word " * 40_000 + "a\rb"
    with open(tmp_path / "data.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["instruction", "output"], *[[f"{i}?", text] for i in range(3)]])
    assert {answer for _, answer in rows_of(load(tmp_path / "data.csv", eval_samples=1))} == {text}
    (tmp_path / "short.csv").write_text("instruction,output\na,b\nc\n")
    with pytest.raises(SystemExit, match="short.csv, line 3: 1 cells, and the header has 2"):
        load(tmp_path / "short.csv")
