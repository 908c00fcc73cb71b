"""Makes the meta device keep the same tensors alive as a CUDA device.

On the meta device PyTorch computes attention by matrix products, dropout keeps a mask in the dtype of its input, and
autocast does nothing, and products of experts are for bfloat16 alone. On CUDA, attention and dropout are one kernel
each, autocast makes copies of the weights, and experts have any dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The products of experts, by which transformers computes all experts of a layer at once; torch 2.6 may lack them.
GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default if hasattr(torch.ops.aten, "_grouped_mm") else None
_HALF = (torch.float16, torch.bfloat16)

# The functions that torch.autocast runs in half precision or in float32 on CUDA, by the names that Python code calls.
_PRODUCTS = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv")
_CONVOLUTIONS = tuple(f"conv{kind}{dim}d" for kind in ("", "_transpose") for dim in (1, 2, 3))
_LOWER = frozenset((*_PRODUCTS, *_CONVOLUTIONS, "einsum", "prelu", "scaled_dot_product_attention"))
_LOSSES = ("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "huber_loss", "binary_cross_entropy_with_logits")
_POINTWISE = ("pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "exp", "expm1", "log", "log1p", "softplus")
_REDUCTIONS = ("sum", "prod", "cumsum", "cumprod", "norm", "logsumexp", "softmax", "log_softmax", "cosine_similarity")
_FLOAT32 = frozenset((*_LOSSES, *_POINTWISE, *_REDUCTIONS, "layer_norm", "group_norm"))


class CudaRules(TorchFunctionMode):
    """A mode in which functions on meta tensors allocate as they do on CUDA.

    Args:
        autocast: the dtype to which `torch.autocast` casts float32; None: no autocast.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast
        self._lowered: dict[int, Tensor] = {}
        self._keeps_lowered = False

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Cast each weight once and keep the copy to the end of this context, as `with torch.autocast` does.

        Outside of it, gradient checkpointing recomputes layers, and each layer casts its weights again.
        """
        self._keeps_lowered = True
        try:
            yield
        finally:
            self._keeps_lowered = False
            self._lowered.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.autocast is not None:
            if name in _LOWER:
                args, kwargs = _map_tensors((args, kwargs), self._cast_to_half)
            elif name in _FLOAT32 and "dtype" not in kwargs:
                args, kwargs = _map_tensors((args, kwargs), _cast_to_float32)
        if name == "scaled_dot_product_attention":
            return _attention(func, *args, **kwargs)
        if name == "dropout" and func is torch.nn.functional.dropout:
            return _dropout(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _cast_to_half(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (self._keeps_lowered and tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()):
            return tensor.to(self.autocast)
        found = self._lowered.get(id(tensor))
        if found is None:
            found = self._lowered[id(tensor)] = tensor.to(self.autocast)
        return found


class _Autocast(torch.autocast):
    """`torch.autocast` that does nothing on the meta device: torch's own raises, even to a model that disables it."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type == "meta":
            device_type, args, kwargs = "cpu", (), {"enabled": False}
        super().__init__(device_type, *args, **kwargs)


@contextlib.contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Replace `torch.autocast` so that `torch.autocast(device_type="meta")` raises no error."""
    original = torch.autocast
    torch.autocast = _Autocast  # type: ignore[misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


def grouped_product(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result of `GROUPED_PRODUCT` on the meta device; on CUDA nothing else is allocated, in bfloat16 or not.

    Args:
        left, right: matrices, or stacks of them with one for each expert.
        offs: (experts,), where each expert's part ends of the dimension in which a matrix has all experts' parts.
        bias, out_dtype: as torch has them.
    """
    stacked = left.dim() == right.dim()  # with two matrices each expert has the product of its parts of both
    experts = left.shape[:1] if left.dim() == 3 or offs is None else offs.shape
    return left.new_empty([*(experts if stacked else ()), left.shape[-2], right.shape[-1]], dtype=out_dtype)


def _cast_to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(inner, change) for inner in value)
    if isinstance(value, dict):
        return {key: _map_tensors(inner, change) for key, inner in value.items()}
    return value


def _dropout(
    func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not training or inplace or not 0 < p < 1 or not input.is_meta:
        return func(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    func: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that CUDA would choose.

    It is flash attention for half precision without a mask, and the memory-efficient kernel otherwise. The latter does
    not support grouped heads; then it is matrix products.
    """
    aten = torch.ops.aten
    width = query.shape[-1]
    if not query.is_meta or query.dim() != 4:
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is None and query.dtype in _HALF and width == value.shape[-1] <= 256:
        scale = width**-0.5 if scale is None else scale
        padded = [_pad(tensor) for tensor in (query, key, value)]
        attended = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return attended[..., :width]
    if query.shape[1] == key.shape[1]:
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        inputs = (query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal)
        return aten._scaled_dot_product_efficient_attention(*inputs, scale=scale)[0]
    return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _pad(tensor: Tensor) -> Tensor:
    """Pad the last dimension to a multiple of 8, which the kernels need."""
    missing = -tensor.shape[-1] % 8
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as an additive bias in the dtype of the query, expanded over heads without a copy."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    length = mask.shape[-1]
    return _pad(mask)[..., :length].expand(*query.shape[:3], key.shape[2])
