"""`optim="foam"` inside the Hugging Face Trainer: the only place that touches private names of transformers.

What this file relies on, in transformers 4.57 to 5.x, and what it is for:

* `transformers.training_args.OptimizerNames`, a str Enum: the names that `TrainingArguments` and its parsers accept.
  New members go into the private maps of `enum.Enum` (`_member_map_`, `_member_names_`, `_value2member_map_`).
* `TrainingArguments.__post_init__`: wrapped, so that a bad `optim_args` fails before a model is loaded.
* `Trainer.get_optimizer_cls_and_kwargs(args, model)`, static: wrapped; the one road to the optimizer. Its caller,
  `Trainer.create_optimizer`, also wrapped, makes param groups by weight decay and passes the returned kwargs on.
* `Trainer.get_decay_parameter_names(model)`: called. Where it cannot be, `foam_param_groups` has an equal rule.
* `Trainer.train`: wrapped, to refuse sharded training, to hand the trainer to `OptimizerMemoryCallback`, see
  `trainer_report`, and to release gradients, see `trainer_release`. It reads `is_deepspeed_enabled` and
  `accelerator.parallelism_config`; what it needs to know of FSDP is in `trainer_fsdp`.
* `Trainer._save_checkpoint` and what it calls last, `CallbackHandler.on_save`, `Trainer._load_best_model`: wrapped for
  whole checkpoints, see `trainer_saving` and `trainer_checkpoints`. `Trainer.train`'s first argument is
  `resume_from_checkpoint`.
* `Trainer._load_optimizer_and_scheduler`: wrapped where it is, so that state goes to the weights it was saved of.
* `Trainer._load_from_checkpoint`: wrapped where it is, so that INT8 checkpoints meet models that hold the same, and
  for models that are saved under other names, see `trainer_weights`; `Trainer._issue_warnings_after_load`, so that no
  trained weight is left as it was.
* `transformers.modelcard.extract_hyperparameters_from_trainer`: wrapped, so that model cards name the optimizer.

If something that is to be wrapped moves, importing transformers raises an ImportError that names it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from foam_hf.optim_args import FOAM_NAMES, default_scale, foam_options, ours_like, parse_optim_args
from foam_hf.optimizer.names import loading_by_name
from foam_hf.tensors.places import is_sharded
from foam_hf.trainer import checkpoints, saving, weights
from foam_hf.trainer.fsdp import fsdp_in_use, refuse_with_fsdp, unsupported_fsdp
from foam_hf.trainer.int8 import refuse_other_optimizer, refuse_ready_made_optimizer, refusing_other_checkpoints
from foam_hf.trainer.report import bind_reports, expect_report
from foam_hf.wrapping import require, wrap

logger = logging.getLogger("foam_hf")

_announced: weakref.ref[Any] | None = None  # the arguments of the run whose first line was printed last
# Those of `FOAM_NAMES` that transformers did not have before us; importlib.reload keeps them.
_registered: set[str] = globals().get("_registered", set())
_trainer: ContextVar[Any] = ContextVar("foam_hf_trainer", default=None)  # the Trainer that is at work


def _name(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def _is_ours(args: Any) -> bool:
    return _name(getattr(args, "optim", None)) in _registered


def register_names(training_args: types.ModuleType) -> None:
    """Add `FOAM_NAMES`, `foam` and its kin, to `transformers.training_args.OptimizerNames`. Idempotent."""
    names = require(training_args, "OptimizerNames")
    for value in FOAM_NAMES:
        existing = names._value2member_map_.get(value)
        if existing is None:
            _add_member(names, value.upper(), value)
            _registered.add(value)
        elif "__reduce_ex__" in vars(existing):  # added by us before, or by an earlier import of this package
            _pickle_by_this_package(existing)
            _registered.add(value)
        else:
            _registered.discard(value)
            logger.warning("transformers has its own optim=%r: foam_hf leaves it alone, and it is the one used", value)
    arguments = require(training_args, "TrainingArguments")
    wrap(arguments, "__post_init__", _checking_post_init)


def _add_member(names: Any, name: str, value: str) -> None:
    """What `enum.Enum` does for a member in a class body, on Python 3.10 to 3.13."""
    member = str.__new__(names, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    _pickle_by_this_package(member)
    names._member_names_.append(name)
    names._member_map_[name] = member
    names._value2member_map_[value] = member
    if hasattr(names, "_hashable_values_"):  # Python >= 3.12
        names._hashable_values_.append(value)
    type.__setattr__(names, name, member)


def _pickle_by_this_package(member: Any) -> None:
    """Pickles name a function of this package, so that loading one registers the member first."""
    member.__reduce_ex__ = lambda protocol: (optimizer_name, (member.value,))


def optimizer_name(value: str) -> Any:
    """The `OptimizerNames` member of `value`, registered first: what a pickled `training_args.bin` calls."""
    from transformers import training_args

    register_names(training_args)
    return training_args.OptimizerNames(value)


def _checking_post_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if _is_ours(self):  # first: before transformers asks for DeepSpeed to be installed, for example
            _options(self)
            _refuse_sharding(self)
            if _releases_gradients(self):
                from foam_hf.trainer.release import refuse_arguments

                refuse_arguments(self)
        else:
            _refuse_misspelt(self.optim)
        original(self, *args, **kwargs)

    return __post_init__


def _refuse_misspelt(optim: Any) -> None:
    """Raise ValueError for a name that is nobody's and nearly ours, before transformers lists some forty names."""
    from transformers.training_args import OptimizerNames

    meant = ours_like(optim) if isinstance(optim, str) and optim not in OptimizerNames._value2member_map_ else None
    if meant in _registered:
        raise ValueError(f"optim={optim!r} is no optimizer of the Trainer; did you mean {meant!r}?")


