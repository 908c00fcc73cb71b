"""Gradients that are NaN or infinite: which blocks a step leaves out for them, and how the user hears of it.

The unit is the rule's: a block of a folded weight, an element of what does not fold, or a whole tensor. Which are left
out says ``tensors.finite``. A step writes its number beside each parameter of which it leaves out something; kernels
have the sums of squares in registers. These numbers come to the host while it prepares the next step, so nothing ever
waits for them, but a checkpoint.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy
import torch
from torch import Tensor, nn

logger = logging.getLogger("foam_hf")


class NonfiniteGradientError(FloatingPointError):
    """A gradient was NaN or infinite, and ``nonfinite`` is ``"error"``.

    Attributes:
        parameters: those with such a gradient.
    """

    def __init__(self, message: str, parameters: list[Tensor]) -> None:
        super().__init__(message)
        self.parameters = parameters

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, [])  # what comes back from another process: the message, no tensors

    def name(self, model: nn.Module) -> None:
        """Let the message end with the names that ``model`` has for the parameters."""
        names = {id(p): name for name, p in model.named_parameters()}
        found = [names[id(p)] for p in self.parameters if id(p) in names]
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            self.args = (f"{self.args[0]} (in the model: {', '.join(found[:4])}{more})",)


class DeviceRecord:
    """For each parameter the last step that left out a block of it on one device, or 0."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.steps = torch.zeros(size, dtype=torch.int32, device=device)
        self._seen = numpy.zeros(size, dtype=numpy.int32)
        self._host = self.steps if device.type == "cpu" else torch.empty_like(self.steps, device="cpu").pin_memory()
        self._sent: Any = None  # an event behind the copy that is on its way

    def grown(self, size: int) -> DeviceRecord:
        more = DeviceRecord(self.steps.device, size)
        more.steps[: len(self.steps)] = self.steps
        more._seen[: len(self._seen)] = self._seen
        return more

    def forget(self, i: int) -> None:
        """Nothing was ever left out of parameter ``i``; the caller has taken what is new."""
        if i < len(self.steps):
            self.steps[i] = 0
            self._seen[i] = 0

    def send(self) -> None:
        """Start a copy to the host, unless one is on its way."""
        device = self.steps.device
        if device.type == "cpu" or self._sent is not None:
            return
        backend = getattr(torch, device.type)
        with backend.device(device):
            self._host.copy_(self.steps, non_blocking=True)
            self._sent = backend.Event()
            self._sent.record()

    def new(self, wait: bool) -> dict[int, int]:
        """Parameter -> step of what was left out since the last call, as far as the host knows it."""
        if self._host is not self.steps:
            if wait:
                self._host.copy_(self.steps)
            elif self._sent is None or not self._sent.query():
                return {}
            self._sent = None
        now = self._host.numpy()
        if numpy.array_equal(now, self._seen):
            return {}
        found = {i: int(now[i]) for i in numpy.flatnonzero(now != self._seen).tolist()}
        self._seen = now.copy()
        return found


class LeftOutReport:
    """What an optimizer's steps have left out, by parameter, and how the user hears of it."""

    def __init__(self) -> None:
        self._devices: dict[torch.device, DeviceRecord] = {}
        self._times = 0  # that something was left out and nonfinite is "skip"

    def left_out_at(self, group: dict[str, Any], device: torch.device, size: int) -> Tensor | None:
        """Where steps write their numbers, int32 with one element for each of ``size`` parameters.

        None if ``group`` ignores gradients that are not finite.
        """
        if group["nonfinite"] == "ignore":
            return None
        found = self._devices.get(device)
        if found is None or len(found.steps) < size:
            found = DeviceRecord(device, size) if found is None else found.grown(size)
            self._devices[device] = found
        return found.steps

    def forget(self, i: int, groups: list[dict[str, Any]]) -> None:
        """Parameter ``i`` begins anew: its steps have numbers that were there before.

        Raises:
            NonfiniteGradientError: something was left out before, and was not reported.
        """
        if any(i < len(record.steps) for record in self._devices.values()):
            self.report(groups, wait=True)
        for record in self._devices.values():
            record.forget(i)

    def send(self) -> None:
        for record in self._devices.values():
            record.send()

    def report(self, groups: list[dict[str, Any]], wait: bool = False) -> None:
        """Raise or warn of what is new, as each parameter's group says.

        Raises:
            NonfiniteGradientError: something was left out of a parameter whose group has ``nonfinite="error"``.
        """
        news: dict[int, int] = {}
        for record in self._devices.values():
            news |= record.new(wait)
        if not news:
            return
        places = [(p, group["nonfinite"]) for group in groups for p in group["params"]]
        fatal, skipped = (
            {i: places[i][0] for i in sorted(news) if places[i][1] == mode} for mode in ("error", "skip")
        )
        if fatal:
            raise NonfiniteGradientError(
                f"{_description(fatal, news, len(places))}. Blocks with such gradients keep their weights and "
                "moments; everything else was updated. Expected finite gradients: a lower learning rate, other data "
                "or clipping may help; nonfinite='skip' leaves such blocks out and goes on, 'ignore' does as AdamW",
                list(fatal.values()),
            )
        if not skipped:
            return
        self._times += 1
        if self._times & (self._times - 1) == 0:
            logger.warning(
                f"{_description(skipped, news, len(places))}. Blocks with such gradients keep their weights and "
                f"moments (nonfinite='skip'). Steps of this run with such gradients: {self._times}; the next warning "
                f"is at {2 * self._times}"
            )


def _description(hit: dict[int, Tensor], steps: dict[int, int], parameters: int) -> str:
    first, p = next(iter(hit.items()))
    return (
        f"step {max(steps[i] for i in hit)}: gradients of {len(hit)} of {parameters} parameters are NaN or infinite, "
        f"the first of them parameter {first} of shape {tuple(p.shape)}"
    )
