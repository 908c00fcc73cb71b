"""Averages gradients over processes inside the backward pass, for gradient release: DDP's work without its buckets.

DDP keeps a copy of all gradients. Here each gradient is sent when it is complete, and freed after its update. As in
DDP, each rank divides its gradients by the number of ranks, and all are added up, so the bits are DDP's. Of several
backward passes a step, each is averaged for itself, and all ranks must make as many: ``PassNumbers`` compares.

All ranks must send the same gradients in the same order, so weights are sent in packs whose order is agreed upon: at
first the reverse of the model's, vectors last, and after one step that of the first rank. A weight without a gradient
on some ranks counts as zeros there, and holds up the packs behind it until ``finish``. One without a gradient on every
rank is not updated.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import BackwardCFunction

from foam_hf.optimizer.packs import bytes_of, flat_gradients, references

LARGEST_PACK = 25 * 2**20  # bytes, as in DDP: one collective for many small gradients, and time to hide it behind


class _Sent(NamedTuple):
    """A pack on its way.

    Attributes:
        works: what to wait for.
        params: of the pack.
        grads: what will be their averaged gradients.
        used: on how many ranks each has a gradient, float32 (len(params),), and the sums of ``PassNumbers``.
        size: bytes of the gradients.
    """

    works: list[Any]
    params: list[Tensor]
    grads: list[Tensor]
    used: Tensor
    size: int


class PassNumbers:
    """Finds out that ranks made different numbers of backward passes, whose gradients would be averaged silently.

    Each pack carries the numbers of its step and of its pass, and how many the step has at most: updates depend on it.
    On a GPU the answer is read a pass later, or more.

    Attributes:
        count: how many numbers there are.
        micros: the most passes of the current step.
    """

    count = 3

    def __init__(self, world: int) -> None:
        self._world, self._step, self._pass, self.micros = world, 0, 0, 1
        self._wrong: Tensor | None = None
        self._host: Tensor | None = None
        self._event: Any = None

    @property
    def _numbers(self) -> tuple[int, ...]:
        return self._step, self._pass, self.micros

    def write(self, numbers: Tensor) -> None:
        """Write the numbers that a pack carries."""
        for place, number in zip(numbers, self._numbers, strict=True):
            place.fill_(number)  # no copy from the host

    def read(self, sums: Tensor) -> None:
        """Compare with the sums of the numbers over ranks.

        Raises:
            RuntimeError: other ranks sent another pass, or one of a step of another length.
        """
        pairs = zip(sums, self._numbers, strict=True)
        wrong = functools.reduce(operator.or_, (found != number * self._world for found, number in pairs))
        if sums.device.type == "cpu":
            self._refuse(bool(wrong))
        else:
            self._wrong = wrong if self._wrong is None else self._wrong | wrong

    def end_pass(self) -> None:
        """Count the pass; raises as ``read``, of an earlier one."""
        self._pass += 1
        if self._wrong is None:
            return
        if self._host is None:
            self._host = torch.zeros((), dtype=torch.bool).pin_memory()
            self._event = getattr(torch, self._wrong.device.type).Event()
        elif not self._event.query():
            return
        self._refuse(bool(self._host))
        self._host.copy_(self._wrong, non_blocking=True)
        self._event.record()

    def end_step(self) -> None:
        """Count the step, unless it had no pass, as one that a single process makes to have state to load into."""
        if self._pass:
            self._step, self._pass = (self._step + 1) % 1000, 0  # small, so that sums are exact

    def _refuse(self, wrong: bool) -> None:
        if wrong:
            raise RuntimeError(
                "processes made different numbers of backward passes before optimizer.step(), or were told of "
                f"different ones: this one is at pass {self._pass + 1} of a step with accumulation={self.micros}; "
                "expected as many on every process, as gradient release averages each, and the same accumulation"
            )


class Averaging:
    """Sends gradients, and hands out the parameters whose gradients are averaged.

    Args:
        params: all that get a gradient, of floating dtypes and on one device; the same on all ranks, in this order.
        group: the process group.
        largest_pack: bytes.
        accumulates: whether a step may have several passes.
    """

    def __init__(
        self, params: Sequence[Tensor], group: Any, largest_pack: int = LARGEST_PACK, accumulates: bool = False
    ) -> None:
        self.group, self._world = group, distributed.get_world_size(group)
        self._pass_numbers = PassNumbers(self._world) if accumulates else None
        self._told = self._pass_numbers.count if self._pass_numbers is not None else 0
        self._params, self._numbers = list(params), {id(p): i for i, p in enumerate(params)}
        self._limit = min(largest_pack, max((bytes_of(p) for p in params), default=0))
        self._agreed, self._references = False, references()
        # Vectors last: a norm that is defined far from where it is used would hold up much, and they are small.
        self._pack(sorted(range(len(self._params)), key=lambda i: (self._params[i].dim() < 2, -i)))
        self._sent: deque[_Sent] = deque()
        self.forget()

    def _pack(self, order: Iterable[int]) -> None:
        self._packs: list[list[Tensor]] = []
        held = 0
        for p in (self._params[i] for i in order):
            if not self._packs or held + bytes_of(p) > self._limit:
                self._packs.append([])
                held = 0
            self._packs[-1].append(p)
            held += bytes_of(p)
        self._order = [self._numbers[id(p)] for pack in self._packs for p in pack]
        self._pack_of = {id(p): i for i, pack in enumerate(self._packs) for p in pack}

    def forget(self) -> None:
        """Forget the gradients of this pass."""
        for sent in self._sent:
            for work in sent.works:
                work.wait()
        self._sent.clear()
        self._coming: Tensor | None = None  # whose hook this is
        self._next, self._task, self._finished = 0, -1, False
        self._came: list[int] = []
        self._here: set[int] = set()
        self._lacking = [len(pack) for pack in self._packs]

    def end_step(self) -> None:
        """Forget the gradients of the step, whether it was completed or not."""
        self.forget()
        if self._pass_numbers is not None:
            self._pass_numbers.end_step()

    def expect(self, micros: int) -> None:
        """A step begins that has so many passes at most."""
        if self._pass_numbers is not None:
            self._pass_numbers.micros = micros

    def averages(self, p: Tensor) -> bool:
        """Whether ``p`` is one of its parameters."""
        return id(p) in self._numbers

    def has(self, p: Tensor) -> bool:
        """Whether the gradient of ``p`` has come in this pass."""
        return id(p) in self._here

    def is_new_task(self) -> bool:
        """Whether this is the first call in a backward pass, or in one nested in it by reentrant checkpointing."""
        last, self._task = self._task, torch._C._current_graph_task_id()
        return self._task != last

    @staticmethod
    def is_nested() -> bool:
        """Whether this backward pass is part of another one, as reentrant checkpointing makes them."""
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code is BackwardCFunction.apply.__code__:
                return True
        return False

    @property
    def began(self) -> bool:
        """Whether a gradient has come in this pass."""
        return bool(self._here)

    @property
    def unfinished(self) -> bool:
        """Whether gradients have come, through ``add`` or without it."""
        if self._here or self._finished:
            return bool(self._here)
        with torch._C.DisableTorchFunctionSubclass():
            return any(p.grad is not None for p in self._params)

    @property
    def bytes_on_the_way(self) -> int:
        return sum(sent.size for sent in self._sent)

    def add(self, p: Tensor) -> Iterator[list[Tensor]]:
        """The gradient of ``p`` is complete on this rank. Yields parameters whose gradients are averaged now."""
        self._finished, self._coming = False, p
        self._here.add(id(p))
        self._came.append(self._numbers[id(p)])
        self._lacking[self._pack_of[id(p)]] -= 1
        while self._next < len(self._packs) and not self._lacking[self._next]:
            yield from self._send_next()
        self._coming = None

    def land(self) -> Iterator[list[Tensor]]:
        """Wait for all that was sent; yields its parameters."""
        while self._sent:
            yield self._land_first()

    def finish(self) -> Iterator[list[Tensor]]:
        """End the pass, with zeros for gradients that this rank lacks. All ranks must call it. Yields parameters."""
        with torch._C.DisableTorchFunctionSubclass():  # a gradient that did not come through ``add`` is sent too
            self._here |= {id(p) for p in self._params if p.grad is not None}
        while self._next < len(self._packs):
            yield from self._send_next()
        yield from self.land()
        if not self._agreed:
            self._agree()
        self.forget()
        if self._pass_numbers is not None:
            self._pass_numbers.end_pass()
        self._finished = True  # gradients that are kept until the step are not averaged again

    def _agree(self) -> None:
        """Take over the order in which gradients came on rank 0, those that did not come last."""
        here = set(self._came)
        order = self._came + [i for i in self._order if i not in here]
        told = torch.tensor(order, device=self._params[0].device)
        distributed.broadcast(told, distributed.get_global_rank(self.group, 0), group=self.group)
        self._pack(told.tolist())
        self._agreed = True

    def _send_next(self) -> Iterator[list[Tensor]]:
        """Send the next pack. Yields what must land before, so that no more than two packs are on the way."""
        pack = self._packs[self._next]
        self._next += 1
        size = sum(map(bytes_of, pack))
        while self._sent and self.bytes_on_the_way + size > 2 * self._limit:
            yield self._land_first()
        works: list[Any] = []
        grads: list[Tensor] = []
        params: list[Tensor] = []
        for dtype in dict.fromkeys(p.dtype for p in pack):
            mine = [p for p in pack if p.dtype == dtype]
            flat, parts = flat_gradients(mine, self._references[mine[0] is self._coming])
            flat.mul_(1.0 / self._world)
            works.append(distributed.all_reduce(flat, group=self.group, async_op=True))
            params += mine
            grads += parts
        used = torch.ones(len(params) + self._told, device=params[0].device)
        if self._pass_numbers is not None:
            self._pass_numbers.write(used[len(params) :])
        for i, p in enumerate(params):
            if id(p) not in self._here:
                used[i].zero_()  # no copy from the host, which would wait for the GPU
        works.append(distributed.all_reduce(used, group=self.group, async_op=True))
        self._sent.append(_Sent(works, params, grads, used, size))

    def _land_first(self) -> list[Tensor]:
        """Wait for the first pack; returns those of its parameters that have a gradient on any rank.

        All ranks get the same packs in the same order, so that clipping finds the same norms on them.
        """
        sent = self._sent.popleft()
        for work in sent.works:
            work.wait()  # on a GPU the stream waits, not the host
        if self._pass_numbers is not None:
            self._pass_numbers.read(sent.used[len(sent.params) :])
        lacks = any(id(p) not in self._here for p in sent.params)
        counts = (
            sent.used[: len(sent.params)].tolist() if lacks else [1.0] * len(sent.params)
        )  # only then must the host wait
        found = [(p, grad) for p, grad, count in zip(sent.params, sent.grads, counts, strict=True) if count]
        with torch._C.DisableTorchFunctionSubclass():
            for p, grad in found:
                p.grad = grad
        return [p for p, _ in found]


@torch.no_grad()
def send_from_first(tensors: Iterable[Tensor], group: Any) -> None:
    """Overwrite ``tensors`` by those of the first rank of ``group``, as DDP does with weights and buffers."""
    source = distributed.get_global_rank(group, 0)
    for x in tensors:
        for part in _inner(x):
            whole = part.contiguous()
            distributed.broadcast(whole, source, group=group)
            if whole is not part:
                part.copy_(whole)


def _inner(x: Tensor) -> list[Tensor]:
    """The plain tensors that ``x`` consists of: an INT8 weight has codes and scales."""
    flatten = getattr(x, "__tensor_flatten__", None)
    if flatten is None:
        return [x.detach()]
    names, _ = flatten()
    return [part for name in names for part in _inner(getattr(x, name))]


def state_of(model: nn.Module) -> list[Tensor]:
    """Weights and buffers of ``model``, each once."""
    found = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return list(found.values())
