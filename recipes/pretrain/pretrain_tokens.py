"""A folder of tokens and their tokenizer, made once: train.bin, held_out.bin, tokens.json, the tokenizer's files."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from pretrain_arguments import PretrainArguments
from pretrain_data import (
    EXPECTED,
    HUB_CONFIGS,
    Encoder,
    PackedTokens,
    local_documents,
    place,
    text_files,
    write_tokens,
)
from pretrain_stream import HubStream, PackedStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foam_hf.recipe_kit import hub_problem, one_line, say

END = "<|endoftext|>"
SAMPLE = 200_000_000  # characters that a tokenizer is trained on, from the start of the data
SMALLEST = 257  # a token for each byte, and the end of a text
HELD_OUT_KEYS = "held_out_documents.npy"


@dataclasses.dataclass
class Data:
    """What a run reads. `description` is for results.json; by `made_from` a checkpoint knows its data."""

    tokenizer: PreTrainedTokenizerBase
    train: PackedTokens | PackedStream
    held_out: PackedTokens
    description: dict
    made_from: dict


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text comes back as it was. SystemExit if `vocab_size` does not hold all bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise SystemExit(f"--tokenizer train: the model has {vocab_size} tokens; expected {SMALLEST} or more.")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_first(texts, SAMPLE), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, bos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def get_tokenizer(name: str, vocab_size: int, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerBase:
    """From a folder or the hub; trained on `texts()` if `name` is "train", or no hub answers and none is cached."""
    folder = os.path.expanduser(name)
    if name != "train":
        local = os.path.isdir(folder)
        if not local and (os.path.isabs(folder) or name.startswith(".") or name.count("/") > 1):
            raise SystemExit(f"--tokenizer: no folder {folder}; expected one, a name on the hub, or train.")
        problem = None if local else hub_problem()
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=local or problem is not None)
        except Exception as error:  # of the hub's HTTP client, by version, and what a broken file raises
            if problem is None:
                raise SystemExit(f"Cannot load the tokenizer {name}: {one_line(error)}") from None
            say(f"No tokenizer {name} ({problem}), so one of {vocab_size} tokens is trained on the data.")
    tokenizer = train_tokenizer(texts(), vocab_size)
    if len(tokenizer) < vocab_size:
        say(f"The tokenizer has {len(tokenizer)} tokens: the data give no more; the model keeps {vocab_size}.")
    return tokenizer


def prepare(recipe: PretrainArguments, vocab_size: int, every: int, rank: int = 0, world: int = 1) -> Data:
    """The data of a run, tokenized unless --tokens_path, or --dataset_path itself, holds what an earlier run made.

    Args:
        vocab_size: of the model.
        every: sequences that this process takes in an optimizer step.
        rank, world: of this process, and how many there are; a stream is divided among them.

    SystemExit for data that cannot be had or used, in one sentence.
    """
    given = Path(os.path.expanduser(recipe.dataset_path)) if recipe.dataset_path else None
    folder = Path(recipe.tokens_path)
    if given is not None and (given / "tokens.json").is_file():
        folder = given
        say(f"{given} holds tokens made before: their tokenizer and their division into documents are used.")
        meta = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    else:
        meta = _made(recipe, vocab_size, given, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if meta["vocab_size"] > vocab_size:
        raise SystemExit(
            f"The tokens in {folder} are of a vocabulary of {meta['vocab_size']}, and the model has {vocab_size}; "
            f"expected --config_overrides vocab_size={meta['vocab_size']}."
        )
    length = recipe.sequence_length
    held_out = PackedTokens(folder / "held_out.bin", meta["dtype"], length, recipe.eval_tokens // length)
    if not len(held_out) and not recipe.prepare_only:
        raise SystemExit(
            f"{meta['counts']['held_out']['tokens']} tokens are held out, fewer than one sequence of {length}; "
            "expected more text, a larger --eval_share or a shorter --sequence_length."
        )
    if meta["streamed"]:
        train = _stream(recipe, tokenizer, meta, folder, every, rank, world)
    else:
        train = PackedTokens(folder / "train.bin", meta["dtype"], length)
        if len(train) < recipe.total_batch_size and not recipe.prepare_only:
            raise SystemExit(
                f"{meta['counts']['train']['tokens']} tokens to train on are {len(train)} sequences of {length}, "
                f"fewer than a step's {recipe.total_batch_size}; expected more text, or a smaller --total_batch_size."
            )
    description = {
        "streamed": meta["streamed"],
        "tokenizer": meta["tokenizer"],
        **meta["counts"],
        "held_out_tokens_used": len(held_out) * length,
    }
    return Data(tokenizer, train, held_out, description, meta["made_from"])


def _made(recipe: PretrainArguments, vocab_size: int, given: Path | None, folder: Path) -> dict:
    """What tokens.json in `folder` says; made first, if it is not there. SystemExit if it is of other data."""
    made_from = {"tokenizer": recipe.tokenizer, "vocab_size": vocab_size, "text_column": recipe.text_column}
    config = recipe.dataset_config or HUB_CONFIGS.get(recipe.dataset_name)
    if given is not None:
        shares = {name: getattr(recipe, name) for name in ("eval_share", "train_share", "split_seed")}
        made_from |= {"files": _files(given), **shares}
    else:
        made_from |= {"dataset_name": recipe.dataset_name, "dataset_config": config, "eval_tokens": recipe.eval_tokens}
    file = folder / "tokens.json"
    if file.is_file():
        meta = json.loads(file.read_text(encoding="utf-8"))
        keys = {**made_from, **meta["made_from"]}
        changed = [key for key in keys if made_from.get(key) != meta["made_from"].get(key)]
        if changed:
            raise SystemExit(
                f"The tokens in {folder} were made with another {', '.join(changed)}; expected another --tokens_path "
                "or --output_dir, or this folder deleted."
            )
        return meta
    folder.mkdir(parents=True, exist_ok=True)
    if given is not None:
        tokenizer, counts = _tokenize_files(recipe, vocab_size, given, folder)
    else:
        tokenizer, counts = _tokenize_held_out(recipe, vocab_size, made_from, folder)
    trained = not tokenizer.name_or_path  # from a folder or the hub, it has one
    meta = {
        "streamed": given is None,
        "tokenizer": f"trained on the data, {len(tokenizer)} tokens" if trained else recipe.tokenizer,
        "vocab_size": vocab_size,
        "dtype": Encoder(tokenizer, vocab_size).dtype.name,
        "counts": counts,
        "made_from": made_from,
    }
    file.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")  # last: what lacks it is done again
    return meta


def _files(path: Path) -> str:
    """A digest of the files' names, sizes and times."""
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in text_files(path)]
    return hashlib.blake2b(repr(found).encode(), digest_size=16).hexdigest()