def _options(args: Any) -> dict[str, Any]:
    """The options that `args.optim` and `args.optim_args` ask for; FOAM's own defaults fill the rest."""
    options = foam_options(_name(args.optim), args.optim_args)
    options.pop("gradient_release", None)
    return {"seed": args.seed, **options}


def _releases_gradients(args: Any) -> bool:
    return _is_ours(args) and bool(foam_options(_name(args.optim), args.optim_args).get("gradient_release"))


def register_trainer(trainer_module: types.ModuleType) -> None:
    """Teach `transformers.trainer.Trainer` to build FOAM and to serve `OptimizerMemoryCallback`. Idempotent."""
    trainer_class = require(trainer_module, "Trainer")
    wrap(trainer_class, "get_optimizer_cls_and_kwargs", _building_foam)
    wrap(trainer_class, "create_optimizer", _creating_optimizer)
    wrap(trainer_class, "train", _binding_train)
    if hasattr(trainer_class, "_load_from_checkpoint"):  # a help to users, not what training rests on
        wrap(trainer_class, "_load_from_checkpoint", _loading_checked)
    wrap(trainer_class, "_save_checkpoint", functools.partial(saving.saving, is_ours=_is_ours))
    wrap(require(trainer_module, "CallbackHandler"), "on_save", saving.sealing_again)
    wrap(trainer_class, "_load_best_model", functools.partial(checkpoints.loading_best, is_ours=_is_ours))
    if hasattr(trainer_class, "_load_optimizer_and_scheduler"):
        by_name = functools.partial(loading_by_name, foam_of=checkpoints.foam_of)
        wrap(trainer_class, "_load_optimizer_and_scheduler", by_name)
    if hasattr(trainer_class, "_issue_warnings_after_load"):
        refusing = functools.partial(weights.refusing_missing_weights, is_ours=_is_ours)
        wrap(trainer_class, "_issue_warnings_after_load", refusing)
    wrap(trainer_class, "_push_from_checkpoint", saving.finishing)
    rotates = trainer_class if hasattr(trainer_class, "_rotate_checkpoints") else trainer_module  # 4.x, 5.x
    name = "_rotate_checkpoints" if rotates is trainer_class else "rotate_checkpoints"
    wrap(rotates, name, saving.finishing)


class _KnowingItsTrainer(staticmethod):
    """Static, as in transformers; but called by a Trainer it knows by which."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        function = super().__get__(instance, owner)
        return function if instance is None else _at_work(instance, function)


def _at_work(trainer: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, during which `trainer` is the one that the builder of FOAM asks."""

    @functools.wraps(function)
    def with_trainer(*args: Any, **kwargs: Any) -> Any:
        token = _trainer.set(trainer)
        try:
            return function(*args, **kwargs)
        finally:
            _trainer.reset(token)

    return with_trainer


