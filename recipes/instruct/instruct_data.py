"""Instructions from the hub or from local files, as TRL's prompt/completion rows.

Four layouts are told apart by their columns. Everything but plain prompt/completion text becomes conversations, for
the model's chat template: a row is ``{"prompt": [messages], "completion": [the assistant's message]}``.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
from instruct_files import EXTENSIONS, Rows

from foam_hf.recipe_kit import one_line

LAYOUTS = {  # in this order: a data set with messages often has a prompt column beside them
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
}
# Roles in other spellings, without capitals -> as chat templates know them.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatbot", "chatgpt", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
NO_PROMPT, NO_ANSWER, NO_TURN = "without a question", "without an answer", "without an answer of the assistant"
EXPECTED = (
    "instruction, output and perhaps input (Alpaca); messages or conversations (lists of role and content); "
    "or prompt and completion"
)


@dataclass
class Instructions:
    """Rows to train on and held-out rows, and what happened on the way: ``counts`` goes into results.json."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    counts: dict


def load_instructions(recipe, whole_conversations: bool = False) -> Instructions:
    """Read, convert and split what `recipe` (InstructArguments) names; SystemExit for what cannot be used.

    With `whole_conversations`, a row of messages stays one example; else each answer in it becomes one.
    """
    splits, where = _read(recipe.dataset_path, recipe.dataset_name, recipe.dataset_config)
    counts: dict = {}
    rows = {}
    for split, raw in splits.items():
        rows[split], counts[split], origins = _convert(raw, f"{where}, {split}", whole_conversations)
    wanted = recipe.eval_samples
    if "held_out" not in rows:
        rows = _divide(rows["train"], origins, wanted, recipe.split_seed)
    elif wanted >= 1:
        rows["held_out"] = rows["held_out"].select(range(min(int(wanted), len(rows["held_out"]))))
    if recipe.train_samples is not None:
        rows["train"] = rows["train"].select(range(min(recipe.train_samples, len(rows["train"]))))
    if recipe.template_kwargs:  # TRL hands them to the chat template
        for split, part in rows.items():
            rows[split] = part.add_column("chat_template_kwargs", [recipe.template_kwargs] * len(part))
    return Instructions(**rows, counts=counts)


def _divide(examples: datasets.Dataset, origins: list[int], wanted: float, seed: int) -> dict:
    """Examples to train on and held-out ones; those of one row, as the answers of a conversation, stay together."""
    of_row: dict[int, list[int]] = {}
    for i, origin in enumerate(origins):
        of_row.setdefault(origin, []).append(i)
    total = len(of_row)
    share = max(1, round(wanted * total)) if wanted < 1 else int(wanted)
    if not 1 <= share < total:
        raise SystemExit(f"--eval_samples: {wanted:g} of {total} rows leaves none on one side.")
    groups = datasets.Dataset.from_dict({"examples": list(of_row.values())})
    divided = groups.train_test_split(test_size=share, seed=seed)
    return {
        name: examples.select([i for group in divided[part]["examples"] for i in group])
        for name, part in (("train", "train"), ("held_out", "test"))
    }


