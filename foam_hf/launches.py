"""How a step updates the parameters of a group: by the fused kernels of ``kernels``, or plainly by ``update``."""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch
from torch import Tensor

from foam_hf.adam_mini import update_adam_mini
from foam_hf.eight_bit import update_8bit
from foam_hf.folding import Level
from foam_hf.int8_weights import Int8Weight
from foam_hf.muon import update_muon
from foam_hf.nonfinite import leaving_out_whole
from foam_hf.places import is_sharded, local
from foam_hf.sharding import add_over_ranks
from foam_hf.update import FactoredMoment, Hyper, Member, update_parameter

if TYPE_CHECKING:
    from foam_hf.factored_kernels import FactoredLaunch
    from foam_hf.kernels import Launch

KERNEL_VARIABLE = "FOAM_HF_KERNEL"
State = MutableMapping[str, Any]
Unfinished = Any  # a FactoredMoment or FactoredLaunch: ``sums`` and ``store``
Told = Callable[[dict[str, Any], torch.device], Tensor | None]
# Rules with an update of their own, on any device; no kernel takes them, and they need whole tensors.
_UPDATES: dict[str, Callable[[Tensor, Tensor, State, Level, Hyper], None]] = {
    "muon": update_muon,
    "adam_mini": update_adam_mini,
    "8bit": update_8bit,
}


def use_kernels(device: torch.device) -> bool:
    """Whether parameters on ``device`` are updated by the fused kernels; ``FOAM_HF_KERNEL`` decides otherwise.

    ``auto`` (the default): on NVIDIA, AMD and Intel GPUs where Triton is installed. ``reference``: nowhere.
    ``triton``: everywhere, also on a CPU under Triton's interpreter.

    Raises:
        ValueError: the variable has another value.
    """
    choice = os.environ.get(KERNEL_VARIABLE, "auto")
    if choice not in ("auto", "reference", "triton"):
        raise ValueError(f"{KERNEL_VARIABLE} is not valid: got {choice!r}; expected 'auto', 'reference' or 'triton'")
    return choice == "triton" or (choice == "auto" and device.type in ("cuda", "xpu") and _triton_installed())


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


class StepPlan:
    """What one step of an optimizer does. It serves again as long as it ``holds``, so tables are built only once.

    It keeps no gradient alive, and is valid only for the very tensors of state it was made with.
    """

    def __init__(
        self, groups: list[dict[str, Any]], state: Mapping[Tensor, State], members: list[list[Member]]
    ) -> None:
        self._launches: list[tuple[dict[str, Any], Member, Launch | FactoredLaunch]] = []
        self._rest: list[tuple[dict[str, Any], Member]] = []
        for group, mine in zip(groups, members, strict=True):
            self._add(group, mine)
        self._states = list({id(member.state): member.state for mine in members for member in mine}.values())
        if not self._launches:
            return  # without tables there is nothing to keep
        self._params = list({id(member.p): member.p for mine in members for member in mine}.values())
        self._sharded = any(is_sharded(p) for p in self._params)
        self._all_params = [p for group in groups for p in group["params"]]
        self._all_states = list(state.values())
        moments = [(known, name) for known in self._states for name in known if isinstance(known[name], Tensor)]
        self._holders, self._names = [known for known, _ in moments], [name for _, name in moments]
        self._rules = _rules(groups)
        self._grad_kinds, self._grads = _gradients(self._all_params, self._sharded)
        self._addresses = self._current_addresses()

    def _add(self, group: dict[str, Any], members: list[Member]) -> None:
        unfit = [member for member in members if not use_kernels(local(member.p).device)]
        fused = [member for member in members if use_kernels(local(member.p).device)]
        if fused:
            from foam_hf.kernels import make_launches

            launches, more = make_launches(fused)
            self._launches += [(group, member, launch) for member, launch in launches]
            unfit += more
        self._rest += [(group, member) for member in unfit]

    def holds(self, groups: list[dict[str, Any]], state: Mapping[Tensor, State]) -> bool:
        """Whether the plan still serves: nothing has moved but gradients, which it then follows."""
        if not self._launches:
            return False
        params = [p for group in groups for p in group["params"]]
        if not (
            _same(params, self._all_params)
            and _same(list(state.values()), self._all_states)
            and _rules(groups) == self._rules
            and self._current_addresses() == self._addresses
        ):
            return False
        kinds, addresses = _gradients(params, self._sharded)
        if kinds != self._grad_kinds:
            return False
        if not numpy.array_equal(addresses, self._grads):
            if ((addresses ^ self._grads) % 16).any():  # the kernels were compiled for another alignment
                return False
            self._grads = addresses
            for _, _, launch in self._launches:
                launch.move_gradients(addresses[launch.streams])
        return True

    def run(self, hyper: Callable[[dict[str, Any], Member], Hyper], grad_scale: Tensor | None, told: Told) -> None:
        """Update everything; gradients are those of a loss times ``grad_scale``, a tensor of one element.

        ``told`` says where a group tells in which step it last left out a block, one element a parameter of a device.
        """
        for state in self._states:
            state["step"] += 1
        unfinished: list[tuple[Unfinished, Hyper, Tensor | None]] = []
        for group, member, launch in self._launches:
            h, left_out = hyper(group, member), told(group, launch.geometry.device)
            if launch.run(h, grad_scale, left_out):
                unfinished.append((launch, h, left_out))
        if self._launches:  # autograd cannot see that a kernel wrote the weights
            torch.autograd.graph.increment_version(self._params)
        for group, member in self._rest:
            h, left_out = hyper(group, member), _told_of(member, told(group, member.weight.device))
            left = _update_plainly(member, h, grad_scale, left_out)
            if left is not None:
                unfinished.append((left, h, left_out))
        if unfinished:
            _finish(unfinished)

    def _current_addresses(self) -> list[int]:
        # What a kernel was told the address of must still be there when it runs again.
        moments = map(operator.getitem, self._holders, self._names)
        held = [*self._params, *moments]
        return list(map(Tensor.data_ptr, map(local, held) if self._sharded else held))


