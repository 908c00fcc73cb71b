"""Tune a chat model on instructions: `python train.py [--config CONFIG.yaml] --dataset_path FILE --output_dir DIR`.

Keys are the fields of InstructArguments (instruct_arguments.py) and of TRL's SFTConfig. The command line wins over
the YAML config (smollm2-135m.yaml beside this script if none is named), and that over the defaults.
"""

import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

import foam_hf  # registers optim="foam" and "foam_mini"
from foam_hf.memory import breakdown

HERE = Path(__file__).resolve().parent
sys.path[:0] = [] if str(HERE) in sys.path else [str(HERE)]  # the siblings, also when this file is imported

import answers  # noqa: E402
import chat_models  # noqa: E402
from instruct_arguments import InstructArguments, parse, say  # noqa: E402
from instruct_data import Instructions, count_lengths, load_instructions, one_line  # noqa: E402

SAMPLES = 3


class Meter(TrainerCallback):
    """Bytes after the first optimizer step, gradients still there; time and tokens of all steps after the first."""

    def __init__(self) -> None:
        self.memory = None
        self.seconds, self.tokens, self.steps = 0.0, 0, 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.began, self.seen = time.perf_counter(), state.num_input_tokens_seen

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if self.memory is None:
            self.memory = breakdown(model, optimizer)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps += 1
        if self.steps == 2:  # the first step compiles kernels and allocates: it counts only if it is the only one
            self.seconds, self.tokens = 0.0, 0
        self.seconds += time.perf_counter() - self.began
        self.tokens += state.num_input_tokens_seen - self.seen

    def peak_by_kind(self) -> dict | None:
        """Bytes at the peak by kind; None without CUDA. All counts are of this process."""
        if self.memory is None or self.memory.peak is None:
            return None
        parts = {name: getattr(self.memory, name) for name in ("weights", "gradients", "state")}
        peak = torch.cuda.max_memory_allocated()
        return {
            "total": peak,
            "weights": parts["weights"],
            "gradients": parts["gradients"],
            "optimizer_state": parts["state"],
            "rest": peak - sum(parts.values()),
        }


def build_trainer(recipe: InstructArguments, args, data: Instructions, model, tokenizer, meter: Meter) -> SFTTrainer:
    """TRL's trainer, which applies the template, masks the prompt, cuts and packs; SystemExit for what it refuses."""
    try:
        return SFTTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=tokenizer,
            peft_config=chat_models.lora_config(recipe),
            callbacks=[meter, foam_hf.OptimizerMemoryCallback()],
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise SystemExit(f"train.py: {one_line(error)}") from None


def check_template(recipe: InstructArguments, data: Instructions, model, tokenizer) -> None:
    """SystemExit where the chat template is missing, or where answers as it writes them would never end."""
    row = data.train[0]
    if isinstance(row.get("prompt"), str):
        say("Plain prompt and completion: trained as they are, without a chat template.")
        return
    if tokenizer.chat_template is None:
        raise SystemExit(
            f"{recipe.model_name_or_path} has no chat template, as base models often; expected an Instruct model, "
            "--chat_template_path of one that has, or data with plain prompt and completion columns."
        )
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **recipe.template_kwargs)
    end = tokenizer(text.rpartition(messages[-1]["content"].strip())[2], add_special_tokens=False)["input_ids"]
    stops = answers.stop_tokens(model, tokenizer)
    if not set(end) & set(stops):
        raise SystemExit(
            f"The chat template ends an answer with {tokenizer.decode(end)!r}, but generation stops at "
            f"{tokenizer.convert_ids_to_tokens(stops)}: answers would never end. Expected --eos_token to name the "
            "token that ends an answer."
        )


def evaluate(recipe: InstructArguments, trainer: SFTTrainer, data: Instructions) -> dict:
    """Held-out loss and perplexity, exact match if asked for, and the first sample answers."""
    loss = finite(trainer.evaluate()["eval_loss"])
    scores = {"eval_loss": loss, "perplexity": None if loss is None else finite(math.exp(min(loss, 700)))}
    count = min(recipe.exact_match_samples or len(data.held_out), len(data.held_out)) if recipe.eval_exact_match else 0
    rows = data.held_out.select(range(min(max(count, SAMPLES), len(data.held_out)))).to_list()
    pairs = [question_and_answer(row) for row in rows]
    started = time.perf_counter()
    with torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=trainer.args.bf16):
        generated = answers.generate(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            [prompt for prompt, _ in pairs],
            template_kwargs=recipe.template_kwargs,
            max_new_tokens=recipe.max_new_tokens,
            batch_size=trainer.args.per_device_eval_batch_size,
        )
    if count:
        scores |= answers.exact_match(generated[:count], [reference for _, reference in pairs[:count]])
        scores["generation_seconds"] = round(time.perf_counter() - started, 2)
    scores["samples"] = [
        {"prompt": text(prompt), "reference": reference, "answer": answer}
        for (prompt, reference), answer in zip(pairs[:SAMPLES], generated, strict=False)
    ]
    return scores


