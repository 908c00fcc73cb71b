"""How a step updates the parameters of a group: by the fused kernels of ``kernels``, or plainly by ``update``."""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from foam_hf.update import Hyper, Member, update_parameter

if TYPE_CHECKING:
    from foam_hf.kernels import Launch

KERNEL_VARIABLE = "FOAM_HF_KERNEL"


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


class GroupStep:
    """One step of a param group. It can be run again as long as ``holds``: tables of addresses are built only once."""

    def __init__(self, members: list[Member]) -> None:
        self._params = [member.p for member in members]
        self._states = [member.state for member in members]
        self._addresses = self._current_addresses()
        self._launches: list[tuple[Member, Launch]] = []
        self._rest = [member for member in members if not use_kernels(member.p.device)]
        fused = [member for member in members if use_kernels(member.p.device)]
        if fused:
            from foam_hf.kernels import make_launches

            self._launches, unfit = make_launches(fused)
            self._rest += unfit

    def holds(self, params: list[Tensor], state: Mapping[Tensor, MutableMapping[str, Any]]) -> bool:
        """Whether the same parameters have gradients, and no tensor has moved."""
        live = [p for p in params if p.grad is not None]
        return (
            len(live) == len(self._params)
            and all(map(operator.is_, live, self._params))
            and all(state[p] is known for p, known in zip(live, self._states, strict=True))
            and self._addresses == self._current_addresses()
        )

    def run(self, hyper: Callable[[Member], Hyper]) -> None:
        for state in self._states:
            state["step"] += 1
        for member, launch in self._launches:
            launch.run(hyper(member))
        for member in self._rest:
            p, state, level, second_moment, _ = member
            update_parameter(p, cast(Tensor, p.grad), state, level, second_moment, hyper(member))

    def _current_addresses(self) -> list[Any]:
        grads = [cast(Tensor, p.grad) for p in self._params]
        moments = [x for state in self._states for x in state.values() if isinstance(x, Tensor)]
        kinds = [(grad.dtype, grad.is_contiguous()) for grad in grads]
        return [
            *map(Tensor.data_ptr, self._params),
            *map(Tensor.data_ptr, grads),
            *map(Tensor.data_ptr, moments),
            kinds,
        ]
