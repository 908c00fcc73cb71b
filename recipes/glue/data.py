"""GLUE's nine tasks, from the model hub or from local files, as plain lists of rows.

A row is ``{"text": str, "text_pair": str | None, "label": int | float}``. Local files need no package beyond Python
itself, except parquet (pyarrow).
"""

import csv
import glob
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from foam_hf.recipe_kit import hub_problem, one_line

HUB_DATASET = "nyu-mll/glue"
EXTENSIONS = ("jsonl", "json", "csv", "parquet", "tsv")
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev")}


@dataclass(frozen=True)
class Task:
    """One GLUE task: its text columns, its labels in GLUE's order (None: regression) and its metrics.

    ``main`` are the metrics whose mean is the task's one number in tables; ``renames`` maps the column names of
    GLUE's own files to the hub's.
    """

    folder: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    main: tuple[str, ...]
    renames: dict[str, str] = field(default_factory=dict)
    validation_sets: tuple[str, ...] = ("validation",)


PAIR = ("sentence1", "sentence2")
F1 = ("f1", "accuracy")
CORRELATIONS = ("pearson", "spearmanr")
MATTHEWS = ("matthews_correlation",)
ACCURACY = ("accuracy",)
MRPC_NAMES = {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"}
MNLI_NAMES = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}
MNLI_MAIN = ("matched_accuracy",)
BOTH = ("matched", "mismatched")
TASKS = {
    "cola": Task("CoLA", ("sentence",), ("unacceptable", "acceptable"), MATTHEWS, MATTHEWS),
    "sst2": Task("SST-2", ("sentence",), ("negative", "positive"), ACCURACY, ACCURACY),
    "mrpc": Task("MRPC", PAIR, ("not_equivalent", "equivalent"), F1, ("f1",), MRPC_NAMES),
    "stsb": Task("STS-B", PAIR, None, CORRELATIONS, CORRELATIONS, {"score": "label"}),
    "qqp": Task(
        "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), F1, ("f1",), {"is_duplicate": "label"}
    ),
    "mnli": Task(
        "MNLI",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ACCURACY,
        MNLI_MAIN,
        MNLI_NAMES,
        BOTH,
    ),
    "qnli": Task("QNLI", ("question", "sentence"), ("entailment", "not_entailment"), ACCURACY, ACCURACY),
    "rte": Task("RTE", PAIR, ("entailment", "not_entailment"), ACCURACY, ACCURACY),
    "wnli": Task("WNLI", PAIR, ("not_entailment", "entailment"), ACCURACY, ACCURACY),
}


def load_splits(task_name: str, dataset_path: str | None, several: bool = False) -> dict[str, list[dict]]:
    """Rows of one task: ``train`` and ``validation`` (MNLI: ``matched`` and ``mismatched``).

    With ``several`` tasks, ``dataset_path`` must have a subfolder for each. SystemExit names what is missing or wrong.
    """
    task = TASKS[task_name]
    if dataset_path is None:
        raw = _hub_splits(task_name, task)
    else:
        raw = _local_splits(task_name, task, Path(dataset_path).expanduser(), several)
    return {split: _clean(rows, task_name, task, where) for split, (rows, where) in raw.items()}


def _hub_splits(task_name: str, task: Task) -> dict[str, tuple[Iterable[dict], str]]:
    local = f"give a folder with files for {task_name} (jsonl, csv, parquet or tsv) by --dataset_path"
    problem = hub_problem()  # before the import: datasets reads offline mode once
    try:
        import datasets
    except ImportError:
        reason = problem or "it needs the package datasets (pip install datasets)"
        raise SystemExit(f"Cannot load {HUB_DATASET} from the model hub: {reason}; {local}.") from None
    if problem:
        datasets.config.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(HUB_DATASET, task_name)
    except Exception as error:
        reason = problem or f"{type(error).__name__}: {one_line(error)}"
        raise SystemExit(f"Cannot load {HUB_DATASET} from the model hub: {reason}; {local}.") from None
    names = {split: f"validation_{split}" if split in BOTH else split for split in ("train", *task.validation_sets)}
    return {split: (loaded[name], f"{HUB_DATASET} {task_name} {name}") for split, name in names.items()}


