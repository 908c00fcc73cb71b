"""Instructions from the hub or from local files, as TRL's prompt/completion rows.

Four layouts are told apart by their columns. Everything but plain prompt/completion text becomes conversations, for
the model's chat template: a row is ``{"prompt": [messages], "completion": [the assistant's message]}``.
"""

from dataclasses import dataclass
from pathlib import Path

import datasets

LAYOUTS = {  # in this order: a data set with messages often has a prompt column beside them
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
EXTENSIONS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
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
            # An empty cell is empty text: pandas would make 12 a 12.0 beside it, and take "NA" for another.
            how = {"keep_default_na": False} if kinds[0].suffix == ".csv" else {}
            if path.is_file():
                loaded = datasets.load_dataset(EXTENSIONS[path.suffix], data_files=str(path), **how)
            else:
                loaded = datasets.load_dataset(str(path), **how)
    except Exception as error:  # whatever the hub, pyarrow or pandas raise
        cause = error.__cause__ or error  # datasets wraps the one that says what is wrong
        said = "there are no rows" if isinstance(cause, StopIteration) else one_line(cause)
        raise SystemExit(f"Cannot read {where}: {type(cause).__name__}: {said}") from None
    if "train" not in loaded:
        raise SystemExit(f"{where} has the splits {', '.join(loaded)}; expected one called train.")
    splits = {"train": loaded["train"]}
    held_out = next((loaded[name] for name in ("validation", "test") if name in loaded), None)
    if held_out is not None:
        splits["held_out"] = held_out
    return splits, where


def _convert(raw: datasets.Dataset, where: str, whole_conversations: bool) -> tuple[datasets.Dataset, dict, list[int]]:
    """Prompt/completion rows, counts of rows, of what was left out and of examples made of them, and whose each is."""
    columns = raw.column_names
    layout = next((name for name, needed in LAYOUTS.items() if set(needed) <= set(columns)), None)
    if layout is None:
        raise SystemExit(f"{where}: found the columns {', '.join(columns)}; expected {EXPECTED}.")
    used = {*LAYOUTS[layout], *(("input",) if layout == "alpaca" else ())}
    converted, origins, empty = [], [], 0
    for number, row in enumerate(raw, 1):
        if layout == "alpaca":
            made = _from_alpaca(row)
        elif layout == "prompt/completion":
            made = _from_pair(row, f"{where}, row {number}")
        else:
            made = _from_messages(row, layout, f"{where}, row {number}", whole_conversations)
        converted += made
        origins += [number] * len(made)
        empty += not made
    counts = {
        "layout": layout,
        "rows": len(raw),
        "empty_rows_left_out": empty,
        "examples": len(converted),
        "columns_not_used": sorted(set(columns) - used),
    }
    if not converted:
        raise SystemExit(f"{where}: no example is left of {len(raw)} rows; all of them lack a prompt or an answer.")
    return datasets.Dataset.from_list(converted), counts, origins


def _text(value) -> str:
    """A cell as text; a number may be an answer."""
    return "" if value is None else str(value)


def _from_alpaca(row: dict) -> list[dict]:
    parts = [_text(row.get(name)).strip() for name in ("instruction", "input")]
    question, answer = "\n\n".join(filter(None, parts)), _text(row["output"]).strip()
    return [_turn([{"role": "user", "content": question}], answer)] if question and answer else []


def _from_pair(row: dict, where: str) -> list[dict]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt, completion = _messages(prompt, where), _messages(completion, where)
        good = prompt and any(message["content"].strip() for message in completion)
    elif isinstance(prompt, list) or isinstance(completion, list):
        raise SystemExit(f"{where}: expected prompt and completion both as text, or both as messages, got a mix.")
    else:
        prompt, completion = _text(prompt), _text(completion)
        good = prompt.strip() and completion.strip()
    return [{"prompt": prompt, "completion": completion}] if good else []


def _from_messages(row: dict, layout: str, where: str, whole: bool) -> list[dict]:
    """One example for each answer of the assistant, with all that precedes it as its prompt; or the conversation."""
    messages = _messages(row[layout] or [], where)
    answers = [
        i for i, message in enumerate(messages) if i and message["role"] == "assistant" and message["content"].strip()
    ]
    if whole:
        return [{"messages": messages}] if answers else []
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
        name = SHAREGPT_ROLES.get(message[role], message[role]) if sharegpt else message[role]
        found.append({"role": name, "content": message[content] or ""})
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
            if found["empty_rows_left_out"]:
                line += f", of which {found['empty_rows_left_out']} without question or answer are left out"
            if found["columns_not_used"]:
                line += f"; columns not used: {', '.join(found['columns_not_used'])}"
        lines.append(line)
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """An error's text for a message of one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."