class ParameterPlan:
    """A step of one parameter alone, as ``StepPlan`` takes it for all; it serves again as long as it ``holds``."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._launch: Launch | FactoredLaunch | None = None
        if use_kernels(member.p.device):
            from foam_hf.kernels import make_launches

            launches, _ = make_launches([member])
            self._launch = launches[0][1] if launches else None
        self._gradient, self._kind = _gradient(cast(Tensor, member.p.grad))
        self._addresses = self._current_addresses()

    def holds(self, state: State, rule: tuple[Any, Any]) -> bool:
        """Whether the plan still serves: nothing has moved but the gradient, which it then follows."""
        member = self._member
        if state is not member.state or rule != (member.level, member.second_moment):
            return False
        if self._launch is None:
            return not use_kernels(member.p.device)
        address, kind = _gradient(cast(Tensor, member.p.grad))
        if kind != self._kind or self._current_addresses() != self._addresses:
            return False
        if address != self._gradient:
            self._gradient = address
            self._launch.move_gradients(numpy.array([address]))
        return True

    def run(self, hyper: Callable[[Member], Hyper], grad_scale: Tensor | None, told: Tensor | None) -> None:
        """Update the parameter; its gradient is that of a loss times ``grad_scale``, a tensor of one element."""
        if self._launch is not None:
            refuse_capture()
        self._member.state["step"] += 1
        if self._launch is None:
            _update_plainly(self._member, hyper(self._member), grad_scale, _told_of(self._member, told))
        else:
            self._launch.run(hyper(self._member), grad_scale, told)
        # autograd sees neither what a kernel writes nor INT8 codes, and a backward pass under way may still need them.
        torch.autograd.graph.increment_version(self._member.p)

    def _current_addresses(self) -> list[int]:
        p, state = self._member.p, self._member.state
        return [p.data_ptr(), *(x.data_ptr() for x in state.values() if isinstance(x, Tensor))]


def _told_of(member: Member, told: Tensor | None) -> Tensor | None:
    return None if told is None else told[member.stream]


def _update_plainly(member: Member, h: Hyper, grad_scale: Tensor | None, told: Tensor | None) -> FactoredMoment | None:
    weight, grad, level, rule = member.weight, member.grad, member.level, member.second_moment
    grad = grad if grad_scale is None else grad.float() / grad_scale.to(grad.device)
    if rule not in _UPDATES:
        return update_parameter(weight, grad, member.moments, level, rule, h, member.place, told)
    held = [weight.codes, weight.scales] if isinstance(weight, Int8Weight) else [weight]
    held += [x for x in member.state.values() if isinstance(x, Tensor)]
    with leaving_out_whole(grad, held, told, h.step) as wanted:
        if wanted:
            _UPDATES[rule](weight, grad, member.state, level, h)
    return None


def _finish(unfinished: list[tuple[Unfinished, Hyper, Tensor | None]]) -> None:
    """What the factored rule has left to do when the ranks of a shard know each other's sums."""
    # By parameter and piece, as which of them share a launch may differ from rank to rank.
    parts = sorted((part for one, _, _ in unfinished for part in one.sums), key=operator.itemgetter(0))
    add_over_ranks([(groups, tensor) for _, groups, tensor in parts])
    for one, h, told in unfinished:
        one.store(h, told)


def refuse_capture() -> None:
    """Raise RuntimeError while a CUDA graph is captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "FOAM's update cannot be captured in a CUDA graph: the learning rate and the step count it was captured "
            "with would never change; expected a capture of forward and backward only, and step() after its replay"
        )


def _gradient(grad: Tensor) -> tuple[int, tuple[Any, ...]]:
    """The address of a dense gradient, and all else of it that a launch depends on."""
    address = grad.data_ptr()
    return address, (grad.dtype, grad.is_contiguous(), address % 16)


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _rules(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(group["level"], group["second_moment"], group["mini_rows"], group["plain_state"]) for group in groups]


def _gradients(params: list[Tensor], sharded: bool) -> tuple[list[Any], numpy.ndarray]:
    """Every parameter's gradient: what a launch is compiled for, and its address, 0 for none or a sparse one.

    It runs in every step, over hundreds of small tensors, hence the passes without a line of Python for each.
    """
    grads = [p.grad for p in params]
    missing = [grad is None for grad in grads]
    present = [grad for grad in grads if grad is not None]
    dtypes: list[Any] = [grad.dtype for grad in present]
    if sharded:
        dtypes += [getattr(grad, "placements", None) for grad in present]
        present = list(map(local, present))
    try:
        contiguous = list(map(Tensor.is_contiguous, present))
        found = list(map(Tensor.data_ptr, present))
    except RuntimeError:  # a sparse gradient has neither
        return [missing, dtypes, [grad.layout for grad in present]], numpy.zeros(len(params), dtype=numpy.int64)
    if len(found) == len(params):
        return [missing, dtypes, contiguous], numpy.array(found, dtype=numpy.int64)
    addresses = numpy.zeros(len(params), dtype=numpy.int64)
    addresses[~numpy.array(missing)] = found
    return [missing, dtypes, contiguous], addresses