def _local_splits(task_name: str, task: Task, root: Path, several: bool) -> dict[str, tuple[Iterable[dict], str]]:
    if not root.is_dir():
        raise SystemExit(f"--dataset_path: no folder {root}; expected one with train and validation files.")
    folders = [root / task_name, root / task.folder]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None and several:
        raise SystemExit(
            f"--dataset_path {root} has no subfolder {task_name} or {task.folder}; several tasks need one each."
        )
    folder = folder or root
    if task_name == "mrpc" and not _find(folder, "train") and (folder / "msr_paraphrase_train.txt").is_file():
        return _mrpc_originals(folder)
    splits = {}
    for split in ("train", *task.validation_sets):
        names = SPLIT_NAMES.get(split) or tuple(f"{name}_{split}" for name in SPLIT_NAMES["validation"])
        found = [file for name in names for file in _find(folder, name)]
        if not found:
            looked = ", ".join(f"{name}.{{{','.join(EXTENSIONS)}}}" for name in names)
            raise SystemExit(f"{folder} has no {split} file for {task_name}; looked for {looked}.")
        if len(found) > 1 and not all(_is_shard(file) for file in found):
            raise SystemExit(f"{folder} has several {split} files: {', '.join(f.name for f in found)}; keep one.")
        splits[split] = ([row for file in found for row in read_rows(file, task_name)], ", ".join(map(str, found)))
    return splits


def _find(folder: Path, name: str) -> list[Path]:
    files = [folder / f"{name}.{extension}" for extension in EXTENSIONS]
    shards = sorted(folder.glob(f"{glob.escape(name)}-?????-of-?????.parquet"))  # the hub's own layout
    return [file for file in files if file.is_file()] + shards


def _is_shard(file: Path) -> bool:
    return "-of-" in file.name


def _mrpc_originals(folder: Path) -> dict[str, tuple[Iterable[dict], str]]:
    """Microsoft's own corpus files: GLUE's validation set is the part of the training file listed in dev_ids.tsv."""
    source, ids = folder / "msr_paraphrase_train.txt", folder / "dev_ids.tsv"
    if not ids.is_file():
        raise SystemExit(f"{folder} has {source.name} but no dev_ids.tsv, which says what GLUE's validation set is.")
    held_out = {tuple(line.split("\t")) for line in ids.read_text(encoding="utf-8-sig").splitlines()}
    rows = list(read_rows(source, "mrpc"))
    in_validation = [(row.get("#1 ID"), row.get("#2 ID")) in held_out for row in rows]
    train = [row for row, held in zip(rows, in_validation, strict=True) if not held]
    validation = [row for row, held in zip(rows, in_validation, strict=True) if held]
    return {"train": (train, str(source)), "validation": (validation, f"{source} by {ids.name}")}


