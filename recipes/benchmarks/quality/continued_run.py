"""One run of a study of continued pretraining: a chat model goes on with plain text, in full or through adapters.

    python -m recipes.benchmarks.quality.continued_run --model_name_or_path smollm2 \\
        --dataset_path corpus_tokens/tokens.json --tokens 2000000 --block 512 --output_dir run

The text is a folder of tokens that `recipes/pretrain/train.py --prepare_only true` made with the model's tokenizer.
Flags are those of recipes/instruct/train.py, and `--tokens` to train on, in blocks of `--block`, `--eval_tokens` of
held-out documents, and `--other FILE` of pairs, whose loss tells what is forgotten. results.json is as that script's,
and the model is not saved.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
import transformers
from trl import SFTTrainer

import foam_hf
from foam_hf.recipe_kit import finite, write_json
from recipes.benchmarks.quality.instruct_run import RECIPE, other_loss


def blocks(folder: Path, split: str, length: int, tokens: int) -> datasets.Dataset:
    """At least `tokens` tokens of a split in sequences of `length`, spread over the whole of it.

    Raises SystemExit where the file has fewer.
    """
    meta = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    flat = np.memmap(folder / f"{split}.bin", meta["dtype"], mode="r")
    whole, count = len(flat) // length, math.ceil(tokens / length)
    if count > whole:
        raise SystemExit(f"{folder / split}.bin: got {len(flat)} tokens, {whole} blocks; expected {count} or more.")
    rows = [flat[start : start + length] for start in (i * whole // count * length for i in range(count))]
    values = pyarrow.array(np.concatenate(rows).astype(np.int32))
    column = pyarrow.ListArray.from_arrays(np.arange(0, count * length + 1, length, dtype=np.int32), values)
    return datasets.Dataset(pyarrow.table({"input_ids": column, "labels": column}))


def evaluate(trainer: SFTTrainer, recipe, other: Path | None) -> dict:
    """Held-out loss on the text, and on pairs of another kind."""
    loss = finite(trainer.evaluate()["eval_loss"])
    scores = {"eval_loss": loss, "perplexity": None if loss is None else finite(math.exp(min(loss, 700)))}
    return scores | ({"other_loss": other_loss(trainer, recipe, other)} if other else {})


def translate(words: list[str]) -> tuple[list[str], argparse.Namespace]:
    """The words for the recipe's arguments, and those that are ours."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--eval_tokens", type=int, default=262144)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--prepared", type=Path)  # of instruct_run.py; here tokens are made before
    own, rest = parser.parse_known_args(words)
    return rest, own


def main(argv: list[str] | None = None) -> dict:
    """Run what the words ask for; the results, as in the results.json written."""
    words, own = translate(sys.argv[1:] if argv is None else argv)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    recipe, args, settings = RECIPE.parse(words)
    args.max_length, args.completion_only_loss = None, True  # blocks are cut already; pairs are scored on answers
    args.include_num_input_tokens_seen = "non_padding"
    folder, meter = Path(recipe.dataset_path).parent, RECIPE.Meter()
    model, tokenizer = RECIPE.chat_models.load(recipe, Path(args.output_dir))
    train = blocks(folder, "train", own.block, own.tokens)
    held_out = blocks(folder, "held_out", own.block, own.eval_tokens)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=RECIPE.chat_models.lora_config(recipe),
        callbacks=[meter, foam_hf.OptimizerMemoryCallback()],
    )
    trainer.save_model = lambda *_: None  # a grid of saved models fills a disk
    with torch.random.fork_rng(devices=[]):  # the order of the data does not hang on it
        before = evaluate(trainer, recipe, own.other) if recipe.eval_before else None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trained = trainer.train()
    peak = meter.peak_by_kind()
    data = {"train": {"used": len(train), "tokens": len(train) * own.block}, "held_out": {"used": len(held_out)}}
    results = RECIPE.describe_run(recipe, trainer, trained, meter, peak, data) | {
        "before": before,
        "after": evaluate(trainer, recipe, own.other),
        "settings": settings,
    }
    write_json(Path(args.output_dir) / "results.json", results)
    return results


if __name__ == "__main__":
    main()
