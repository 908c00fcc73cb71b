"""How the user hears of gradients that are NaN or infinite: an error or a warning, as ``nonfinite`` says.

``tensors.finite`` decides what a step leaves out. For each parameter the device holds the number of the last step that
left out a block of it. These numbers are copied to the host while it prepares the next step. Only a checkpoint waits
for the copy.
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
        return type(self), (*self.args, [])  # tensors do not travel between processes

    def name(self, model: nn.Module) -> None:
        """Append the names of the parameters in ``model`` to the message."""
        names = {id(p): name for name, p in model.named_parameters()}
        found = [names[id(p)] for p in self.parameters if id(p) in names]
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            self.args = (f"{self.args[0]} (in the model: {', '.join(found[:4])}{more})",)


class DeviceRecord:
    """For each parameter, the last step on one device that left out a block of it, or 0."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.steps = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = self.steps if device.type == "cpu" else torch.zeros_like(self.steps, device="cpu").pin_memory()
        self._now = self._host.numpy()
        self._seen = self._now.copy()
        self._seen_bytes = self._seen.tobytes()

    def resized(self, size: int) -> DeviceRecord:
        """A copy of the record for ``size`` parameters."""
        more = DeviceRecord(self.steps.device, size)
        more.steps[: len(self.steps)] = self.steps
        more._seen[: len(self._seen)] = self._seen
        more._seen_bytes = more._seen.tobytes()
        return more

    def last(self, i: int) -> int:
        """The last step that left out a block of parameter ``i``, as far as the host knows."""
        return max(int(self._now[i]), int(self._seen[i])) if i < len(self.steps) else 0

    def forget(self, i: int) -> None:
        """Reset parameter ``i`` to 0. The caller must have called ``take_new`` before, or its report is lost."""
        if i < len(self.steps):
            self.steps[i] = 0
            self._now[i] = self._seen[i] = 0
            self._seen_bytes = self._seen.tobytes()

    def send(self) -> None:
        """Start a copy to the host. No event tells its end: each number there is of this copy or of one before."""
        if self._host is not self.steps:
            self._host.copy_(self.steps, non_blocking=True)

    def take_new(self, wait: bool) -> dict[int, int]:
        """Parameter -> step that left out a block of it, for all that the host has learned since the last call.

        With ``wait`` the host waits for the device, so that nothing is missing.
        """
        if wait and self._host is not self.steps:
            self._host.copy_(self.steps)
        if self._now.tobytes() == self._seen_bytes:  # nearly always, and the fastest comparison of few numbers
            return {}
        now = numpy.maximum(self._now, self._seen)  # copies in several streams may end in another order
        found = {i: int(now[i]) for i in numpy.flatnonzero(now != self._seen).tolist()}
        self._seen, self._seen_bytes = now, now.tobytes()
        return found


class LeftOutReport:
    """Collects what an optimizer's steps have left out, on all devices, and reports it to the user."""

    def __init__(self) -> None:
        self._devices: dict[torch.device, DeviceRecord] = {}
        self._skips = 0  # how often something new was left out under nonfinite="skip"

    def left_out_at(self, group: dict[str, Any], device: torch.device, size: int) -> Tensor | None:
        """The tensor on ``device`` where steps write their numbers: int32 (size,), an element for each parameter.

        None if ``group`` has ``nonfinite="ignore"``.
        """
        if group["nonfinite"] == "ignore":
            return None
        found = self._devices.get(device)
        if found is None or len(found.steps) < size:
            found = DeviceRecord(device, size) if found is None else found.resized(size)
            self._devices[device] = found
        return found.steps

    def forget(self, i: int, groups: list[dict[str, Any]]) -> None:
        """Reset parameter ``i``, which has lost its state: it counts its steps from 1 again.

        Raises:
            NonfiniteGradientError: a block was left out before, and this was not reported yet.
        """
        if any(i < len(record.steps) for record in self._devices.values()):
            self.report(groups, wait=True)
        for record in self._devices.values():
            record.forget(i)

    def forget_beyond(self, i: int, step: int, groups: list[dict[str, Any]]) -> None:
        """As ``forget``, if more steps are recorded than parameter ``i`` has counted: somebody has set it back.

        Otherwise its next steps would look like those that were reported.
        """
        if any(record.last(i) > step for record in self._devices.values()):
            self.forget(i, groups)

    def send(self) -> None:
        """Start copies to the host."""
        for record in self._devices.values():
            record.send()

    def report(self, groups: list[dict[str, Any]], wait: bool = False) -> None:
        """Raise or warn if blocks were left out since the last call, as each parameter's group says.

        With ``wait`` the host waits for the device, so that no step is missing.

        Raises:
            NonfiniteGradientError: a block was left out of a parameter whose group has ``nonfinite="error"``.
        """
        news: dict[int, int] = {}
        for record in self._devices.values():
            news |= record.take_new(wait)
        if not news:
            return
        parameters = [(p, group["nonfinite"]) for group in groups for p in group["params"]]
        fatal, skipped = (
            {i: parameters[i][0] for i in sorted(news) if parameters[i][1] == mode} for mode in ("error", "skip")
        )
        if fatal:
            raise NonfiniteGradientError(
                f"{_description(fatal, news, len(parameters))}. Blocks with such gradients keep their weights and "
                "moments; everything else was updated. Expected finite gradients: a lower learning rate, other data "
                "or clipping may help; nonfinite='skip' leaves such blocks out and goes on, 'ignore' does as AdamW",
                list(fatal.values()),
            )
        if not skipped:
            return
        self._skips += 1
        if self._skips & (self._skips - 1) == 0:  # a power of two: rarer and rarer
            logger.warning(
                f"{_description(skipped, news, len(parameters))}. Blocks with such gradients keep their weights and "
                f"moments (nonfinite='skip'). Steps of this run with such gradients: {self._skips}; the next warning "
                f"is at {2 * self._skips}"
            )


def _description(hit: dict[int, Tensor], steps: dict[int, int], parameters: int) -> str:
    first, p = next(iter(hit.items()))
    return (
        f"step {max(steps[i] for i in hit)}: gradients of {len(hit)} of {parameters} parameters are NaN or infinite, "
        f"the first of them parameter {first} of shape {tuple(p.shape)}"
    )
