"""Updates flat vectors of weights that ZeRO has made: each part of a weight as if it were a weight of its own.

A block that the ends of two vectors cut is updated in both processes. They exchange its gradient and keep its moments
each, so a block is never computed from a part of it. This is one all-gather for each vector in a step.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from foam_hf.optim_args import names_of
from foam_hf.optimizer.flat import LAYOUT, FlatWeights
from foam_hf.optimizer.flat_parts import FlatParts, Part
from foam_hf.optimizer.nonfinite import LeftOutReport
from foam_hf.optimizer.state import state_problem
from foam_hf.optimizer.step import PreparedStep
from foam_hf.tensors.places import Piece
from foam_hf.tensors.step import Member, State

Group = dict[str, Any]
_FIXED = names_of(lambda each: each.field and not each.may_change)


class FlatStep:
    """The prepared update of one flat vector."""

    def __init__(
        self, parts: FlatParts, weights: FlatWeights, group: Group, state: State, left_out: LeftOutReport
    ) -> None:
        self._parts, self._group, self._state, self._left_out = parts, group, state, left_out
        self._vector = parts.flat.tensor.detach()
        self._streams = len(weights.weights)
        device = self._vector.device
        send, own, take, self._most = parts.exchange(weights.weights)
        self._send, self._own, self._take = (
            torch.tensor(index, dtype=torch.int64, device=where)
            for index, where in ((send, device), (own, device), (take, parts.flat.device))
        )
        self._blocks = torch.zeros(parts.shared_elements, dtype=self._vector.dtype, device=device)
        self._members: list[Member] = []
        self._states: list[State] = []
        self._grads: list[tuple[int, tuple[int, ...]]] = []  # where each view of a gradient begins, and its shape
        for part in parts.parts:
            self._add(part, self._vector)
        self._shared = len(self._members)
        for part in parts.shared:
            self._add(part, self._blocks)
        self._views = [member.p for member in self._members]
        self._prepared: PreparedStep | None = None
        self._key = self.key(parts, group, state)

    def _add(self, part: Part, vector: Tensor) -> None:
        view = _view(vector, part.at, part.shape)
        state: State = {"step": self._state["step"]}
        for name, (begin, tensor) in part.state.items():
            state[name] = _view(self._state[name], begin, tuple(tensor.shape))
        self._states.append(state)
        self._grads.append((part.at, part.shape))
        names = tuple(part.state)
        self._members.append(Member(view, state, names, part.level, part.rule, part.weight, Piece(part.place)))

    @staticmethod
    def key(parts: FlatParts, group: Group, state: State) -> tuple[Any, ...]:
        """What must stay as it is, or the step must be prepared anew."""
        held = [parts.flat.tensor, *(state[name] for name in parts.sizes)]
        return (
            id(group),
            id(state),
            *(group[name] for name in _FIXED),
            *((id(x), x.data_ptr(), x.device) for x in held),
        )

    def holds(self, group: Group, state: State) -> bool:
        """Whether nothing has changed that the step was prepared for. DeepSpeed may move or replace the tensors."""
        steps = {each["step"] for each in self._states}
        return steps <= {state["step"]} and self.key(self._parts, group, state) == self._key

    def run(self, grad_scale: Tensor | None) -> None:
        """Update the vector by its gradient."""
        grad = self._parts.flat.tensor.grad
        assert grad is not None
        grad = grad.detach()
        shared = self._exchanged(grad)
        if len(self._own):
            self._blocks.zero_().index_copy_(0, self._own, self._vector.index_select(0, self._send))
        for number, (view, (at, shape)) in enumerate(zip(self._views, self._grads, strict=True)):
            view.grad = _view(grad if number < self._shared else shared, at, shape)
        try:
            if self._views:
                self._run(grad_scale)
        finally:
            for view in self._views:
                view.grad = None
        if len(self._own):
            self._vector.index_copy_(0, self._send, self._blocks.index_select(0, self._own))
        self._state["step"] += 1

    def _run(self, grad_scale: Tensor | None) -> None:
        if self._prepared is None or not self._prepared.holds([self._group], self._views, self._states):
            self._prepared = PreparedStep([self._group], self._views, self._states, [self._members])
        self._prepared.run(grad_scale, self._left_out, self._streams)

    def _exchanged(self, grad: Tensor) -> Tensor:
        """The gradients of the shared blocks, whole. Every process that shares the weights must call it."""
        if not self._most:
            return grad
        flat = self._parts.flat
        mine = torch.zeros(self._most, dtype=grad.dtype, device=flat.device)
        mine[: len(self._send)] = grad.index_select(0, self._send)
        everything = torch.empty(self._most * len(flat.spans), dtype=grad.dtype, device=flat.device)
        _all_gather(everything, mine, group=flat.process_group)
        return everything.index_select(0, self._take).to(grad.device)


def _all_gather(into: Tensor, mine: Tensor, group: Any) -> None:
    distributed: Any = torch.distributed
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # until torch 2.12
    gather(into, mine, group=group)


def _view(x: Tensor, at: int, shape: tuple[int, ...]) -> Tensor:
    return x[at : at + torch.Size(shape).numel()].view(shape)


class FlatSteps:
    """The prepared updates of all flat vectors of an optimizer."""

    def __init__(self) -> None:
        self._steps: dict[int, FlatStep] = {}

    def run(
        self,
        weights: FlatWeights,
        groups: list[Group],
        states: MutableMapping[Tensor, Any],
        left_out: LeftOutReport,
        grad_scale: Tensor | None,
    ) -> None:
        """Update the flat vectors in ``groups`` that have a gradient.

        Raises:
            ValueError: a vector is none of those that ZeRO made of the weights, or its state does not fit it.
        """
        for group in groups:
            for p in group["params"]:
                parts = weights.parts.get(id(p))
                if parts is None:
                    raise ValueError(
                        f"a param group holds a vector of shape {tuple(p.shape)} that ZeRO did not have before; "
                        "expected one engine of DeepSpeed for each FOAM"
                    )
                if p.grad is None:
                    continue
                state = state_of(parts, states, weights, left_out)
                prepared = self._steps.get(id(p))
                if prepared is None or not prepared.holds(group, state):
                    self._steps.pop(id(p), None)
                    prepared = self._steps[id(p)] = FlatStep(parts, weights, group, state, left_out)
                prepared.run(grad_scale)


def state_of(
    parts: FlatParts, states: MutableMapping[Tensor, Any], weights: FlatWeights, left_out: LeftOutReport
) -> State:
    """The state of a flat vector, made of zeros if it has none.

    Raises:
        ValueError: it is not the state of this vector.
    """
    vector = parts.flat.tensor
    state = states[vector]
    if not state:
        for number in {part.weight for part in (*parts.parts, *parts.shared)}:
            left_out.forget(number, weights.as_groups())
        state["step"], state[LAYOUT] = 0, parts.layout
        for name, tensor in parts.spec.items():
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=vector.device)
        return state
    problem = state_problem({name: x for name, x in state.items() if name != LAYOUT}, parts.spec)
    if not problem and state.get(LAYOUT) != parts.layout:
        problem = "it is that of another process's vector, or of other weights"
    if problem:
        raise ValueError(
            f"the state of a flat vector of {vector.numel()} elements does not fit it: {problem}. FOAM's state lies "
            "in blocks of whole weights, and can be read back by the same number of processes alone; expected no "
            "elastic_checkpoint, load_universal_checkpoint or other code that cuts it as the weights are cut"
        )
    return state
