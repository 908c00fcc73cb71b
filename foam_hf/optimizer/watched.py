"""Checks whether a prepared step is still valid: the same groups, parameters, state and kinds of gradients.

The checks run in every step over hundreds of small tensors. For speed they use ``map`` with functions in C, not loops.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from foam_hf.optim_args import names_of
from foam_hf.tensors.places import is_sharded, local
from foam_hf.tensors.step import Member, State

_GRAD, _DTYPE, _STEP = operator.attrgetter("grad"), operator.attrgetter("dtype"), operator.itemgetter("step")
# The fields of a group that are read only when a step is prepared.
_PREPARED_FOR = operator.itemgetter(*names_of(lambda each: each.field and not each.may_change))


class StatesAlike(NamedTuple):
    """States whose tensors have the same names. Each function in ``tensors`` gets the tensor of one name."""

    tensors: list[Callable[[State], Tensor]]
    states: list[State]


class Watched:
    """The groups, parameters and state of a prepared step; ``unchanged`` compares them with the present ones."""

    def __init__(
        self, groups: list[dict[str, Any]], params: list[Tensor], states: list[State], members: list[Member]
    ) -> None:
        """``params`` and ``states`` are all of the step's, ``members`` those that it may update."""
        self._groups, self._params, self._states = list(groups), params, states
        self._fields = _fields(groups)
        self._weights = unique(member.p for member in members)
        self._alike = _alike(unique(member.state for member in members))
        self._updated = [state for alike in self._alike for state in alike.states]
        self.sharded = any(is_sharded(p) for p in self._weights)
        self._steps, self._addresses = self._steps_and_addresses()

    def follow_steps(self) -> None:
        """Remember the step counts after this step, which has increased them."""
        self._steps = list(map(_STEP, self._updated))

    def unchanged(self, groups: list[dict[str, Any]], params: list[Tensor], states: list[State]) -> bool:
        """Whether all is the same, without regard to gradients and to options that every step reads anew."""
        return (
            _same(groups, self._groups)
            and _same(params, self._params)
            and _same(states, self._states)
            and _fields(groups) == self._fields
            and self._holds_its_state()
        )

    def _holds_its_state(self) -> bool:
        try:
            return self._steps_and_addresses() == (self._steps, self._addresses)
        except (KeyError, TypeError):  # a caller has removed state
            return False

    def _steps_and_addresses(self) -> tuple[list[int], list[int]]:
        held = [*self._weights]
        for alike in self._alike:
            for tensor in alike.tensors:
                held += map(tensor, alike.states)
        # The kernels' tables hold these addresses.
        addresses = list(map(Tensor.data_ptr, map(local, held) if self.sharded else held))
        return list(map(_STEP, self._updated)), addresses


class Gradients(NamedTuple):
    """The gradients of a step's parameters, as far as a prepared step depends on them.

    Attributes:
        missing: bool, True for a parameter without a gradient.
        kinds: lists of what kernels are compiled for, dtype and contiguity, with an element for each parameter, None
            for a missing gradient. For DTensors all that must not change: also which are missing, and placements.
        addresses: int64, 0 for a missing or sparse gradient.
    """

    missing: numpy.ndarray
    kinds: list[Any]
    addresses: numpy.ndarray


class WatchedGradients:
    """The kinds of gradients that the kernels' tables were made for, and the gradients of the last step."""

    def __init__(self, params: list[Tensor], members: list[Member], sharded: bool) -> None:
        self._sharded = sharded
        self.last = gradients_of(params, sharded)
        # A missing gradient is expected in the dtype of its weight, and contiguous.
        number = {id(p): i for i, p in enumerate(params)}
        self._kinds = {number[id(member.p)]: (member.p.dtype, True) for member in members}
        if not sharded:
            found = zip(*self.last.kinds, strict=True)
            self._kinds |= {i: kind for i, kind in enumerate(found) if not self.last.missing[i]}
        self._alignments = self.last.addresses % 16

    def fit(self, found: Gradients, moved: bool) -> bool:
        """Whether the tables can be used for the gradients ``found``. ``moved`` says whether addresses differ."""
        if found.kinds != self.last.kinds and (self._sharded or not self._know(found.kinds)):
            return False
        # The kernels were compiled for the alignment of these addresses.
        return not moved or not ((found.addresses % 16 != self._alignments) & ~found.missing).any()

    def _know(self, kinds: list[Any]) -> bool:
        """Whether every gradient that is not missing is of the kind that the tables were made for."""
        return all(kind[0] is None or kind == self._kinds.get(i) for i, kind in enumerate(zip(*kinds, strict=True)))


def unique(values: Iterable[Any]) -> list[Any]:
    """The objects in ``values``, each once, compared by identity."""
    return list({id(value): value for value in values}.values())


def _alike(states: list[State]) -> list[StatesAlike]:
    by_names: dict[tuple[str, ...], list[State]] = {}
    for state in states:
        names = tuple(sorted(name for name in state if isinstance(state[name], Tensor)))
        by_names.setdefault(names, []).append(state)
    return [StatesAlike([*map(operator.itemgetter, names)], some) for names, some in by_names.items()]


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _fields(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(*_PREPARED_FOR(group), len(group["params"])) for group in groups]


def gradients_of(params: list[Tensor], sharded: bool) -> Gradients:
    """The present gradients of ``params``."""
    with torch._C.DisableTorchFunctionSubclass():  # or tensor subclasses would run Python code
        grads = list(map(_GRAD, params))
    if not sharded:
        try:
            found = list(map(Tensor.data_ptr, grads))
            kinds = [list(map(_DTYPE, grads)), list(map(Tensor.is_contiguous, grads))]
            return Gradients(numpy.zeros(len(params), dtype=bool), kinds, _int64(found))
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
        return Gradients(missing, [[grad is None or grad.layout for grad in grads]] * 2, addresses)
    return Gradients(missing, kinds if sharded else [_spread(values, missing) for values in kinds], addresses)


def _spread(values: list[Any], missing: numpy.ndarray) -> list[Any]:
    """``values``, one for each gradient, as a list with an element for each parameter: None if ``missing``."""
    found = iter(values)
    return [None if is_missing else next(found) for is_missing in missing]


def _int64(values: list[int]) -> numpy.ndarray:
    return numpy.array(values, dtype=numpy.int64)
