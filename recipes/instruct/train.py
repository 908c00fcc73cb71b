"""Tune a chat model on instructions: `python train.py [--config CONFIG.yaml] --dataset_path FILE --output_dir DIR`.

Keys are the fields of InstructArguments (instruct_arguments.py) and of TRL's SFTConfig. The command line wins over
the YAML config (smollm2-135m.yaml beside this script if none is named), and that over the defaults.
"""

import logging
import math
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object

import foam_hf  # registers optim="foam" and "foam_mini"
from foam_hf.recipe_kit import (
    checkpoint_to_resume,
    finished_results,
    finite,
    keep_earlier,
    one_line,
    resumed_callback,
    resumes_newest,
    say,
    write_json,
)

try:
    import datasets  # noqa: F401  # before trl, which hides what it lacks
    from trl import SFTConfig, SFTTrainer
except ImportError as error:  # one line, before anything is read
    raise SystemExit(f"This recipe needs TRL, PEFT and datasets (pip install trl peft datasets): {error}") from None

HERE = Path(__file__).resolve().parent
sys.path[:0] = [] if str(HERE) in sys.path else [str(HERE)]  # the siblings, also when this file is imported

import answers  # noqa: E402
import chat_models  # noqa: E402
from instruct_arguments import WHOLE, InstructArguments, parse  # noqa: E402
from instruct_data import Instructions, count_lengths, describe, load_instructions  # noqa: E402
from measuring import Meter, versions  # noqa: E402

SAMPLES = 3  # answers in results.json


def build_trainer(recipe: InstructArguments, args: SFTConfig, data: Instructions, meter: Meter) -> SFTTrainer:
    """TRL's trainer, which applies the template, masks the prompt, cuts and packs; SystemExit for what it refuses."""
    say(f"Loading {recipe.model_name_or_path} ...")
    model, tokenizer = chat_models.load(recipe, Path(args.output_dir))
    plain = isinstance(data.train[0].get("prompt"), str)
    if plain:
        say("Plain prompt and completion: trained as they are, without a chat template.")
    elif tokenizer.chat_template is None and args.chat_template_path is None:
        raise SystemExit(
            f"{recipe.model_name_or_path} has no chat template, as base models often; expected an Instruct model, "
            "--chat_template_path of a model that has one, or data with plain prompt and completion columns."
        )
    foam_log = logging.getLogger("foam_hf")
    foam_log.disabled = True  # its summary comes when train() builds the optimizer
    try:
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=tokenizer,
            peft_config=chat_models.lora_config(recipe),
            callbacks=[meter, foam_hf.OptimizerMemoryCallback(), resumed_callback(say)],
        )
        trainer.get_optimizer_cls_and_kwargs(args, trainer.model)  # a wrong setting ends here, not in train()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise SystemExit(f"train.py: {one_line(error)}") from None
    finally:
        foam_log.disabled = False
    if not plain:
        check_end_of_answers(data.train[0], trainer, recipe.template_kwargs)
    return trainer


def check_end_of_answers(row: dict, trainer: SFTTrainer, template_kwargs: dict) -> None:
    """SystemExit where answers, as the chat template writes them, do not end in a token that ends generation."""
    tokenizer = trainer.processing_class
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    content = next((words for message in reversed(messages) if (words := message["content"].strip())), None)
    if content is None:
        return
    text = tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
    end = tokenizer(text.rpartition(content)[2], add_special_tokens=False)["input_ids"]
    stops = answers.stop_tokens(trainer.model, tokenizer)
    if not set(end) & set(stops):
        raise SystemExit(
            f"The chat template ends an answer with {tokenizer.decode(end)!r}, but generation stops at "
            f"{', '.join(tokenizer.convert_ids_to_tokens(stops))}: answers would never end. Expected --eos_token to "
            "name the token that ends an answer."
        )


def count_cuts(recipe: InstructArguments, data: Instructions, trainer: SFTTrainer) -> None:
    """Add to the data's counts how many examples are too long, and how many of them TRL dropped."""
    for split, rows, prepared in (
        ("train", data.train, trainer.train_dataset),
        ("held_out", data.held_out, trainer.eval_dataset),
    ):
        args = trainer.args
        lengths = count_lengths(rows, trainer.processing_class, args.max_length, recipe.template_kwargs)
        packed = args.packing if split == "train" or args.eval_packing is None else args.eval_packing
        lengths["dropped_without_answer"] = None if packed else len(rows) - len(prepared)
        data.counts[split] = {**data.counts.get(split, {}), "used": len(rows), **lengths}
        if not len(prepared):
            raise SystemExit(
                f"--max_length: got {args.max_length}, which cuts off every answer of the {len(rows)} "
                f"{split.replace('_', '-')} examples; the longest has {lengths['longest']} tokens."
            )
    say(describe(data.counts, trainer.args.max_length))


def evaluate(recipe: InstructArguments, trainer: SFTTrainer, data: Instructions) -> dict:
    """Held-out loss and perplexity, exact match if asked for, and the first answers."""
    loss = finite(trainer.evaluate()["eval_loss"])
    scores = {"eval_loss": loss, "perplexity": None if loss is None else finite(math.exp(min(loss, 700)))}
    wanted = recipe.exact_match_samples or len(data.held_out) if recipe.eval_exact_match else SAMPLES
    rows = data.held_out.select(range(min(max(wanted, SAMPLES), len(data.held_out)))).to_list()
    prompts, references = zip(*map(question_and_answer, rows), strict=True)
    args, started = trainer.args, time.perf_counter()
    with (
        trainer.accelerator.split_between_processes(list(prompts)) as share,
        torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16),
    ):
        generated = answers.generate(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            share,
            template_kwargs=recipe.template_kwargs,
            max_new_tokens=recipe.max_new_tokens,
            batch_size=recipe.generation_batch_size or args.per_device_eval_batch_size,
        )
    generated = gather_object(generated)
    if recipe.eval_exact_match:
        scores |= answers.exact_match(generated[:wanted], list(references[:wanted]))
        scores["generation_seconds"] = round(time.perf_counter() - started, 2)
    questions = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    scores["samples"] = [
        {"prompt": question, "reference": reference, "answer": answer}
        for question, reference, answer in zip(questions, references, generated, strict=True)
    ][:SAMPLES]
    return scores


