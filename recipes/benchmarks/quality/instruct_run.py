"""One run of an instruct study: recipes/instruct/train.py, with what many short runs of one study need beside it.

The tokens of a data set are made by the first run and read by the others (`--prepared FOLDER`); the tuned model is not
saved; `--other FILE` adds the loss on examples of another kind, which tells what is forgotten; `--spike 30:1000`
multiplies the loss of step 30 by 1000; and `--optim` takes two more names, built here: `foam_factored_embeddings`
(embeddings and heads fold by the factored rule at scale 1, whatever else folds by optim_args) and `gefen_x` (the
package gefen-x without its kernels).
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import transformers
from trl import SFTTrainer

from foam_hf import FOAM, foam_param_groups
from foam_hf.optim_args import parse_optim_args, split_optim_args
from recipes.benchmarks.common.folders import RECIPES, load_script

# At import, so that forks find it done.
RECIPE = load_script(RECIPES / "instruct" / "train.py", "study_instruct_train")
OTHER_ROWS = 200  # of --other


def factored_embeddings(trainer, optim_args: str | None):
    """FOAM with all matrices folded, embeddings and heads by the factored rule at scale 1."""
    args, model = trainer.args, trainer.model
    vocabulary = vocabulary_weights(model)
    groups = []
    folding: dict = {"fold_embeddings": True, "fold_head": True, "embedding_rule": "block"}
    for group in foam_param_groups(model, weight_decay=args.weight_decay, **folding):
        outer = [p for p in group["params"] if id(p) in vocabulary]
        inner = [p for p in group["params"] if id(p) not in vocabulary]
        groups += [{**group, "params": inner}] if inner else []
        groups += [{**group, "params": outer, "second_moment": "factored", "scale": 1.0}] if outer else []
    return FOAM(groups, **adam_arguments(args), **{"seed": args.seed, **parse_optim_args(optim_args)})


def vocabulary_weights(model) -> set[int]:
    """Ids of the weights of embedding and head."""
    modules = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    return {id(module.weight) for module in modules}


def gefen_x(trainer, optim_args: str | None):
    """Gefen over named parameters, those without decay in a group of their own."""
    from gefen import Gefen

    args, decaying = trainer.args, set(trainer.get_decay_parameter_names(trainer.model))
    named = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [pair for pair in named if (pair[0] in decaying) == decays], "weight_decay": weight_decay}
        for decays, weight_decay in ((True, args.weight_decay), (False, 0.0))
    ]
    options = {name: json.loads(value) for name, value in split_optim_args(optim_args)}
    return Gefen([group for group in groups if group["params"]], **adam_arguments(args), fused=False, **options)


def adam_arguments(args) -> dict[str, Any]:
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


OWN = {"foam_factored_embeddings": factored_embeddings, "gefen_x": gefen_x}


def translate(words: list[str]) -> tuple[list[str], argparse.Namespace]:
    """The words for train.py, and those that are ours; `optim` among them if it is one of OWN."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("optim", "optim_args"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--prepared", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--spike")
    own, rest = parser.parse_known_args(words)
    if own.optim in OWN:
        return [*rest, "--optim", "adamw_torch"], own
    rest += ["--optim", own.optim] if own.optim else []
    rest += ["--optim_args", own.optim_args] if own.optim_args else []
    own.optim = None
    return rest, own


def remembered(folder: Path, parts: object, make, save, load):
    """What `make` returns, saved in `folder` under `parts` for the next run; whole or not at all, as many may try."""
    place = folder / hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
    if place.exists():
        return load(place)
    value = make()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder))
    save(value, temporary)
    try:
        os.rename(temporary, place)
    except OSError:  # another run was first
        shutil.rmtree(temporary)
    return value


def preparing(folder: Path, original):
    """TRL's preparation of a data set, remembered by rows, tokenizer and what is done to them."""

    @functools.wraps(original)
    def prepare(self, dataset, processing_class, args, packing, *rest):
        parts = [
            "tokens",
            dataset.to_list(),
            processing_class.name_or_path,
            processing_class.chat_template,
            args.max_length,
            packing,
            args.completion_only_loss,
            args.assistant_only_loss,
            rest[-1],
        ]
        return remembered(
            folder,
            parts,
            lambda: original(self, dataset, processing_class, args, packing, *rest),
            lambda value, place: value.save_to_disk(place),
            lambda place: datasets.load_from_disk(str(place)),
        )

    return prepare


def counting(folder: Path, original):
    """count_lengths, remembered likewise."""

    @functools.wraps(original)
    def count(rows, tokenizer, *rest):
        return remembered(
            folder,
            ["lengths", rows.to_list(), tokenizer.name_or_path, tokenizer.chat_template, rest],
            lambda: original(rows, tokenizer, *rest),
            lambda value, place: (place / "lengths.json").write_text(json.dumps(value), encoding="utf-8"),
            lambda place: json.loads((place / "lengths.json").read_text(encoding="utf-8")),
        )

    return count


def other_loss(trainer, recipe, file: Path) -> float | None:
    """Held-out loss on examples of another file; always the same ones."""
    asked = dataclasses.replace(recipe, dataset_path=str(file), train_samples=None, eval_samples=OTHER_ROWS)
    rows = RECIPE.load_instructions(asked).held_out
    return RECIPE.finite(trainer.evaluate(eval_dataset=rows, metric_key_prefix="other")["other_loss"])


def add_spike(trainer, spike: str) -> None:
    """Multiply the loss of one step: `spike` is STEP:FACTOR, steps counted from 0."""
    step, factor = spike.split(":")
    original = trainer.compute_loss

    def compute_loss(model, *arguments, **named):
        found = original(model, *arguments, **named)
        if not model.training or trainer.state.global_step != int(step):
            return found
        return (found[0] * float(factor), *found[1:]) if isinstance(found, tuple) else found * float(factor)

    trainer.compute_loss = compute_loss


def main(argv: list[str] | None = None) -> dict:
    """Run what the words ask for; the results, as in the results.json written."""
    words, own = translate(sys.argv[1:] if argv is None else argv)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    recipe, build_trainer, count_lengths = RECIPE, RECIPE.build_trainer, RECIPE.count_lengths
    evaluate = RECIPE.evaluate
    prepare = SFTTrainer._prepare_dataset

    def build(*arguments):
        trainer = build_trainer(*arguments)
        trainer.save_model = lambda *_: None  # a grid of saved models fills a disk
        if own.optim:
            trainer.optimizer = OWN[own.optim](trainer, own.optim_args)
        if own.spike:
            add_spike(trainer, own.spike)
        return trainer

    def evaluate_both(arguments, trainer, data):
        scores = evaluate(arguments, trainer, data)
        return scores | ({"other_loss": other_loss(trainer, arguments, own.other)} if own.other else {})

    recipe.build_trainer, recipe.evaluate = build, evaluate_both
    if own.prepared:
        recipe.count_lengths = counting(own.prepared, count_lengths)
        SFTTrainer._prepare_dataset = preparing(own.prepared, prepare)
    try:
        results = recipe.main(words)
    finally:
        recipe.build_trainer, recipe.count_lengths, recipe.evaluate = build_trainer, count_lengths, evaluate
        SFTTrainer._prepare_dataset = prepare
    if own.optim:
        results |= {"optim": own.optim, "optim_args": own.optim_args}
        place = results["settings"]["output_dir"]
        recipe.write_json(Path(place) / "results.json", results, ensure_ascii=False)
    return results


if __name__ == "__main__":
    main()
