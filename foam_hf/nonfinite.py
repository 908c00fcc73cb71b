"""Gradients that are NaN or infinite: which blocks a step leaves out for them, and how the user hears of it.

The unit is what shares a moment: a block of a folded weight, an element of any other. It is left out if the sum of its
gradient's squares is not finite in float32: NaN, infinity, or an element beyond 1.8e19. Kernels have that sum in
registers, and count what they leave out in device memory. The counts come to the host while the next step is prepared,
so nothing ever waits for them, but a checkpoint.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from foam_hf.folding import blocked

logger = logging.getLogger("foam_hf")

MODES = ("error", "skip", "ignore")


class NonfiniteGradientError(FloatingPointError):
    """A gradient was NaN or infinite, and ``nonfinite`` is ``"error"``.

    Attributes:
        parameters: those with such a gradient.
    """

    def __init__(self, message: str, parameters: list[Tensor]) -> None:
        super().__init__(message)
        self.parameters = parameters

    def name(self, model: nn.Module) -> None:
        """Let the message end with the names that ``model`` has for the parameters."""
        names = {id(p): name for name, p in model.named_parameters()}
        found = [names[id(p)] for p in self.parameters if id(p) in names]
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            self.args = (f"{self.args[0]} (in the model: {', '.join(found[:4])}{more})",)


def left_out_blocks(G: Tensor, width: int) -> Tensor | None:
    """Which blocks of ``width`` columns a step must leave out: bool (rows, blocks), or None where it is none.

    ``G`` is float32 (rows, n). On a CPU one product without temporaries answers for nearly every gradient; elsewhere
    an answer would wait for the device, and the mask is always made.
    """
    if G.device.type == "cpu":
        flat = G.reshape(-1)
        if math.isfinite(torch.dot(flat, flat).item()):
            return None
    sums = torch.cat([part.square().sum(-1) for part in blocked(G, width)], 1)
    mask = (sums < math.inf).logical_not_()  # NaN too
    return None if G.device.type == "cpu" and not bool(mask.any()) else mask


class Kept:
    """The blocks of a chunk that keep what they hold: ``restore`` undoes what an update did to them."""

    def __init__(self, mask: Tensor, G: Tensor, weight: Tensor, moments: list[Tensor], width: int) -> None:
        wide = mask.repeat_interleave(width, 1)[:, : G.shape[1]]
        self.gradient = G.masked_fill(wide, 0.0)  # a new tensor: G may be the gradient itself
        self._old = [(wide, weight), *((mask, moment.clone()) for moment in moments)]

    def restore(self, W: Tensor, moments: list[Tensor]) -> None:
        for (mask, old), x in zip(self._old, (W, *moments), strict=True):
            x.copy_(torch.where(mask, old, x))


class _Counts:
    """How often each parameter's blocks were left out on one device, since the beginning and modulo 2**32."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.counts = torch.zeros(size, dtype=torch.int32, device=device)
        self._seen = numpy.zeros(size, dtype=numpy.int32)
        self._host = self.counts if device.type == "cpu" else torch.empty_like(self.counts, device="cpu").pin_memory()
        self._sent: Any = None  # an event after the copy that is on its way

    def grown(self, size: int) -> _Counts:
        more = _Counts(self.counts.device, size)
        more.counts[: len(self.counts)] = self.counts
        more._seen[: len(self._seen)] = self._seen
        return more

    def send(self) -> None:
        """Start a copy to the host, unless one is on its way."""
        device = self.counts.device
        if device.type == "cpu" or self._sent is not None:
            return
        backend = getattr(torch, device.type)
        with backend.device(device):
            self._host.copy_(self.counts, non_blocking=True)
            self._sent = backend.Event()
            self._sent.record()

    def new(self, wait: bool) -> numpy.ndarray | None:
        """What was counted since the last call, as far as the host knows it, or None."""
        if wait and self._host is not self.counts:
            self._host.copy_(self.counts)
            self._sent = None
        elif self._host is not self.counts:
            if self._sent is None or not self._sent.query():
                return None
            self._sent = None
        now = self._host.numpy()
        if numpy.array_equal(now, self._seen):
            return None
        found = (now - self._seen).view(numpy.uint32)
        self._seen = now.copy()
        return found


class Watch:
    """What an optimizer's steps have left out, by parameter."""

    def __init__(self) -> None:
        self._devices: dict[torch.device, _Counts] = {}
        self._steps = 0  # with something left out and nonfinite="skip"

    def counts(self, group: dict[str, Any], device: torch.device, size: int) -> Tensor | None:
        """Where steps count, int32 with one element for each of ``size`` parameters; None if ``group`` ignores."""
        if group["nonfinite"] == "ignore":
            return None
        found = self._devices.get(device)
        if found is None or len(found.counts) < size:
            found = _Counts(device, size) if found is None else found.grown(size)
            self._devices[device] = found
        return found.counts

    def send(self) -> None:
        for counts in self._devices.values():
            counts.send()

    def tell(self, groups: list[dict[str, Any]], state: Any, wait: bool = False) -> None:
        """Raise or warn of what is new, as each parameter's group says.

        Raises:
            NonfiniteGradientError: a group with ``nonfinite="error"`` has a parameter of which something was left out.
        """
        news = [found for counts in self._devices.values() if (found := counts.new(wait)) is not None]
        if not news:
            return
        totals = numpy.zeros(max(map(len, news)), dtype=numpy.int64)
        for found in news:
            totals[: len(found)] += found
        places = [(p, group) for group in groups for p in group["params"]]
        hit = [(i, *places[i]) for i in numpy.flatnonzero(totals).tolist() if i < len(places)]
        fatal = [(i, p) for i, p, group in hit if group["nonfinite"] == "error"]
        if fatal:
            raise NonfiniteGradientError(
                f"{_description(fatal, totals, state, len(places))}. The blocks keep their weights and moments; "
                "everything else was updated. Expected finite gradients: a lower learning rate, other data, or "
                "max_grad_norm may help; nonfinite='skip' leaves such blocks out and goes on, 'ignore' does as AdamW",
                [p for _, p in fatal],
            )
        skipped = [(i, p) for i, p, group in hit if group["nonfinite"] == "skip"]
        if not skipped:
            return
        self._steps += 1
        if self._steps & (self._steps - 1) == 0:
            logger.warning(
                f"{_description(skipped, totals, state, len(places))}, and keep their weights and moments "
                f"(nonfinite='skip'): the {self._steps}. time in this run; the next warning is at the "
                f"{2 * self._steps}."
            )


def _description(hit: list[tuple[int, Tensor]], totals: numpy.ndarray, state: Any, parameters: int) -> str:
    first, p = hit[0]
    step = state[p].get("step", 0) if p in state else 0
    blocks = int(sum(totals[i] for i, _ in hit))
    return (
        f"step {step}: the gradients of {blocks} blocks in {len(hit)} of {parameters} parameters are NaN or infinite, "
        f"the first in parameter {first} of shape {tuple(p.shape)}"
    )
