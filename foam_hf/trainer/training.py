"""The wrapper of `Trainer.train`: it checks the run and its checkpoint, releases gradients, and improves errors."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from foam_hf.optim_args import foam_options, option, parse_optim_args
from foam_hf.trainer import checkpoints, weights
from foam_hf.trainer.build import updates_by_blocks_alone, with_current_trainer
from foam_hf.trainer.lost_process import explain_lost_process
from foam_hf.trainer.names import foam_of, releases_gradients, requested_options, uses_foam
from foam_hf.trainer.offload import refuse_with_offload
from foam_hf.trainer.private import is_deepspeed_enabled
from foam_hf.trainer.refusals import refuse_ready_made_optimizer, refuse_sharding
from foam_hf.trainer.report import bind_reports


def wrap_train(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer.train`. In a run without FOAM it only refuses INT8 weights and connects memory reports."""

    @functools.wraps(original)
    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if uses_foam(trainer.args):
            refuse_sharding(trainer.args, trainer.model, trainer)
            args, kwargs = checkpoints.checked_arguments(trainer, args, kwargs)
            weights.refuse_unreadable(trainer)
        refuse_ready_made_optimizer(trainer)
        refuse_with_offload(trainer)
        bind_reports(trainer)
        watches = _lost_process(trainer), _unused(trainer), _gradient_release(trainer), _skipped_steps(trainer)
        with ExitStack() as stack:
            for watch in (*watches, _name_nonfinite_weights(trainer), _suggest_optim_args(trainer)):
                stack.enter_context(watch)
            result = with_current_trainer(trainer, original)(trainer, *args, **kwargs)
            if (optimizer := foam_of(trainer)) is not None:
                optimizer.check_gradients()  # raises for the last step, which no later step has checked
            return result

    return train


def _lost_process(trainer: Any) -> AbstractContextManager[None]:
    return explain_lost_process(trainer) if uses_foam(trainer.args) else nullcontext()


@contextmanager
def _added(trainer: Any, callback: Any) -> Iterator[None]:
    """While it is open, the trainer has this callback."""
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


def _unused(trainer: Any) -> AbstractContextManager[None]:
    if not (uses_foam(trainer.args) or os.environ.get("FOAM_HF_RUN_PREFIX")):  # other runs get no callback
        return nullcontext()
    from foam_hf.trainer.unused import UnusedFoam

    return _added(trainer, UnusedFoam(trainer))


def _gradient_release(trainer: Any) -> AbstractContextManager[None]:
    searches = uses_foam(trainer.args) and getattr(trainer, "hp_search_backend", None) is not None
    if not (searches or releases_gradients(trainer.args)):  # a search sets a trial's arguments when training begins
        return nullcontext()
    from foam_hf.trainer.release import release_while_training

    return release_while_training(trainer)


def _skipped_steps(trainer: Any) -> AbstractContextManager[None]:
    if not (uses_foam(trainer.args) and is_deepspeed_enabled(trainer)):
        return nullcontext()
    from foam_hf.trainer.skipped_steps import SkippedSteps

    return _added(trainer, SkippedSteps(trainer))


@contextmanager
def _name_nonfinite_weights(trainer: Any) -> Iterator[None]:
    """Add the names of weights to an error about NaN gradients: the optimizer knows weights by number only."""
    from foam_hf.optimizer.nonfinite import NonfiniteGradientError

    try:
        yield
    except NonfiniteGradientError as error:
        error.name(trainer.model)
        raise


@contextmanager
def _suggest_optim_args(trainer: Any) -> Iterator[None]:
    """Add to the error about a checkpoint of other options the `optim_args` that can resume from it."""
    from foam_hf.optimizer.state import CheckpointMismatchError

    try:
        yield
    except CheckpointMismatchError as error:
        if not uses_foam(trainer.args):  # a script made this FOAM, so its groups do not come from optim_args
            raise
        from foam_hf.trainer.carry_over import continuing_args, explain_folded_heads

        args, blocks_alone = trainer.args, updates_by_blocks_alone(trainer.args, trainer)
        given = parse_optim_args(args.optim_args)
        fitting = continuing_args(trainer.model, args.optim_target_modules, given, error, blocks_alone=blocks_alone)
        if fitting is None and (reason := explain_folded_heads(trainer.model, error)):
            raise ValueError(f"{error}. {reason}.") from error
        factored = any(group.get("second_moment") == "factored" for group in error.state_dict["param_groups"])
        one_pass = ", gradient_accumulation_steps=1" if blocks_alone and factored else ""
        if fitting is None or (not one_pass and _equal(foam_options("foam", fitting), requested_options(args))):
            raise  # in the second case something else made these groups, as a trainer's own create_optimizer
        raise ValueError(
            f"{error}. To go on with this checkpoint: optim='foam', optim_args={fitting!r}{one_pass}."
        ) from error


def _equal(some: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether these options are the same; those that are missing have their defaults."""
    defaults = {name: option(name).default for name in (*some, *others)}
    return {**defaults, **some} == {**defaults, **others}
