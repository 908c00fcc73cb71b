"""Host memory for weights that visit a GPU: whole pages, locked where CUDA can, so that copies run beside its work.

torch's own pinned memory comes in powers of two, which would waste up to half of it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from foam_hf.display import format_bytes

logger = logging.getLogger("foam_hf")

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


class Pages(mmap.mmap):
    """Anonymous memory of ``size`` bytes, which tensors of ``view`` keep alive; it is taken when it is used."""

    locked = False

    def __new__(cls, size: int) -> Pages:
        return super().__new__(cls, -1, max(1, size))

    def __init__(self, size: int) -> None:
        self.nbytes = max(1, size)

    def view(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor at ``offset`` bytes, in a storage of its own: what saves it sees no shared one."""
        return torch.frombuffer(self, dtype=dtype, count=shape.numel(), offset=offset).view(shape)

    def lock(self) -> bool:
        """Let CUDA copy from and to these pages while it computes; False if it cannot lock them."""
        if not self.locked:
            self.locked = int(torch.cuda.cudart().cudaHostRegister(self._address(), self.nbytes, _PORTABLE)) == 0
            if not self.locked:
                _forget_error()
        return self.locked

    def _address(self) -> int:
        return torch.frombuffer(self, dtype=torch.uint8, count=1).data_ptr()

    def __del__(self) -> None:
        if self.locked:
            with contextlib.suppress(Exception):  # CUDA may be gone when the interpreter ends
                torch.cuda.synchronize()  # a copy may still run
                torch.cuda.cudart().cudaHostUnregister(self._address())


def _forget_error() -> None:
    """CUDA keeps the error of a call, and the next kernel would raise it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def lock_all(pages: list[Pages]) -> None:
    """Lock ``pages``; a warning if some cannot be locked."""
    failed = [each.nbytes for each in pages if not each.lock()]
    if failed:
        logger.warning(
            f"offload='cpu': {format_bytes(sum(failed))} of host memory could not be locked (pinned), and copies of "
            "these weights wait for the GPU and it for them; expected a higher limit of locked memory: ulimit -l, "
            "docker run --ulimit memlock=-1, or under WSL more memory in .wslconfig"
        )


def refuse_too_little(needed: int) -> None:
    """Raise RuntimeError if machine, container or batch job have less than ``needed`` bytes of host memory left."""
    left = available()
    if left is not None and needed > left:
        raise RuntimeError(
            f"offload='cpu' keeps INT8 weights in host memory: got {format_bytes(left)} of it left; expected "
            f"{format_bytes(needed)}"
        )


def available() -> int | None:
    """Bytes of host memory that a process can still take, or None if the system does not say."""
    found = [left for left in (_of_machine(), _of_container()) if left is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _of_container() -> int | None:
    """What is left to the control groups of this process: a container's, or a batch job's below the machine's root."""
    found = []
    for folder, (limit, usage, cache) in _control_groups():
        with contextlib.suppress(OSError, ValueError, KeyError):
            most = int((folder / limit).read_text(encoding="ascii"))  # "max" without a limit
            used = int((folder / usage).read_text(encoding="ascii"))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            files = dict(line.split() for line in lines)
            found.append(most - used + int(files[cache]))  # the cache of files gives way
    return min(found, default=None)


def _control_groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folder of each group that this process is in, and the names of limit, usage and cache in it."""
    second = "memory.max", "memory.current", "inactive_file"
    first = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    yield _CGROUP, second
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            inside = [part for part in path.split("/") if part]
            groups = ["/".join(inside[:end]) for end in range(len(inside) + 1)]
            if not controllers:
                yield from ((_CGROUP / group, second) for group in groups[1:])
            elif "memory" in controllers.split(","):
                yield from ((_CGROUP / "memory" / group, first) for group in groups)
