"""One table of what this package wraps in transformers' Trainer, and the function that wraps it.

When transformers releases a version, compare it with `TABLE`, `foam_hf/trainer/private.py`,
`foam_hf/int8/quantizer.py` and `foam_hf/planner/fsdp2.py`. All other uses of transformers are of its documented
interface.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from foam_hf.wrapping import require, wrap


@dataclass(frozen=True)
class Row:
    """A name of transformers.

    Attributes:
        module, owner, name: the dotted module, the class or "" for the module itself, and the attribute.
        use: what this package uses it for.
        wrapper: MODULE.FUNCTION of `foam_hf.trainer`, which takes the original function and returns its replacement;
            empty if the name is only read.
        since, until: the first version that has the name, and the first that no longer has it.
        without: what is lost if the name is missing. If this is empty, a missing name is an ImportError that names it,
            raised when transformers is imported.
    """

    module: str
    owner: str
    name: str
    use: str
    wrapper: str = ""
    since: str = "4.57"
    until: str = "6"
    without: str = ""

    def is_in(self, version: str) -> bool:
        """Whether the table says that this version of transformers has the name."""
        return Version(self.since) <= Version(version) < Version(self.until)


_TRAINER, _ARGUMENTS = "transformers.trainer", "transformers.training_args"
_MAPPING, _LOADING = "transformers.conversion_mapping", "transformers.core_model_loading"

TABLE = (
    Row(
        _ARGUMENTS,
        "",
        "OptimizerNames",
        use="a str Enum, the legal values of optim: `names` adds ours to the private maps of enum.Enum",
    ),
    Row(
        _ARGUMENTS,
        "TrainingArguments",
        "__post_init__",
        use="a bad optim_args fails before a model is loaded",
        wrapper="refusals.wrap_post_init",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "get_optimizer_cls_and_kwargs",
        use="static, of (args, model): Trainer gets the class and the arguments of every named optimizer from it",
        wrapper="build.wrap_get_optimizer",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "create_optimizer",
        use="makes param groups by weight decay, and calls get_optimizer_cls_and_kwargs",
        wrapper="build.wrap_create_optimizer",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "get_decay_parameter_names",
        use="which weights decay: see `private.decay_parameter_names`",
        without="foam_param_groups decides by the same rule",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "train",
        use="refusals before the first step, whole checkpoints, gradient release, reports; its first argument is "
        "resume_from_checkpoint",
        wrapper="training.wrap_train",
    ),
    Row(_TRAINER, "Trainer", "_get_output_dir", use="of (trial): the folder of a run's checkpoints"),
    Row(
        _TRAINER,
        "Trainer",
        "_save_checkpoint",
        use="of (model, trial): writes checkpoint-STEP, trainer_state.json last; the wrapper adds a manifest",
        wrapper="saving.wrap_save_checkpoint",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_push_from_checkpoint",
        use="_save_checkpoint calls it when every file is written",
        wrapper="saving.wrap_after_last_file",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_rotate_checkpoints",
        use="_save_checkpoint calls it after every file is written: deletes old checkpoints",
        wrapper="saving.wrap_after_last_file",
        until="5.2",
    ),
    Row(
        _TRAINER,
        "",
        "rotate_checkpoints",
        use="the successor of Trainer._rotate_checkpoints, a function",
        wrapper="saving.wrap_after_last_file",
        since="5.2",
    ),
    Row(
        _TRAINER,
        "CallbackHandler",
        "on_save",
        use="called after _save_checkpoint: callbacks may change files of the checkpoint",
        wrapper="saving.wrap_on_save",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_load_best_model",
        use="reads state.best_model_checkpoint after the last step",
        wrapper="checkpoints.wrap_load_best_model",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_load_from_checkpoint",
        use="of (resume_from_checkpoint): loads weights by their names in the model, and only warns of missing ones",
        wrapper="checkpoints.wrap_load_from_checkpoint",
        without="INT8 checkpoints are not compared with the model, and weights saved under other names are not loaded",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_issue_warnings_after_load",
        use="of (load_result), called by _load_from_checkpoint: no trained weight may be missing",
        wrapper="weights.wrap_issue_warnings",
        without="a trained weight that a checkpoint lacks is a warning, not an error",
    ),
    Row(
        _TRAINER,
        "Trainer",
        "_load_optimizer_and_scheduler",
        use="the optimizer matches saved state to weights by their names",
        wrapper="checkpoints.wrap_load_optimizer",
        without="state is matched by position alone",
    ),
    Row(
        _TRAINER,
        "",
        "deepspeed_load_checkpoint",
        use="of (engine, folder): loads what DeepSpeed saved; the wrapper compares the options of the optimizer first",
        wrapper="deepspeed.wrap_load_checkpoint",
        without="a checkpoint of other options is refused in DeepSpeed's own words",
    ),
    Row(
        "accelerate.accelerator",
        "",
        "map_pytorch_optim_to_deepspeed",
        use="of (optimizer): with offload_optimizer accelerate replaces every optimizer by DeepSpeed's CPU Adam",
        wrapper="deepspeed.wrap_map_to_deepspeed",
        without="FOAM in an own loop of accelerate is replaced by DeepSpeed's CPU Adam with offload_optimizer",
    ),
    Row(
        "transformers.modelcard",
        "",
        "extract_hyperparameters_from_trainer",
        use="model cards name the optimizer",
        wrapper="build.wrap_model_card",
    ),
    Row(
        _MAPPING,
        "",
        "get_model_conversion_mapping",
        use="see `private.weight_conversions`",
        since="5.0",
        without="weights that are saved under other names are not recognized",
    ),
    Row(
        _LOADING,
        "",
        "PrefixChange",
        use="see `private.weight_conversions`",
        since="5.6",
        without="weights that are saved under other names are not recognized",
    ),
    Row(
        _LOADING,
        "",
        "revert_weight_conversion",
        use="see `private.as_saved`",
        since="5.0",
        without="weights that cannot be loaded after training are not refused before it",
    ),
)


def patch(module: types.ModuleType) -> None:
    """Wrap the names of `TABLE` in `module`, a module of transformers that was just imported. Idempotent.

    Raises:
        ImportError: `module` lacks a name whose `without` is empty.
    """
    from transformers import __version__ as version

    for row in TABLE:
        if row.module != module.__name__:
            continue
        owner = require(module, row.owner) if row.owner else module
        if not hasattr(owner, row.name) and (row.without or not row.is_in(version)):
            continue
        require(owner, row.name)
        if row.wrapper:
            wrap(owner, row.name, _wrapper(row.wrapper))


def _wrapper(path: str) -> Callable[[Any], Any]:
    """Import a wrapper by its path, late: the files with the wrappers import this one."""
    file, name = path.split(".")
    found: Callable[[Any], Any] = getattr(importlib.import_module(f"foam_hf.trainer.{file}"), name)
    return found
