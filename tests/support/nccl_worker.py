"""Two processes against one, by every engine: what tests/optimizer/test_nccl.py checks with two GPUs, over NCCL.

    FOAM_HF_TEST_DEVICE=cuda python -m tests.support.nccl_worker FOLDER
    python -m tests.support.nccl_worker FOLDER int8 release  # these families alone, here over gloo on a CPU

Each family has processes of its own, which are ended after LIMIT_S. They import at the same time and compute in
turns, or on two GPUs each where there are more. FOLDER/nccl.json has a row a case: "bits", or the largest difference
relative to the largest element, or the error. Rows are printed as well.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.devices import BACKEND, DEVICE, choose_gpu, start_group
from tests.support.tolerances import error
from tests.support.torchrun import launch

LIMIT_S = float(os.environ.get("FOAM_HF_TEST_LIMIT_S", "500"))
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESUME = ", resume 2 -> 1 -> 2"
KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
Steps = list[Tensor]
Case = Callable[[Path, int], Any]  # of a folder and the number of processes; weights after each step, or nothing


def record(folder: Path, case: str, told: str) -> None:
    """Write the row of a case that every process has a word on: "bits", or an error."""
    told = agreed(told)
    if os.environ["RANK"] == "0":
        write(folder, case, told)


def agreed(told: str) -> str:
    """The first word that is not "bits" of all processes, of which each must call this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return told
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, told)
    return next((word for word in said if word != "bits"), "bits")


def write(folder: Path, case: str, told: str) -> None:
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"case": case, "found": told}) + "\n")


def difference(mine: Steps, theirs: Steps) -> str:
    """ "bits", or the largest relative difference of all steps and the first step that differs."""
    if len(mine) != len(theirs) or not mine:
        return f"got {len(mine)} steps, expected {len(theirs)}"
    pairs = [(a.float(), b.float()) for a, b in zip(mine, theirs, strict=True)]
    differing = [step for step, pair in enumerate(zip(mine, theirs, strict=True), 1) if not torch.equal(*pair)]
    if not differing:
        return "bits"
    return f"near: {max(error(*pair) for pair in pairs):.1e} from step {differing[0]} of {len(mine)}"


@contextmanager
def one_process() -> Iterator[None]:
    """Without a launcher's variables, so that a Trainer is one of a single process."""
    kept = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


# Families. Each is run by launches of so many processes, in this order.


def of_trainer(folder: Path, world: int, again: bool) -> None:
    """DDP and FSDP2 in the Trainer."""
    from tests.support import ddp_worker
    from tests.support import sharding_trainer_worker as worker

    worker.allow_fsdp_on_cpus()
    cases: dict[str, Case] = {}
    for kind, fsdp in (("DDP", None), ("FSDP2", {})):
        for dtype in (torch.float32, torch.bfloat16):
            options = {"dtype": dtype, "max_steps": worker.STEPS}
            cases[f"{kind}, {str(dtype)[6:]}"] = lambda place, n, options=options, fsdp=fsdp: worker.run(
                place, world=n, fsdp=fsdp if n > 1 else None, **options
            )[1]
    for name in ddp_worker.CASES:
        cases[f"DDP, {name}"] = lambda place, n, name=name: ddp_worker.case(place, name, world=n)
    for name in worker.FEATURES:
        cases[f"FSDP2, {name}"] = lambda place, n, name=name: worker.feature(
            place, name, world=n, **({"fsdp": True} if n > 1 else {})
        )
    saves = {"save_strategy": "steps", "save_steps": 4}
    for kind, fsdp in (("DDP", None), *((f"FSDP2 {kind}", {"FSDP_STATE_DICT_TYPE": kind}) for kind in KINDS)):

        def train(place: Path, n: int, steps: int, resume: Path | None, fsdp: Any = fsdp) -> Steps:
            return worker.run(place, world=n, fsdp=fsdp, max_steps=steps, resume=resume, **saves)[1]

        resumes(cases, kind, folder, again, train)
    compared(folder, world, cases, again, whole="DDP, float32")


def of_int8(folder: Path, world: int, again: bool) -> None:
    """INT8 weights under FSDP2, by hand with release and in the Trainer."""
    from tests.support import int8_sharding_worker as worker

    worker.allow_fsdp_on_cpus()
    cases: dict[str, Case] = {}
    for name in ("accumulation", "checkpointing", "release", "tied"):
        cases[f"FSDP2, INT8, {name}"] = lambda place, n, name=name: worker.feature(place, name, fsdp=n > 1, world=n)
    saves = {"save_strategy": "steps", "save_steps": 4}

    def train(place: Path, n: int, steps: int, resume: Path | None) -> Steps:
        fsdp = {"FSDP_STATE_DICT_TYPE": KINDS[0]}
        return worker.run(place, world=n, model=worker.model(), fsdp=fsdp, max_steps=steps, resume=resume, **saves)[1]

    cases["DDP, INT8"] = lambda place, n: worker.run(place, world=n, model=worker.model())[1]
    cases["FSDP2, INT8"] = lambda place, n: (
        train(place, n, worker.STEPS, None)
        if n > 1
        else worker.run(place, model=worker.model(), max_steps=worker.STEPS)[1]
    )
    resumes(cases, "FSDP2, INT8", folder, again, train)
    compared(folder, world, cases, again, whole="FSDP2, INT8")
    if world > 1 and not again:
        each(folder, {"FSDP2, INT8, by hand": lambda: worker.one_process_and_shards(world)})


