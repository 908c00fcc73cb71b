"""A run of two processes of which one is killed: what the other says and does, and the checkpoint before it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError

import tests.support.killed_rank_worker as worker
from foam_hf.trainer.lost_process import explain_lost_process
from foam_hf.trainer.manifest import begin, check, complete_manifest

LIMIT_S = 200  # on a busy machine
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5834."
NCCL = "NCCL error in: NCCLUtils.cpp:94, {}"


@pytest.mark.long
@pytest.mark.slow
def test_the_survivor_names_the_step_and_the_checkpoint_which_goes_on_exactly(tmp_path: Path) -> None:
    survivor, killed = worker.two_processes(tmp_path, "cpu", LIMIT_S)
    assert killed.returncode == -9
    assert survivor.returncode not in (0, -9), survivor.stdout[-3000:]
    (line,) = [line for line in survivor.stdout.splitlines() if "a collective failed" in line]
    saved = tmp_path / f"checkpoint-{worker.SAVED}"
    assert line.startswith(f"process 0 of 2 stops after step {worker.KILLED}: a collective failed, as another")
    assert line.endswith(f"finished is {saved}, from which resume_from_checkpoint=True goes on")
    check(saved, lambda name: True)
    expected = worker.train(tmp_path / "alone", 1, save_strategy="no")
    resumed = worker.train(tmp_path / "resumed", 1, resume=saved)
    assert all(map(torch.equal, resumed, expected[worker.SAVED :])) and len(resumed) == worker.STEPS - worker.SAVED


def lines_on(error: BaseException, output: Path, caplog: Any, world: int = 2, **args: Any) -> list[str]:
    """What is logged if a run in `output` ends by `error` after three steps."""
    settings = {"world_size": world, "process_index": 0, "output_dir": str(output), "save_only_model": False, **args}
    trainer = SimpleNamespace(args=SimpleNamespace(**settings), state=SimpleNamespace(global_step=3))
    caplog.clear()
    with pytest.raises(type(error)) as caught, explain_lost_process(trainer):
        raise error
    assert caught.value is error and error.__context__ is None
    return caplog.messages


def save(output: Path, step: int) -> Path:
    folder = output / f"checkpoint-{step}"
    begin(folder)
    (folder / "model.safetensors").write_bytes(bytes(100))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    complete_manifest(folder, {})
    return folder


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError(GLOO.replace("Connection closed by peer", "Read error [127.0.0.1]:1: Connection reset by peer")),
        RuntimeError("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation"),
        RuntimeError(f"[Rank 0]: Rank 2 failed to pass monitoredBarrier in 60000 ms\n Original exception: \n{GLOO}"),
        DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
        DistBackendError(NCCL.format("ncclRemoteError: A call failed possibly due to a remote process exiting.")),
    ],
    ids=lambda error: str(error)[-40:],
)
def test_errors_of_a_lost_process_are_explained_and_go_on_as_they_are(
    error: Exception, tmp_path: Path, caplog: Any
) -> None:
    (line,) = lines_on(error, tmp_path, caplog)
    assert line.startswith("process 0 of 2 stops after step 3: a collective failed")
    assert lines_on(error, tmp_path, caplog, world=1) == []


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        RuntimeError("Caught ConnectionResetError in DataLoader worker process 0: Connection reset by peer"),
        TimeoutError("Timed out waiting for the server that generates"),
        DistBackendError(NCCL.format("ncclInvalidUsage: This usually reflects invalid usage. Duplicate GPU detected")),
        DistBackendError(NCCL.format("ncclUnhandledCudaError: Failed to CUDA calloc async 608 bytes, out of memory")),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("wrong"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: str(error)[-40:],
)
def test_other_errors_are_not_taken_for_a_lost_process(error: BaseException, tmp_path: Path, caplog: Any) -> None:
    assert lines_on(error, tmp_path, caplog) == []


def test_a_checkpoint_is_named_if_it_is_this_runs_and_whole(tmp_path: Path, caplog: Any) -> None:
    def told(**args: Any) -> str:
        (line,) = lines_on(RuntimeError(GLOO), tmp_path, caplog, **args)
        return line.partition("says why; ")[2]

    nothing = f"no checkpoint of step 3 or before is complete in {tmp_path}, as this machine sees it"
    assert told() == nothing
    (tmp_path / "checkpoint-3").mkdir()
    assert told() == nothing
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    newest = "the newest checkpoint whose save finished is"
    assert told() == f"{newest} {two}, from which resume_from_checkpoint=True goes on"
    assert told(save_only_model=True) == f"{newest} {two}, which has weights alone, as save_only_model asks"
    other = save(tmp_path, 500)  # of another run in this folder, which True would take
    assert told() == f"{newest} {two}, from which resume_from_checkpoint={str(two)!r} goes on"
    other.rename(tmp_path / "another run")
    (two / "model.safetensors").unlink()
    assert told() == f"{newest} {one}, from which resume_from_checkpoint={str(one)!r} goes on"


def test_what_cannot_be_read_does_not_hide_the_error(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    two = save(tmp_path, 2)
    (tmp_path / "checkpoint-3" / "trainer_state.json").mkdir(parents=True)
    (line,) = lines_on(RuntimeError(GLOO), tmp_path, caplog)
    assert f"finished is {two}, from which resume_from_checkpoint={str(two)!r}" in line

    def gone(self: Path, pattern: str) -> Any:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "glob", gone)
    (line,) = lines_on(RuntimeError(GLOO), tmp_path, caplog)
    assert line.endswith(f"{tmp_path} cannot be read: [Errno 116] Stale file handle")
