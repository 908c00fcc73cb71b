"""What stands around `Trainer.train`: refusals before it, whole checkpoints, gradient release, and clear errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from foam_hf.optim_args import parse_optim_args
from foam_hf.trainer import checkpoints, weights
from foam_hf.trainer.build import at_work
from foam_hf.trainer.names import foam_of, is_ours, releases_gradients
from foam_hf.trainer.refusals import refuse_ready_made_optimizer, refuse_sharding
from foam_hf.trainer.report import bind_reports


def wrap_train(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer.train`; of a run without FOAM, only INT8 weights and reports are its business."""

    @functools.wraps(original)
    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if is_ours(trainer.args):
            refuse_sharding(trainer.args, trainer.model, trainer)
            args, kwargs = checkpoints.checked_arguments(trainer, args, kwargs)
            weights.refuse_unreadable(trainer)
        refuse_ready_made_optimizer(trainer)
        bind_reports(trainer)
        with _gradient_release(trainer), _naming_parameters(trainer), _advising(trainer):
            result = at_work(trainer, original)(trainer, *args, **kwargs)
            if (optimizer := foam_of(trainer)) is not None:
                optimizer.check_gradients()  # of the last step
            return result

    return train


def _gradient_release(trainer: Any) -> AbstractContextManager[None]:
    searches = is_ours(trainer.args) and getattr(trainer, "hp_search_backend", None) is not None
    if not (searches or releases_gradients(trainer.args)):  # a search sets a trial's arguments when training begins
        return nullcontext()
    from foam_hf.trainer.release import released

    return released(trainer)


@contextmanager
def _naming_parameters(trainer: Any) -> Iterator[None]:
    """An optimizer knows its parameters by number alone; the model may be made when training begins."""
    from foam_hf.optimizer.nonfinite import NonfiniteGradientError

    try:
        yield
    except NonfiniteGradientError as error:
        error.name(trainer.model)
        raise


@contextmanager
def _advising(trainer: Any) -> Iterator[None]:
    """A checkpoint that this run's options do not fit names those that go on with it."""
    from foam_hf.optimizer.state import CheckpointMismatchError

    try:
        yield
    except CheckpointMismatchError as error:
        if not is_ours(trainer.args):  # a FOAM made by hand, whose groups no optim_args make
            raise
        from foam_hf.trainer.carry_over import continuing_args, wrapped_heads

        args = trainer.args
        words = continuing_args(trainer.model, args.optim_target_modules, parse_optim_args(args.optim_args), error)
        if words is None and (reason := wrapped_heads(trainer.model, error)):
            raise ValueError(f"{error}. {reason}.") from error
        if words is None:
            raise
        raise ValueError(f"{error}. To go on with this checkpoint: optim='foam', optim_args={words!r}.") from error
