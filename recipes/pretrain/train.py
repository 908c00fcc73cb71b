"""Pretrain a language model: `python train.py [CONFIG.yaml] --output_dir DIR [--dataset_path TEXT] [--flags ...]`.

Flags are the fields of PretrainArguments (pretrain_arguments.py) and of transformers' TrainingArguments. The command
line wins over the YAML config (llama-60m.yaml beside this script if none is named), and that over the defaults.
"""

import dataclasses
import difflib
import json
import logging
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed

import foam_hf  # registers optim="foam" and its companions
from foam_hf.memory import adamw_state_bytes, state_bytes
from foam_hf.optimizer.groups import layer_names
from foam_hf.planner.model_configs import ModelError, load_config
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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [] if str(HERE) in sys.path else [str(HERE)]  # the siblings, also when this file is imported

import other_optimizers  # noqa: E402
from pretrain_arguments import PretrainArguments, build_training_arguments, parse  # noqa: E402
from pretrain_callbacks import Clock, Position  # noqa: E402
from pretrain_stream import PackedStream  # noqa: E402
from pretrain_tokens import Data, prepare  # noqa: E402


def model_config(recipe: PretrainArguments) -> PretrainedConfig:
    """The model's config with --config_overrides, and positions for the sequence length; SystemExit if wrong."""
    try:
        config = load_config(os.path.expanduser(recipe.model))
    except ModelError as error:
        raise SystemExit(f"--model: {error}") from None
    overrides = {}
    for pair in filter(str.strip, (recipe.config_overrides or "").split(",")):
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not hasattr(config, key):
            near = difflib.get_close_matches(key, config.to_dict(), 1, 0.0)[0]
            raise SystemExit(f"--config_overrides: got {pair!r}; expected key=value of the config, as {near!r}.")
        overrides[key], now = yaml.safe_load(text), getattr(config, key)
        if now is not None and type(overrides[key]) is not type(now):
            raise SystemExit(f"--config_overrides: {key} is now {now!r}, got {text!r}; expected {type(now).__name__}.")
    if overrides:
        settings = config.to_dict()
        # What the config has worked out from others is worked out again.
        if settings.get("head_dim") == config.hidden_size // config.num_attention_heads:
            del settings["head_dim"]
        if "num_hidden_layers" in overrides:
            settings.pop("layer_types", None)
        config = type(config).from_dict({**settings, **overrides})
    if recipe.sequence_length > config.max_position_embeddings:
        say(f"max_position_embeddings: {recipe.sequence_length} instead of {config.max_position_embeddings}.")
        config.max_position_embeddings = recipe.sequence_length
    return config


def compile_layers(model: PreTrainedModel, backend: Any = "inductor") -> None:
    """Compile the decoder layers, which share one graph, and the loss, which then never holds fp32 logits, in place.

    The names of the weights stay. SystemExit for a model without layers.
    """
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise SystemExit(f"--compile_layers: {type(model).__name__} has no list of layers; expected --torch_compile.")
    for layer in layers:
        layer.compile(backend=backend, dynamic=False)
    model.loss_function = torch.compile(model.loss_function, backend=backend, dynamic=False)


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; infinite where a float is too small for it."""
    return math.exp(loss) if loss < 700 else math.inf


class PretrainTrainer(Trainer):
    """Trainer with perplexity beside every evaluation loss, streams it does not touch, and two more optimizers."""

    def __init__(self, *args, optimizer_name: str, **kwargs) -> None:
        self.optimizer_name = optimizer_name
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, PackedStream):
            return super().get_train_dataloader()
        # Each process has its own stream already, and its position is this process's: nobody else may read it.
        return DataLoader(
            self.train_dataset, batch_size=self._train_batch_size, pin_memory=self.args.dataloader_pin_memory
        )

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = output.metrics.get(f"{metric_key_prefix}_loss")
        if loss is not None:
            output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity(loss)
        return output

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.optimizer_name in other_optimizers.OTHERS:
            model = self.model if model is None else model
            decaying = set(self.get_decay_parameter_names(model))
            self.optimizer = other_optimizers.build(self.optimizer_name, model, self.args, decaying)
            return self.optimizer
        return super().create_optimizer() if model is None else super().create_optimizer(model)


def build_trainer(
    recipe: PretrainArguments, args: TrainingArguments, optim: str, config: PretrainedConfig, data: Data
) -> PretrainTrainer:
    """Trainer with a fresh model; SystemExit for an optimizer's wrong setting."""
    set_seed(args.seed)  # before the weights are drawn
    tokenizer = data.tokenizer
    tokenizer.model_max_length = config.max_position_embeddings
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.use_cache = False
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.dtype))
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise SystemExit(f"--config_overrides: no model can be made so: {one_line(error)}") from None
    if recipe.compile_layers:
        compile_layers(model)
    trainer = PretrainTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
        callbacks=[foam_hf.OptimizerMemoryCallback(), resumed_callback(say)],
        optimizer_name=optim,
    )
    foam_log = logging.getLogger("foam_hf")
    foam_log.disabled = True  # its summary comes when train() builds the optimizer
    try:
        if optim in other_optimizers.OTHERS:
            other_optimizers.build(optim, model, args, set())
        else:
            trainer.get_optimizer_cls_and_kwargs(args, model)  # a wrong setting ends here, not in train()
    except (ValueError, TypeError, ImportError) as error:
        raise SystemExit(f"train.py: {one_line(error)}") from None
    finally:
        foam_log.disabled = False
    return trainer


