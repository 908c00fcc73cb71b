"""What gradient release refuses, and what it warns of."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from foam_hf.optimizer.deepspeed import is_partitioned
from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.members import parameters_of
from foam_hf.optimizer.releases import active
from foam_hf.optimizer.sharding import largest_share

logger = logging.getLogger("foam_hf")

Names = dict[int, str]  # id of a parameter -> its name in the model


def check_clip(largest: Any, clip_by: Any, accumulation: Any) -> None:
    """Raise TypeError or ValueError for arguments of clipping that are not legal."""
    if clip_by not in ("all", "weight"):
        raise ValueError(f"clip_by is not known: got {clip_by!r}; expected 'all' or 'weight'")
    if clip_by == "weight" and largest and accumulation != 1:
        raise ValueError(
            "clip_by='weight' bounds the gradient of a whole step, and with several backward passes there are only "
            f"parts of it: got accumulation={accumulation}; expected clip_by='all', or accumulation=1"
        )
    if largest is None:
        return
    if isinstance(largest, bool) or not isinstance(largest, numbers.Real):
        raise TypeError(f"max_grad_norm is not a number: got {largest!r}; expected a number >= 0, or None")
    if math.isnan(largest) or largest < 0:
        raise ValueError(f"max_grad_norm is out of range: got {largest!r}; expected a number >= 0, or None")


def check_model(model: nn.Module, optimizer: FOAM, names: Names) -> None:
    """Raise ValueError or RuntimeError if the weights are not the model's, ZeRO's, or released already."""
    params = list(parameters_of(optimizer.param_groups))
    ours = {id(p) for p in params}
    if any(is_partitioned(p) and id(p) not in ours for p in model.parameters() if p.requires_grad):
        raise ValueError(
            "gradient release does not run with DeepSpeed's ZeRO, which has moved the weights of this model into "
            "flat vectors; expected no gradient release, as ZeRO 2 and 3 themselves keep a part of the gradients "
            "alone, or a model that DeepSpeed does not train"
        )
    foreign = [tuple(p.shape) for p in params if id(p) not in names]
    if foreign:
        raise ValueError(
            f"{len(foreign)} of the optimizer's {len(params)} parameters are not the model's, the first of shape "
            f"{foreign[0]}; expected the model that the optimizer was made for, after all changes of its weights"
        )
    if any(ours & {id(p) for p in parameters_of(other._optimizer.param_groups)} for other in active):
        raise RuntimeError(
            "gradient release is enabled for these parameters already, and would update them twice; expected "
            "remove() of the first handle before"
        )


def too_many(name: str, micros: int) -> RuntimeError:
    """The error for a parameter that got more gradients than a step of ``micros`` backward passes has."""
    if micros > 1:
        return RuntimeError(
            f"{name} got more gradients before optimizer.step() than gradient release was told of: got "
            f"{micros + 1}; expected at most accumulation={micros} backward passes for each step, "
            "those that failed or whose batch is skipped included"
        )
    return RuntimeError(
        f"{name} got a second gradient before optimizer.step(), and gradient release has updated it with the "
        "first. Expected one backward pass for each optimizer.step(), also after one that failed or whose batch "
        "is skipped, or enable_gradient_release(..., accumulation=N) for N of them; and use_reentrant=False where "
        "gradient checkpointing meets a weight that several layers share"
    )


def unended(name: str) -> RuntimeError:
    """The error for the gradient of another backward pass, when those of the last one are on their way."""
    return RuntimeError(
        f"{name} got the gradient of another backward pass, and the one before did not reach its end: what it sent to "
        "other processes is on its way; expected finish() of gradient release's handle, on every process, after a "
        "backward pass that raised an error"
    )


def refuse_again(rest: list[Tensor], updated: Iterable[int], names: Names, excess: bool) -> None:
    """Raise RuntimeError if one of ``rest``, which have a gradient at the end of a step, is updated already.

    ``excess`` says whether the step has raised ``too_many``.
    """
    found = {*updated}
    again = [p for p in rest if id(p) in found]
    if again and excess:
        raise RuntimeError(
            f"{names.get(id(again[0]), 'a parameter')} and {len(again) - 1} more have a gradient of the backward pass "
            "that was one too many for this step, and that raised an error; expected optimizer.zero_grad() before "
            "optimizer.step(), or no step() after such an error"
        )
    if again:
        raise RuntimeError(
            f"{names.get(id(again[0]), 'a parameter')} and {len(again) - 1} more have a gradient again "
            "after their update, as DistributedDataParallel copies its buckets back; expected the DDP wrapper "
            "itself as the model of enable_gradient_release, or nothing that writes gradients after the backward "
            "pass"
        )


def warn_of_kept(kept: list[Tensor], limit: int) -> None:
    """Warn that gradients are kept which take more than ``limit`` bytes."""
    size = sum(map(largest_share, kept))
    if size > limit:
        logger.warning(
            f"gradient release: the gradients of {len(kept)} parameters, {size / 2**20:.1f} MiB, are kept until "
            "optimizer.step(), as clipping and accumulation need them where weights do not fold. Folded "
            "embeddings and heads, a level above 0, or no clipping (max_grad_norm=0) and one backward pass a step "
            "save this memory"
        )


def warn_of_hookless(params: list[Tensor], names: Names) -> None:
    """Warn of gradients that no hook was there to free."""
    logger.warning(
        f"gradient release: {len(params)} gradients were kept until optimizer.step(), the first of them "
        f"{names.get(id(params[0]), 'of a parameter')}, as no hook was there to free them. Weights that "
        "model.to() has moved, if quantized, and those unfrozen or added later need enable_gradient_release "
        "anew; the updates are right, but memory is not saved"
    )


def warn_of_unfinished(count: int) -> None:
    """Warn of a checkpoint in the middle of a step that has updated ``count`` parameters."""
    logger.warning(
        f"gradient release: a checkpoint in the middle of a step holds neither old nor new moments of the "
        f"{count} parameters that the step has updated so far, and a run that is resumed from it "
        "differs from this one; expected state_dict() after optimizer.step()"
    )
