"""`Int8Config`: which weights of a model become INT8, and where they are kept."""

from __future__ import annotations

import difflib
from typing import Any

from packaging.version import Version
from transformers.utils.quantization_config import QuantizationConfigMixin

from foam_hf.int8.files import METHOD, SMALLEST_BLOCK

OLDEST = "5.6"  # older versions read all weights before they quantize the first


class Int8Config(QuantizationConfigMixin):
    """The quantization config for trainable INT8 weights: one byte an element, and a float32 scale for each block.

    Every `nn.Linear` weight that `foam_hf.foam_param_groups` folds becomes an `Int8Weight`; embeddings, norms, biases,
    tied or shared weights, fused experts and `Conv1D` stay in the model's dtype.

    Args:
        block_size: columns of a block, a power of two from 16 to 1024. If it does not divide a width, the block has
            the largest smaller power of two that does. A weight whose width 16 does not divide stays, with a warning.
        head: the LM head becomes INT8 too, if it is not tied to the embedding.
        modules_to_not_convert: modules to leave alone: names, parts of names, or regexes that match whole names.
        dequantize: load a checkpoint of INT8 weights as a plain floating point model.
        offload: "cpu" keeps INT8 weights in host memory, and brings them to the device one layer at a time, see
            :mod:`foam_hf.int8.offload`. They are trained with ``gradient_release=true``, in one process. It is for
            loading: no checkpoint has it.

    Raises:
        TypeError, ValueError: an argument is unknown, out of range, or of the wrong type.
        ImportError: transformers is older than 5.6.
    """

    quant_method: Any  # a plain string; the base class declares an enum
    offload: str | None = None  # pickles of earlier versions lack it

    def __init__(
        self,
        block_size: int = 128,
        head: bool = False,
        modules_to_not_convert: list[str] | None = None,
        dequantize: bool = False,
        offload: str | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        check_version()
        for name, value in unknown.items():
            legal = ("block_size", "head", "modules_to_not_convert", "dequantize", "offload")
            near = difflib.get_close_matches(name, legal, n=1, cutoff=0.0)[0]
            raise TypeError(
                f"Int8Config has no {name}, got {name}={value!r}; did you mean {near!r}? expected {', '.join(legal)}"
            )
        if quant_method != METHOD:
            raise ValueError(f"quant_method is of another config, got {quant_method!r}; expected {METHOD!r}")
        if isinstance(block_size, bool) or not isinstance(block_size, int):
            raise TypeError(f"block_size is not an integer, got {block_size!r}; expected a power of two, 16 to 1024")
        if not SMALLEST_BLOCK <= block_size <= 1024 or block_size & (block_size - 1):
            raise ValueError(f"block_size is not valid, got {block_size}; expected a power of two from 16 to 1024")
        for name, flag in (("head", head), ("dequantize", dequantize)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} is not a bool, got {flag!r}; expected True or False")
        names: Any = modules_to_not_convert
        if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
            raise TypeError(f"modules_to_not_convert is no list of strings, got {names!r}; expected module names")
        if offload not in (None, "cpu"):
            raise ValueError(f"offload is not valid, got {offload!r}; expected 'cpu' or None")
        if offload and dequantize:
            raise ValueError(
                f"dequantize=True leaves no INT8 weight to offload, got offload={offload!r}; expected one"
            )
        self.quant_method = quant_method
        self.block_size = block_size
        self.head = head
        self.modules_to_not_convert = None if names is None else list(names)
        self.dequantize = dequantize
        self.offload = offload

    def choice(self) -> dict[str, Any]:
        """The arguments that decide which weights become INT8, and their blocks."""
        return {name: getattr(self, name) for name in ("block_size", "head", "modules_to_not_convert")}

    def to_dict(self) -> dict[str, Any]:
        """The dict for config.json: how the checkpoint was made, and not what is for loading alone."""
        return {"quant_method": self.quant_method, **self.choice()}


def check_version() -> None:
    """Raise ImportError if transformers is too old for INT8 weights."""
    import transformers  # imported late: transformers replaces its own module after it has imported this file

    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise ImportError(
            f"INT8 weights (foam_hf.Int8Config) need transformers {OLDEST} or newer, got {transformers.__version__}; "
            f"expected: pip install 'transformers>={OLDEST}'"
        )
