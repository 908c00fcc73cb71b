"""What INT8 weights in host memory take on the GPU and in the host, and when the bus between them is hidden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from foam_hf.int8.offload import weights_of
from foam_hf.int8.visits import Part, layout, slot_sizes
from foam_hf.tensors.rows import visiting_layer

# Assumed of a card: GB/s each way of PCIe 4.0 with 16 lanes, and what an RTX 4090 reaches of its 165 TFLOPS in bf16.
BUS, ARITHMETIC = 25, 100


class Offloaded(NamedTuple):
    """Bytes of the weights that are offloaded, and how many elements they have."""

    weights: int  # their codes and scales
    host: int  # host memory, in which each tensor is aligned
    slots: int  # on the GPU
    elements: int

    @property
    def hidden_from(self) -> int:
        """Tokens a step from which a forward pass takes as long as its layers take to come.

        It takes two operations for each element and token. A backward pass that recomputes layers takes three times
        as long, and the bus brings as much; updated layers go back on the other way meanwhile.
        """
        return round(self.weights / (BUS * 1e9) * ARITHMETIC * 1e12 / (2 * self.elements))


def offloaded(model: nn.Module, blocks: Mapping[str, int]) -> Offloaded:
    """Count what ``Int8Config(offload="cpu")`` offloads of ``model``, from shapes alone.

    Args:
        model: on any device, with floating point weights or INT8 ones.
        blocks: name -> columns of a block, of the weights that are INT8.

    Raises:
        ValueError: the model has no layers with INT8 weights.
    """
    return _counted([layout(weights) for weights in weights_of(model, blocks)])


def slots_instead(model: nn.Module) -> int:
    """Bytes of the slots of a model that is offloaded, less those of the weights that visit them; 0 for any other."""
    layers = [layer for p in model.parameters() if (layer := visiting_layer(p)) is not None]
    if not layers:
        return 0
    found = _counted([(layer.parts, layer.nbytes) for layer in layers[0].visits.layers])
    return found.slots - found.weights


def _counted(layers: list[tuple[list[tuple[Part, Part]], int]]) -> Offloaded:
    parts = [part for parts, _ in layers for pair in parts for part in pair]
    sizes = [size for _, size in layers]
    return Offloaded(
        weights=sum(shape.numel() * dtype.itemsize for _, shape, dtype in parts),
        host=sum(sizes),
        slots=sum(slot_sizes(sizes)),
        elements=sum(codes.numel() for parts, _ in layers for (_, codes, _), _ in parts),
    )
