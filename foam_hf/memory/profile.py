"""Measures GPU memory through one training step by sampling the allocator, and draws it by kind."""

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

# () -> (bytes allocated now, most bytes allocated so far), on the devices of a model.
Counter = Callable[[], tuple[int, int]]


@dataclass(frozen=True)
class Sample:
    """The bytes that are allocated at one moment of a step; `activations` are all bytes of no other kind."""

    phase: str
    weights: int
    state: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.gradients + self.activations


def cuda_counter(devices: set[torch.device]) -> Counter:
    """A function that reads torch's counters of `devices`, without resetting them."""

    def read() -> tuple[int, int]:
        now = sum(torch.cuda.memory_allocated(device) for device in devices)
        return now, sum(torch.cuda.max_memory_allocated(device) for device in devices)

    return read


class StepRecorder:
    """Samples memory through one step: around every innermost module, forward and backward, and at every gradient.

    Tensors that live only between two samples are seen only if they raise the allocator's peak. The second step raises
    it, because it is the first one with optimizer state; so record the second step.

    Args:
        model: sampled by hooks, which `stop` removes.
        optimizer: has taken a step, so that it has state.
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
        """Register the hooks, at the beginning of a step."""
        self._state = total(state_storages(self._optimizer), self._devices)
        self._peak = self._counter()[1]
        self._handles = [
            self._model.register_forward_pre_hook(lambda *_: self._begin_phase(FORWARD)),
            self._model.register_forward_hook(lambda *_: self._begin_phase(BACKWARD)),
        ]
        for module in self._model.modules():
            if next(module.children(), None) is None:
                self._handles.append(module.register_forward_pre_hook(lambda *_: self._sample()))
                self._handles.append(module.register_forward_hook(self._after_module))
        self._handles += [p.register_post_accumulate_grad_hook(lambda _: self._sample()) for p in self._parameters]
        self._sample()

    def before_optimizer(self) -> None:
        """Call this after the backward pass, before the optimizer's step."""
        self._begin_phase(OPTIMIZER)

    def after_optimizer(self) -> None:
        """Call this after the optimizer's step, before gradients are freed."""
        self._sample()

    def stop(self) -> list[Sample]:
        """Remove the hooks and return the samples in order. It may be called twice, or without `start`."""
        if self._handles:
            self._sample()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self._samples

    def _begin_phase(self, phase: str) -> None:
        self._sample()
        self._phase = phase
        self._sample()

    def _after_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._sample()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: self._sample())  # called when backward reaches this module

    def _sample(self) -> None:
        allocated, peak = self._counter()
        gradients = sum(_gradient_bytes(p.grad, self._devices) for p in self._parameters if p.grad is not None)
        known = self._weights, self._state, gradients
        if peak > max(self._peak, allocated):  # memory was higher between the last sample and this one
            self._samples.append(Sample(self._phase, *known, peak - sum(known)))
        self._peak = max(peak, self._peak)
        self._samples.append(Sample(self._phase, *known, max(0, allocated - sum(known))))


def _gradient_bytes(gradient: Tensor, devices: set[torch.device]) -> int:
    """The bytes of a gradient on `devices`, without `storages`: a sample asks for hundreds of gradients."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # DTensor
    return local.numel() * local.element_size() if local.device in devices else 0


def draw(samples: Sequence[Sample], path: Path, *, title: str) -> None:
    """Draw memory through a step as stacked areas into `path`, by a rename, so that no half-written file is left.

    Args:
        samples: in order, at least one.
        path: its suffix is one of `PICTURES`.
        title: above the picture.

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
    """Draw a line at the beginning of each phase, and its name above the areas."""
    starts = [i for i, sample in enumerate(samples) if i == 0 or sample.phase != samples[i - 1].phase]
    above = axes.get_xaxis_transform()
    for start, end in zip(starts, [*starts[1:], len(samples)], strict=True):
        phase = samples[start].phase
        if start:
            axes.axvline(start, color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
        if end - start > 0.12 * len(samples):
            axes.text((start + end - 1) / 2, 0.99, phase, transform=above, va="top", ha="center")
        elif phase == OPTIMIZER:  # too narrow for its name, which goes to the left, below the other names
            axes.text(start, 0.92, f"{phase} \N{RIGHTWARDS ARROW} ", transform=above, va="top", ha="right")
    passes = sum(samples[start].phase == FORWARD for start in starts)
    several = f", {passes} forward and backward passes" if passes > 1 else ""
    axes.set_xlabel(f"one training step, module by module{several}")


def _thinned(samples: Sequence[Sample], most: int = 4000) -> Sequence[Sample]:
    """At most `most` samples, each the highest of several in a row: a picture cannot show more."""
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
