"""The rows of local files, JSON, CSV or Parquet, with their text as it stands there."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

EXTENSIONS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class Rows:
    """The rows of local files as they stand there: text stays text, numbers keep their spelling.

    Nothing guesses types from the first rows: a later row may have another column, and "1969-07-20" is no date.
    """

    def __init__(self, files: list[Path]) -> None:
        self.rows = [row for file in files for row in read_rows(file)]
        if not self.rows:
            raise ValueError("there are no rows")
        self.column_names = list(dict.fromkeys(name for row in self.rows for name in row))

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(file: Path) -> list[dict]:
    """The rows of one file; ValueError that names file and line where it is none of its kind."""
    kind = EXTENSIONS[file.suffix]
    if kind == "parquet":
        from pyarrow import parquet  # datasets needs it

        return parquet.read_table(file).to_pylist()
    text = file.read_bytes().decode("utf-8-sig")  # no newline is translated
    return _csv_rows(text, file) if kind == "csv" else _json_rows(text, file)


def _csv_rows(text: str, file: Path) -> list[dict]:
    csv.field_size_limit(sys.maxsize)  # one text may be longer than 131,072 characters
    lines = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    try:
        header = next(lines, [])
        rows = []
        for row in lines:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{file.name}, line {lines.line_num}: {len(row)} cells, and the header has {len(header)}"
                )
            rows.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{file.name}, line {lines.line_num}: no CSV: {error}") from None
    return rows


def _json_rows(text: str, file: Path) -> list[dict]:
    """A list of objects, or an object a line. Numbers keep their spelling: 1.50 is an answer, and not 1.5."""
    reader = json.JSONDecoder(parse_float=Number, parse_int=Number, parse_constant=Number)
    listed = text.lstrip().startswith("[")
    rows, number = [], 1
    try:
        for number, part in enumerate([text] if listed else text.split("\n"), 1):  # noqa: B007
            if part.strip():
                found = reader.decode(part.strip("\r\n\t ") if not listed else part)
                rows += found if listed else [found]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file.name}, line {number + error.lineno - 1}: no JSON: {error.msg}") from None
    wrong = next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if wrong:
        raise ValueError(f"{file.name}, row {wrong}: expected an object with columns, got {rows[wrong - 1]!r:.80}")
    return rows


class Number(str):
    """A number of a JSON file, as it is spelt there."""
