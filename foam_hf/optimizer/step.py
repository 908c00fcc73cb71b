"""How a step updates the parameters of a group: by kernels where their rule has them, else by the rule in torch."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from foam_hf.kernels.choice import use_kernels
from foam_hf.optim_args import names_of
from foam_hf.optimizer.sharding import add_over_ranks
from foam_hf.rules.all import rule_named
from foam_hf.rules.rule import Launch, Unfinished
from foam_hf.tensors.finite import leaving_out_whole
from foam_hf.tensors.places import is_sharded, local
from foam_hf.tensors.rows import PLAIN, kernels_of, kind_of, weight_rows
from foam_hf.tensors.step import Hyper, Member, State

_GRAD, _DTYPE, _STEP = operator.attrgetter("grad"), operator.attrgetter("dtype"), operator.itemgetter("step")
# The fields of a group that a step, once prepared, reads no more.
_PREPARED_FOR = operator.itemgetter(*names_of(lambda each: each.field and not each.may_change))
LeftOutAt = Callable[[dict[str, Any], torch.device], Tensor | None]


class StepPlan:
    """What a step of some parameters does. It serves again as long as it ``holds``, so tables are built only once.

    It keeps no gradient alive, and is valid only for the very tensors of state it was made with.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        params: list[Tensor],
        states: list[State],
        members: list[list[Member]],
    ) -> None:
        """``holds`` compares ``params`` and ``states``; ``members`` are those with a gradient or state, by group."""
        self._launches: list[tuple[dict[str, Any], Launch]] = []
        self._rest: list[tuple[dict[str, Any], Member]] = []
        for group, mine in zip(groups, members, strict=True):
            self._add(group, mine)
        self._members = {member.stream: member for mine in members for member in mine}  # pieces share what counts here
        self._states = list({id(member.state): member.state for member in self._members.values()}.values())
        self._updated = list({id(member.p): member.p for member in self._members.values()}.values())
        number = {id(p): i for i, p in enumerate(params)}
        self._numbers = {stream: number[id(member.p)] for stream, member in self._members.items()}
        self._places = [numpy.array([self._numbers[i] for i in launch.streams]) for _, launch in self._launches]
        missing = numpy.array([p.grad is None for p in params])
        self._follow_missing(missing)
        if not self._launches:
            return  # without tables there is nothing to keep
        self._in_order = [numpy.array_equal(places, numpy.arange(len(params))) for places in self._places]
        self._indices: list[Tensor | None] = [None] * len(self._launches)  # the places on the device, once needed
        self._sharded = any(is_sharded(p) for p in self._updated)
        self._groups, self._all_params, self._all_states = list(groups), params, states
        moments = [(known, name) for known in self._states for name in known if isinstance(known[name], Tensor)]
        self._holders, self._names = [known for known, _ in moments], [name for _, name in moments]
        self._rules, self._steps = _rules(groups), list(map(_STEP, self._states))
        self._missing, self._grad_kinds, self._grads = _gradients(params, self._sharded)
        # What a launch is compiled for, of gradients that are missing too: as their weights are.
        self._kinds = {number[id(p)]: (p.dtype, True) for p in self._updated}
        if not self._sharded:
            self._kinds |= {i: kind for i, kind in enumerate(zip(*self._grad_kinds, strict=True)) if not missing[i]}
        self._alignments = self._grads % 16
        self._addresses = self._current_addresses()

    def _add(self, group: dict[str, Any], members: list[Member]) -> None:
        by_kernels: dict[str, list[Member]] = {}
        for member in members:
            by_kernels.setdefault(_kernels(member) or "", []).append(member)
        unfit = by_kernels.pop("", [])
        for module, some in by_kernels.items():
            launches, more = importlib.import_module(module).make_launches(some)
            self._launches += [(group, launch) for launch in launches]
            unfit += more
        self._rest += [(group, member) for member in unfit]

    def holds(self, groups: list[dict[str, Any]], params: list[Tensor], states: list[State]) -> bool:
        """Whether the plan still serves: nothing has moved but gradients, come or gone, which it then follows."""
        if not self._launches:
            return False
        if not (
            _same(groups, self._groups)
            and _same(params, self._all_params)
            and _same(states, self._all_states)
            and _rules(groups) == self._rules
            and self._current_state() == (self._steps, self._addresses)
        ):
            return False
        missing, kinds, addresses = _gradients(params, self._sharded)
        if kinds != self._grad_kinds:
            if self._sharded or not self._knows(kinds):
                return False
            self._grad_kinds = kinds
        if not numpy.array_equal(addresses, self._grads):
            moved = (addresses % 16 != self._alignments) & ~missing
            if moved.any():  # the kernels were compiled for another alignment
                return False
            self._grads = addresses
            for (_, launch), places in zip(self._launches, self._places, strict=True):
                launch.move_gradients(addresses[places])
        if not numpy.array_equal(missing, self._missing):
            self._missing = missing
            self._follow_missing(missing)
        return True

    def _knows(self, kinds: list[Any]) -> bool:
        """Whether every gradient that is there is of the kind that the tables were made for."""
        return all(kind[0] is None or kind == self._kinds.get(i) for i, kind in enumerate(zip(*kinds, strict=True)))

    def _follow_missing(self, missing: numpy.ndarray) -> None:
        """Leave out what has no gradient in this step: of each launch one member that has one speaks for it."""
        present = [member for stream, member in self._members.items() if not missing[self._numbers[stream]]]
        self._stepping = list({id(member.state): member.state for member in present}.values())
        self._changing = list({id(member.p): member.p for member in present}.values())
        self._leads: list[Member | None] = []
        for (_, launch), places in zip(self._launches, self._places, strict=True):
            here = ~missing[places]
            launch.leave_out(here)
            first = int(here.argmax())
            self._leads.append(self._members[int(launch.streams[first])] if here[first] else None)

    def run(
        self, hyper: Callable[[dict[str, Any], Member], Hyper], grad_scale: Tensor | None, left_out_at: LeftOutAt
    ) -> None:
        """Update everything; gradients are those of a loss times ``grad_scale``.

        ``grad_scale`` has one element, or one for each of ``params``. ``left_out_at`` gives, for a group and a
        device, where to write in which step a block was last left out, one element a parameter; or None.
        """
        for state in self._stepping:
            state["step"] += 1
        if self._launches:
            self._steps = list(map(_STEP, self._states))
        unfinished: list[tuple[Unfinished, Hyper, Tensor | None]] = []
        for i, ((group, launch), lead) in enumerate(zip(self._launches, self._leads, strict=True)):
            if lead is None:
                continue
            h, where = hyper(group, lead), left_out_at(group, launch.device)
            left = launch.run(h, self._scales(i, grad_scale), where)
            if left is not None:
                unfinished.append((left, h, where))
        for group, member in self._rest:
            if member.p.grad is None:
                continue
            h, where = hyper(group, member), left_out_at(group, member.weight.device)
            where = None if where is None else where[member.stream]
            scale = grad_scale
            if scale is not None and scale.numel() > 1:
                scale = scale[self._numbers[member.stream]]
            left = _update_plainly(member, h, scale, where)
            if left is not None:
                unfinished.append((left, h, where))
        # autograd sees neither what a kernel writes nor INT8 codes, and a backward pass under way may still need them.
        torch.autograd.graph.increment_version(self._changing)
        if unfinished:
            _finish(unfinished)

    def _scales(self, i: int, grad_scale: Tensor | None) -> Tensor | None:
        """Those of launch ``i``, in the order of its table."""
        if grad_scale is None or grad_scale.numel() == 1 or self._in_order[i]:
            return grad_scale
        if self._indices[i] is None:
            self._indices[i] = torch.from_numpy(self._places[i]).to(grad_scale.device)
        return grad_scale[self._indices[i]]

    def _current_state(self) -> tuple[list[int], list[int]] | None:
        """Steps and addresses; None where somebody has taken state away."""
        try:
            return list(map(_STEP, self._states)), self._current_addresses()
        except (KeyError, TypeError):
            return None

    def _current_addresses(self) -> list[int]:
        # What a kernel has the address of must still be there when it runs again.
        moments = map(operator.getitem, self._holders, self._names)
        held = [*self._updated, *moments]
        return list(map(Tensor.data_ptr, map(local, held) if self._sharded else held))


