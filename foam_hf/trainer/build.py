"""Makes FOAM from TrainingArguments, prints the first line of a run, and writes the model card's line on FOAM."""

from __future__ import annotations

import functools
import logging
import os
import sys
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from foam_hf.optim_args import RELEASE_KEYS, default_scale, embedding_rule_of, names_of, option
from foam_hf.trainer.deepspeed import let_foam_update_on_cpu, uses_deepspeed
from foam_hf.trainer.names import foam_of, name_of, releases_gradients, requested_options, uses_foam
from foam_hf.trainer.private import decay_parameter_names
from foam_hf.trainer.refusals import refuse_other_optimizer, refuse_sharding
from foam_hf.trainer.report import require_report_events

logger = logging.getLogger("foam_hf")

_BY_BLOCKS = (
    "FOAM: embeddings and heads have embedding_rule=block here, the one rule for DeepSpeed's ZeRO and for gradient "
    "release with accumulation; elsewhere it is factored, which learns more from much text"
)
_announced: weakref.ref[Any] | None = None  # the arguments of the run whose first line was printed last
_current_trainer: ContextVar[Any] = ContextVar("foam_hf_trainer", default=None)


class _TrainerStaticMethod(staticmethod):
    """A static method, as transformers has it, that sets the current trainer when an instance calls it."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        function = super().__get__(instance, owner)
        return function if instance is None else with_current_trainer(instance, function)


def with_current_trainer(trainer: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that `_foam_cls_and_kwargs` can find `trainer` while it runs."""

    @functools.wraps(function)
    def with_trainer(*args: Any, **kwargs: Any) -> Any:
        token = _current_trainer.set(trainer)
        try:
            return function(*args, **kwargs)
        finally:
            _current_trainer.reset(token)

    return with_trainer


def wrap_get_optimizer(original: Callable[..., Any]) -> Any:
    """Wrap `Trainer.get_optimizer_cls_and_kwargs`: it returns FOAM and its arguments where a run asks for FOAM."""

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None, *more: Any, **kwargs: Any) -> Any:
        if uses_foam(args):
            return _foam_cls_and_kwargs(args, model)
        refuse_other_optimizer(model, f"optim={name_of(getattr(args, 'optim', None))!r}")
        return original(args, model, *more, **kwargs)

    return _TrainerStaticMethod(get_optimizer_cls_and_kwargs)


