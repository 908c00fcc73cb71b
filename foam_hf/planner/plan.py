"""The records of the planner: the bytes that one model takes with one optimizer, by kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number of bytes that is estimated, not counted.

    Attributes:
        bytes: the estimate.
        note: one line for the user on how good it is: what it was compared with, and the largest error.
    """

    bytes: int
    note: str


@dataclass(frozen=True)
class Plan:
    """The bytes that training one model with one optimizer takes on one device, at the peak of a step.

    Weights, gradients and state are counted to the byte; activations are an estimate. Under FSDP2 and DeepSpeed's ZeRO
    the device is the one of several GPUs that holds most.

    Attributes:
        optim: the optimizer's name in Trainer's `optim`.
        options: the chosen options, as in `optim_args`; "" for the defaults.
        batch, sequence: sequences on the device at a time, and tokens in each.
        gradient_release: whether the update runs inside the backward pass.
        int8_weights: whether the weights that fold are INT8.
        offload_weights: whether INT8 weights are in host memory, and visit the device layer by layer.
        parameters: how many parameters the model has; tied ones count once.
        trainable: how many of them are trained.
        weights: bytes of parameters and buffers.
        gradients: bytes of all gradients; with gradient release, of the largest one.
        state: bytes of optimizer state after the first step.
        activations: the rest of the peak: activations, logits, temporary memory. If some gradients do not exist yet
            at the peak, their bytes are subtracted here, so that all kinds add up to the peak.
        activations_note: how good the estimate of `activations` is.
        zero: DeepSpeed's ZeRO as it is planned, or "".
        fsdp2: whether FSDP2 divides the model.
        gpus: how many share the model.
        masters: bytes of the float32 copies of weights that ZeRO updates.
        buffers: bytes of DeepSpeed or FSDP2: gradients on their way, and gathered weights.
        step: bytes beside weights, masters and state while ZeRO's optimizer steps; what it has beyond gradients and
            buffers counts as activations if it is more than those.
        host: bytes in host memory, of each process, if the optimizer or INT8 weights are offloaded.
        hidden_from: tokens a step from which the bus is hidden by which these weights come, see `planner.offload`.
    """

    optim: str
    options: str
    batch: int
    sequence: int
    gradient_release: bool
    int8_weights: bool
    parameters: int
    trainable: int
    weights: int
    gradients: int
    state: int
    activations: int
    activations_note: str
    zero: str = ""
    fsdp2: bool = False
    gpus: int = 1
    masters: int = 0
    buffers: int = 0
    step: int = 0
    host: int = 0
    offload_weights: bool = False
    hidden_from: int = 0

    @property
    def label(self) -> str:
        """The optimizer and the chosen options, as the first cell of a table's row."""
        chosen = [self.options] if self.options else []
        chosen += ["gradient release"] if self.gradient_release else []
        where = " in host memory" if self.offload_weights else ""
        chosen += [f"INT8 weights{where}"] if self.int8_weights else []
        return f"{self.optim} ({', '.join(chosen)})" if chosen else self.optim

    @property
    def total(self) -> int:
        """Bytes at the peak of a step on the device: the sum of all kinds."""
        return self.weights + self.masters + self.gradients + self.state + self.buffers + self.activations
