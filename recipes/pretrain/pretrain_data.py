"""Text as sequences of tokens without padding, from files that are tokenized once; pretrain_stream.py has streams.

Documents are joined end to end, each closed by the tokenizer's end of sequence, and cut into sequences of one length.
What is held out is chosen by document, from its text alone, so that a copy of it is never trained on.
"""

import gzip
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from foam_hf.recipe_kit import one_line

HUB_DATASET = "allenai/c4"
HUB_CONFIGS = {HUB_DATASET: "en"}
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz")
EXPECTED = "a .txt, .jsonl or .parquet file or a folder of them"
BATCH = 512  # documents tokenized together


def text_files(path: Path) -> list[Path]:
    """The files that --dataset_path names, in order; SystemExit if there is none."""
    if not path.exists():
        raise SystemExit(f"--dataset_path: no file or folder {path}; expected {EXPECTED}.")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = [file for file in found if file.name.endswith(SUFFIXES)]
    if not found:
        raise SystemExit(f"--dataset_path: {path} is not, and does not hold, {', '.join(SUFFIXES)} files.")
    return found


def local_documents(path: Path, column: str) -> Iterator[str]:
    """The texts below `path`, empty ones left out; SystemExit for a file without the column, or that cannot be read.

    A .txt file in a folder is a document; in a single .txt file, blank lines divide documents.
    """
    for file in text_files(path):
        try:
            if file.name.endswith(".parquet"):
                found = _parquet(file, column)
            elif ".json" in file.name:
                found = _json_lines(file, column)
            else:
                found = re.split(r"\n\s*\n", _text(file)) if file == path else [_text(file)]
            yield from filter(str.strip, found)
        except (OSError, ValueError, ImportError, EOFError) as error:
            raise SystemExit(f"Cannot read {file}: {type(error).__name__}: {one_line(error)}") from None


def _text(file: Path) -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")


def _json_lines(file: Path, column: str) -> Iterator[str]:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise SystemExit(f"{file}, line {number}: expected an object with {column!r}, as in .jsonl files.")
            yield text_of(row, column, f"{file}, line {number}")


def _parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    if column not in table.schema_arrow.names:
        text_of(dict.fromkeys(table.schema_arrow.names), column, str(file))
    for batch in table.iter_batches(batch_size=1000, columns=[column]):
        yield from (text_of({column: text}, column, str(file)) for text in batch.column(0).to_pylist())


def text_of(row: dict, column: str, where: str) -> str:
    """A row's text, "" for none; SystemExit where there is no such column, or no text in it."""
    if column not in row:
        raise SystemExit(f"{where}: no column {column!r}; expected --text_column to be one of {', '.join(row)}.")
    if not isinstance(row[column], str | None):
        raise SystemExit(f"{where}: {column!r} holds {type(row[column]).__name__}, expected text.")
    return row[column] or ""


def place(text: str, seed: int) -> float:
    """A number from 0 to 1 that the text alone decides, another one for each seed."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "little"))
    return int.from_bytes(digest.digest(), "little") / 2**64


# ---- tokens ----


class Encoder:
    """Texts to one array of ids, each text closed by the end of sequence; SystemExit for ids beyond the model's."""

    def __init__(self, tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        if tokenizer.eos_token_id is None:
            raise SystemExit("The tokenizer has no end-of-sequence token to divide documents; expected another one.")
        tokenizer.model_max_length = 10**30  # documents are longer, and cut later

    def __call__(self, texts: list[str]) -> np.ndarray:
        if not texts:
            return np.zeros(0, self.dtype)
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        eos = [self.tokenizer.eos_token_id]
        flat = np.concatenate([np.asarray(row + eos, dtype=np.int64) for row in rows])
        if flat.max() >= self.vocab_size:
            raise SystemExit(
                f"The tokenizer gives the token {flat.max()}, and the model has {self.vocab_size}; expected "
                f"--config_overrides vocab_size={len(self.tokenizer)}, another --tokenizer, or --tokenizer train."
            )
        return flat.astype(self.dtype)


def write_tokens(folder: Path, documents: Iterable[str], encode: Encoder, shares: tuple[float, float, int]) -> dict:
    """Write train.bin and held_out.bin into `folder`; the counts. `shares`: held out, of the others used, seed."""
    held_share, train_share, seed = shares
    used = held_share + train_share * (1 - held_share)
    counts = {split: {"documents": 0, "tokens": 0, "characters": 0} for split in ("train", "held_out")}
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        open(Path(scratch, "train"), "wb") as train,
        open(Path(scratch, "held_out"), "wb") as held_out,
    ):
        files = {"train": train, "held_out": held_out}
        waiting: dict[str, list[str]] = {"train": [], "held_out": []}

        def flush(split: str) -> None:
            tokens, texts = encode(waiting[split]), waiting[split]
            tokens.tofile(files[split])
            for name, more in (
                ("documents", len(texts)),
                ("tokens", len(tokens)),
                ("characters", sum(map(len, texts))),
            ):
                counts[split][name] += more
            waiting[split] = []

        for text in documents:
            where = place(text, seed)
            if where >= used:
                continue
            split = "held_out" if where < held_share else "train"
            waiting[split].append(text)
            if len(waiting[split]) == BATCH:
                flush(split)
        for split, file in files.items():
            flush(split)
            file.close()
            os.replace(Path(scratch, split), folder / f"{split}.bin")
    return counts


def as_item(tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """A sequence as a causal language model takes it: int64 ids, and the same as labels."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone()}


class PackedTokens(Dataset):
    """The sequences of a file of tokens, what is left at its end dropped; at most `limit`, spread over the file."""

    def __init__(self, file: Path, dtype: str, sequence_length: int, limit: int | None = None) -> None:
        self.file, self.dtype, self.length = Path(file), np.dtype(dtype), sequence_length
        whole = self.file.stat().st_size // self.dtype.itemsize // sequence_length
        self.count = whole if limit is None else min(whole, max(1, limit))
        self.whole = whole
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if self._tokens is None:
            self._tokens = np.memmap(self.file, self.dtype, mode="r")
        start = index * self.whole // self.count * self.length
        return as_item(self._tokens[start : start + self.length])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tokens": None}  # a worker maps the file itself