def _read(dataset_path: str | None, dataset_name: str | None, dataset_config: str | None) -> tuple[dict, str]:
    if (dataset_path is None) == (dataset_name is None):
        got = "both" if dataset_path else "neither"
        raise SystemExit(f"Give --dataset_path (a file or folder) or --dataset_name (on the hub); got {got}.")
    where = dataset_path or dataset_name
    try:
        if dataset_name:
            loaded = datasets.load_dataset(dataset_name, dataset_config)
        else:
            path = Path(dataset_path).expanduser()
            if not path.exists():
                raise SystemExit(f"--dataset_path: no file or folder {path}.")
            kinds = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in EXTENSIONS)
            if not kinds or kinds[0].suffix not in EXTENSIONS:
                raise SystemExit(f"--dataset_path: {path} is not, or does not hold, {', '.join(EXTENSIONS)} files.")
            loaded = {split: Rows(files) for split, files in _splits_of(path, kinds).items()}
    except Exception as error:  # whatever the hub, pyarrow, csv or json raise
        cause = error.__cause__ or error  # datasets wraps the one that says what is wrong
        raise SystemExit(f"Cannot read {where}: {type(cause).__name__}: {one_line(cause)}") from None
    for split, rows in loaded.items():
        if dataset_name and (guessed := _guessed_columns(rows)):
            raise SystemExit(
                f"{where}, {split}: {', '.join(guessed)} came as dates and times, which are not the text of the file; "
                "expected text: download the file and give it by --dataset_path."
            )
    if "train" not in loaded:
        raise SystemExit(f"{where} has the splits {', '.join(loaded)}; expected one called train.")
    splits = {"train": loaded["train"]}
    held_out = next((loaded[name] for name in ("validation", "test") if name in loaded), None)
    if held_out is not None:
        splits["held_out"] = held_out
    return splits, where


def _guessed_columns(rows: datasets.Dataset) -> list[str]:
    """The columns that we use and that whoever read the file took for dates."""
    used = {name for needed in LAYOUTS.values() for name in needed} | {"input"}
    dates = ("timestamp", "date", "time", "duration")
    return [n for n, kind in rows.features.items() if n in used and str(getattr(kind, "dtype", "")).startswith(dates)]


