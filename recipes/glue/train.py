"""Fine-tune an encoder on GLUE: `python train.py [CONFIG.yaml] --task_name cola --output_dir runs/cola [--flags ...]`.

Flags are the fields of GlueArguments (arguments.py) and of transformers' TrainingArguments. The command line wins over
the YAML config (roberta-base.yaml beside this script if none is named), and that over the defaults.
"""

import dataclasses
import gc
import json
import logging
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import foam_hf  # registers optim="foam" and "foam_mini"
from foam_hf.memory import adamw_state_bytes, state_bytes
from foam_hf.recipe_kit import (
    checkpoint_to_resume,
    finite,
    hub_problem,
    keep_earlier,
    one_line,
    resumed_callback,
    resumes_newest,
    say,
    write_json,
)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [] if str(HERE) in sys.path else [str(HERE)]  # the siblings, also when this file is imported

import metrics  # noqa: E402
import table  # noqa: E402
from arguments import GlueArguments, build_training_arguments, parse  # noqa: E402
from data import TASKS, load_splits  # noqa: E402


def model_source(recipe: GlueArguments) -> tuple[str, bool]:
    """Folder or hub name of the model, and whether only the cache can give it; SystemExit where nothing can."""
    name = os.path.expanduser(recipe.model_name_or_path)
    if os.path.isdir(name):
        return name, True
    if os.path.isabs(name) or name.startswith(".") or name.count("/") > 1:
        raise SystemExit(f"--model_name_or_path: no folder {name}.")
    problem = hub_problem()
    if problem and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise SystemExit(
            f"Cannot load the model {name}: {problem}, and it is not in the local cache; "
            "give the folder of a saved model by --model_name_or_path."
        )
    return name, problem is not None


def load_model(recipe: GlueArguments, task_name: str):
    """Tokenizer and classifier for one task; SystemExit with one sentence where they cannot be had."""
    task = TASKS[task_name]
    name, local_only = model_source(recipe)
    labels = {"num_labels": 1, "problem_type": "regression"}
    if task.labels:
        labels = {
            "id2label": dict(enumerate(task.labels)),
            "label2id": {label: index for index, label in enumerate(task.labels)},
            "problem_type": "single_label_classification",
        }
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_only)
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=AutoConfig.from_pretrained(name, local_files_only=local_only, **labels),
            dtype=getattr(torch, recipe.dtype),
            local_files_only=local_only,
            ignore_mismatched_sizes=recipe.ignore_mismatched_sizes,
            **({"quantization_config": foam_hf.Int8Config()} if recipe.int8_weights else {}),
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        hint = " A classifier of other labels needs --ignore_mismatched_sizes." if "mismatch" in str(error) else ""
        raise SystemExit(f"Cannot load the model {name} for {task_name}: {one_line(error)}{hint}") from None
    # A classifier's loss is a mean already: without this, Trainer multiplies it by processes and accumulation steps.
    model.accepts_loss_kwargs = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


# They number the positions of tokens from behind that of padding.
BEHIND_PADDING = (
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "mpnet",
)


def positions(config) -> float:
    """How many tokens the model has positions for."""
    count = getattr(config, "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return math.inf
    return count - config.pad_token_id - 1 if config.model_type in BEHIND_PADDING else count


def tokenize(rows: list[dict], tokenizer, max_length: int) -> list[dict]:
    """Rows as input ids (unpadded; the collator pads each batch) and labels."""
    texts = [row["text"] for row in rows]
    pairs = [row["text_pair"] for row in rows] if rows[0]["text_pair"] is not None else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    return [
        {**{name: values[index] for name, values in encoded.items()}, "labels": row["label"]}
        for index, row in enumerate(rows)
    ]


def build_trainer(recipe: GlueArguments, args: TrainingArguments, task_name: str, splits: dict) -> Trainer:
    """Trainer with a fresh model on one task."""
    set_seed(args.seed)  # before the classifier's weights are drawn
    tokenizer, model = load_model(recipe, task_name)
    length = min(recipe.max_seq_length, tokenizer.model_max_length, positions(model.config))
    sets = {}
    for name, rows in splits.items():
        limit = recipe.max_train_samples if name == "train" else recipe.max_eval_samples
        sets[name] = tokenize(rows[:limit], tokenizer, length)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in sets.items())
    say(f"{task_name}: {counts} examples, cut at {length} tokens")
    train_set = sets.pop("train")

    def compute_metrics(output) -> dict[str, float]:
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        return metrics.score(task_name, logits, output.label_ids)

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=sets if len(sets) > 1 else sets["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if args.bf16 or args.fp16 else None),
        compute_metrics=compute_metrics,
        callbacks=[foam_hf.OptimizerMemoryCallback(), resumed_callback(say)],
    )
    foam_log = logging.getLogger("foam_hf")
    foam_log.disabled = True  # its summary comes when train() builds the optimizer
    try:
        trainer.get_optimizer_cls_and_kwargs(args, model)  # a wrong optimizer setting ends here, not in train()
    except (ValueError, TypeError, ImportError) as error:
        raise SystemExit(f"train.py: {one_line(error)}") from None
    finally:
        foam_log.disabled = False
    return trainer


def evaluate(trainer: Trainer, task_name: str) -> dict[str, float]:
    """The task's metrics and loss on its validation sets, without Trainer's timings."""
    found = {name.removeprefix("eval_"): finite(value) for name, value in trainer.evaluate().items()}
    return {name: value for name, value in found.items() if name.endswith((*TASKS[task_name].metrics, "loss"))}