def _tokenize_files(
    recipe: PretrainArguments, vocab_size: int, path: Path, folder: Path
) -> tuple[PreTrainedTokenizerBase, dict]:
    def documents() -> Iterator[str]:
        return local_documents(path, recipe.text_column)

    def training_documents() -> Iterator[str]:
        return (text for text in documents() if place(text, recipe.split_seed) >= recipe.eval_share)

    tokenizer = get_tokenizer(recipe.tokenizer, vocab_size, training_documents)
    shares = (recipe.eval_share, recipe.train_share, recipe.split_seed)
    counts = write_tokens(folder, documents(), Encoder(tokenizer, vocab_size), shares)
    if not counts["train"]["documents"]:
        raise SystemExit(f"--dataset_path: {path} has no text to train on; expected {EXPECTED}, with text in it.")
    for split, found in counts.items():
        say(f"{split}: {', '.join(f'{count:,} {name}' for name, count in found.items())}")
    tokenizer.save_pretrained(folder)
    return tokenizer, counts


def _open(source: dict, split: str, rank: int = 0, world: int = 1) -> HubStream:
    """A split of the data set that a folder's `made_from` names."""
    try:
        name, config, column = (source[key] for key in ("dataset_name", "dataset_config", "text_column"))
        return HubStream(name, config, split, column, rank, world)
    except ImportError:
        raise SystemExit(
            "Streaming from the hub needs `pip install datasets`; or give text by --dataset_path."
        ) from None


def _refuse_without_hub(name: str) -> None:
    problem = hub_problem()
    if problem:
        raise SystemExit(
            f"The data set {name} cannot be streamed: {problem}; give text of your own by --dataset_path ({EXPECTED})."
        )


def _tokenize_held_out(
    recipe: PretrainArguments, vocab_size: int, source: dict, folder: Path
) -> tuple[PreTrainedTokenizerBase, dict]:
    """Of a stream only what is held out is kept: its validation split, or else its first documents."""
    _refuse_without_hub(recipe.dataset_name)
    try:
        train = _open(source, "train")
        try:
            held_out, own_split = _open(source, "validation"), True
        except ValueError:  # there is no such split
            held_out, own_split = train, False
        tokenizer = get_tokenizer(recipe.tokenizer, vocab_size, lambda: train)
        encode, tokens, texts, count = Encoder(tokenizer, vocab_size), [], [], 0
        for text in filter(str.strip, held_out):
            texts.append(text)
            tokens.append(encode([text]))
            count += len(tokens[-1])
            if count >= recipe.eval_tokens:
                break
    except SystemExit:
        raise
    except Exception as error:  # whatever datasets and the hub's HTTP client raise
        raise SystemExit(
            f"Cannot stream {recipe.dataset_name}: {type(error).__name__}: {one_line(error)}; text of your own: "
            f"--dataset_path ({EXPECTED})."
        ) from None
    flat = np.concatenate([np.zeros(0, encode.dtype), *tokens])
    flat.tofile(folder / "held_out.bin")
    # Also where the split is its own: no copy of a held-out document is trained on.
    np.save(folder / HELD_OUT_KEYS, np.array([place(text, 0) for text in texts]))
    where = "the validation split" if own_split else "the first documents: there is no validation split"
    say(f"held_out: {len(texts):,} documents, {len(flat):,} tokens, of {where}")
    tokenizer.save_pretrained(folder)
    return tokenizer, {"held_out": {"documents": len(texts), "tokens": len(flat), "characters": sum(map(len, texts))}}


def _stream(
    recipe: PretrainArguments, tokenizer, meta: dict, folder: Path, every: int, rank: int, world: int
) -> PackedStream:
    source = meta["made_from"]
    _refuse_without_hub(source["dataset_name"])
    held_out = set(np.load(folder / HELD_OUT_KEYS).tolist())
    return PackedStream(
        opened=lambda: _open(source, "train", rank, world),
        encode=Encoder(tokenizer, meta["vocab_size"]),
        sequence_length=recipe.sequence_length,
        every=every,
        keep=lambda text: place(text, 0) not in held_out,
    )
