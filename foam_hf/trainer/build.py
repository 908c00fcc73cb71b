"""From TrainingArguments to FOAM: its param groups and options, the first line of a run, and the model card's."""

from __future__ import annotations

import functools
import logging
import os
import sys
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from foam_hf.optim_args import default_scale, names_of, option
from foam_hf.trainer.names import asked_options, is_ours, name_of, releases_gradients
from foam_hf.trainer.patches import decay_parameter_names
from foam_hf.trainer.refusals import refuse_other_optimizer, refuse_sharding
from foam_hf.trainer.report import expect_report

logger = logging.getLogger("foam_hf")

_announced: weakref.ref[Any] | None = None  # the arguments of the run whose first line was printed last
_trainer: ContextVar[Any] = ContextVar("foam_hf_trainer", default=None)  # the Trainer that is at work


class _KnowingItsTrainer(staticmethod):
    """Static, as in transformers; but called by a Trainer it knows by which."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        function = super().__get__(instance, owner)
        return function if instance is None else at_work(instance, function)


def at_work(trainer: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, during which `trainer` is the one that the builder of FOAM asks."""

    @functools.wraps(function)
    def with_trainer(*args: Any, **kwargs: Any) -> Any:
        token = _trainer.set(trainer)
        try:
            return function(*args, **kwargs)
        finally:
            _trainer.reset(token)

    return with_trainer


def wrap_get_optimizer(original: Callable[..., Any]) -> Any:
    """`Trainer.get_optimizer_cls_and_kwargs`, which knows FOAM."""

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None, *more: Any, **kwargs: Any) -> Any:
        if is_ours(args):
            return _foam_cls_and_kwargs(args, model)
        refuse_other_optimizer(model, f"optim={name_of(getattr(args, 'optim', None))!r}")
        return original(args, model, *more, **kwargs)

    return _KnowingItsTrainer(get_optimizer_cls_and_kwargs)


def wrap_create_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer.create_optimizer`, during which the trainer is known; a report that nothing reaches is found then."""

    @functools.wraps(original)
    def create_optimizer(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        result = at_work(trainer, original)(trainer, *args, **kwargs)
        expect_report(trainer)
        return result

    return create_optimizer


def _foam_cls_and_kwargs(args: Any, model: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    from foam_hf.optimizer.decided import Decided
    from foam_hf.optimizer.foam import FOAM
    from foam_hf.optimizer.groups import foam_param_groups, grouping_options

    running = _trainer.get()
    trainer = running if running is not None and running.args is args else None
    model = getattr(trainer, "model", None) if model is None else model  # LoRA+ of several clients names none
    if model is None:
        raise ValueError(
            f"optim={name_of(args.optim)!r} decides by the model which weights fold, and whoever makes the optimizer "
            "here named none, outside of Trainer.train: training loops of their own do so, as LLaMA-Factory's PPO. "
            "Expected another optim for this run, or in a script of yours "
            "Trainer.get_optimizer_cls_and_kwargs(args, model)"
        )
    options = _options(args)
    refuse_sharding(args, model, trainer)
    if "state_dtype" in options:
        options["state_dtype"] = getattr(torch, options["state_dtype"])
    groups = foam_param_groups(
        model,
        weight_decay=args.weight_decay,
        target_modules=args.optim_target_modules,
        decay_parameter_names=decay_parameter_names(trainer, model),
        **grouping_options(options),
    )
    kwargs = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **options,
    }
    # a throw-away optimizer holds no state yet: it validates every value and knows what the real one will keep
    preview = FOAM([dict(group) for group in groups], **kwargs)
    _announce(args, preview)
    if args.should_log and all("level" in group for group in groups):  # only plain groups name theirs
        logger.warning(
            f"optim={name_of(args.optim)!r}: no trainable weight of {type(model).__name__} folds, so this run keeps "
            "AdamW's state; expected weights of two or more dimensions in the base model"
        )
    # not as "params": whoever makes groups of his own, for their learning rates, would lose them, or these
    decided = Decided(groups, type(model).__name__, released=releases_gradients(args))
    return FOAM, {**kwargs, "decided": decided}


def _options(args: Any) -> dict[str, Any]:
    """The options of FOAM that `args` ask for; its own defaults fill the rest."""
    options = asked_options(args)
    options.pop("gradient_release", None)
    return {"seed": args.seed, **options}


def _announce(args: Any, optimizer: Any) -> None:
    """Say what a run gains by its optimizer."""
    from foam_hf.memory.measured import headline, summarize

    _print_once(args, headline(optimizer))
    if not args.should_log:
        return
    logger.info(summarize(optimizer))
    if os.environ.get("FOAM_HF_SUMMARY") and not logger.disabled:  # foam-hf run --summary
        print(summarize(optimizer), file=sys.stderr, flush=True)


def _print_once(args: Any, line: str) -> None:
    """By process 0, on stderr, unless its `log_level` asks for errors alone."""
    global _announced
    announced = _announced is not None and _announced() is args
    if announced or args.process_index or args.get_process_log_level() > logging.WARNING:
        return
    _announced = weakref.ref(args)
    print(line, file=sys.stderr, flush=True)


def wrap_model_card(original: Callable[..., Any]) -> Callable[..., Any]:
    """`extract_hyperparameters_from_trainer`: a saved run's model card names FOAM with its effective options."""

    @functools.wraps(original)
    def extract_hyperparameters_from_trainer(trainer: Any) -> dict[str, Any]:
        hyperparameters: dict[str, Any] = original(trainer)
        if is_ours(trainer.args):
            hyperparameters["optimizer"] = describe(trainer.args)
        return hyperparameters

    return extract_hyperparameters_from_trainer


def describe(args: Any) -> str:
    """FOAM with every option that TrainingArguments give it, as a model card says it."""
    effective = {name: option(name).default for name in names_of(lambda each: each.key and each.field)}
    if args.optim_target_modules is None:  # else these decide, unless the options are given
        effective |= {"fold_embeddings": True, "fold_head": True}
    effective |= _options(args)
    if effective["scale"] is None:
        effective["scale"] = default_scale(effective["level"], effective["second_moment"])
    for name in names_of(lambda each: each.rule not in (None, effective["second_moment"])):
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
