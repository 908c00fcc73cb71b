"""Gradient release in several processes: who averages the gradients over them, and what is refused.

Under FSDP2: FSDP2, which adds up the gradients of a module at the end of its backward pass, and then runs the hooks of
its sharded parameters, in every torch that this package supports. It runs them on the stream of the reduction. The
default stream waits for that stream at the end of the backward pass, and the next forward pass reads the shards after
it. So an update in a hook reads a complete gradient, and is complete before its weight is needed.

Under DDP, and for a process group that the caller names: ``Averaging``.

Of several backward passes a step, each is reduced at once, also where a loop asks DDP or FSDP2 not to: what they would
keep until the last pass are whole gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, distributed, nn

from foam_hf.optimizer.averaging import LARGEST_PACK, Averaging, send_from_first, state_of
from foam_hf.optimizer.ddp import ignored_by, take_over
from foam_hf.tensors.places import is_sharded
from foam_hf.tensors.rows import visiting_layer

_always_reduced: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # -> how many ask for it


class Processes:
    """What gradient release does in several processes: nothing, unless it averages the gradients itself.

    Attributes:
        averaging: None if gradients are whole when a hook sees them: in one process, and under FSDP2.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Tensor],
        group: Any,
        broadcast_buffers: bool = True,
        accumulates: bool = False,
    ) -> None:
        """``params`` are all of the optimizer, and ``accumulates`` says whether a step may have several passes.

        Other arguments and errors are as in ``enable_gradient_release``.
        """
        self.averaging: Averaging | None = None
        self._accumulates = accumulates
        self._give_back: Callable[[], None] | None = None
        self._buffers: list[Tensor] = []
        self._ddp: Any = None
        trained = [p for p in params if p.requires_grad]
        wrapper = type(model).__name__
        if wrapper == "DistributedDataParallel":  # by name, because torch.distributed may be missing
            self._average(model, trained, model.process_group if group is None else group)
            self._ddp, self._give_back = model, take_over(model)
        elif group is not None:
            self._average(model, trained, group)
            send_from_first(state_of(model), group)
            self._buffers = list(model.buffers()) if broadcast_buffers else []
        else:
            _refuse_unreduced(model, trained, wrapper)
            if accumulates:
                self._give_back = _reduce_always(model)

    def _average(self, model: Any, trained: list[Tensor], group: Any) -> None:
        """Average the gradients of ``trained``, but for those that DDP was told to ignore."""
        named = dict(model.named_parameters())
        visiting = [name for name, p in named.items() if visiting_layer(p) is not None]
        if visiting:
            raise ValueError(
                f"offloaded weights are trained in one process: got a process group, and {len(visiting)} of them, "
                f"{visiting[0]} the first; expected Int8Config() without offload, or one process"
            )
        ignored = {id(p) for p in (ignored_by(model) if hasattr(model, "parameters_to_ignore") else ())}
        mine = {id(p) for p in trained}
        sharded = [name for name, p in named.items() if is_sharded(p)]
        if sharded:
            raise ValueError(
                f"weights that are sharded need no process_group: got one, and {len(sharded)} DTensors, "
                f"{sharded[0]} the first; expected process_group=None"
            )
        others = [name for name, p in named.items() if p.requires_grad and id(p) not in mine | ignored]
        if others:
            raise ValueError(
                f"gradient release averages the gradients of its optimizer alone: got {len(others)} more trainable "
                f"parameters in the model, {others[0]} the first; expected them frozen or in the optimizer"
            )
        averaged = [p for p in named.values() if id(p) in mine and id(p) not in ignored]
        devices = sorted({str(p.device) for p in averaged})
        if len(devices) > 1:
            raise ValueError(
                f"gradients are averaged on one device of each process: got weights on {', '.join(devices)}; expected "
                "the whole model on one, or training without gradient release"
            )
        largest = getattr(model, "bucket_bytes_cap", LARGEST_PACK)
        self.averaging = Averaging(averaged, group, largest, self._accumulates)

    @property
    def reduces(self) -> bool:
        """Whether this backward pass averages; DDP's ``no_sync`` says that it must not, where a step has one pass."""
        return self._ddp is None or self._accumulates or bool(self._ddp.require_backward_grad_sync)

    def refuse_rest(self, rest: list[Tensor], names: dict[int, str]) -> None:
        """Raise RuntimeError if gradients in ``rest``, which no hook has seen, should have been averaged."""
        if self.averaging is not None:
            raise RuntimeError(
                f"{names.get(id(rest[0]), 'a parameter')} has a gradient that was not averaged over the processes: it "
                "was unfrozen, or added to the optimizer, after enable_gradient_release; expected it called anew"
            )

    def send_buffers(self) -> None:
        """Send the buffers of the first rank to all, after a step. DDP does it itself, before a forward pass."""
        if self.averaging is not None and self._buffers:
            send_from_first(self._buffers, self.averaging.group)

    def close(self) -> None:
        """Let DDP average again, and FSDP2 do as it is told, if they did before."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


def _reduce_always(model: nn.Module) -> Callable[[], None]:
    """Let FSDP2 reduce the gradients of every backward pass of ``model``, whatever it is told.

    Returns:
        a function that lets it do as it is told again, when nobody else has asked for this.
    """
    # Without the wait that ``set_is_last_backward(False)`` leaves out, a forward pass would race with updates.
    names = ("set_requires_gradient_sync", "set_requires_all_reduce", "set_is_last_backward")
    modules: list[Any] = [module for module in model.modules() if hasattr(type(module), names[0])]
    for module in modules:
        asked = _always_reduced[module] = _always_reduced.get(module, 0) + 1
        if asked > 1:
            continue
        module.set_requires_gradient_sync(True, recurse=False)
        module.set_is_last_backward(True)
        for name in names:
            setattr(module, name, _do_nothing)

    def give_back() -> None:
        for module in modules:
            _always_reduced[module] -= 1
            for name in names if not _always_reduced[module] else ():
                vars(module).pop(name, None)

    return give_back


def _do_nothing(*_: Any, **__: Any) -> None:
    """Stands in for what tells FSDP2 not to reduce, or not to wait for it."""


def _refuse_unreduced(model: nn.Module, trained: list[Tensor], wrapper: str) -> None:
    """Raise ValueError if a hook of ``trained`` would see a gradient that was not added up over all processes."""
    if wrapper in ("DataParallel", "FullyShardedDataParallel"):
        raise ValueError(_refusal(wrapper))
    world, whole = processes(), [p for p in trained if not is_sharded(p)]
    if world == 1 or not whole:
        return
    if len(whole) < len(trained):
        names = {id(p): name for name, p in model.named_parameters()}
        raise ValueError(
            f"FSDP2 does not add up the gradient of a weight that it does not shard: got {len(whole)} of the "
            f"optimizer's {len(trained)} parameters, {names.get(id(whole[0]), 'without a name')} the first; expected "
            "all in fully_shard, or training without gradient release"
        )
    raise ValueError(_refusal(f"{world} processes, and a model that neither DDP nor FSDP2 has wrapped"))


def _refusal(found: str) -> str:
    return (
        "gradient release updates a weight before its gradient could be averaged with those of other devices: "
        f"got {found}; expected one process with one GPU, DDP, FSDP2, or "
        "enable_gradient_release(..., process_group=torch.distributed.group.WORLD) without a wrapper"
    )


def processes() -> int:
    """How many processes torch.distributed has, 1 without it."""
    there: Any = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1
