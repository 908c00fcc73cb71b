"""The host's side of the kernels: which tensors they take, tables of addresses on the device, launching.

A table in device memory holds the addresses and sizes of a launch's tensors, see ``columns``; a second one says which
tensor a program works on. Both are kept between steps: gradients that moved get new addresses in the first, those that
appear or vanish a new second one, any other change gets new tables. ``uploads`` brings the first to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import KernelCall, parameter_names
from foam_hf.kernels.columns import count_of, filled
from foam_hf.kernels.parts import philox
from foam_hf.tensors.folding import Level, block_width
from foam_hf.tensors.places import Place, local
from foam_hf.tensors.step import Hyper, Member

MAX_COLUMNS = 32768  # a tile of more columns would not fit the registers of a program
TILE_ELEMENTS = 2048  # of a program
VECTOR = 1 << 16  # vectors of no more elements share a launch, whatever their length
MAX_WARPS = 16 if torch.version.hip else 32  # of a program, 1024 threads: on AMD a warp has 64
NOTHING: Mapping[str, Any] = MappingProxyType({})
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def takes_ptx(device: torch.device) -> bool:
    """Whether PTX may stand in a kernel: not on AMD's and Intel's GPUs, nor in Triton's interpreter."""
    return device.type == "cuda" and torch.version.hip is None and isinstance(philox, triton.JITFunction)


@dataclass(frozen=True)
class Entry:
    """One parameter of a step: its tensors on one device, its level, and its place in the random stream."""

    weight: Tensor
    grad: Tensor
    moments: tuple[Tensor, ...]  # as state holds them
    level: Level
    stream: int
    place: Place
    grad_offset: int  # bytes, from where the rank's gradient of the parameter begins
    pending: tuple[Tensor, ...] = ()  # as a member's, of a micro-batch

    @classmethod
    def of(cls, member: Member) -> Entry:
        moments = tuple(member.moments.values())
        if member.p.grad is None:  # for a later step, with a gradient as autograd makes them
            grad, offset = torch.empty(member.p.shape, dtype=member.p.dtype, device="meta"), 0
        else:
            grad = member.grad
            offset = grad.data_ptr() - local(member.p.grad).data_ptr()
        whole = member.weight, grad, moments, member.level, member.stream, member.place, offset
        return cls(*whole, pending=member.parts_of_pending)

    @property
    def columns(self) -> int:
        return self.weight.shape[-1] if self.weight.dim() else 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.grad, *self.moments

    def fits(self, empty: bool = False) -> bool:
        """Whether a kernel takes it; a weight without elements only if ``empty``. The rest is updated plainly."""
        # A gradient that autograd has left to be negated is read as it lies.
        if self.grad.is_neg() or not all(x.is_contiguous() for x in self.tensors):
            return False
        dtypes = {x.dtype for x in self.moments}
        if len(dtypes) != 1 or not {self.weight.dtype, self.grad.dtype, *dtypes} <= TRITON_DTYPES.keys():
            return False
        if self.weight.numel() == 0 and not empty:
            return False
        geometry = Geometry.of(self)
        rows = self.weight.numel() // self.columns if self.columns else 0
        segments = rows * -(-self.columns // geometry.columns)
        # A kernel counts rows, columns and segments in int32, those of a tile beyond the last too.
        largest = max(rows, self.columns, self.place.columns, segments)
        return geometry.columns <= MAX_COLUMNS and largest + MAX_COLUMNS < 2**31


@dataclass(frozen=True)
class Geometry:
    """What a launch is compiled for; tensors that agree in it share one."""

    device: torch.device
    weight: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    width: int  # F
    columns: int  # C, a power of two
    even: bool  # every row is whole segments
    aligned: bool  # every row starts on 16 bytes
    shifted: bool  # columns begin inside of a random draw of eight

    @classmethod
    def of(cls, entry: Entry) -> Geometry:
        n = entry.columns
        width = 1 if entry.level == 0 else power_of_two(block_width(entry.level, entry.place.columns))
        # Narrow blocks share a segment with their neighbours; eight columns are one random draw.
        columns = max(8, width, min(256, power_of_two(n)))
        aligned = n % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in entry.tensors)
        dtypes = (entry.weight.dtype, entry.grad.dtype, entry.moments[0].dtype)
        even = n % columns == 0 and (n == entry.place.columns or entry.weight.numel() == n)
        if entry.weight.dim() < 2 and n <= VECTOR:  # norms and biases: one launch costs more than what is gained
            columns, even, aligned = 256, False, False
        shifted = entry.place.first_column % 8 != 0 and entry.weight.dtype == torch.bfloat16
        return cls(entry.weight.device, *dtypes, width, columns, even, aligned, shifted)


def power_of_two(n: int) -> int:
    """The least that is not smaller than ``n``."""
    return 1 << max(0, n - 1).bit_length()


