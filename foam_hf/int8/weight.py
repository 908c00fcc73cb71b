"""``Int8Weight``: a tensor of one byte an element that trains as an ordinary parameter.

Outside it is a tensor of a floating dtype: autograd, ``named_parameters``, clipping, counting and param groups see
this dtype only. Inside it holds ``codes`` (int8) and ``scales``, a float32 for each block of adjacent columns. An
element is ``code * scale``. Quantizing gives the largest element of a block the code 127 or -127.

``torch.nn.functional.linear`` dequantizes the weight, multiplies, and frees the copy; between forward and backward
only the input and the codes are alive. Every other operation reads a dequantized copy. Views of whole rows share
codes and scales. Other views are copies, and writing to them raises an error. ``copy_``, ``zero_``, ``normal_`` and
the like replace all values. Arithmetic in place raises an error, because rounding to int8 would lose it. Only
``foam_hf.FOAM`` trains such weights: see ``foam_hf/int8/rows.py``.

FSDP2 (``torch.distributed.fsdp.fully_shard``) splits such a weight by rows. Its all-gather carries codes and scales,
and the weight that a layer computes with is made of these without a copy.

DDP's first broadcast sends dequantized values. Ranks with the same weights keep their codes exactly. A rank with other
weights gets those of rank 0, rounded to the nearest codes. So let every rank load the same checkpoint.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from foam_hf._version import __version__
from foam_hf.int8.codes import (
    BLOCK_SIZE,
    DTYPES,
    MIN_SCALE,
    check_parts,
    check_width,
    dequantize,
    quantize,
    row_chunks,
)
from foam_hf.int8.linear import linear
from foam_hf.int8.rows import Int8Rows
from foam_hf.int8.views import read_only, shared_views

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default)
_MADE_LIKE = (
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.rand_like.default,
    _aten.randn_like.default,
    _aten.new_empty.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.new_empty_strided.default,
)
# Operations that overwrite every element without reading it.
_FILLS = (
    _aten.zero_.default,
    _aten.fill_.Scalar,
    _aten.fill_.Tensor,
    _aten.normal_.default,
    _aten.uniform_.default,
)


class Int8Weight(Tensor):
    """Codes and block scales that look like a dense floating point tensor.

    Args:
        codes: int8, contiguous, (..., n); each in [-127, 127].
        scales: float32, contiguous, (..., n / block size), on the same device. The block size follows from the shapes.
        dtype: the outer dtype, in which it computes: torch.bfloat16, torch.float16 or torch.float32.

    Raises:
        TypeError: codes, scales or ``dtype`` have another dtype.
        ValueError: shapes or devices of codes and scales do not fit each other.
    """

    codes: Tensor
    scales: Tensor
    outer_dtype: torch.dtype  # the same as ``dtype``, which runs Python code of a tensor subclass
    foam_rows = Int8Rows  # how FOAM updates it, see foam_hf.tensors.rows
    _whole: Int8Weight | None  # of a view of a weight's first rows: that weight, which FSDP2 has padded
    _OWN: ClassVar[tuple[str, ...]] = ("codes", "scales", "outer_dtype", "_whole")  # that the constructor sets

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Int8Weight:
        check_parts(codes, scales, dtype)
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        self.codes, self.scales, self._whole = codes, scales, None
        self.outer_dtype = dtype

    @classmethod
    def from_float(cls, weight: Tensor, block_size: int = BLOCK_SIZE) -> Int8Weight:
        """Quantize ``weight`` to the nearest codes.

        Args:
            weight: (..., n), float32, bfloat16 or float16; the result has this dtype outside.
            block_size: columns that share a scale.

        Raises:
            TypeError: ``weight`` has another dtype.
            ValueError: ``block_size`` does not divide n.
        """
        check_width(weight, block_size)
        weight = weight.detach()
        n = weight.shape[-1]
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty((*weight.shape[:-1], n // block_size), dtype=torch.float32, device=weight.device)
        result = cls(codes, scales, weight.dtype)
        _quantize_into(result, weight, keep=False)
        return result

    @property
    def block_size(self) -> int:
        """Adjacent columns that share a scale."""
        return self.codes.shape[-1] // self.scales.shape[-1] if self.scales.shape[-1] else BLOCK_SIZE

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """``codes * scales`` as a plain tensor of ``dtype`` (default: the outer dtype), without a gradient."""
        return dequantize(self.codes, self.scales, self.outer_dtype if dtype is None else dtype)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Codes and scales, where a file reads them; on another device than the weight's if it is offloaded."""
        return self.codes, self.scales

    def written(self) -> None:
        """Called when codes or scales were changed; an offloaded weight then goes back to host memory."""

    def _view_of(self, codes: Tensor, scales: Tensor, whole: Int8Weight | None = None) -> Int8Weight:
        view = Int8Weight(codes, scales, self.dtype)
        view._whole = whole
        return view

    def _set_data(self, data: Tensor) -> None:
        """Take over the codes and scales of ``data``, for ``weight.data = data``: torch does not set attributes."""
        if not isinstance(data, Int8Weight):
            raise TypeError(
                f"cannot make a {type(data).__name__} the data of an INT8 weight; expected weight.copy_(new), which "
                "quantizes it, or module.weight = torch.nn.Parameter(new)"
            )
        self.codes, self.scales, self._whole = data.codes, data.scales, data._whole
        self.outer_dtype = data.outer_dtype

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape, dtype = tuple(self.shape), str(self.dtype).removeprefix("torch.")
        return f"Int8Weight(shape={shape}, dtype={dtype}, block_size={self.block_size}, device='{self.device}')"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["codes", "scales"], {"dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], meta: dict[str, Any], size: Any, stride: Any
    ) -> Int8Weight:
        return cls(inner["codes"], inner["scales"], meta["dtype"])

    def _stable_hash_for_caching(self) -> str:
        """The key of torch.compile's cache on disk; the version stands for the code of this file."""
        where = str(self.device), self.requires_grad
        return repr((__version__, tuple(self.shape), self.dtype, self.block_size, *where))

    def share_memory_(self) -> Int8Weight:
        """Move codes and scales to shared memory, as ``Tensor.share_memory_``."""
        self.codes.share_memory_()
        self.scales.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.codes.is_shared() and self.scales.is_shared()

    def __reduce_ex__(self, protocol: Any) -> Any:
        hidden = {key: value for key, value in self.__dict__.items() if key not in self._OWN}
        return _rebuild, (*self.stored(), self.dtype, self.requires_grad, hidden)

    # FSDP2 calls the next two. With a signature of more arguments it would require each input to have the shape of the
    # codes where rows do not divide evenly.
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, Tensor], None]:
        """What this rank adds to the all-gather: codes and scales, with the rows that pad them."""
        padded = self if self._whole is None else self._whole
        return (padded.codes, padded.scales), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Int8Weight | None = None
    ) -> tuple[Int8Weight, tuple[()]] | None:
        """The weight of all ranks' codes and scales; ``out``, if given, is one that has their memory already."""
        codes, *rest = gathered
        scales = rest[0] if rest else self.scales  # of one rank FSDP2 copies the first input alone
        if out is None:
            return Int8Weight(codes, scales, dtype), ()
        if not rest:
            out.scales = scales
        return None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        if func in _METADATA:  # read some forty times a step; the rest of this function takes longer than the read
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.data_ptr:
                return func(args[0].codes)
            if func is Tensor.__setitem__ and isinstance(args[0], Int8Weight):
                raise NotImplementedError(
                    "cannot write a part of an INT8 weight; expected weight.copy_(new) for the whole weight"
                )
            if func == _SET_DATA:
                args[0]._set_data(args[1])
            result = func(*args, **(kwargs or {}))
            return result if torch.compiler.is_compiling() else read_only(result)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        self = args[0] if args else None
        if isinstance(self, Int8Weight):
            if func in _SAME:
                return self._view_of(self.codes, self.scales, self._whole)
            views = shared_views(func, self.codes, self.scales, args[1:])
            if isinstance(views, list):
                return [self._view_of(*parts) for parts in views]
            if views is not None:
                begins = views[0].storage_offset() == self.codes.storage_offset()
                return self._view_of(*views, self if begins else None)
            if func is _aten.clone.default:
                return Int8Weight(self.codes.clone(), self.scales.clone(), self.dtype)
            if func is _aten._to_copy.default and kwargs.get("dtype", self.dtype) in DTYPES:
                dtype = kwargs.pop("dtype", None)
                kwargs.pop("memory_format", None)
                parts = [func(part, *args[1:], **kwargs) for part in (self.codes, self.scales)]
                return Int8Weight(parts[0], parts[1], self.dtype if dtype is None else dtype)
            if func in _MADE_LIKE:
                return _made_like(self, func, args[1:], kwargs)
            if func is _aten.copy_.default:
                _copy_into(self, args[1])
                return self
            if func in _FILLS:
                plain = torch.empty(self.shape, dtype=self.dtype, device=self.device)
                _quantize_into(self, func(plain, *args[1:], **kwargs))
                return self
        _refuse_writing(func, args, kwargs)
        args, kwargs = tree_map_only(Int8Weight, Int8Weight.dequantize, (args, kwargs))
        return func(*args, **kwargs)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
