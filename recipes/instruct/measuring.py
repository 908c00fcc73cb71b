"""What a run costs, what it ran on, and how its results are written."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers import TrainerCallback

import foam_hf
from foam_hf.memory import breakdown

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate", "gguf")


class Meter(TrainerCallback):
    """Bytes after the first optimizer step, gradients still there; time and tokens of all steps after the first."""

    def __init__(self) -> None:
        self.memory = None
        self.seconds, self.tokens, self.steps = 0.0, 0, 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.began, self.seen = time.perf_counter(), state.num_input_tokens_seen

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if self.memory is None:
            self.memory = breakdown(model, optimizer)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the optimizer's kernels are part of this step
        self.steps += 1
        if self.steps == 2:  # the first step compiles kernels and allocates: it counts only if it is the only one
            self.seconds, self.tokens = 0.0, 0
        self.seconds += time.perf_counter() - self.began
        self.tokens += state.num_input_tokens_seen - self.seen

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    def peak_by_kind(self) -> dict[str, int] | None:
        """Bytes at the peak since the counter was reset, of this process; None without CUDA."""
        if self.memory is None or self.memory.peak is None:
            return None
        kinds = {
            "weights": self.memory.weights,
            "gradients": self.memory.gradients,
            "optimizer_state": self.memory.state,
        }
        peak = torch.cuda.max_memory_allocated()
        return {"total": peak, **kinds, "rest": peak - sum(kinds.values())}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "foam_hf": foam_hf.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
