"""Checks whether a prepared step is still valid: the same groups, parameters, state and kinds of gradients.

The checks run in every step over hundreds of small tensors. For speed they use ``map`` with functions in C, not loops.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from foam_hf.optim_args import names_of
from foam_hf.tensors.places import is_sharded, local
from foam_hf.tensors.step import Member, State

_GRAD, _DTYPE, _STEP = operator.attrgetter("grad"), operator.attrgetter("dtype"), operator.itemgetter("step")
# torch's own comparison of many addresses in C++. It is private, and only builds for CUDA have it. For parameters it
# takes as long as to ask each for its address, for other tensors half of that.
_ALL_EQUAL = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
_GUARDS: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
# The fields of a group that are read only when a step is prepared.
_PREPARED_FOR = operator.itemgetter(*names_of(lambda each: each.field and not each.may_change))


class Watched:
    """The groups, parameters and state of a prepared step; ``unchanged`` compares them with the present ones."""

    def __init__(
        self, groups: list[dict[str, Any]], params: list[Tensor], states: list[State], members: list[Member]
    ) -> None:
        """``params`` and ``states`` are all of the step's, ``members`` those that it may update."""
        self._groups, self._params, self._states = list(groups), params, states
        self._fields = _fields(groups)
        self._weights = unique(member.p for member in members)
        self._tensors = _getters(unique(member.state for member in members))
        self.sharded = any(is_sharded(p) for p in self._weights)
        weights = self._own(self._weights)
        self._addresses, self._layouts = list(map(Tensor.data_ptr, weights)), _layouts(weights)
        self._same_kinds = SameKinds()
        self._same_kinds.learn(weights)
        moments = self._moments()
        self._moment_addresses = list(map(Tensor.data_ptr, moments))
        # A tensor subclass may say itself where its memory is, which torch's comparison does not ask.
        self._plain = all(type(x) is Tensor for x in moments)

    def unchanged(self, groups: list[dict[str, Any]], params: list[Tensor], states: list[State]) -> bool:
        """Whether all is the same, without regard to steps, gradients and options that every step reads anew."""
        return (
            _same(groups, self._groups)
            and _same(params, self._params)
            and _same(states, self._states)
            and _fields(groups) == self._fields
            and self._holds_its_state()
        )

    def _holds_its_state(self) -> bool:
        """Whether all tensors are where the kernels' tables say, but gradients, and weights of the same layout."""
        weights = self._own(self._weights)
        try:
            return (
                list(map(Tensor.data_ptr, weights)) == self._addresses
                and have_addresses(self._moments(), self._moment_addresses, self._plain)
                and self._keep_layouts(weights)
            )
        except (KeyError, RuntimeError, TypeError):  # a caller has removed state
            return False

    def _keep_layouts(self, weights: list[Tensor]) -> bool:
        """Whether ``weights`` have the shapes of before: a part or a transpose of one begins at the same address."""
        if self._same_kinds.found_in(weights):
            return True
        if _layouts(weights) != self._layouts:
            return False
        self._same_kinds.learn(weights)
        return True

    def _moments(self) -> list[Tensor]:
        found: list[Tensor] = []
        for get, states in self._tensors:
            found += map(get, states)
        return self._own(found)

    def _own(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(map(local, tensors)) if self.sharded else tensors


class StepCounts:
    """The step counts of some states, as this step has left them there."""

    def __init__(self, states: list[State]) -> None:
        self._states, self.counts = states, list(map(_STEP, states))
        self._follow()

    def _follow(self) -> None:
        self._present: list[bool] | None = None  # which states a step counts; None for all
        self._even = len(set(self.counts)) == 1

    def unchanged(self) -> bool:
        """Whether nobody else has written to them."""
        try:
            return list(map(_STEP, self._states)) == self.counts
        except (KeyError, TypeError):
            return False

    def count_only(self, present: Sequence[bool]) -> None:
        """From now on, count steps only of the states that are ``present``, one value for each."""
        self._follow()
        if not all(present):
            self._present = list(present)

    def advance(self) -> None:
        """Count a step."""
        if self._present is None and self._even and self.counts:
            count = self.counts[0] + 1
            self.counts = [count] * len(self.counts)
            for state in self._states:
                state["step"] = count
            return
        if self._present is None:
            self.counts = [count + 1 for count in self.counts]
        else:
            self.counts = list(map(operator.add, self.counts, self._present))
        for state, count in zip(self._states, self.counts, strict=True):
            state["step"] = count


class Gradients(NamedTuple):
    """The gradients of a step's parameters, as far as a prepared step depends on them.

    Attributes:
        missing: whether each parameter lacks a gradient; None if none does.
        kinds: lists of what tables and kernels are made for, see ``_kinds``, with an element for each gradient that
            is not missing. For DTensors also which are missing, and placements.
        addresses: one for each parameter, 0 for a missing or sparse gradient.
    """

    missing: list[bool] | None
    kinds: list[Any]
    addresses: list[int]


class WatchedGradients:
    """The kinds of gradients that the kernels' tables were made for, and the gradients of the last step.

    Attributes:
        last: those that ``follow`` has found.
        moved: their addresses, int64, if they are not those of before.
    """

    def __init__(self, params: list[Tensor], members: list[Member], sharded: bool) -> None:
        self._sharded = sharded
        grads = _all_of(params)
        self.last = last = _described(grads, sharded)
        # A missing gradient is expected in the dtype of its weight, and contiguous; one of no member has no kind.
        number = {id(p): i for i, p in enumerate(params)}
        self._kinds: list[list[Any]] = [[None] * len(params) for _ in range(3)]
        for member in members:
            i = number[id(member.p)]
            for kinds, expected in zip(self._kinds, (member.p.dtype, True, member.p.numel()), strict=True):
                kinds[i] = expected
        self.moved: numpy.ndarray | None = None
        self._alignments = numpy.array(last.addresses, dtype=numpy.int64) & 15
        self._same_kinds = SameKinds()
        if sharded:
            self._kinds = last.kinds
            return
        present = range(len(params)) if last.missing is None else itertools.compress(range(len(params)), here(last))
        for j, i in enumerate(present):
            for kinds, found in zip(self._kinds, last.kinds, strict=True):
                kinds[i] = found[j]
        if last.missing is None:
            self._same_kinds.learn(grads)

    def follow(self, params: list[Tensor]) -> bool:
        """Let ``last`` be the present gradients; False, and no change, if the tables do not suit them."""
        grads = _all_of(params)
        found = self._as_before(grads)
        if found is None:
            found = _described(grads, self._sharded)
            if not self._fit(found):
                return False
            if found.missing is None and not self._sharded:
                self._same_kinds.learn(grads)
        moved = None
        if found is not self.last and found.addresses != self.last.addresses:
            moved = numpy.array(found.addresses, dtype=numpy.int64)
            # The kernels were compiled for the alignment of these addresses. A missing gradient has none.
            misfits = (moved & 15) != self._alignments
            if misfits.any() and moved[misfits].any():
                return False
        self.last, self.moved = found, moved
        return True

    def _as_before(self, grads: list[Any]) -> Gradients | None:
        """The gradients, if all are here and of the kinds of the last step; None says that a closer look is needed."""
        last = self.last
        if last.missing is not None or not self._same_kinds.found_in(grads):
            return None
        try:
            if _ALL_EQUAL is not None and have_addresses(grads, last.addresses):
                return last
            return last._replace(addresses=list(map(Tensor.data_ptr, grads)))
        except RuntimeError:  # a sparse gradient has no address
            return None

    def _fit(self, found: Gradients) -> bool:
        expected = self._kinds
        if found.missing is not None and not self._sharded:
            present = here(found)
            expected = [list(itertools.compress(kinds, present)) for kinds in expected]
        return found.kinds == expected


class SameKinds:
    """Whether tensors have the type, dtype, device, sizes and strides of others before, asked in one call.

    The call is what ``torch.compile`` guards its inputs by. It is not public: where a version of torch has none, or
    another one, the answer is always that it is not known. The tensors are not kept.
    """

    def __init__(self) -> None:
        self._check: Any = None
        self._count = 0
        self._tries = 3  # strides of dimensions of one element, and modes of torch, may change in every step

    def learn(self, tensors: list[Tensor]) -> None:
        """From now on compare with ``tensors``."""
        self._check, self._count = None, len(tensors)
        if _GUARDS is None or self._tries == 0:
            return
        self._tries -= 1
        shapes, strides = ([[*map(int, get(x))] for x in tensors] for get in (Tensor.size, Tensor.stride))
        try:
            guards = _GUARDS(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
            self._check = guards.check if guards.check(*tensors) else None
        except (RuntimeError, TypeError, ValueError):
            self._tries = 0

    def found_in(self, tensors: list[Any]) -> bool:
        """Whether ``tensors``, or None where one is missing, are of the same kinds; False also if it is not known."""
        return self._check is not None and len(tensors) == self._count and bool(self._check(*tensors))


def here(gradients: Gradients) -> list[bool]:
    """Which parameters have a gradient, one value for each."""
    return [not missing for missing in gradients.missing or [False] * len(gradients.addresses)]


def have_addresses(tensors: list[Tensor], addresses: list[int], plain: bool = True) -> bool:
    """Whether ``tensors`` are at ``addresses``; not ``plain`` are subclasses that say where their memory is.

    Raises:
        TypeError: one is not a tensor.
        RuntimeError: the same, or one has no address, as sparse ones.
    """
    if plain and _ALL_EQUAL is not None and len(tensors) == len(addresses):
        return bool(_ALL_EQUAL(tensors, addresses, _every(len(addresses))))
    return list(map(Tensor.data_ptr, tensors)) == addresses


@functools.lru_cache(maxsize=8)
def _every(count: int) -> list[int]:
    return list(range(count))


def unique(values: Iterable[Any]) -> list[Any]:
    """The objects in ``values``, each once, compared by identity."""
    return list({id(value): value for value in values}.values())


def _getters(states: list[State]) -> list[tuple[Any, list[State]]]:
    """Functions that get a tensor of a state, each with the states that have the tensor."""
    by_names: dict[tuple[str, ...], list[State]] = {}
    for state in states:
        names = tuple(sorted(name for name in state if isinstance(state[name], Tensor)))
        by_names.setdefault(names, []).append(state)
    return [(operator.itemgetter(name), some) for names, some in by_names.items() for name in names]


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _fields(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(*_PREPARED_FOR(group), len(group["params"])) for group in groups]


def _all_of(params: list[Tensor]) -> list[Any]:
    """The gradient of each of ``params``, or None."""
    with torch._C.DisableTorchFunctionSubclass():  # or tensor subclasses would run Python code
        return list(map(_GRAD, params))


def _described(grads: list[Any], sharded: bool) -> Gradients:
    if not sharded:
        try:
            addresses = list(map(Tensor.data_ptr, grads))
            return Gradients(None, _kinds(grads), addresses)
        except (RuntimeError, TypeError):  # a sparse gradient has no address, None is no tensor
            pass
    missing = [grad is None for grad in grads]
    present = [grad for grad in grads if grad is not None]
    whole = present
    if sharded:
        present = list(map(local, present))
    try:
        found = iter(map(Tensor.data_ptr, present))
        addresses = [0 if is_missing else next(found) for is_missing in missing]
        kinds = _kinds(present)
    except RuntimeError:
        return Gradients(missing, [[grad.layout for grad in whole]] * 3, [0] * len(grads))
    if sharded:
        kinds += [missing, [getattr(grad, "placements", None) for grad in whole]]
    return Gradients(missing if any(missing) else None, kinds, addresses)


def _kinds(grads: list[Tensor]) -> list[list[Any]]:
    """Of each gradient the dtype, whether its memory holds it as kernels read it, and how many elements it has."""
    counts, contiguous = list(map(Tensor.numel, grads)), list(map(Tensor.is_contiguous, grads))
    if 1 in counts:  # autograd may leave one number to be negated, as the imaginary part of a conjugate
        pairs = zip(grads, contiguous, counts, strict=True)
        contiguous = [flag and not (count == 1 and grad.is_neg()) for grad, flag, count in pairs]
    return [list(map(_DTYPE, grads)), contiguous, counts]


def _layouts(weights: list[Tensor]) -> list[Any]:
    return [(x.dtype, x.shape, x.stride()) for x in weights]