# Functions that read metadata and return no view of the weight.
_METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in ("dtype", "shape", "device", "requires_grad", "grad", "grad_fn", "is_leaf", "ndim", "_version")
) | {Tensor.dim, Tensor.numel, Tensor.size, Tensor.element_size, Tensor.is_floating_point, Tensor.is_contiguous}


def _quantize_into(weight: Int8Weight, source: Tensor, keep: bool = True) -> None:
    """Quantize ``source`` into ``weight``; with ``keep``, blocks that already have these values keep their codes.

    So copying a weight's own values into it changes nothing. Without ``keep`` it could change a block in which
    training has left the largest code below 127.
    """
    for codes, scales, values in row_chunks(weight.codes, weight.scales, source.to(weight.device)):
        new, new_scales = (
            x.view(y.shape)
            for x, y in zip(quantize(values.flatten(1), weight.block_size), (codes, scales), strict=True)
        )
        if keep:
            same = ((codes * scales).to(values.dtype) == values).all(-1, keepdim=True)
            new, new_scales = torch.where(same, codes, new), torch.where(same, scales, new_scales)
        codes.copy_(new)
        scales.copy_(new_scales)
    weight.written()


def _made_like(weight: Int8Weight, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A new tensor like ``weight``: plain, but INT8 for the rows of a shard of FSDP2 and for ``Module.to_empty``."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype", weight.dtype)
    if func is _aten.new_zeros.default and len(args[0]) == weight.dim() > 1 and dtype in (None, weight.dtype):
        (size,) = args
        if size[-1] == weight.shape[-1]:
            codes = weight.codes.new_zeros(size, device=device)
            scales = weight.scales.new_full((*size[:-1], weight.scales.shape[-1]), MIN_SCALE, device=device)
            return Int8Weight(codes, scales, weight.dtype)
    if func is _aten.empty_like.default and weight.is_meta and device is not None:
        codes, scales = (torch.empty_like(part, device=device) for part in (weight.codes, weight.scales))
        return Int8Weight(codes, scales, weight.dtype)
    # They use shape, dtype and device only.
    return func(torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape), *args, **kwargs)