def question_and_answer(row: dict) -> tuple[str | list[dict], str]:
    """What the model continues, and the answer in the data."""
    if "messages" in row:
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        return row["messages"][:last], row["messages"][last]["content"]
    return row["prompt"], text(row["completion"])


def text(part: str | list[dict]) -> str:
    return part if isinstance(part, str) else part[-1]["content"]


def finite(value: float) -> float | None:
    """The value, or None for the loss of a run that diverged: JSON has no NaN."""
    return value if math.isfinite(value) else None


def write_json(path: Path, value: object) -> None:
    """Write the whole file or leave what was there: a temporary neighbour, then one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, allow_nan=False, ensure_ascii=False)
        stream.write("\n")
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in ("foam-hf", "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = foam_hf.__version__ if name == "foam-hf" else None
    return found


def main(argv: list[str] | None = None) -> dict:
    """Run what the arguments ask for; the results, as in the results.json written."""
    recipe, args, settings = parse(sys.argv[1:] if argv is None else argv)
    output_dir = Path(args.output_dir)
    optim = getattr(args.optim, "value", args.optim) + (f" ({args.optim_args})" if args.optim_args else "")
    say(f"{recipe.method} | {recipe.model_name_or_path} in {recipe.dtype} | {optim}, lr {args.learning_rate}")
    data = load_instructions(
        dataset_path=recipe.dataset_path,
        dataset_name=recipe.dataset_name,
        dataset_config=recipe.dataset_config,
        eval_samples=recipe.eval_samples,
        train_samples=recipe.train_samples,
        split_seed=recipe.split_seed,
        whole_conversations=args.assistant_only_loss,
        template_kwargs=recipe.template_kwargs,
    )
    model, tokenizer = chat_models.load(recipe, output_dir)
    args.include_num_input_tokens_seen = "non_padding"  # for tokens a second
    meter = Meter()
    check_template(recipe, data, model, tokenizer)
    for split, rows in (("train", data.train), ("held_out", data.held_out)):
        data.counts[f"{split}_lengths"] = count_lengths(rows, tokenizer, args.max_length, recipe.template_kwargs)
    trainer = build_trainer(recipe, args, data, model, tokenizer, meter)
    for split, rows, prepared in (
        ("train", data.train, trainer.train_dataset),
        ("held_out", data.held_out, trainer.eval_dataset),
    ):
        packed = split == "train" and args.packing
        data.counts[f"{split}_lengths"]["dropped_for_length"] = None if packed else len(rows) - len(prepared)
    say(json.dumps(data.counts))
    if recipe.method != "full":
        say(chat_models.adapter_saving(trainer.model))
    before = evaluate(recipe, trainer, data) if recipe.eval_before else None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    checkpoint = args.resume_from_checkpoint
    if str(checkpoint).lower() == "true":
        checkpoint = get_last_checkpoint(args.output_dir) if output_dir.is_dir() else None
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    peak = meter.peak_by_kind()
    trainer.save_model()
    after = evaluate(recipe, trainer, data)
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    results = {
        "model": recipe.model_name_or_path,
        "method": recipe.method,
        "dtype": recipe.dtype,
        "optim": getattr(args.optim, "value", args.optim),
        "optim_args": args.optim_args,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "before": before,
        "after": after,
        "train_loss": finite(trained.training_loss),
        "steps": trained.global_step,
        "train_seconds": trained.metrics["train_runtime"],
        "tokens_per_second": meter.tokens / meter.seconds if meter.seconds else None,
        "trained_parameters": sum(p.numel() for p in trainable),
        "optimizer_state_bytes": meter.memory.state if meter.memory else None,
        "peak_bytes": peak,
        "data": data.counts,
        "settings": settings,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        write_json(output_dir / "results.json", results)
    say(f"Saved in {output_dir}: the {'model' if recipe.method == 'full' else 'adapter'}, tokenizer, results.json.")
    return results


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("foam_hf").setLevel(logging.INFO)  # what folds, what does not, and what that costs
    main()
