"""Fine-tune an encoder on GLUE: `python train.py [CONFIG.yaml] --task_name cola --output_dir runs/cola [--flags ...]`.

Flags are the fields of GlueArguments (arguments.py) and of transformers' TrainingArguments. The command line wins over
the YAML config (roberta-base.yaml beside this script if none is named), and that over the defaults.
"""

import dataclasses
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import foam_hf  # registers optim="foam" and "foam_mini"
from foam_hf.memory import adamw_state_bytes, state_bytes

HERE = Path(__file__).resolve().parent
sys.path[:0] = [] if str(HERE) in sys.path else [str(HERE)]  # the siblings, also when this file is imported

import metrics  # noqa: E402
import table  # noqa: E402
from arguments import GlueArguments, build_training_arguments, parse, resumes_newest, say  # noqa: E402
from data import TASKS, hub_problem, load_splits  # noqa: E402


def load_model(recipe: GlueArguments, task_name: str):
    """Tokenizer and classifier for one task; SystemExit with one sentence where they cannot be had."""
    task, name, offline = TASKS[task_name], os.path.expanduser(recipe.model_name_or_path), False
    if not os.path.isdir(name):
        local = "give the folder of a saved model by --model_name_or_path"
        if os.path.isabs(name) or name.startswith(".") or name.count("/") > 1:
            raise SystemExit(f"--model_name_or_path: no folder {name}.")
        problem = hub_problem()
        offline = problem is not None
        from huggingface_hub import try_to_load_from_cache

        if offline and not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise SystemExit(f"Cannot load the model {name}: {problem}, and it is not in the local cache; {local}.")
    labels = {"id2label": dict(enumerate(task.labels))} if task.labels else {"num_labels": 1}
    if task.labels:
        labels["label2id"] = {label: index for index, label in enumerate(task.labels)}
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=offline, **labels)
        config.problem_type = "single_label_classification" if task.labels else "regression"
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline)
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, recipe.dtype),
            local_files_only=offline,
            ignore_mismatched_sizes=recipe.ignore_mismatched_sizes,
        )
    except (OSError, ValueError, RuntimeError) as error:
        hint = " (a classifier of other labels needs --ignore_mismatched_sizes)" if "mismatch" in str(error) else ""
        raise SystemExit(f"Cannot load the model {name} for {task_name}: {error}{hint}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def tokenize(rows: list[dict], tokenizer, max_length: int) -> list[dict]:
    """Rows as input ids (unpadded; the collator pads each batch) and labels."""
    texts = [row["text"] for row in rows]
    pairs = [row["text_pair"] for row in rows] if rows[0]["text_pair"] is not None else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=min(max_length, tokenizer.model_max_length))
    return [
        {**{name: values[index] for name, values in encoded.items()}, "labels": row["label"]}
        for index, row in enumerate(rows)
    ]