def _copy_into(weight: Int8Weight, source: Tensor) -> None:
    if not isinstance(source, Int8Weight):
        _quantize_into(weight, source.expand(weight.shape))
        return
    if source.shape != weight.shape or source.block_size != weight.block_size:
        raise ValueError(
            f"cannot copy an INT8 weight of shape {tuple(source.shape)} in blocks of {source.block_size} into one of "
            f"shape {tuple(weight.shape)} in blocks of {weight.block_size}; expected the same shape and block size"
        )
    codes, scales = source.stored()  # to bring an offloaded source to the device could send `weight` away
    weight.codes.copy_(codes)
    weight.scales.copy_(scales)
    weight.written()


def _refuse_writing(func: Any, args: Any, kwargs: Any) -> None:
    """Raise NotImplementedError if ``func`` would write to an ``Int8Weight``."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if any(isinstance(x, Int8Weight) for x in (value if isinstance(value, list | tuple) else [value])):
            raise NotImplementedError(
                f"{func} in place on INT8 weights would lose what is smaller than a code; expected foam_hf.FOAM to "
                "train them, a dequantized model to merge adapters into, or weight.copy_(new) to write whole values "
                "to the nearest codes"
            )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Int8Weight):
        return linear(input, weight, bias)
    with torch._C.DisableTorchFunctionSubclass():  # the INT8 weight is the input or the bias
        return torch.nn.functional.linear(input, weight, bias)


def _rebuild(codes: Tensor, scales: Tensor, dtype: torch.dtype, requires_grad: bool, hidden: dict[str, Any]) -> Tensor:
    weight = Int8Weight(codes, scales, dtype).requires_grad_(requires_grad)
    weight.__dict__.update(hidden)  # includes the attribute by which isinstance finds an nn.Parameter
    return weight


# With the names of version 0.2 and earlier too: `torch.load(weights_only=True)` compares names.
_OLD_NAMES = [(known, f"foam_hf.int8_weights.{known.__name__}") for known in (_rebuild, Int8Weight)]
torch.serialization.add_safe_globals([_rebuild, Int8Weight, *_OLD_NAMES])
