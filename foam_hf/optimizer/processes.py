"""Gradient release in several processes: who adds up the gradients over them, and what is refused.

FSDP2 adds up the gradients of a module at the end of its backward pass, and then runs the hooks of its sharded
parameters, in every torch that this package supports. It runs them on the stream of the reduction. The default stream
waits for that stream at the end of the backward pass, and the next forward pass reads the shards after it. So an
update in a hook reads a complete gradient, and is complete before its weight is needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed, nn

from foam_hf.tensors.places import is_sharded


def refuse_unreduced(model: nn.Module, params: list[Tensor]) -> None:
    """Raise ValueError if a hook of ``params`` would see a gradient that was not added up over all processes."""
    wrapper = type(model).__name__
    # Compared by name, because torch.distributed may be missing.
    if wrapper in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise ValueError(_refusal(wrapper))
    world = processes()
    names = {id(p): name for name, p in model.named_parameters()}
    whole = [p for p in params if p.requires_grad and not is_sharded(p)]
    if world > 1 and whole and len(whole) < len(params):
        raise ValueError(
            f"FSDP2 does not add up the gradient of a weight that it does not shard: got {len(whole)} of the "
            f"optimizer's {len(params)} parameters, {names.get(id(whole[0]), 'without a name')} the first; expected "
            "all in fully_shard, or training without gradient release"
        )
    if world > 1 and whole:
        raise ValueError(_refusal(f"{world} processes"))


def _refusal(found: str) -> str:
    return (
        "gradient release updates a weight before its gradient could be averaged with those of other devices: "
        f"got {found}; expected one process with one GPU, FSDP2, or training without gradient release"
    )


def processes() -> int:
    """How many processes torch.distributed has, 1 without it."""
    there: Any = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1