def wrap_create_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer.create_optimizer`: it sets the current trainer, and a memory report without events is refused."""

    @functools.wraps(original)
    def create_optimizer(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        result = with_current_trainer(trainer, original)(trainer, *args, **kwargs)
        require_report_events(trainer)
        foam = foam_of(trainer)
        if foam is not None and uses_deepspeed(trainer.args, trainer):  # it loads before a wrapper could name them
            foam.name_weights(trainer.model)
        return result

    return create_optimizer


def _foam_cls_and_kwargs(args: Any, model: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    from foam_hf.memory.measured import headline
    from foam_hf.optimizer.decided import Decided
    from foam_hf.optimizer.foam import FOAM
    from foam_hf.optimizer.groups import foam_param_groups, grouping_options
    from foam_hf.optimizer.tables import OTHERWISE

    running = _current_trainer.get()
    trainer = running if running is not None and running.args is args else None
    model = getattr(trainer, "model", None) if model is None else model  # trainers with LoRA+ pass no model
    if model is None:
        raise ValueError(
            f"optim={name_of(args.optim)!r} decides by the model which weights fold, and no model was given: some "
            "trainers make the optimizer outside of Trainer.train, as LLaMA-Factory's PPO does. Expected another "
            "optim for this run, or Trainer.get_optimizer_cls_and_kwargs(args, model) in your own script"
        )
    options = _options(args)
    refuse_sharding(args, model, trainer)
    let_foam_update_on_cpu(trainer)
    if "state_dtype" in options:
        options["state_dtype"] = getattr(torch, options["state_dtype"])
    blocks_alone = updates_by_blocks_alone(args, trainer)
    settings = {
        "weight_decay": args.weight_decay,
        "target_modules": args.optim_target_modules,
        "decay_parameter_names": decay_parameter_names(trainer, model),
    }
    left_open = blocks_alone and foam_param_groups(model, **settings, **grouping_options(dict(options)))
    groups = foam_param_groups(model, **settings, **grouping_options(options, blocks_alone=blocks_alone))
    kwargs = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **options,
    }
    # A throw-away optimizer without state validates every value and predicts the state of the real one.
    preview = FOAM([dict(group) for group in groups], **kwargs)
    lines = [headline(preview, zero=args.world_size if uses_deepspeed(args, trainer) else None)]
    lines += [_BY_BLOCKS] if left_open and any(OTHERWISE in group for group in left_open) else []
    _announce(args, preview, "\n".join(lines))
    if args.should_log and all("level" in group for group in groups):  # only groups that do not fold have the key
        logger.warning(
            f"optim={name_of(args.optim)!r}: no trainable weight of {type(model).__name__} folds, so this run keeps "
            "AdamW's state; expected weights of two or more dimensions in the base model"
        )
    # Not as "params": trainers that make their own groups would then overwrite these, or lose their learning rates.
    decided = Decided(groups, type(model).__name__, released=releases_gradients(args))
    return FOAM, {**kwargs, "decided": decided}


def updates_by_blocks_alone(args: Any, trainer: Any = None) -> bool:
    """Whether a run cannot have whole matrices, or adds up backward passes without keeping gradients.

    Embeddings then have the block rule by default, see `embedding_rule_of`. `trainer` is None if it is not known.
    """
    return uses_deepspeed(args, trainer) or (releases_gradients(args) and args.gradient_accumulation_steps > 1)


def _options(args: Any) -> dict[str, Any]:
    """The options of FOAM that `args` give; FOAM's defaults fill in the rest."""
    options = requested_options(args)
    for name in RELEASE_KEYS:
        options.pop(name, None)
    return {"seed": args.seed, **options}


def _announce(args: Any, optimizer: Any, lines: str) -> None:
    """Print `lines`, and log a summary of the optimizer."""
    from foam_hf.memory.measured import summarize

    _print_once(args, lines)
    if not args.should_log:
        return
    logger.info(summarize(optimizer))
    if os.environ.get("FOAM_HF_SUMMARY") and not logger.disabled:  # foam-hf run --summary
        print(summarize(optimizer), file=sys.stderr, flush=True)


def _print_once(args: Any, lines: str) -> None:
    """Print `lines` to stderr, once a run, on process 0, unless `log_level` hides warnings."""
    global _announced
    announced = _announced is not None and _announced() is args
    if announced or args.process_index or args.get_process_log_level() > logging.WARNING:
        return
    _announced = weakref.ref(args)
    print(lines, file=sys.stderr, flush=True)


def wrap_model_card(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `extract_hyperparameters_from_trainer`: the model card of a run names FOAM with its effective options."""

    @functools.wraps(original)
    def extract_hyperparameters_from_trainer(trainer: Any) -> dict[str, Any]:
        hyperparameters: dict[str, Any] = original(trainer)
        if uses_foam(trainer.args):
            hyperparameters["optimizer"] = describe_optimizer(trainer.args, trainer)
        return hyperparameters

    return extract_hyperparameters_from_trainer


def describe_optimizer(args: Any, trainer: Any = None) -> str:
    """The text of a model card on FOAM: its name and every option, as TrainingArguments give them.

    `trainer` is None if it is not known.
    """
    effective = {name: option(name).default for name in names_of(lambda each: each.key and each.field)}
    if args.optim_target_modules is None:  # else the target modules decide whether embeddings and head fold
        effective |= {"fold_embeddings": True, "fold_head": True}
    effective |= {name: option(name).default for name in ("embedding_scale", "embedding_rule")}
    effective |= _options(args)
    if effective["scale"] is None:
        effective["scale"] = default_scale(effective["level"], effective["second_moment"])
    rule = embedding_rule_of(effective, blocks_alone=updates_by_blocks_alone(args, trainer))
    effective["embedding_rule"] = rule
    if effective["embedding_scale"] is None:
        factored = default_scale(effective["level"], "factored")
        effective["embedding_scale"] = factored if rule == "factored" else effective["scale"]
    unread = names_of(lambda each: each.rule not in (None, effective["second_moment"]))
    if effective.get("fold_embeddings") is False and effective.get("fold_head") is False:
        unread += ("embedding_rule", "embedding_scale")
    for name in unread:
        effective.pop(name, None)
    if releases_gradients(args):
        effective["gradient_release"] = True
    if args.optim_target_modules is not None:
        effective["optim_target_modules"] = args.optim_target_modules
    listed = ", ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in effective.items())
    return (
        f"Use {name_of(args.optim)} (FOAM, arXiv 2512.07112, from foam_hf) with betas=({args.adam_beta1},"
        f"{args.adam_beta2}) and epsilon={args.adam_epsilon} and optimizer_args={listed}"
    )
