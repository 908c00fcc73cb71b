"""Launching a kernel in every step of a training: by names, and without what Triton does to find what it compiled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import triton

# Since then a compiled kernel takes every argument of its function, the constants too.
DIRECT_LAUNCH = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


class KernelCall:
    """A kernel with those of its constants that are the same in every step.

    Triton inspects all arguments to find what it has compiled, which takes the host as long as the GPU takes for a
    small model. After the first time that is left out: nothing that it looks at changes from step to step, but the
    constants that are given at a call, and how wide integers are.

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
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, programs: int, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
        """Launch ``programs`` of the kernel; ``arguments`` and ``constants`` are in the order of its parameters.

        Raises:
            TypeError: at the first call, if these names are not those of the parameters.
        """
        values, varying = (*arguments.values(),), (*constants.values(),)
        sizes = [values[i].bit_length() // 32 for i in self._integers]  # seeds are int32, int64 or uint64
        key = (*varying, *sizes)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*values, *self._constants, *varying)
            return
        self._check_names([*arguments, *self._names, *constants])
        if not self._integers:
            self._integers = [i for i, x in enumerate(values) if type(x) is int]
            key += tuple(values[i].bit_length() // 32 for i in self._integers)
        compiled = self._kernel[programs, 1, 1](*values, *self._constants, *varying, **self._options)
        if DIRECT_LAUNCH and compiled is not None:  # None from Triton's interpreter
            self._compiled[key] = compiled

    def _check_names(self, given: list[str]) -> None:
        expected = list(inspect.signature(self._kernel.fn).parameters)
        if given != expected:
            raise TypeError(
                f"the names are not the parameters of {self._kernel.fn.__name__}: got {given}; expected {expected}"
            )