def read_rows(file: Path, task_name: str) -> Iterator[dict]:
    """Rows of one file as dictionaries, columns named as in the file; SystemExit names file and line of an error."""
    kind = file.suffix.lstrip(".")
    if kind == "parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise SystemExit(f"{file}: reading parquet needs pyarrow (pip install pyarrow).") from None
        try:
            yield from parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise SystemExit(f"{file}: not a parquet file ({one_line(error)}).") from None
        return
    try:
        # Only a line feed ends a line: a carriage return may stand inside a text.
        with open(file, encoding="utf-8-sig", newline="\n") as stream:
            if kind in ("json", "jsonl"):
                yield from _json_rows(stream, file)
            elif kind == "csv":
                csv.field_size_limit(sys.maxsize)  # a text may be longer than 131,072 characters
                yield from _csv_rows(stream, file)
            else:
                yield from _tsv_rows(stream, task_name, file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{file}: not {kind} in UTF-8 ({one_line(error)}).") from None


def _json_rows(stream, file: Path) -> Iterator[dict]:
    start = " "
    while start.isspace():
        start = stream.read(1)
    stream.seek(0)
    line_number = 0
    try:
        if start == "[":
            yield from json.load(stream)
            return
        for line in stream:
            line_number += 1
            if line.strip():
                yield json.loads(line)
    except json.JSONDecodeError as error:
        raise SystemExit(f"{file}, line {line_number or error.lineno}: not JSON ({error.msg}).") from None


def _csv_rows(stream, file: Path) -> Iterator[dict]:
    lines = csv.reader(stream, strict=True)
    try:
        header = next(lines, [])
        for row in lines:
            if row and len(row) != len(header):
                raise SystemExit(
                    f"{file}, line {lines.line_num}: {len(row)} cells, and the header has {len(header)}; expected as "
                    "many, and quotes around a text with commas, quotes or line breaks."
                )
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        hint = "a text with a carriage return in it needs quotes" if "new-line" in str(error) else one_line(error)
        raise SystemExit(f"{file}, line {lines.line_num}: not CSV ({hint}).") from None


def _tsv_rows(stream, task_name: str, file: Path) -> Iterator[dict]:
    lines = (line.removesuffix("\n").removesuffix("\r").split("\t") for line in stream)  # there is no quoting
    header = next(lines, [])
    if task_name == "cola" and "sentence" not in header:
        # GLUE's own CoLA files have no header: source, label, the author's mark, sentence.
        for number, row in enumerate(itertools.chain([header], lines), 1):
            if row == [""]:
                continue
            if len(row) != 4:
                raise SystemExit(f"{file}, line {number}: expected 4 columns without a header, found {len(row)}.")
            yield {"label": row[1], "sentence": row[3]}
        return
    skipped = 0
    for row in lines:
        if len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        elif row != [""]:
            skipped += 1
    if skipped:  # GLUE's QQP has a handful of them
        print(f"{file}: {skipped} lines without {len(header)} columns were left out.")


def _clean(rows: Iterable[dict], task_name: str, task: Task, where: str) -> list[dict]:
    """Rows with our three keys; errors for missing columns, no rows and foreign labels; empty texts are counted."""
    needed = {*task.columns, "label"}
    cleaned, empty = [], 0
    for number, raw in enumerate(rows, 1):
        if not isinstance(raw, dict):
            raise SystemExit(f"{where}, row {number}: expected columns with names, got {raw!r:.80}.")
        row = {task.renames.get(name, name): value for name, value in raw.items() if name is not None}
        row |= {name: raw[name] for name in needed & raw.keys()}  # a column that already has the hub's name wins
        if not needed <= row.keys():
            missing = ", ".join(sorted(needed - row.keys()))
            raise SystemExit(f"{where}: no column {missing} for {task_name}; found {', '.join(map(str, raw))}.")
        texts = ["" if row[name] is None else str(row[name]) for name in task.columns]
        empty += not all(text.strip() for text in texts)
        label = _label(row["label"], task, f"{where}, row {number}")
        cleaned.append({"text": texts[0], "text_pair": texts[1] if len(texts) > 1 else None, "label": label})
    if not cleaned:
        raise SystemExit(f"{where}: no rows.")
    if empty:
        print(f"{where}: {empty} of {len(cleaned)} rows have an empty text; they are kept.")
    return cleaned


def _label(value, task: Task, where: str) -> int | float:
    if task.labels is None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not 0 <= number <= 5:
            raise SystemExit(f"{where}: label {value!r}; expected a number from 0 to 5.")
        return number
    if value in task.labels:
        return task.labels.index(value)
    try:
        index = int(float(value))  # 1.0, as pandas writes a column with gaps
        if index == float(value) and 0 <= index < len(task.labels):
            return index
    except (TypeError, ValueError, OverflowError):
        pass
    names = ", ".join(f"{index} ({name})" for index, name in enumerate(task.labels))
    raise SystemExit(f"{where}: label {value!r}; expected {names}.")
