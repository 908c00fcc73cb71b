"""FOAM on DTensor parameters, as FSDP2 and tensor parallelism make them: pieces of weights, their state, their sums.

A row folds by itself, so a shard of whole rows or whole blocks is updated without communication. State is made of
DTensors on the weight's mesh, with its placements, so that ``torch.distributed.checkpoint`` can reshard it. A state
tensor may lack a dimension of the weight. What splits that dimension then replicates the state. Only the factored rule
needs sums over ranks, as its means go over rows that other ranks hold: ``add_over_ranks``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foam_hf.rules.all import shardable_options
from foam_hf.rules.rule import Rule, StateTensor
from foam_hf.tensors.folding import Level, block_width, num_blocks
from foam_hf.tensors.places import Group, Piece, is_sharded, local, whole_place
from foam_hf.tensors.rows import PLAIN, kind_of


class _Cut(NamedTuple):
    """A dimension of a mesh that splits one dimension of a tensor, in ``parts`` as ``torch.chunk`` makes them."""

    mesh_dim: int
    parts: int


def pieces_of(p: Any, rule: Rule, level: Level) -> list[Piece]:
    """The pieces of this rank's shard of ``p``, a DTensor: at least one, which may be empty.

    Raises:
        ValueError: the shard is not whole rows or whole blocks, that of a quantized weight not whole rows, the rule
            needs whole rows or columns and both are split, or weights are offloaded to the CPU.
    """
    mesh = p.device_mesh
    if local(p).device.type not in (mesh.device_type, "meta"):
        raise ValueError(
            f"CPU offload of FSDP2 is not supported: got a weight on {local(p).device}, mesh on {mesh.device_type}; "
            "expected OffloadPolicy(), in accelerate fsdp_offload_params: false, as FOAM's state is small"
        )
    cuts = [_cuts(p, dim) for dim in range(p.dim())]
    spans = [_rank_range(size, cut, mesh.get_coordinate()) for size, cut in zip(p.shape, cuts, strict=True)]
    mine = tuple(len(span) for span in spans)
    if mine != tuple(local(p).shape):
        raise ValueError(
            f"cannot tell which part of a weight this rank holds: got a local shape of {tuple(local(p).shape)} for "
            f"{tuple(p.shape)} with placements {p.placements}, where {mine} would follow; expected Shard or Replicate"
        )
    if not p.dim():
        return [Piece(whole_place(p))]
    if rule.on_whole is not None:
        shared_dimension(p)  # refuses what cannot be gathered
        return [Piece(whole_place(p))]
    _check_columns(p, cuts[-1], level)
    if cuts[-1] and kind_of(p) != PLAIN:
        raise ValueError(
            f"{kind_of(p).upper()} weights are sharded by rows alone: got one of shape {tuple(p.shape)} with "
            f"placements {p.placements}; expected Shard(0) or Replicate"
        )
    last = max((dim for dim in range(p.dim() - 1) if cuts[dim]), default=0)
    groups = [tuple(mesh.get_group(cut.mesh_dim) for cut in some) for some in cuts]
    row_groups = groups[-2] if p.dim() > 1 else ()
    if rule.shards != "rows and columns" and row_groups and groups[-1]:
        right = " or ".join(map(repr, shardable_options(("rows and columns",))["second_moment"]))
        raise ValueError(
            f"second_moment={rule.name!r} needs the means of a matrix's rows or of its columns on one rank: got shape "
            f"{tuple(p.shape)} with placements {p.placements}, which split both; expected second_moment={right}, "
            "for embeddings and heads embedding_rule='block'"
        )
    rows = p.shape[:-1]
    strides = [math.prod(rows[dim + 1 :]) for dim in range(len(rows))]
    pieces = []
    for index in itertools.product(*map(range, mine[:last])):
        begin = [span.start for span in spans[:-1]]
        begin[:last] = (b + i for b, i in zip(begin, index, strict=False))
        first_row = sum(b * s for b, s in zip(begin, strides, strict=True))
        place = whole_place(p)._replace(
            first_row=first_row, first_column=spans[-1].start, row_groups=row_groups, column_groups=groups[-1]
        )
        pieces.append(Piece(place, index))
    return pieces or [Piece(whole_place(p))]  # a shard without any matrix: only the step is counted


class SharedDimension(NamedTuple):
    """The one dimension of a DTensor that is cut over several ranks.

    ``spans`` are the parts of the ranks of ``group``, in its order.
    """

    dim: int
    group: Group
    spans: tuple[range, ...]


def shared_dimension(p: Any) -> SharedDimension | None:
    """The dimension of ``p``, a DTensor, that is cut; None if each rank holds all of ``p``.

    Raises:
        ValueError: the last dimension is cut, or several dimensions of the mesh cut ``p``.
    """
    cuts = [(dim, cut) for dim in range(p.dim()) for cut in _cuts(p, dim)]
    if not cuts:
        return None
    if len(cuts) > 1 or cuts[0][0] == p.dim() - 1:
        right = " or ".join(map(repr, shardable_options(("rows and columns",))["second_moment"]))
        raise ValueError(
            "a rule that needs whole matrices gathers rows over one dimension of the mesh: got shape "
            f"{tuple(p.shape)} with placements {p.placements} on {p.device_mesh}; expected one Shard of any dimension "
            f"but the last, as FSDP2 makes it without tensor parallelism, or second_moment={right}"
        )
    ((dim, cut),) = cuts
    group, mesh, at = p.device_mesh.get_group(cut.mesh_dim), p.device_mesh, list(p.device_mesh.get_coordinate())
    line = mesh.mesh[tuple(slice(None) if i == cut.mesh_dim else c for i, c in enumerate(at))].tolist()
    spans = [range(0)] * cut.parts
    for coordinate, rank in enumerate(line):
        at[cut.mesh_dim] = coordinate
        spans[torch.distributed.get_group_rank(group, rank)] = _rank_range(p.shape[dim], [cut], at)
    return SharedDimension(dim, group, tuple(spans))


def _cuts(p: Any, dim: int) -> list[_Cut]:
    """The mesh dimensions that split dimension ``dim`` of ``p``, in the order in which they split it."""
    found: list[tuple[int, _Cut]] = []
    for i, placement in enumerate(p.placements):
        kind = type(placement).__name__
        if kind not in ("Shard", "_StridedShard", "Replicate"):
            raise ValueError(
                f"cannot update a weight of shape {tuple(p.shape)} with the placement {placement!r}: got "
                f"{p.placements}; expected Shard or Replicate for every dimension of the mesh"
            )
        if kind != "Replicate" and placement.dim % p.dim() == dim:
            # Tensor parallelism splits first, though it stands to the right in the mesh. FSDP2 then splits its parts,
            # and marks them as strided shards.
            found.append((kind == "_StridedShard", _Cut(i, p.device_mesh.size(i))))
    return [cut for _, cut in sorted(found, key=lambda pair: pair[0]) if cut.parts > 1]


def _rank_range(size: int, cuts: Sequence[_Cut], coordinate: Sequence[int] | None) -> range:
    """The part of a dimension of ``size`` that the rank at ``coordinate`` of the mesh holds."""
    if coordinate is None:
        raise ValueError("this rank is not part of a weight's mesh; expected an optimizer for its own weights alone")
    span = range(size)
    for cut in cuts:
        chunk = -(-len(span) // cut.parts)
        part = span[chunk * coordinate[cut.mesh_dim] : chunk * (coordinate[cut.mesh_dim] + 1)]
        # An empty part begins at an element of the tensor too. So a rank without rows still names an existing matrix,
        # and takes part in the sums over the ranks that share it.
        last = max(span.start, span.stop - 1)
        span = part if part else range(last, last)
    return span


def _all_ranges(size: int, cuts: Sequence[_Cut]) -> Iterator[range]:
    """The parts of a dimension of ``size`` that the ranks hold."""
    for parts in itertools.product(*(range(cut.parts) for cut in cuts)):
        coordinate = dict(zip((cut.mesh_dim for cut in cuts), parts, strict=True))
        yield _rank_range(size, cuts, [coordinate.get(i, 0) for i in range(max(coordinate, default=-1) + 1)])


def _check_columns(p: Any, cuts: Sequence[_Cut], level: Level) -> None:
    """Raise ValueError if columns are split inside a block, on any rank."""
    n = p.shape[-1]
    width, blocks = block_width(level, n), num_blocks(level, n)
    columns, moments = list(_all_ranges(n, cuts)), list(_all_ranges(blocks, cuts))
    for mine, held in zip(columns, moments, strict=True):
        if mine and (mine.start, mine.stop) != (held.start * width, min(held.stop * width, n)):
            cut = sorted({span.start for span in columns if 0 < span.start < n})
            what = "level='row' makes a whole row one block" if level == "row" else f"level={level} has blocks"
            raise ValueError(
                f"{what} of {width} columns: got a weight of shape {tuple(p.shape)} whose {n} columns are split at "
                f"{cut} (placements {p.placements}); expected multiples of {width}, or rows split instead"
            )


def empty_state(p: Any, state: StateTensor) -> Tensor:
    """A new tensor of state of ``p``: zeros, as a DTensor if ``p`` is one."""
    part = torch.zeros(local_shape(p, state), dtype=state.dtype, device=local(p).device)
    return _state_dtensor(p, state, part) if is_sharded(p) else part


def as_state_of(p: Any, name: str, state: StateTensor, value: Any) -> Tensor:
    """A copy of ``value``, the saved state ``name`` of ``p``, sharded as ``p`` is. Its dtype stays as it is.

    A whole tensor is cut without communication. A DTensor of other placements is redistributed.

    Raises:
        ValueError: ``value`` is a DTensor on another mesh.
    """
    value, device = value.detach(), local(p).device
    if not is_sharded(p):
        value = value.full_tensor() if is_sharded(value) else value
        return value.to(device, copy=True).contiguous()
    if not is_sharded(value):
        part = value[tuple(slice(span.start, span.stop) for span in _spans(p, state))]
    elif value.device_mesh != p.device_mesh:
        raise ValueError(
            f"saved state {name} is a DTensor on {value.device_mesh}, its weight is on {p.device_mesh}; expected a "
            "state dict that torch.distributed.checkpoint has read, as it reshards, or whole tensors"
        )
    else:
        part = local(value.redistribute(placements=_placements(p, state)))
    return _state_dtensor(p, state, part.to(device, copy=True).contiguous())


def local_shape(p: Any, state: StateTensor) -> torch.Size:
    """The shape of what this rank holds of a tensor of state of ``p``."""
    return torch.Size(map(len, _spans(p, state))) if is_sharded(p) else state.shape


def _dimensions(p: Any, state: StateTensor) -> list[int]:
    """The dimensions of ``p`` that this tensor of state has."""
    return [dim for dim in range(p.dim()) if dim != state.lacks]


def _spans(p: Any, state: StateTensor) -> list[range]:
    """The part of each dimension of a tensor of state of ``p`` that this rank holds."""
    coordinate = p.device_mesh.get_coordinate()
    dims = _dimensions(p, state)
    return [_rank_range(size, _cuts(p, dim), coordinate) for size, dim in zip(state.shape, dims, strict=True)]


def _placements(p: Any, state: StateTensor) -> tuple[Any, ...]:
    """The placements of a tensor of state of ``p``: those of ``p``, but replicated for a dimension that it lacks."""
    from torch.distributed.tensor import Replicate, Shard

    number = {dim: i for i, dim in enumerate(_dimensions(p, state))}

    def of_state(placement: Any) -> Any:
        dim = None if placement.is_replicate() else number.get(placement.dim % p.dim())
        if dim is None:
            return Replicate()
        strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
        return type(placement)(dim, **strided) if strided else Shard(dim)

    return tuple(map(of_state, p.placements))


def _state_dtensor(p: Any, state: StateTensor, part: Tensor) -> Tensor:
    """A tensor of state of ``p`` as a DTensor, from the part that this rank holds."""
    from torch.distributed.tensor import DTensor

    shape = state.shape
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(part, p.device_mesh, _placements(p, state), run_check=False, shape=shape, stride=strides)


def zero_gradient(p: Any) -> Tensor:
    """A gradient of zeros of ``p``: a DTensor if ``p`` is one."""
    mine = local(p)
    part = torch.zeros(mine.shape, dtype=mine.dtype, device=mine.device)
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def follow_placements(p: Any) -> None:
    """Give the gradient of ``p`` the placements of ``p``, as autograd may leave partial sums or other shards."""
    grad = p.grad
    if not is_sharded(grad) or grad.device_mesh != p.device_mesh:
        raise ValueError(
            f"the gradient of a weight of shape {tuple(p.shape)} on {p.device_mesh} is "
            f"{'on ' + str(grad.device_mesh) if is_sharded(grad) else 'no DTensor'}; expected one on the same mesh"
        )
    if tuple(grad.placements) != tuple(p.placements):
        p.grad = grad.redistribute(placements=p.placements)


def add_over_ranks(parts: Sequence[tuple[tuple[Group, ...], Tensor]]) -> None:
    """Add up float32 tensors over the ranks of their process groups, in place.

    Every rank must pass the same shapes in the same order. Which tensors are passed together changes no bit, so that
    gradient release, which passes a few at a time, computes what a whole step does.
    """
    for group in dict.fromkeys(group for groups, _ in parts for group in groups):
        mine = [tensor for groups, tensor in parts if group in groups and tensor.numel()]
        if mine:
            flat = _sum_in_order(torch.cat([tensor.reshape(-1) for tensor in mine]), group)
            split = flat.split([tensor.numel() for tensor in mine])
            torch._foreach_copy_(mine, [part.view_as(tensor) for part, tensor in zip(split, mine, strict=True)])


def _sum_in_order(flat: Tensor, group: Group) -> Tensor:
    """The sum of ``flat``, one-dimensional, over ``group``, each element in the order of ranks.

    An all-reduce adds up in an order that depends on where an element stands. This one has its traffic: each rank
    gets its part of all ranks, adds up, and sends the result to all.
    """
    ranks, size = group.size(), flat.numel()
    part = -(-size // ranks)
    flat = torch.nn.functional.pad(flat, (0, part * ranks - size))
    received = torch.empty_like(flat)
    torch.distributed.all_to_all_single(received, flat, group=group)
    total, *others = received.view(ranks, part).unbind()
    for other in others:
        total += other
    # torch 2.13 has a new name for this function, and warns of the old one.
    gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    gather(flat, total, group=group)
    return flat[:size]


def norms_of(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each gradient, float32 (len(grads),); for DTensors the norm of the whole, the same on all ranks.

    Every rank must pass the gradients of the same parameters in the same order.
    """
    norms = torch.stack(torch._foreach_norm([*map(local, grads)], 2, dtype=torch.float32))
    return add_over_shards(grads, norms.square_()).sqrt_() if any(map(is_sharded, grads)) else norms


def add_over_shards(sharded: Sequence[Tensor], values: Tensor) -> Tensor:
    """Add up each of ``values``, in place, over the ranks that share the DTensor of the same number; returns them.

    Every rank must pass the same DTensors, or gradients of the same, in the same order.
    """
    groups = [_groups_that_cut(x) if is_sharded(x) else () for x in sharded]
    if any(groups):
        add_over_ranks([*zip(groups, values.split(1), strict=True)])
    return values


def _groups_that_cut(x: Any) -> tuple[Group, ...]:
    """The process groups over which a DTensor is cut."""
    return tuple(x.device_mesh.get_group(cut.mesh_dim) for dim in range(x.dim()) for cut in _cuts(x, dim))


def largest_share(x: Any) -> int:
    """Bytes of the largest share of ``x`` that a rank holds, the same number on all ranks; of a plain tensor, all."""
    cuts = [cut.parts for dim in range(x.dim()) for cut in _cuts(x, dim)] if is_sharded(x) else []
    return -(-x.numel() * x.element_size() // math.prod(cuts))
