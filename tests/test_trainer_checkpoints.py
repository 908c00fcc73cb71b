"""Checkpoints that a crash, a full disk or a bad bit has touched: training goes on exactly, or says what is wrong."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from foam_hf import trainer_checkpoints
from foam_hf.trainer_checkpoints import MANIFEST
from tests.test_trainer_runs import assert_same_bits, make_trainer, weights
from tests.tiny_models import tiny_qwen2, tiny_roberta

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


class PulledOut(BaseException):
    """What a process does not survive."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run with checkpoints 2, 4 and 6, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    trainer = make_trainer(folder, **SAVING)
    trainer.train()
    return folder, weights(trainer)


@pytest.fixture
def run(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of it that stopped behind checkpoint 4."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    return tmp_path / "run"


def resume(folder: Path, checkpoint: Any = True, **settings: Any) -> dict[str, Any]:
    trainer = make_trainer(folder, **{**SAVING, **settings})
    trainer.train(resume_from_checkpoint=checkpoint)
    return weights(trainer)


def flip(path: Path, place: int = -20) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("dies_in", ["save_model", "_save_rng_state", "_push_from_checkpoint"])
def test_a_save_that_was_killed_is_passed_by(monkeypatch, whole, run: Path, dies_in: str, caplog) -> None:
    def die(self: Any, *args: Any, **kwargs: Any) -> None:
        raise PulledOut

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, dies_in if dies_in != "_push_from_checkpoint" else "_save_scaler", die)
        with pytest.raises(PulledOut):
            resume(run, save_total_limit=1)
    assert (run / "checkpoint-4").is_dir() and (run / "checkpoint-6").is_dir()
    assert_same_bits(resume(run), whole[1])
    assert "newer checkpoints are incomplete: checkpoint-6 (its save did not finish)" in caplog.text


def test_old_checkpoints_go_only_when_the_new_one_is_whole(monkeypatch, run: Path) -> None:
    (run / "checkpoint-9").mkdir()
    (run / "checkpoint-9" / MANIFEST).write_text(json.dumps(trainer_checkpoints._WRITING))
    resume(run, save_total_limit=1)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]
    assert json.loads((run / "checkpoint-6" / MANIFEST).read_text())["complete"]


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "model.safetensors", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST]
)
def test_a_changed_file_is_refused_by_name(run: Path, name: str) -> None:
    path = run / "checkpoint-4" / name
    before = path.read_bytes()
    for damage in (lambda: flip(path), lambda: path.write_bytes(before[:-7]), path.unlink):
        damage()
        if name == MANIFEST and not path.exists():
            break  # a checkpoint of an older version
        with pytest.raises(ValueError, match=rf"checkpoint-4 cannot be resumed from: {name}.*checkpoint-2$"):
            resume(run)
        with pytest.raises(ValueError, match=name):
            resume(run, str(run / "checkpoint-4"))
        path.write_bytes(before)


def test_without_a_manifest_what_can_be_checked_is(whole, run: Path) -> None:
    folder = run / "checkpoint-4"
    (folder / MANIFEST).unlink()
    for name, told in (
        ("optimizer.pt", "optimizer.pt is"),
        ("scheduler.pt", "scheduler.pt is"),
        ("model.safetensors", "its header tells of"),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-300])
        with pytest.raises(ValueError, match=told):
            resume(run)
        (folder / name).write_bytes(before)
    (folder / "scheduler.pt").rename(run / "elsewhere")
    with pytest.raises(ValueError, match=r"it has optimizer.pt but no scheduler.pt"):
        resume(run)
    (run / "elsewhere").rename(folder / "scheduler.pt")
    assert_same_bits(resume(run), whole[1])