def _kernels(member: Member) -> str | None:
    """The module of the kernels that may take ``member``; None if there are none."""
    if not use_kernels(local(member.p).device):
        return None
    if kind_of(member.weight) == PLAIN:
        return rule_named(member.rule).kernel
    return kernels_of(member.weight).get(member.rule)


def _update_plainly(
    member: Member, h: Hyper, grad_scale: Tensor | None, left_out_at: Tensor | None
) -> Unfinished | None:
    rule, grad, state = rule_named(member.rule), member.grad, member.moments
    grad = grad if grad_scale is None else grad.float() / grad_scale.to(grad.device)
    weight = weight_rows(member.weight, member.place)
    if rule.unit == "block":
        return rule.update(weight, grad, state, member.level, h, left_out_at)
    with leaving_out_whole(grad, [*weight.tensors, *state.values()], left_out_at, h.step) as wanted:
        return rule.update(weight, grad, state, member.level, h) if wanted else None


def _finish(unfinished: list[tuple[Unfinished, Hyper, Tensor | None]]) -> None:
    """What the factored rule has left to do when the ranks of a shard know each other's sums."""
    # By parameter and piece, as which of them share a launch may differ from rank to rank.
    parts = sorted((part for one, _, _ in unfinished for part in one.sums), key=operator.itemgetter(0))
    add_over_ranks([(groups, tensor) for _, groups, tensor in parts])
    for one, h, left_out_at in unfinished:
        one.store(h, left_out_at)