def of_zero_trainer(folder: Path, world: int, again: bool) -> None:
    """ZeRO in the Trainer; another number of processes is refused, so 2 -> 2."""
    from tests.support import zero_trainer_worker as worker

    cases: dict[str, Case] = {}
    for stage in (1, 2, 3):
        zero = worker.config(stage, zero=worker.exact(stage))
        cases[f"ZeRO {stage}, Trainer"] = lambda place, n, zero=zero: worker.run(
            place, world=n, deepspeed=zero if n > 1 else None, max_steps=worker.STEPS
        )[1]
        for name in ("accumulation", "clipping", "lora", *(["mini"] if stage == 3 else [])):
            cases[f"ZeRO {stage}, {name}"] = lambda place, n, name=name, stage=stage: worker.feature(
                place, name, stage if n > 1 else None, world=n
            )
    for stage in (2, 3):
        cases[f"ZeRO {stage}, resume 2 -> 2"] = lambda place, n, stage=stage: (
            worker.resumed(place, stage) if n > 1 else worker.run(place, max_steps=5)[1][2:]
        )
    compared(folder, world, cases, again)


def of_zero_engine(folder: Path, world: int, again: bool) -> None:
    """ZeRO without the Trainer, 50 steps."""
    from tests.support import zero_worker as worker

    worker.deepspeed.init_distributed(BACKEND, verbose=False)
    names = [name for name in worker.CASES if "offload" not in name]
    checks: dict[str, Callable[[], float | None]] = {}
    for name in names:
        title = name.replace("zero", "ZeRO")
        checks[title] = lambda name=name: worker.follows_one_process(
            name, worker.STEPS if name.count(",") == 0 else worker.SHORT
        )
    for stage in (1, 2, 3):
        checks[f"ZeRO {stage}, bfloat16"] = lambda stage=stage: worker.bfloat16(stage)
        checks[f"ZeRO {stage}, resume by hand"] = lambda stage=stage: worker.resumes(stage, folder, world)
    each(folder, checks)


def of_release(folder: Path, world: int, again: bool) -> None:
    """Gradient release under FSDP2 and in place of DDP, against the same engine without it."""
    from torch.distributed.device_mesh import init_device_mesh

    from tests.support import release_accumulation_worker, release_ddp_worker
    from tests.support import release_worker as worker

    alone = folder / "alone.pt"
    if os.environ["RANK"] == "0":
        torch.save(release_accumulation_worker.alone([*release_accumulation_worker.CASES]), alone)
    start_group()
    dist.barrier()
    mesh = init_device_mesh(DEVICE, (world,))
    checks: dict[str, Callable[[], float | None]] = {}
    for name, case in worker.FSDP2_CASES.items():
        checks[f"FSDP2, release, {name}"] = lambda name=name, case=case: worker.compare_fsdp2(mesh, {name: case})
    checks["FSDP2, release, norms"] = lambda: worker.norms(mesh)
    checks["FSDP2, release, resume"] = lambda: worker.resume(mesh)
    for name, one in release_ddp_worker.CASES.items():
        checks[f"DDP, release, {name}"] = lambda name=name, one=one: release_ddp_worker.compare({name: one})
    for name, found in torch.load(alone).items():
        checks[f"DDP and FSDP2, release and accumulation, {name}"] = lambda name=name, found=found: (
            release_accumulation_worker.compare({name: found})
        )
    each(folder, checks)


# Function, numbers of processes of its launches, the module that takes long to import.
FAMILIES: dict[str, tuple[Callable[[Path, int, bool], None], tuple[int, ...], str]] = {
    "trainer": (of_trainer, (2, 1, 2), "ddp_worker"),
    "int8": (of_int8, (2, 1, 2), "int8_sharding_worker"),
    "zero_engine": (of_zero_engine, (2,), "zero_worker"),
    "release": (of_release, (2,), "release_accumulation_worker"),
    "zero_trainer": (of_zero_trainer, (2, 1), "zero_trainer_worker"),
}


