"""Make an acceptability task in CoLA's format from the English sentences of Python's own documentation.

A sentence stands as its author wrote it (label 1) or with half of its words moved (label 0). Every sentence appears
both ways, and both ways on the same side of the split, so no sentence of validation was seen in training. Standard
library only: `python sentences.py FOLDER` writes train.jsonl and validation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MIN_WORDS, MAX_WORDS = 6, 24
VALIDATION_SHARE = 0.2

# Markup of the documentation's plain-text form, and typographic signs that only some Python versions use.
_MARKUP = [
    (re.compile(r"[‘’]"), "'"),
    (re.compile(r"[“”]"), '"'),
    (re.compile(r"\*\*?(\S(?:[^*]*\S)?)\*\*?"), r"\1"),
    (re.compile(r"``?([^`]+)``?(?:_)?"), r"\1"),
    (re.compile(r'"([^"]*)"'), r"\1"),
    (re.compile(r" ?\[\d+\]"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r"^(?:Changed|New|Added|Deprecated since) (?:in )?version [\d.]+: "), ""),
]
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)]\.) (?=[A-Z])")
# Words and names with the punctuation of prose: code, formulas and cut-off lists do not match.
_PROSE = re.compile(r"[A-Z][A-Za-z'-]*(?:[,;:]? [(]?[A-Za-z_][A-Za-z0-9_.'/-]*(?:\(\))?[)]?)+\.")


def paragraphs(text: str) -> Iterator[str]:
    """Yield the blocks of `text` that blank lines separate, each on one line, without the bullet or term before it."""
    for block in re.split(r"\n\s*\n", text):
        lines = re.sub(r"^(\s*)[*•] ", r"\1  ", block, count=1).splitlines()
        indents = [len(line) - len(line.lstrip()) for line in lines]
        if len(lines) > 1 and indents[1] > indents[0]:  # a term or a signature, and its description
            lines, indents = lines[1:], indents[1:]
        if lines and len(set(indents)) == 1:
            yield re.sub(r"(?<=[a-z]-) ", "", " ".join(line.strip() for line in lines))


def documentation_sentences() -> list[str]:
    """The distinct English sentences of `pydoc_data.topics`, MIN_WORDS to MAX_WORDS words long, in a fixed order."""
    from pydoc_data.topics import topics

    found: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in paragraphs(topics[name]):
            for pattern, replacement in _MARKUP:
                paragraph = pattern.sub(replacement, paragraph)
            for sentence in _SENTENCE_END.split(paragraph.strip()):
                if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS and _PROSE.fullmatch(sentence):
                    found.setdefault(sentence.lower(), sentence)
    return [found[key] for key in sorted(found)]


def move_words(sentence: str, rng: random.Random) -> str:
    """`sentence` with half of its words (three or more) moved in one random cycle; the full stop stays at the end."""
    words = sentence[:-1].split()
    moved = list(words)
    while moved == words:  # a cycle of equal words would change nothing
        places = rng.sample(range(len(words)), max(3, len(words) // 2))
        for place, source in zip(places, places[-1:] + places[:-1], strict=True):
            moved[place] = words[source]
        # The capital letter of a sentence's first word must not tell where that word stood.
        if moved[0] != words[0]:
            start = places[(places.index(0) + 1) % len(places)]
            moved[start] = moved[start][0].lower() + moved[start][1:] if words[0][1:].islower() else words[0]
            moved[0] = moved[0][0].upper() + moved[0][1:]
    return " ".join(moved) + "."


def make_splits(seed: int = 0) -> dict[str, list[dict[str, object]]]:
    """Rows of train and validation, each half label 1 and half label 0; the same for the same Python and seed."""
    rng = random.Random(seed)
    sentences = documentation_sentences()
    rng.shuffle(sentences)
    cut = round(len(sentences) * VALIDATION_SHARE)
    splits = {}
    for name, part in (("train", sentences[cut:]), ("validation", sentences[:cut])):
        rows = [row for text in part for row in ((text, 1), (move_words(text, rng), 0))]
        rng.shuffle(rows)
        splits[name] = [{"sentence": text, "label": label, "idx": index} for index, (text, label) in enumerate(rows)]
    return splits


def write_splits(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write train.jsonl and validation.jsonl into `folder`; the number of rows of each."""
    splits = make_splits(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: len(rows) for name, rows in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write train.jsonl and validation.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the moves (default: 0)")
    options = parser.parse_args()
    try:
        counts = write_splits(options.folder, options.seed)
    except OSError as error:
        sys.exit(f"sentences.py: cannot write {options.folder}: {error}")
    print(f"{options.folder}: " + ", ".join(f"{count} rows in {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