def earlier_work(output_dir: Path, settings: dict, training: dict) -> tuple[dict | None, str | None]:
    """Results of the same run if it finished, and the checkpoint to go on from, as --resume_from_checkpoint asks."""
    wanted, results_file = training.get("resume_from_checkpoint"), output_dir / "results.json"
    if resumes_newest(wanted) and results_file.is_file():
        finished = json.loads(results_file.read_text(encoding="utf-8"))
        if "settings" not in finished:
            raise SystemExit(f"{results_file} is not of one run; choose another --output_dir.")
        keys = {**settings, **finished["settings"]}
        changed = [key for key in keys if settings.get(key) != finished["settings"].get(key)]
        if changed:
            raise SystemExit(f"{results_file} is of another {', '.join(changed)}; choose another --output_dir.")
        say(f"{output_dir} is finished: its results are kept.")
        return finished, None
    return None, checkpoint_to_resume(wanted, output_dir)


def run(recipe: GlueArguments, args: TrainingArguments, training: dict, task_name: str, splits: dict) -> dict:
    """Train, evaluate and save one task with one seed; what its results.json holds."""
    own = ("task_name", "seeds", "seed", "output_dir", "resume_from_checkpoint", "hub_token", "push_to_hub_token")
    settings = {name: value for name, value in {**dataclasses.asdict(recipe), **training}.items() if name not in own}
    settings = json.loads(json.dumps(settings, default=str))
    output_dir = Path(args.output_dir)
    finished, checkpoint = earlier_work(output_dir, settings, training)
    if finished:
        return finished
    trainer = build_trainer(recipe, args, task_name, splits)
    keep_earlier(output_dir, checkpoint is not None, say)  # not before all that may be refused was
    untrained = evaluate(trainer, task_name) if recipe.eval_untrained else None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    started = time.perf_counter()
    scores = evaluate(trainer, task_name)
    eval_seconds = time.perf_counter() - started
    trainer.save_model()
    trainer.save_state()
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
        "train_loss": finite(trained.training_loss),
        "steps": trained.global_step,
        "one_class": metrics.last_note(),
        "resumed_from": checkpoint,
        "optimizer_state_bytes": state_bytes(trainer.optimizer),
        "adamw_state_bytes": adamw_state_bytes([p for p in trainer.model.parameters() if p.requires_grad]),
        "peak_cuda_bytes": peak,
        "seconds": {"train": trained.metrics["train_runtime"], "eval": eval_seconds},
        "metrics_from": "evaluate" if metrics.hub_metric(task_name) else "scikit-learn and scipy",
        "settings": settings,
        "versions": {
            "foam_hf": foam_hf.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        },
    }
    if trainer.is_world_process_zero():
        write_json(output_dir / "results.json", results)
    return results


def main(argv: list[str] | None = None) -> dict:
    """Run what the arguments ask for; the results, as in the results.json written."""
    recipe, training, config, notes = parse(sys.argv[1:] if argv is None else argv)
    root = Path(training["output_dir"]).expanduser()
    seeds = recipe.seeds or [training.get("seed", TrainingArguments.seed)]
    runs = [(task_name, seed) for task_name in recipe.task_name for seed in seeds]
    grid = len(recipe.task_name) > 1 or bool(recipe.seeds)
    wanted = training.get("resume_from_checkpoint")
    if len(runs) > 1 and wanted and not resumes_newest(wanted):
        raise SystemExit("--resume_from_checkpoint: several runs resume by true, each from its own newest checkpoint.")
    optim = training.get("optim", "the default")
    optim = f"{optim} ({training['optim_args']})" if training.get("optim_args") else optim
    say(
        f"GLUE {', '.join(recipe.task_name)} | model {recipe.model_name_or_path} | optimizer {optim}, "
        f"lr {training.get('learning_rate', 'default')} | seed {', '.join(map(str, seeds))} | config {config.name}"
    )
    for note in notes:
        say(note)
    # Everything that can be wrong is found before the first of perhaps many runs.
    arguments = {
        (task_name, seed): build_training_arguments(
            training, root / task_name / f"seed-{seed}" if grid else root, seed
        )
        for task_name, seed in runs
    }
    model_source(recipe)
    several = len(recipe.task_name) > 1
    data = {task_name: load_splits(task_name, recipe.dataset_path, several) for task_name in recipe.task_name}
    results = []
    for number, (task_name, seed) in enumerate(runs, 1):
        if len(runs) > 1:
            say(f"\n[{number}/{len(runs)}] {task_name}, seed {seed}")
        results.append(run(recipe, arguments[task_name, seed], training, task_name, data[task_name]))
        gc.collect()  # the Trainer refers to itself
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    merged = {"runs": results} if grid else results[0]
    if grid and not resumes_newest(wanted):
        keep_earlier(root, True, say)  # the table of an earlier grid; each run has said of its own
    if grid and int(os.environ.get("RANK", "0")) == 0:
        write_json(root / "results.json", merged)
    where = root / "TASK" / "seed-N" if grid else root
    say(f"\nSaved in {where}: the model, its tokenizer and results.json. To use the model:")
    before = "import foam_hf; " if recipe.int8_weights else ""
    say(f"  {before}AutoModelForSequenceClassification.from_pretrained({str(where)!r})\n")
    say(table.text_table(results))
    for result in results:
        if result.get("one_class"):
            say(f"{result['task']}, seed {result['seed']}: {result['one_class']}.")
    say(f"\nTo compare runs of several optimizers: python {HERE / 'table.py'} RUN_FOLDER RUN_FOLDER ...")
    return merged


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("foam_hf").setLevel(logging.INFO)  # what folds, what does not, and what that costs
    main()