def test_no_complete_checkpoint_is_an_error(run: Path) -> None:
    for folder in run.glob("checkpoint-*"):
        (folder / MANIFEST).unlink()
        (folder / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete: checkpoint-4 \(it has no trainer_state"):
        resume(run)


def test_a_save_that_fails_says_so_and_what_is_left(monkeypatch, run: Path) -> None:
    def full(self: Any, *args: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(Trainer, "_save_rng_state", full)
    with pytest.raises(OSError, match=r"checkpoint-6 could not be saved: .*bytes are free.*checkpoint-4$"):
        resume(run)


def test_the_best_model_is_checked_before_it_is_loaded(monkeypatch, tmp_path: Path) -> None:
    settings = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    original = Trainer._load_best_model

    def after_a_bad_bit(self: Any) -> None:
        flip(Path(self.state.best_model_checkpoint) / "model.safetensors")
        original(self)

    monkeypatch.setattr(Trainer, "_load_best_model", after_a_bad_bit)
    with pytest.raises(ValueError, match="model.safetensors has other contents than were saved"):
        make_trainer(tmp_path, **settings).train()


def test_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    make_trainer(tmp_path, optim="adamw_torch", optim_args=None, **SAVING).train()
    assert not list(tmp_path.rglob(MANIFEST))
    (tmp_path / "checkpoint-6" / "rng_state.pth").unlink()
    make_trainer(tmp_path, optim="adamw_torch", optim_args=None, **SAVING).train(resume_from_checkpoint=True)


def test_large_files_have_a_checksum_for_each_piece(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer_checkpoints, "PIECE", 1 << 20)
    path = tmp_path / "file"
    path.write_bytes(os.urandom((5 << 19) + 3))
    sums = trainer_checkpoints._checksums([path])[path]
    assert sums["bytes"] == (5 << 19) + 3 and len(set(sums["crc32"])) == 3


@pytest.mark.slow
def test_killed_processes_go_on_exactly(tmp_path: Path) -> None:
    """The fault campaign, a small one."""
    script = Path(__file__).parent.parent / "recipes" / "benchmarks" / "faults.py"
    main = runpy.run_path(str(script))["main"]
    found = main(["--kills", "2", "--parts", "kills", "--results", str(tmp_path / "faults.json")])["kills"]
    assert found["trials"] == 2 == found.get("exact", 0) + found.get("refused", 0)


class OnDemand(Trainer):
    """Marks a checkpoint while it is written, as enable_jit_checkpoint does."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint-is-incomplete.txt").write_text("being written")
        super()._save_checkpoint(*args, **kwargs)
        (folder / "checkpoint-is-incomplete.txt").unlink()


def test_a_mark_of_transformers_that_goes_again_is_no_file_of_a_checkpoint(whole, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make_trainer(tmp_path, trainer_class=OnDemand, **SAVING).train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    manifest = tmp_path / "checkpoint-4" / MANIFEST
    assert_same_bits(resume(tmp_path), whole[1])
    content = json.loads(manifest.read_text())  # of a version that took it for one
    content["files"]["checkpoint-is-incomplete.txt"] = {"bytes": 13, "crc32": [1]}
    manifest.write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert_same_bits(resume(tmp_path), whole[1])


def test_an_upload_that_fails_is_not_taken_for_a_failed_save(monkeypatch, run: Path, whole) -> None:
    def unreachable(self: Any, *args: Any) -> None:
        raise ConnectionError("the hub is unreachable")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_push_from_checkpoint", trainer_checkpoints.finishing(unreachable))
        trainer = make_trainer(run, **SAVING)
        trainer.args.push_to_hub = True
        with pytest.raises(ConnectionError, match="^the hub is unreachable$"):
            trainer.train(resume_from_checkpoint=True)
    shutil.rmtree(run / "checkpoint-4")
    assert_same_bits(resume(run), whole[1])  # from checkpoint 6, which is whole


def test_a_checkpoint_that_lacks_a_trained_weight_is_refused(run: Path) -> None:
    file = run / "checkpoint-4" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("query.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    (run / "checkpoint-4" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=rf"no values for 1 of \d+ trained weights of Roberta.*, {name} the first"):
        resume(run)
    frozen = tiny_roberta()
    frozen.get_parameter(name).requires_grad_(False)
    trainer_checkpoints.refuse_missing(frozen, [name])
    shared = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    shared["b"] = shared["a"]
    trainer_checkpoints.refuse_missing(shared, ["a.weight", "a.bias"])
    tied = tiny_qwen2()
    trainer_checkpoints.refuse_missing(tied, ["lm_head.weight"])
    with pytest.raises(ValueError, match="model.embed_tokens.weight the first"):
        trainer_checkpoints.refuse_missing(tied, ["lm_head.weight", "model.embed_tokens.weight"])