def _splits_of(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split: a file is train; in a folder names say train, validation (or dev) or test."""
    if path.is_file():
        return {"train": files}
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.name.lower())
        for split, names in SPLIT_WORDS.items():
            if any(name in words for name in names):
                splits.setdefault(split, []).append(file)
                break
    others = [file.name for file in files if not any(file in found for found in splits.values())]
    if splits and others:
        print(f"{path}: not read, as their names say no split: {', '.join(others)}.")
    return splits or {"train": files}  # one set in several files


def _convert(
    raw: datasets.Dataset | Rows, where: str, whole_conversations: bool
) -> tuple[datasets.Dataset, dict, list[int]]:
    """Prompt/completion rows, counts of rows, of what was left out and of examples made of them, and whose each is."""
    columns = raw.column_names
    layout = next((name for name, needed in LAYOUTS.items() if set(needed) <= set(columns)), None)
    if layout is None:
        raise SystemExit(f"{where}: found the columns {', '.join(columns)}; expected {EXPECTED}.")
    used = {*LAYOUTS[layout], *(("input",) if layout == "alpaca" else ())}
    converted, origins, left_out = [], [], Counter()
    for number, row in enumerate(raw, 1):
        if layout == "alpaca":
            made = _from_alpaca(row)
        elif layout == "prompt/completion":
            made = _from_pair(row, f"{where}, row {number}")
        else:
            made = _from_messages(row, layout, f"{where}, row {number}", whole_conversations)
        if isinstance(made, str):
            left_out[made] += 1
            continue
        converted += made
        origins += [number] * len(made)
    counts = {
        "layout": layout,
        "rows": len(raw),
        "rows_left_out": dict(left_out),  # by reason
        "examples": len(converted),
        "columns_not_used": sorted(set(columns) - used),
    }
    if not converted:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise SystemExit(f"{where}: no example is left of {len(raw)} rows: {reasons}.")
    return datasets.Dataset.from_list(converted), counts, origins


def _text(value) -> str:
    """A cell as text; a number may be an answer, and so may true and false, as JSON spells them."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _from_alpaca(row: dict) -> list[dict] | str:
    """The example of a row, or why there is none."""
    parts = [_text(row.get(name)).strip() for name in ("instruction", "input")]
    question, answer = "\n\n".join(filter(None, parts)), _text(row.get("output")).strip()
    if not question:
        return NO_PROMPT
    return [_turn([{"role": "user", "content": question}], answer)] if answer else NO_ANSWER


def _from_pair(row: dict, where: str) -> list[dict] | str:
    """The example of a row, or why there is none."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt, completion = _messages(prompt, where), _messages(completion, where)
        asked, answered = bool(prompt), any(message["content"].strip() for message in completion)
    elif isinstance(prompt, list) or isinstance(completion, list):
        raise SystemExit(f"{where}: expected prompt and completion both as text, or both as messages, got a mix.")
    else:
        prompt, completion = _text(prompt), _text(completion)
        asked, answered = bool(prompt.strip()), bool(completion.strip())
    if not asked:
        return NO_PROMPT
    return [{"prompt": prompt, "completion": completion}] if answered else NO_ANSWER


def _from_messages(row: dict, layout: str, where: str, whole: bool) -> list[dict] | str:
    """One example for each answer of the assistant, with all that precedes it as its prompt; or the conversation.

    Or why there is none.
    """
    messages = _messages(row.get(layout) or [], where)
    answers = [
        i for i, message in enumerate(messages) if i and message["role"] == "assistant" and message["content"].strip()
    ]
    if not answers:
        return NO_TURN
    if whole:
        return [{"messages": messages}]
    return [_turn(messages[:i], messages[i]["content"]) for i in answers]


def _messages(value: list[dict], where: str) -> list[dict]:
    """Role and content of each message, in either spelling; SystemExit for what would be lost without a word."""
    found = []
    for message in value if isinstance(value, list) else [value]:
        sharegpt = isinstance(message, dict) and "from" in message
        role, content = ("from", "value") if sharegpt else ("role", "content")
        if not isinstance(message, dict) or not {role, content} <= message.keys() or message.get("tool_calls"):
            raise SystemExit(f"{where}: expected messages of role and content, no tool calls, got {message!r:.120}.")
        if not isinstance(message[content], str | None):
            raise SystemExit(f"{where}: expected text as content, got {message[content]!r:.120}.")
        name = ROLES.get(str(message[role]).strip().lower())
        if name is None:
            raise SystemExit(f"{where}: unknown role {message[role]!r}; expected one of {', '.join(ROLES)}.")
        found.append({"role": name, "content": str(message[content] or "")})
    return found


def _turn(prompt: list[dict], answer: str) -> dict:
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}


def count_lengths(rows: datasets.Dataset, tokenizer, max_length: int | None, template_kwargs: dict) -> dict:
    """How many examples are longer than `max_length` tokens, and the longest; TRL cuts them at the end."""
    if "messages" in rows.column_names:
        whole = rows["messages"]
    else:
        whole = [p + c for p, c in zip(rows["prompt"], rows["completion"], strict=True)]
    plain = isinstance(whole[0], str)
    texts = [
        part if plain else tokenizer.apply_chat_template(part, tokenize=False, **template_kwargs) for part in whole
    ]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=plain)["input_ids"]]
    return {"longest": max(lengths), "too_long": sum(n > max_length for n in lengths) if max_length else 0}


def describe(counts: dict, max_length: int | None) -> str:
    """The counts of `load_instructions` and `count_lengths`, one line a split."""
    lines = []
    for split, found in counts.items():
        line = f"{split.replace('_', '-')}: {found['used']} examples, the longest has {found['longest']} tokens"
        if found["too_long"]:
            line += f"; {found['too_long']} are longer than {max_length} and are cut"
        if found["dropped_without_answer"]:
            line += f"; {found['dropped_without_answer']} have no answer left and are dropped"
        if "rows" in found:
            line += f"; from {found['rows']} rows of {found['layout']}"
            if found["rows_left_out"]:
                reasons = " and ".join(f"{count} {reason}" for reason, count in found["rows_left_out"].items())
                line += f", of which {reasons} are left out"
            if found["columns_not_used"]:
                line += f"; columns not used: {', '.join(found['columns_not_used'])}"
        lines.append(line)
    return "\n".join(lines)