def refuse_capture() -> None:
    """Raise RuntimeError while a CUDA graph is captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "FOAM's update cannot be captured in a CUDA graph: the learning rate and the step count it was captured "
            "with would never change; expected a capture of forward and backward only, and step() after its replay"
        )


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _rules(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(*_PREPARED_FOR(group), len(group["params"])) for group in groups]


def _gradients(params: list[Tensor], sharded: bool) -> tuple[numpy.ndarray, list[Any], numpy.ndarray]:
    """Of every parameter whether it has no gradient, what a launch is compiled for, and the gradient's address.

    It runs in every step, over hundreds of small tensors, hence the passes without a line of Python for each. What a
    launch is compiled for are lists with a place for each parameter, None for a missing gradient; of shards, all that
    must stay as it is. The address is 0 for none or a sparse one.
    """
    with torch._C.DisableTorchFunctionSubclass():  # INT8 weights would answer in Python
        grads = list(map(_GRAD, params))
    if not sharded:
        try:
            found = list(map(Tensor.data_ptr, grads))
            kinds = [list(map(_DTYPE, grads)), list(map(Tensor.is_contiguous, grads))]
            return numpy.zeros(len(params), dtype=bool), kinds, _int64(found)
        except (RuntimeError, TypeError):  # a sparse gradient has no address, None is no tensor
            pass
    missing = numpy.array([grad is None for grad in grads])
    present = [grad for grad in grads if grad is not None]
    kinds = [list(map(_DTYPE, present))]
    if sharded:
        kinds += [missing.tolist(), [getattr(grad, "placements", None) for grad in present]]
        present = list(map(local, present))
    addresses = _int64([0] * len(params))
    try:
        kinds.append(list(map(Tensor.is_contiguous, present)))
        addresses[~missing] = list(map(Tensor.data_ptr, present))
    except RuntimeError:
        return missing, [[grad is None or grad.layout for grad in grads]] * 2, addresses
    return missing, kinds if sharded else [_spread(values, missing) for values in kinds], addresses


def _spread(values: list[Any], missing: numpy.ndarray) -> list[Any]:
    """``values`` of what is there, in the places of all."""
    found = iter(values)
    return [None if gone else next(found) for gone in missing]


def _int64(values: list[int]) -> numpy.ndarray:
    return numpy.array(values, dtype=numpy.int64)