def run(recipe: GlueArguments, training: dict, task_name: str, seed: int, output_dir: Path) -> dict:
    """Train and evaluate one task with one seed; the contents of its results.json."""
    args = build_training_arguments(training, output_dir, seed)
    settings = {**dataclasses.asdict(recipe), **training}
    for name in ("task_name", "seeds", "seed", "output_dir", "resume_from_checkpoint"):
        settings.pop(name, None)
    settings = json.loads(json.dumps(settings, default=str))
    results_file, resume = output_dir / "results.json", args.resume_from_checkpoint
    if resumes_newest(training):
        finished = json.loads(results_file.read_text(encoding="utf-8")) if results_file.is_file() else None
        if finished and finished["settings"] != settings:
            keys = {**settings, **finished["settings"]}
            changed = [key for key in keys if settings.get(key) != finished["settings"].get(key)]
            raise SystemExit(
                f"{results_file} was made with another {', '.join(changed)}; choose another --output_dir."
            )
        if finished:
            say(f"{output_dir} is finished already: kept.")
            return finished
        resume = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
        say(f"Resuming from {resume}." if resume else f"No checkpoint in {output_dir}: starting from the beginning.")
    elif resume and not os.path.isdir(resume):
        raise SystemExit(
            f"--resume_from_checkpoint: no folder {resume}; expected a checkpoint, or true for the newest."
        )

    splits = load_splits(task_name, recipe.dataset_path, several=len(recipe.task_name) > 1)
    set_seed(args.seed)  # before the classifier's weights are drawn
    tokenizer, model = load_model(recipe, task_name)
    train_rows = splits.pop("train")[: recipe.max_train_samples]
    train_set = tokenize(train_rows, tokenizer, recipe.max_seq_length)
    eval_sets = {
        name: tokenize(rows[: recipe.max_eval_samples], tokenizer, recipe.max_seq_length)
        for name, rows in splits.items()
    }
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in {"train": train_set, **eval_sets}.items())
    say(f"{task_name}: {counts} examples")
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_sets if len(eval_sets) > 1 else eval_sets["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if args.bf16 or args.fp16 else None),
        compute_metrics=lambda output: metrics.score(
            task_name, output[0][0] if isinstance(output[0], tuple) else output[0], output[1]
        ),
        callbacks=[foam_hf.OptimizerMemoryCallback()],
    )

    def evaluate() -> dict[str, float]:
        found = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
        return {name: value for name, value in found.items() if name.endswith((*TASKS[task_name].metrics, "loss"))}

    untrained = evaluate() if recipe.eval_untrained else None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trained = trainer.train(resume_from_checkpoint=resume)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    started = time.perf_counter()
    scores = evaluate()
    seconds = {"train": trained.metrics["train_runtime"], "eval": time.perf_counter() - started}
    trainer.save_model()
    results = {
        "task": task_name,
        "seed": args.seed,
        "model": recipe.model_name_or_path,
        "optim": getattr(args.optim, "value", args.optim),
        "optim_args": args.optim_args,
        "learning_rate": args.learning_rate,
        "main_score": metrics.main_score(task_name, scores),
        "scores": scores,
        "untrained": untrained,
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "examples": {"train": len(train_set), **{name: len(rows) for name, rows in eval_sets.items()}},
        "optimizer_state_bytes": state_bytes(trainer.optimizer),
        "adamw_state_bytes": adamw_state_bytes([p for p in model.parameters() if p.requires_grad]),
        "peak_cuda_bytes": peak,
        "seconds": seconds,
        "settings": settings,
        "metrics_from": "evaluate" if metrics.hub_metric(task_name) else "scikit-learn and scipy",
        "versions": {
            "foam_hf": foam_hf.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if args.device.type == "cuda" else f"{args.device.type}",
        },
    }
    if trainer.is_world_process_zero():
        table.write_json(results_file, results)
    return results


def main(argv: list[str] | None = None) -> dict:
    """Run what the arguments ask for; the results, as in the results.json written."""
    recipe, training, config, notes = parse(sys.argv[1:] if argv is None else argv)
    root = Path(training["output_dir"]).expanduser()
    seeds = recipe.seeds or [training.get("seed", TrainingArguments.seed)]
    runs = [(task_name, seed) for task_name in recipe.task_name for seed in seeds]
    grid = len(recipe.task_name) > 1 or bool(recipe.seeds)
    if len(runs) > 1 and training.get("resume_from_checkpoint") and not resumes_newest(training):
        raise SystemExit("--resume_from_checkpoint: several runs resume by true, each from its own newest checkpoint.")
    optim = training.get("optim", "the default")
    optim = f"{optim} ({training['optim_args']})" if training.get("optim_args") else optim
    say(
        f"GLUE {', '.join(recipe.task_name)} | model {recipe.model_name_or_path} | optimizer {optim}, "
        f"lr {training.get('learning_rate', 'default')} | seed {', '.join(map(str, seeds))} | config {config.name}"
    )
    for note in notes:
        say(note)
    results = []
    for number, (task_name, seed) in enumerate(runs, 1):
        if len(runs) > 1:
            say(f"\n[{number}/{len(runs)}] {task_name}, seed {seed}")
        output_dir = root / task_name / f"seed-{seed}" if grid else root
        results.append(run(recipe, training, task_name, seed, output_dir))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    merged = {"runs": results} if grid else results[0]
    if grid and int(os.environ.get("RANK", "0")) == 0:
        table.write_json(root / "results.json", merged)
    where = root / "TASK" / "seed-N" if grid else root
    say(f"\nSaved in {where}: the model, its tokenizer and results.json. To use the model:")
    say(f"  AutoModelForSequenceClassification.from_pretrained({str(where)!r})\n")
    say(table.text_table(results))
    return merged


if __name__ == "__main__":
    main()
