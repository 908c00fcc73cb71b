"""Two GPUs against one, over NCCL, by every engine; and a run of which one process is killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.support.nccl_worker as worker
from tests.support.tolerances import TOLERANCES

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

# Cases that are near, as sums over processes have another order; all others have the bits of one process.
NEAR = {
    r"FSDP2, (clipping|factored)": "FSDP2 against one process, sums over ranks",
    r"FSDP2, muon.*": "Muon under FSDP2 against one GPU, 3 steps",
    r"ZeRO [12], clipping": "clipping under ZeRO, sums over ranks",
    r"ZeRO [123](, (row|round robin|sub groups|bfloat16 state))?": "ZeRO against one GPU, 50 steps",
    r"ZeRO [12], (Trainer|accumulation|lora|resume 2 -> 2)": "ZeRO against one GPU, 50 steps",
    r"ZeRO [123], bfloat16": "ZeRO against one GPU, bfloat16, 4 steps",
    r"ZeRO 3, (Trainer|accumulation|clipping|lora|mini|resume 2 -> 2)": "ZeRO 3 against one process, 10 steps",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nccl")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"FOAM_HF_TEST_DEVICE": "cuda", "DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.nccl_worker", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return json.loads((folder / "nccl.json").read_text())["rows"]


@pytest.mark.parametrize("family", worker.FAMILIES)
def test_two_gpus_follow_one(rows: list[dict[str, Any]], family: str) -> None:
    mine = {row["case"]: row["found"] for row in rows if row["family"] == family}
    assert mine
    wrong = {case: found for case, found in mine.items() if not _allowed(case, found)}
    assert not wrong, wrong


def _allowed(case: str, found: str) -> bool:
    tolerance = next((name for pattern, name in NEAR.items() if re.fullmatch(pattern, case)), None)
    near = re.match(r"near: ([^\s,]+)", found)
    return found == "bits" or bool(near and tolerance and float(near[1]) <= TOLERANCES[tolerance].allowed)


def test_a_process_that_nobody_watches_ends_within_the_timeout(tmp_path: Path) -> None:
    """NCCL does not notice that a process has ended: torch's watchdog ends the others after ddp_timeout."""
    from foam_hf.trainer.manifest import check
    from tests.support import killed_rank_worker as killed

    survivor, dead = killed.two_processes(tmp_path, "cuda", 60 + 3 * killed.TIMEOUT_S)
    print(survivor.stdout[-4000:])
    assert dead.returncode == -9 and survivor.returncode not in (0, -9)
    assert "a collective failed, as another process" in survivor.stdout or "Watchdog caught" in survivor.stdout
    check(tmp_path / f"checkpoint-{killed.SAVED}", lambda name: True)


def test_torchrun_ends_the_others_and_names_the_one_that_died(tmp_path: Path) -> None:
    from foam_hf.trainer.manifest import check
    from tests.support import killed_rank_worker as killed

    done = killed.under_torchrun(tmp_path, "cuda", 60 + 3 * killed.TIMEOUT_S)
    print(done.stdout[-4000:])
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stdout
    check(tmp_path / f"checkpoint-{killed.SAVED}", lambda name: True)
