"""Muon on matrices that ranks share: who owns which; bits on two GPUs, which `test_sharding.py` compares over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tests.support.gathering_worker as worker
from foam_hf.optimizer.shared_matrices import Matrix, Sharing, owners_of
from foam_hf.rules.muon import cost
from foam_hf.tensors.step import Member

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_work_is_dealt_out_evenly(ranks: int) -> None:
    """Two layers of LLaMA-7B: the most that a rank has is less than a matrix away from the mean."""
    sharing = Sharing(None, tuple(range(8) for _ in range(ranks)))
    shapes = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)] * 2
    members = [
        Member(torch.empty(shape, device="meta"), {}, (), 8, "muon", stream) for stream, shape in enumerate(shapes)
    ]
    owned = owners_of([Matrix(member, 0, (), sharing) for member in members])
    assert sorted(matrix.member.stream for some in owned for matrix in some) == list(range(len(shapes)))
    loads = [sum(cost(*matrix.member.p.shape) for matrix in some) for some in owned]
    assert max(loads) - sum(loads) / ranks < max(cost(*shape) for shape in shapes)
    alone = [owners_of([Matrix(member, 0, (), sharing)]) for member in members[:ranks]]
    assert [[bool(some) for some in each].index(True) for each in alone] == list(range(ranks))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_have_the_bits_of_one(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, worker.__file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert len([*tmp_path.glob("done *")]) == 2