def _loading_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    return refusing_other_checkpoints(weights.loading_renamed(original, _is_ours), _is_ours)


def _building_foam(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None, *more: Any, **kwargs: Any) -> Any:
        if _is_ours(args):
            return _foam_cls_and_kwargs(args, model)
        refuse_other_optimizer(model, f"optim={_name(getattr(args, 'optim', None))!r}")
        return original(args, model, *more, **kwargs)

    return _KnowingItsTrainer(get_optimizer_cls_and_kwargs)


def _creating_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = _at_work(self, original)(self, *args, **kwargs)
        expect_report(self)
        return result

    return create_optimizer


def _foam_cls_and_kwargs(args: Any, model: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    from foam_hf.memory.measured import headline, summarize
    from foam_hf.optimizer.decided import Decided
    from foam_hf.optimizer.foam import FOAM
    from foam_hf.optimizer.groups import foam_param_groups, grouping_options

    running = _trainer.get()
    trainer = running if running is not None and running.args is args else None
    model = getattr(trainer, "model", None) if model is None else model  # LoRA+ of several clients names none
    if model is None:
        raise ValueError(
            f"optim={_name(args.optim)!r} decides by the model which weights fold, and whoever makes the optimizer "
            "here named none, outside of Trainer.train: training loops of their own do so, as LLaMA-Factory's PPO. "
            "Expected another optim for this run, or in a script of yours "
            "Trainer.get_optimizer_cls_and_kwargs(args, model)"
        )
    options = _options(args)
    _refuse_sharding(args, model, trainer)
    if "state_dtype" in options:
        options["state_dtype"] = getattr(torch, options["state_dtype"])
    groups = foam_param_groups(
        model,
        weight_decay=args.weight_decay,
        target_modules=args.optim_target_modules,
        decay_parameter_names=_decay_parameter_names(model, trainer),
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
    _announce(args, headline(preview))
    if args.should_log:
        logger.info(summarize(preview))
        if os.environ.get("FOAM_HF_SUMMARY") and not logger.disabled:  # foam-hf run --summary
            print(summarize(preview), file=sys.stderr, flush=True)
        if all("level" in group for group in groups):  # only plain groups name theirs
            logger.warning(
                f"optim={_name(args.optim)!r}: no trainable weight of {type(model).__name__} folds, so this run keeps "
                "AdamW's state; expected weights of two or more dimensions in the base model"
            )
    # not as "params": whoever makes groups of his own, for their learning rates, would lose them, or these
    decided = Decided(groups, type(model).__name__, released=_releases_gradients(args))
    return FOAM, {**kwargs, "decided": decided}


def _announce(args: Any, line: str) -> None:
    """Print what a run gains, once: by process 0, on stderr, unless its `log_level` asks for errors alone."""
    global _announced
    announced = _announced is not None and _announced() is args
    if announced or args.process_index or args.get_process_log_level() > logging.WARNING:
        return
    _announced = weakref.ref(args)
    print(line, file=sys.stderr, flush=True)


def _decay_parameter_names(model: Any, trainer: Any) -> Any:
    """Trainer's own set, with a subclass's override where the Trainer is known."""
    if trainer is not None:
        return trainer.get_decay_parameter_names(model)
    from transformers import Trainer

    rule: Any = Trainer.get_decay_parameter_names
    try:
        return rule(None, model)
    except (AttributeError, TypeError):  # a version that uses self: foam_param_groups has the same rule
        return None


def _binding_train(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self.args):
            _refuse_sharding(self.args, self.model, self)
            args, kwargs = checkpoints.checked_arguments(self, args, kwargs)
            weights.refuse_unreadable(self)
        refuse_ready_made_optimizer(self)
        bind_reports(self)
        with _gradient_release(self), _naming_parameters(self), _advising(self):
            result = _at_work(self, original)(self, *args, **kwargs)
            if (optimizer := checkpoints.foam_of(self)) is not None:
                optimizer.check_gradients()  # of the last step
            return result

    return train


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
        if not _is_ours(trainer.args):  # a FOAM made by hand, whose groups no optim_args make
            raise
        from foam_hf.trainer.carry_over import continuing_args, wrapped_heads

        args = trainer.args
        words = continuing_args(trainer.model, args.optim_target_modules, parse_optim_args(args.optim_args), error)
        if words is None and (reason := wrapped_heads(trainer.model, error)):
            raise ValueError(f"{error}. {reason}.") from error
        if words is None:
            raise
        raise ValueError(f"{error}. To go on with this checkpoint: optim='foam', optim_args={words!r}.") from error


def _gradient_release(trainer: Any) -> AbstractContextManager[None]:
    searches = _is_ours(trainer.args) and getattr(trainer, "hp_search_backend", None) is not None
    if not (searches or _releases_gradients(trainer.args)):  # a search sets a trial's arguments when training begins
        return nullcontext()
    from foam_hf.trainer.release import released

    return released(trainer, _releases_gradients)


def _refuse_sharding(args: Any, model: Any = None, trainer: Any = None) -> None:
    """Raise ValueError where the optimizer would receive pieces of weights other than FSDP2's."""
    found = _sharding(args, model, trainer)
    if found is not None:
        raise ValueError(
            f"optim={_name(args.optim)!r} does not run with {found}. What works: one GPU, or several with DDP or with "
            "FSDP2 of accelerate 1.6 or newer (fsdp_version: 2), started by torchrun or accelerate launch."
        )
    if fsdp_in_use(args, trainer):
        refuse_with_fsdp(model, trainer, foam_options(_name(args.optim), args.optim_args))


def _sharding(args: Any, model: Any, trainer: Any) -> str | None:
    """What splits the weights in a way that has no path, or None, as far as the arguments known by now can tell."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes")
    if launched or getattr(args, "deepspeed", None) or getattr(trainer, "is_deepspeed_enabled", False):
        return "DeepSpeed, which hands an optimizer flat pieces of many weights, cut anywhere"
    if found := unsupported_fsdp(args, trainer):
        return found
    from transformers.utils import is_sagemaker_mp_enabled

    if is_sagemaker_mp_enabled():
        return "SageMaker model parallelism"

    def degree(owner: Any, name: str) -> int:
        return getattr(owner, name, None) or 1

    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    if getattr(distributed, "enable_expert_parallel", False) or degree(distributed, "ep_size") > 1:
        return "expert parallelism"
    parallelism = getattr(getattr(trainer, "accelerator", args), "parallelism_config", None)
    if degree(model, "tp_size") > 1 or degree(parallelism, "tp_size") > 1:
        return "tensor parallelism, as Trainer would save the optimizer state of one process alone"
    sharded = model is not None and any(is_sharded(parameter) for parameter in model.parameters())
    if sharded and not fsdp_in_use(args, trainer):
        return "a model sharded before the Trainer got it, whose optimizer state it would save from one process alone"
    return None


def register_modelcard(modelcard: types.ModuleType) -> None:
    """Let a saved run's model card name the optimizer with its effective arguments. Idempotent."""
    wrap(modelcard, "extract_hyperparameters_from_trainer", _naming_foam)


def _naming_foam(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def extract_hyperparameters_from_trainer(trainer: Any) -> dict[str, Any]:
        hyperparameters = original(trainer)
        if _is_ours(trainer.args):
            hyperparameters["optimizer"] = _description(trainer.args)
        return hyperparameters

    return extract_hyperparameters_from_trainer


def _description(args: Any) -> str:
    from foam_hf.optimizer.foam import FOAM

    keyword_only = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.signature(FOAM).parameters.values()
    effective = {p.name: p.default for p in signature if p.kind is keyword_only}
    if args.optim_target_modules is None:  # else these decide, unless the options are given
        effective |= {"fold_embeddings": True, "fold_head": True}
    effective |= _options(args)
    if effective["scale"] is None:
        effective["scale"] = default_scale(effective["level"], effective["second_moment"])
    del effective["mini_rows"], effective["decided"]  # each group has its own
    if effective["second_moment"] != "muon":
        del effective["momentum"]
    if _releases_gradients(args):
        effective["gradient_release"] = True
    if args.optim_target_modules is not None:
        effective["optim_target_modules"] = args.optim_target_modules
    listed = ", ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in effective.items())
    return (
        f"Use {_name(args.optim)} (FOAM, arXiv 2512.07112, from foam_hf) with betas=({args.adam_beta1},"
        f"{args.adam_beta2}) and epsilon={args.adam_epsilon} and optimizer_args={listed}"
    )
