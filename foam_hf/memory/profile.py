"""Memory through one training step by kind, measured: a recorder that samples the allocator, and the picture of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.display import INK, KIND_COLORS, format_bytes
from foam_hf.memory.storages import state_storages, storages, total

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer step"

_BOTTOM_TO_TOP = ("weights", "state", "gradients", "activations")

# () -> (bytes allocated now, most bytes ever allocated), on the devices of a model.
Counter = Callable[[], tuple[int, int]]


@dataclass(frozen=True)
class Sample:
    """What is allocated at one moment of a step, in bytes; `activations` is all that is not of the other kinds."""

    phase: str
    weights: int
    state: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.gradients + self.activations


def cuda_counter(devices: set[torch.device]) -> Counter:
    """Reads torch's counters of `devices`; it resets none."""

    def read() -> tuple[int, int]:
        now = sum(torch.cuda.memory_allocated(device) for device in devices)
        return now, sum(torch.cuda.max_memory_allocated(device) for device in devices)

    return read


class StepRecorder:
    """Samples memory through one step: around every innermost module, forward and backward, and at every gradient.

    What comes and goes between two samples is seen where it raises the peak that the allocator keeps: so the second
    step shows its own, as it is the first one with the optimizer's state.

    Args:
        model: sampled through hooks, which are gone after `stop`.
        optimizer: holds the state, and has taken a step.
        devices: of the model.
        counter: reads the allocator; default: `cuda_counter(devices)`.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, devices: set[torch.device], counter: Counter | None = None
    ) -> None:
        self._model, self._optimizer, self._devices = model, optimizer, devices
        self._counter = counter or cuda_counter(devices)
        self._weights = total(storages([*model.parameters(), *model.buffers()]), devices)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._phase = FORWARD
        self._samples: list[Sample] = []
        self._state = self._peak = 0
        self._handles: list[Any] = []

    def start(self) -> None:
        """At the beginning of a step."""
        self._state = total(state_storages(self._optimizer), self._devices)
        self._peak = self._counter()[1]
        self._handles = [
            self._model.register_forward_pre_hook(lambda *_: self._enter(FORWARD)),
            self._model.register_forward_hook(lambda *_: self._enter(BACKWARD)),
        ]
        for module in self._model.modules():
            if next(module.children(), None) is None:
                self._handles.append(module.register_forward_pre_hook(lambda *_: self._sample()))
                self._handles.append(module.register_forward_hook(self._after_module))
        self._handles += [p.register_post_accumulate_grad_hook(lambda _: self._sample()) for p in self._parameters]
        self._sample()

    def before_optimizer(self) -> None:
        """All gradients are there."""
        self._enter(OPTIMIZER)

    def after_optimizer(self) -> None:
        """The weights are new, and the gradients are not freed yet."""
        self._sample()

    def stop(self) -> list[Sample]:
        """Take the hooks off; the samples in their order. Harmless if called twice, or without `start`."""
        if self._handles:
            self._sample()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self._samples

    def _enter(self, phase: str) -> None:
        self._sample()
        self._phase = phase
        self._sample()

    def _after_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._sample()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: self._sample())  # its gradient is there: backward comes to this module

    def _sample(self) -> None:
        allocated, peak = self._counter()
        gradients = sum(_size(p.grad, self._devices) for p in self._parameters if p.grad is not None)
        known = self._weights, self._state, gradients
        if peak > max(self._peak, allocated):  # between this sample and the one before
            self._samples.append(Sample(self._phase, *known, peak - sum(known)))
        self._peak = max(peak, self._peak)
        self._samples.append(Sample(self._phase, *known, max(0, allocated - sum(known))))


def _size(gradient: Tensor, devices: set[torch.device]) -> int:
    """Called hundreds of times a sample, so by arithmetic alone."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # DTensor
    return local.numel() * local.element_size() if local.device in devices else 0


def draw(samples: Sequence[Sample], path: Path, *, title: str) -> None:
    """Draw memory through a step as stacked areas into `path`; its suffix is one of `PICTURES`. Written whole or not.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    samples = _thinned(samples)
    highest = max(samples, key=lambda sample: sample.total)
    unit, name = (1e9, "GB") if highest.total >= 1e9 else (1e6, "MB")
    with plt.rc_context({"font.size": 8, "text.color": INK, "axes.labelcolor": INK}):
        # White, not transparent: the same on light and dark pages.
        figure, axes = plt.subplots(figsize=(6, 3.4), facecolor="white", layout="constrained")
        layers = [[getattr(sample, kind) / unit for sample in samples] for kind in _BOTTOM_TO_TOP]
        colors = [KIND_COLORS[kind] for kind in _BOTTOM_TO_TOP]
        axes.stackplot(range(len(samples)), layers, labels=_BOTTOM_TO_TOP, colors=colors, linewidth=0)
        _mark_phases(axes, samples)
        at = samples.index(highest)
        axes.plot(at, highest.total / unit, "o", color=INK, markersize=3)
        right = at < len(samples) / 2
        axes.annotate(
            f"peak {format_bytes(highest.total)}",
            (at, highest.total / unit),
            xytext=(5 if right else -5, 3),
            textcoords="offset points",
            ha="left" if right else "right",
        )
        axes.set_xlim(0, len(samples) - 1)
        axes.set_ylim(0, 1.28 * highest.total / unit)
        axes.set_xticks([])
        axes.set_ylabel(f"{name} allocated")
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, x=0.02, ha="left", fontsize=9)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, frameon=False, handlelength=1)
        try:
            _save(figure, path)
        finally:
            plt.close(figure)


def _mark_phases(axes: Any, samples: Sequence[Sample]) -> None:
    """A line where a phase begins, and its name above."""
    starts = [i for i, sample in enumerate(samples) if i == 0 or sample.phase != samples[i - 1].phase]
    above = axes.get_xaxis_transform()
    for start, end in zip(starts, [*starts[1:], len(samples)], strict=True):
        phase = samples[start].phase
        if start:
            axes.axvline(start, color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
        if end - start > 0.12 * len(samples):
            axes.text((start + end - 1) / 2, 0.99, phase, transform=above, va="top", ha="center")
        elif phase == OPTIMIZER:  # no room: beside it, below the other names
            axes.text(start, 0.92, f"{phase} \N{RIGHTWARDS ARROW} ", transform=above, va="top", ha="right")
    passes = sum(samples[start].phase == FORWARD for start in starts)
    several = f", {passes} forward and backward passes" if passes > 1 else ""
    axes.set_xlabel(f"one training step, module by module{several}")


def _thinned(samples: Sequence[Sample], most: int = 4000) -> Sequence[Sample]:
    """The highest of each few samples: more than that no picture shows."""
    few = -(-len(samples) // most)
    return [max(samples[i : i + few], key=lambda sample: sample.total) for i in range(0, len(samples), few)]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        figure.savefig(unfinished, dpi=200)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