class AddressTable:
    """Where the tensors of a launch are, on the host and on the device.

    ``own`` has the columns of ``row`` that not every table has, by name, with a value for each of ``entries``.
    ``owners`` says of each pass which programs there are, see ``owner_table``; ``counts`` how many of each tensor.
    """

    def __init__(
        self,
        geometry: Geometry,
        entries: list[Entry],
        row: numpy.dtype,
        own: Mapping[str, Sequence[int]],
        counts: Sequence[Sequence[int]],
    ) -> None:
        self.geometry = geometry
        self.members: list[Member] = []  # of ``entries``, from ``launches_of``
        self.streams = numpy.array([entry.stream for entry in entries])
        self.grad_offsets = numpy.array([entry.grad_offset for entry in entries])
        common = {
            "weight": [entry.weight.data_ptr() for entry in entries],
            "gradient": [entry.grad.data_ptr() for entry in entries],
            "exp_avg": [entry.moments[0].data_ptr() for entry in entries],
            "columns": [entry.columns for entry in entries],
            "stream": [entry.stream for entry in entries],
        }
        self._rows = filled(row, {**common, **own})
        self.table = torch.empty(0, dtype=torch.int64)  # where ``place`` says
        self.changed = True  # since the last upload
        self.nvidia = takes_ptx(geometry.device)
        self._counts = numpy.array([*map(list, counts)], dtype=numpy.int64)
        self.owners = self._all_owners = self._owners(numpy.ones(len(entries), dtype=bool))
        self.mixed = False  # parameters that missed steps have step counts and bias corrections of their own

    @property
    def words(self) -> int:
        """How many int64 the table has."""
        return self._rows.nbytes // 8

    def place(self, host: numpy.ndarray, table: Tensor) -> None:
        """Keep the table at ``host``, int64 (words,), from where it is copied to ``table`` on the device."""
        rows = host.view(self._rows.dtype)
        rows[:] = self._rows
        self._rows, self.table = rows, table

    @property
    def device(self) -> torch.device:
        return self.geometry.device

    def leave_out(self, here: numpy.ndarray, steps: numpy.ndarray) -> None:
        """Run no program of a tensor that is not ``here``, bool; ``steps`` are int64. Both are as ``streams``."""
        mine = steps[here]
        self.mixed = len(mine) > 0 and bool((mine != mine[0]).any())
        self.owners = self._all_owners if here.all() else self._owners(here)

    def _owners(self, here: numpy.ndarray) -> list[Tensor]:
        return [owner_table(count, here, self.device) for count in self._counts]

    def follow_steps(self, h: Hyper, steps: numpy.ndarray) -> None:
        """Write each tensor's step and corrections to its row: for ``mixed`` ones. ``steps`` are as ``streams``."""
        self._rows["step"] = steps
        counts, which = numpy.unique(steps, return_inverse=True)
        ts = [max(t, 1) for t in counts.tolist()]  # 0 of one that was never updated, nor is now
        for name, beta in (("inv_c1", h.b1), ("inv_c2", h.b2)):
            # Python's powers, as in ``hyper_of``: those of numpy may differ in the last bit.
            corrections = numpy.array([1 / (1 - beta**t) for t in ts], dtype=numpy.float32)
            self._rows[name] = corrections.view(numpy.int32)[which]
        self.changed = True

    def move_gradients(self, addresses: numpy.ndarray) -> None:
        """Point to gradients of the same kind elsewhere; ``addresses`` has one for each of ``streams``."""
        numpy.add(addresses, self.grad_offsets, out=self._rows["gradient"])
        self.changed = True

    def constants(self, kernel: Any, **own: Any) -> dict[str, Any]:
        """The constants of ``kernel`` that are the same in every step, in the order of its parameters.

        ``own`` are those that are neither of the table nor of the geometry, by name.
        """
        g = self.geometry
        known = {
            "FIELDS": count_of(self._rows.dtype),
            "W_DTYPE": TRITON_DTYPES.get(g.weight),
            "G_DTYPE": TRITON_DTYPES[g.grad],
            "S_DTYPE": TRITON_DTYPES[g.state],
            "F": g.width,
            "C": g.columns,
            "EVEN": g.even,
            "ALIGNED": g.aligned,
            "SHIFTED": g.shifted,
            "NVIDIA": self.nvidia,
            **own,
        }
        return {name: known[name] for name in parameter_names(kernel) if name in known}

    def update_by(
        self,
        call: KernelCall,
        h: Hyper,
        grad_scale: Tensor | None,
        left_out_at: Tensor | None,
        arguments: Mapping[str, Any] = NOTHING,
        constants: Mapping[str, Any] = NOTHING,
    ) -> None:
        """Launch the programs of the only pass with the step's numbers.

        ``arguments`` replace these or come behind them, ``constants`` come before those of the step.
        """
        (owner,) = self.owners
        of_step, varying = self.of_step(h, grad_scale, left_out_at)
        with device_of(self.device):
            tables = {"table": self.table, "owner": owner}
            call(owner.shape[0], {**tables, **of_step, **arguments}, {**constants, **varying})

    def of_step(
        self, h: Hyper, grad_scale: Tensor | None, left_out_at: Tensor | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What an update takes that changes from step to step: the arguments behind the tables, and the constants."""
        scale, scaled = self.scale(grad_scale)
        where, checked = self.left_out_at(left_out_at), left_out_at is not None
        arguments = {"step": h.step, "seed": h.seed, **numbers(h), "grad_scale": scale, "left_out_at": where}
        constants = {"STOCHASTIC": h.stochastic, "SCALED": scaled, "CHECKED": checked, "MIXED": self.mixed}
        return arguments, constants

    def left_out_at(self, given: Tensor | None) -> Tensor:
        """Where a kernel writes the step of what it leaves out; where nothing is checked any tensor, unwritten."""
        return self.table if given is None else given

    def scale(self, grad_scale: Tensor | None) -> tuple[Tensor, int]:
        """The scales as a kernel takes them, and its ``SCALED``: 0 for none, 1 for one for all, 2 for one each."""
        if grad_scale is None:
            return self.table, 0  # any tensor: it is unread
        grad_scale = grad_scale.to(self.device)  # a GradScaler has one, and a model may be on several GPUs
        aligned = grad_scale.clone() if grad_scale.data_ptr() % 16 else grad_scale  # as a tensor of its own is
        return aligned, 1 if grad_scale.numel() == 1 else 2


Launches = TypeVar("Launches", bound=AddressTable)
Found = TypeVar("Found", bound=Geometry)


def launches_of(
    members: Iterable[Member],
    geometry_of: Callable[[Entry], Found | None],
    launch: Callable[[Found, list[Entry]], Launches],
) -> tuple[list[Launches], list[Member]]:
    """A launch for all members of a geometry, and the members that no kernel takes: theirs is None."""
    buckets: dict[tuple[Found, bool, bool], list[tuple[Member, Entry]]] = {}
    unfit = []
    for member in members:
        entry = Entry.of(member)
        geometry = geometry_of(entry)
        if geometry is None:
            unfit.append(member)
            continue
        key = geometry, member.p.dim() > 1, bool(entry.place.row_groups)  # vectors have another scale
        buckets.setdefault(key, []).append((member, entry))
    made = []
    for (geometry, *_), bucket in buckets.items():
        made.append(launch(geometry, [entry for _, entry in bucket]))
        made[-1].members = [member for member, _ in bucket]
    return made, unfit


def numbers(h: Hyper) -> dict[str, float]:
    """A step's hyperparameters as the kernels take them, all of them floats whatever the user wrote."""
    return {
        "step_size": float(h.lr * h.scale),
        "decay": float(1 - h.lr * h.weight_decay),
        "b1": float(h.b1),
        "a1": float(1 - h.b1),  # a difference of float32 numbers would have lost digits
        "b2": float(h.b2),
        "a2": float(1 - h.b2),
        "inv_c1": float(1 / h.c1),
        "inv_c2": float(1 / h.c2),
        "eps": float(h.eps),
        "rho": float(h.rho),
    }


def owner_table(counts: numpy.ndarray, here: numpy.ndarray, device: torch.device) -> Tensor:
    """For each program on ``device``: its tensor, and its number among that tensor's programs; int32 (programs, 2).

    ``counts`` (int64) says how many programs each tensor has, ``here`` (bool) which tensors have theirs in the table.
    It is made on the device: a large model has millions of programs, and experts come and go with every step.
    """
    tensors = numpy.flatnonzero(here)
    mine = counts[tensors]
    total = int(mine.sum())
    parts = numpy.stack((tensors, mine, numpy.cumsum(mine) - mine)).astype(numpy.int32)
    tensor, count, first = torch.from_numpy(parts).to(device, non_blocking=True)
    which = torch.repeat_interleave(count, output_size=total)
    owners = torch.empty(total, 2, dtype=torch.int32, device=device)
    owners[:, 0] = tensor.index_select(0, which)
    owners[:, 1] = torch.arange(total, dtype=torch.int32, device=device).sub_(first.index_select(0, which))
    return owners


def tiles_of(geometry: Geometry, entries: list[Entry], segments: int) -> list[int]:
    """How many programs each of ``entries`` needs that work on ``segments`` segments each."""
    counts = [entry.weight.numel() // entry.columns * -(-entry.columns // geometry.columns) for entry in entries]
    return [-(-count // segments) for count in counts]


def device_of(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