def question_and_answer(row: dict) -> tuple[str | list[dict], str]:
    """What the model continues, and the answer in the data."""
    if "messages" in row:
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        return row["messages"][:last], row["messages"][last]["content"]
    completion = row["completion"]
    return row["prompt"], completion if isinstance(completion, str) else completion[-1]["content"]


def earlier_work(args, settings: dict) -> tuple[dict | None, str | None]:
    """Results of the same run if it finished, and the checkpoint to go on from, as --resume_from_checkpoint asks."""
    wanted = args.resume_from_checkpoint
    if resumes_newest(wanted) and (finished := finished_results(args.output_dir, settings)):
        return finished, None
    return None, checkpoint_to_resume(wanted, args.output_dir)


def describe_run(recipe: InstructArguments, trainer: SFTTrainer, trained, meter: Meter, peak, counts: dict) -> dict:
    """What results.json says of a run beside its scores. `trained` is what train() returned, `peak` bytes by kind."""
    args = trainer.args
    return {
        "model": recipe.model_name_or_path,
        "method": recipe.method,
        "dtype": recipe.dtype,
        "attention": trainer.model.config._attn_implementation,
        "optim": getattr(args.optim, "value", args.optim),
        "optim_args": args.optim_args,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "train_loss": finite(trained.training_loss),
        "steps": trained.global_step,
        "train_seconds": trained.metrics["train_runtime"],
        "trained_tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_second": meter.tokens_per_second,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "optimizer_state_bytes": meter.memory.state if meter.memory else None,
        "peak_bytes": peak,
        "data": counts,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        "versions": versions(),
    }


def main(argv: list[str] | None = None) -> dict:
    """Run what the arguments ask for; the results, as in the results.json written."""
    recipe, args, settings = parse(sys.argv[1:] if argv is None else argv)
    output_dir, optim = Path(args.output_dir), getattr(args.optim, "value", args.optim)
    finished, checkpoint = earlier_work(args, settings)
    if finished:
        return finished
    options = f" ({args.optim_args})" if args.optim_args else ""
    say(f"{recipe.method} | {recipe.model_name_or_path} in {recipe.dtype} | {optim}{options}, lr {args.learning_rate}")
    if args.device.type == "cpu" and recipe.dtype == "bfloat16":
        say("No GPU: most CPUs are slow in bfloat16; --dtype float32 is often several times as fast.")
    data = load_instructions(recipe, whole_conversations=args.assistant_only_loss)
    args.include_num_input_tokens_seen = "non_padding"  # for tokens a second
    meter = Meter()
    trainer = build_trainer(recipe, args, data, meter)
    count_cuts(recipe, data, trainer)
    keep_earlier(output_dir, checkpoint is not None, say)  # not before all that may be refused was
    if recipe.method not in WHOLE:
        say(chat_models.adapter_saving(trainer.model))
    if recipe.eval_before:
        say("Evaluating and answering before training ...")
    with torch.random.fork_rng(devices=[]):  # the order of the data does not hang on it
        before = evaluate(recipe, trainer, data) if recipe.eval_before else None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    peak = meter.peak_by_kind()
    trainer.save_model()
    say("Evaluating and answering after training ...")
    after = evaluate(recipe, trainer, data)
    results = {
        **describe_run(recipe, trainer, trained, meter, peak, data.counts),
        "before": before,
        "after": after,
        "settings": settings,
    }
    if trainer.is_world_process_zero():
        write_json(output_dir / "results.json", results, ensure_ascii=False)
    say(summary(results, output_dir))
    return results


def summary(results: dict, output_dir: Path) -> str:
    """What the run came to, for the screen."""
    before, after = results["before"], results["after"]
    lines = []
    for number, sample in enumerate(after["samples"]):
        lines.append(f"Question: {clip(sample['prompt'])}")
        lines += [f"  before: {clip(before['samples'][number]['answer'])}"] if before else []
        lines.append(f"  after:  {clip(sample['answer'])}")
    for name, scores in (("before", before), ("after", after)):
        if scores:
            exact = f", exact match {scores['correct']} of {scores['count']}" if "count" in scores else ""
            loss = "not finite" if scores["eval_loss"] is None else f"{scores['eval_loss']:.4f}"
            lines.append(f"{name + ' training:':17} held-out loss {loss}{exact}")
    kind, loader = "model", "transformers.AutoModelForCausalLM"
    if results["method"] == "int8":
        kind, loader = "INT8 model (`foam-hf export` makes it bf16)", f"import foam_hf; {loader}"
    elif results["method"] != "full":
        kind, loader = "adapter", "peft.AutoPeftModelForCausalLM"
    lines.append(f"Saved in {output_dir}: the {kind}, its tokenizer and results.json. To use it:")
    lines.append(f"  {loader}.from_pretrained({str(output_dir)!r})")
    return "\n".join(lines)


def clip(answer: str) -> str:
    """An answer in one line; the whole of it is in results.json."""
    line = " ".join(answer.split())
    return line if len(line) <= 100 else line[:100] + " ..."


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("foam_hf").setLevel(logging.INFO)  # what folds, what does not, and what that costs
    main()