def resumes(cases: dict[str, Case], kind: str, folder: Path, again: bool, train: Any) -> None:
    """Checkpoints of 2, then 1, then 2 processes."""

    def case(place: Path, n: int) -> Steps:
        if n == 1:
            return train(folder / f"one {kind}", n, 8, folder / f"two {kind}" / "checkpoint-4")
        if not again:
            return train(folder / f"two {kind}", n, 4, None)
        return train(folder / f"again {kind}", n, 12, folder / f"one {kind}" / "checkpoint-8")

    cases[f"{kind}{RESUME}"] = case


def compared(folder: Path, world: int, cases: dict[str, Case], again: bool, whole: str = "") -> None:
    """Run cases in this launch's processes; once there are those of two and of one, compare them.

    ``whole`` is the case whose run in one process is that of the resumed ones, had nobody stopped them.
    """
    for name, case in cases.items():
        resumed = name.endswith(RESUME)
        if again and not resumed:
            continue
        files = [folder / f"{name}, {n}.pt" for n in (2, 1, "again")]
        told, steps = "bits", []
        try:
            with one_process() if world == 1 and not resumed else nullcontext():
                steps = case(folder / name, world)
        except Exception:
            traceback.print_exc()
            told = _last_line(traceback.format_exc())
        told = agreed(told)  # one process may fail alone, and the others must not begin the next case without it
        if os.environ["RANK"] != "0":
            continue
        if told != "bits":
            write(folder, name, told)
            continue
        torch.save(steps, files[2 if again else 2 - world])
        if again:
            found = [step for file in files for step in torch.load(file)]
            write(folder, name, difference(found, torch.load(folder / f"{whole}, 1.pt")[: len(found)]))
        elif world == 1 and not resumed:
            write(folder, name, difference(torch.load(files[0]), steps))


def each(folder: Path, checks: dict[str, Callable[[], float | None]]) -> None:
    """Checks that compare by themselves, and return the largest difference where they allow one."""
    for name, check in checks.items():
        try:
            differing = check()
        except Exception:
            traceback.print_exc()
            record(folder, name, _last_line(traceback.format_exc()))
        else:
            record(folder, name, f"near: {differing:.1e}, the largest" if differing else "bits")


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:400]


def as_one_rank(family: str, folder: Path, again: bool) -> None:
    """The function that every process of the launcher runs."""
    world = int(os.environ["WORLD_SIZE"])
    if world == 1 and DEVICE == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    torch.set_num_threads(1)
    importlib.import_module(f"tests.support.{FAMILIES[family][2]}")
    with turn(folder / f"turn of {world}{' again' if again else ''}"):
        choose_gpu()
        FAMILIES[family][0](folder, world, again)


@contextmanager
def turn(mark: Path) -> Iterator[None]:
    """Wait until no other family computes on these GPUs: NCCL's kernels wait for one another at full speed."""
    if os.environ["RANK"] != "0":
        while not mark.exists():
            time.sleep(0.05)
        yield
        return
    with open(os.environ["FOAM_HF_TEST_TURN"], "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mark.touch()
        yield


def one_family(family: str, folder: Path) -> None:
    for index, world in enumerate(FAMILIES[family][1]):
        launch(world, as_one_rank, family, folder, index == 2)


def main(folder: Path, families: list[str]) -> list[dict[str, str]]:
    """Run families at the same time; returns the rows, which are also in FOLDER/nccl.json."""
    started, children = time.monotonic(), {}
    pairs = max(1, torch.cuda.device_count() // 2) if DEVICE == "cuda" else 1
    environment = dict(os.environ) if DEVICE == "cuda" else {**os.environ, "TRITON_INTERPRET": "1"}
    for index, family in enumerate(families):
        pair = index % pairs
        environment["FOAM_HF_TEST_TURN"] = str(folder / f"pair{pair}")
        if DEVICE == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = f"{2 * pair},{2 * pair + 1}"
        place = folder / family
        place.mkdir(parents=True)
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.nccl_worker", "--family", family, str(place)]
        with (place / "log.txt").open("w") as log:
            children[family] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
    rows: list[dict[str, Any]] = []
    for family, child in children.items():
        try:
            code: Any = child.wait(max(1.0, LIMIT_S - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            code = f"ended after {LIMIT_S:.0f} s"
            child.wait()
        lines = folder / family / "rows.jsonl"
        found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
        if code != 0:
            last = (folder / family / "log.txt").read_text(errors="replace")[-3000:]
            found.append({"case": f"{family}, whole", "found": f"exit {code}: {last}"})
        rows += [{"family": family, **row} for row in found]
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    content = {"benchmark": "nccl", "machine": {"name": name, "torch": torch.__version__}, "backend": BACKEND}
    content |= {"seconds": round(time.monotonic() - started), "rows": rows}
    (folder / "nccl.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    if sys.argv[1] == "--family":
        one_family(sys.argv[2], Path(sys.argv[3]))
    else:
        for row in main(Path(sys.argv[1]), sys.argv[2:] or list(FAMILIES)):
            print(f"{row['case']}: {row['found']}", flush=True)
