"""What a memory plan says: bytes by kind for one optimizer on one model. Numbers only; `planner` makes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number that is modelled, not counted.

    Attributes:
        bytes: the estimate.
        note: how good it is, in one line for the user: what it was calibrated on, and the error seen there.
    """

    bytes: int
    note: str


@dataclass(frozen=True)
class Plan:
    """The bytes that training one model with one optimizer takes on one device, at the peak of a step.

    Weights, gradients and state are counted to the byte; activations are an estimate.

    Attributes:
        optim: the optimizer, by the name that Trainer's `optim` takes.
        options: what was chosen of the optimizer's options, as in `optim_args`; "" for its defaults.
        batch, sequence: sequences on the device at a time, and tokens in each.
        gradient_release: the update runs inside the backward pass.
        int8_weights: the weights that fold are INT8.
        parameters: of the model, tied ones once.
        trainable: how many of them are trained.
        weights: parameters and buffers.
        gradients: of all trainable parameters; of the largest alone where the update runs inside backward.
        state: of the optimizer, after its first step.
        activations: what the peak holds on top of the three above: activations, logits, temporary memory. Gradients
            that do not exist yet at the peak are taken off it, so that the four always add up to the peak.
        activations_note: how good that estimate is.
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

    @property
    def label(self) -> str:
        """The optimizer with all that was chosen, as a row of a table starts."""
        chosen = [self.options] if self.options else []
        chosen += ["gradient release"] if self.gradient_release else []
        chosen += ["INT8 weights"] if self.int8_weights else []
        return f"{self.optim} ({', '.join(chosen)})" if chosen else self.optim

    @property
    def total(self) -> int:
        """The peak: the sum of the four kinds."""
        return self.weights + self.gradients + self.state + self.activations