def layers_state_bytes(model, optimizer) -> int:
    """Bytes of the state of the layers' matrices, whatever the optimizer."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's
    inside = layer_names(model)
    taken = {id(p) for name, p in model.named_parameters() if name in inside}

    class Part:
        param_groups = optimizer.param_groups
        state = {p: state for p, state in optimizer.state.items() if id(p) in taken}

    return state_bytes(Part())


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint asks for, or None; SystemExit if it is at the last step already."""
    wanted = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    state = Path(wanted or "") / "trainer_state.json"
    if wanted and args.max_steps > 0 and state.is_file():
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
        if step >= args.max_steps:  # Trainer would take one more
            raise SystemExit(f"{wanted} is at step {step} of --max_steps {args.max_steps}; expected more steps.")
    return wanted


class Tokens:
    """How many tokens so many steps read: the last step of an epoch may be smaller."""

    def __init__(self, recipe: PretrainArguments, data: Data) -> None:
        self.batch, self.length = recipe.total_batch_size, recipe.sequence_length
        self.epoch = None if isinstance(data.train, PackedStream) else len(data.train)  # sequences

    def at(self, step: int) -> int:
        if self.epoch is None:
            return step * self.batch * self.length
        epochs, rest = divmod(step, -(-self.epoch // self.batch))
        return (epochs * self.epoch + rest * self.batch) * self.length


def main(argv: list[str] | None = None) -> dict:
    """Run what the arguments ask for; the results, as in the results.json written."""
    recipe, training, optim, notes = parse(sys.argv[1:] if argv is None else argv)
    config = model_config(recipe)
    args = build_training_arguments(recipe, training, optim)
    for note in notes:
        say(note)
    secret = ("hub_token", "push_to_hub_token")
    settings = {**dataclasses.asdict(recipe), **{key: value for key, value in training.items() if key not in secret}}
    settings = json.loads(json.dumps(settings, default=str))
    goes_on = resumes_newest(args.resume_from_checkpoint) and not recipe.prepare_only
    if goes_on and (finished := finished_results(args.output_dir, settings)):
        return finished
    per_process = recipe.total_batch_size // args.world_size
    say("Reading and tokenizing the text ...")
    with args.main_process_first(desc="tokens"):  # the others find what it has made
        data = prepare(recipe, config.vocab_size, per_process, args.process_index, args.world_size)
    if recipe.prepare_only:
        say(f"Tokens and tokenizer are in {recipe.tokens_path}: give it as --dataset_path.")
        return data.description
    if isinstance(data.train, PackedStream):
        if args.max_steps < 1:
            raise SystemExit("--max_steps: a stream has no end that is known before; expected a number of steps.")
        if args.dataloader_num_workers:
            raise SystemExit("--dataloader_num_workers: a stream is read by the process that trains; expected 0.")
        args.ignore_data_skip = True  # it goes on where it stood, and needs no skipping
    if args.world_size > 1:  # or a last batch that does not go round would count some sequences twice
        together = args.eval_batch_size * args.world_size
        data.held_out.count -= data.held_out.count % together if data.held_out.count > together else 0
    trainer = build_trainer(recipe, args, optim, config, data)
    position, clock = Position(recipe, args, data), Clock()
    trainer.add_callback(position)
    trainer.add_callback(clock)
    tokens, tokens_of_step = Tokens(recipe, data), recipe.total_batch_size * recipe.sequence_length
    options = f" ({args.optim_args})" if args.optim_args else ""
    say(
        f"{recipe.model}, {trainer.model.num_parameters() / 1e6:.1f} M parameters, {recipe.dtype} | {optim}{options}, "
        f"lr {args.learning_rate} | {tokens_of_step:,} tokens a step: {args.world_size} x {args.train_batch_size} "
        f"sequences of {recipe.sequence_length}, {args.gradient_accumulation_steps} times"
    )
    checkpoint = find_checkpoint(args)
    keep_earlier(args.output_dir, checkpoint is not None, say)
    if checkpoint:
        position.restore(Path(checkpoint))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    peak = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else None
    last = trainer.state.log_history[-2] if len(trainer.state.log_history) > 1 else {}
    current = last.get("step") == trained.global_step and not args.load_best_model_at_end
    final = last if "eval_loss" in last and current else trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    curve = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    results = {
        "model": recipe.model,
        "parameters": trainer.model.num_parameters(),
        "optim": optim,
        "optim_args": args.optim_args,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "eval_loss": finite(final["eval_loss"]),
        "perplexity": finite(perplexity(final["eval_loss"])),
        "curve": [
            {"step": step, "tokens": tokens.at(step), "eval_loss": finite(loss)} for step, loss in curve.items()
        ],
        "train_loss": finite(trained.training_loss),
        "steps": trained.global_step,
        "tokens": tokens.at(trained.global_step),
        "tokens_per_second": clock.steps * tokens_of_step / clock.seconds if clock.seconds else None,
        "seconds": trained.metrics["train_runtime"],
        "optimizer_state_bytes": state_bytes(trainer.optimizer),
        "layers_state_bytes": layers_state_bytes(trainer.model, trainer.optimizer),
        "adamw_state_bytes": adamw_state_bytes(trainer.model.parameters()),
        "peak_cuda_bytes": peak,
        "resumed_from": checkpoint,
        "data": data.description,
        "settings": settings,
        "versions": {
            "foam_hf": foam_hf.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
    }
    if trainer.is_world_process_zero():
        write_json(Path(args.output_dir) / "results.json", results)
    shown = "not finite" if results["perplexity"] is None else f"{results['perplexity']:.3f}"
    say(f"Perplexity {shown} after {results['tokens']:,} tokens. Saved in {args.output_dir}: model, tokenizer and")
    say(f"results.json. To use it: AutoModelForCausalLM.from_pretrained({args.output_dir!r})")
    return results


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("foam_hf").setLevel(logging.INFO)  # what folds, what does not, and what that costs
    main()
