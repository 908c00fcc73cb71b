"""Launching a kernel in every step of a training: by names, and without what Triton does to find what it compiled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# Since then a compiled kernel takes every argument of its function, the constants too.
DIRECT_LAUNCH = _VERSION >= (3, 3)
# Versions whose compiled kernels are known to be launched by ``run`` with what ``_run`` gives it.
KNOWN_RUN = (3, 4) <= _VERSION <= (3, 7)


class KernelCall:
    """A kernel with those of its constants that are the same in every step.

    Triton inspects all arguments to find what it has compiled, which takes the host as long as the GPU takes for a
    small model. After the first time that is left out: nothing that it looks at changes from step to step, but the
    constants that are given at a call, and how wide integers are. On a GPU tensors are then given as addresses, or the
    launch would ask the driver about each.

    Args:
        kernel: what ``triton.jit`` made. Its parameters are arguments (tensors, integers, floats), then
            ``constants``, then the constants of a call.
        constants: by name, in the order of the kernel's parameters.
        options: ``num_warps`` and others of Triton's.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any], **options: int) -> None:
        self._kernel, self._options = kernel, options
        self._names, self._constants = tuple(constants), tuple(constants.values())
        self._integers: list[int] = []  # where they are among the arguments
        self._tensors: list[int] = []  # where these are
        self._device: int | None = None  # the index of a GPU on which ``run`` may launch
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, programs: int, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
        """Launch ``programs`` of the kernel; ``arguments`` and ``constants`` are in the order of its parameters.

        Raises:
            TypeError: at the first call, if these names are not those of the parameters.
        """
        values, varying = [*arguments.values()], (*constants.values(),)
        compiled = self._compiled.get(self._key(values, varying))
        if compiled is None:
            self._compile(programs, arguments, constants)
        elif self._device is None or _has_hooks():
            compiled[programs, 1, 1](*values, *self._constants, *varying)
        else:
            self._run(compiled, programs, values, varying)

    def _key(self, values: list[Any], varying: tuple[Any, ...]) -> tuple[Any, ...]:
        for i in self._integers:
            varying += (values[i].bit_length() // 32,)  # seeds are int32, int64 or uint64
        return varying

    def _run(self, compiled: Any, programs: int, values: list[Any], varying: tuple[Any, ...]) -> None:
        """As ``compiled[programs, 1, 1]`` does where nobody listens to launches."""
        for i in self._tensors:
            values[i] = values[i].data_ptr()
        _run(compiled, programs, self._device, (*values, *self._constants, *varying))

    def _compile(self, programs: int, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
        """Launch it as Triton does, and keep what that has compiled."""
        values, varying = [*arguments.values()], (*constants.values(),)
        self._check_names([*arguments, *self._names, *constants])
        self._integers = [i for i, x in enumerate(values) if type(x) is int]
        self._tensors = [i for i, x in enumerate(values) if isinstance(x, Tensor)]
        compiled = self._kernel[programs, 1, 1](*values, *self._constants, *varying, **self._options)
        if DIRECT_LAUNCH and compiled is not None:  # None from Triton's interpreter
            self._compiled[self._key(values, varying)] = compiled
            self._device = index_for_run(values[self._tensors[0]].device)

    def _check_names(self, given: list[str]) -> None:
        expected = parameter_names(self._kernel)
        if given != expected:
            raise TypeError(
                f"the names are not the parameters of {self._kernel.fn.__name__}: got {given}; expected {expected}"
            )


def launch(compiled: Any, programs: int, device: int | None, values: tuple[Any, ...]) -> None:
    """What ``compiled[programs, 1, 1](*values)`` does; ``values`` has addresses in place of tensors.

    Args:
        compiled: what a launch by Triton has returned.
        device: what ``index_for_run`` says of the tensors' device.
    """
    if device is None or _has_hooks():
        compiled[programs, 1, 1](*values)
    else:
        _run(compiled, programs, device, values)


def index_for_run(device: torch.device) -> int | None:
    """The index of a GPU on which ``run`` of a compiled kernel launches it; None of others, or if that is unknown."""
    return device.index if KNOWN_RUN and device.type == "cuda" else None


def _run(compiled: Any, programs: int, device: int | None, values: tuple[Any, ...]) -> None:
    stream = triton.runtime.driver.active.get_current_stream(device)
    # The three that are None would be told of the launch.
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values
    )  # fmt: skip


def parameter_names(kernel: Any) -> list[str]:
    """The names of a kernel's parameters, in order."""
    return list(inspect.signature(kernel.fn).parameters)


def _has_hooks() -> bool:
    """Whether somebody, as a profiler, listens to the launches of kernels."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains of hooks, or before 3.5 one or None
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
