"""Checkpoints that a crash, a full disk or a bad bit has touched: training goes on exactly, or says what is wrong."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from foam_hf.folders import MANIFEST
from foam_hf.trainer import manifest as checkpoint_manifest
from foam_hf.trainer import saving as trainer_saving
from foam_hf.trainer import weights as trainer_weights
from tests.support.tiny_models import tiny_qwen2, tiny_roberta
from tests.trainer.test_runs import assert_same_bits, make_trainer, weights

pytestmark = pytest.mark.long

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


UNFINISHED = {"version": 1, "complete": False}  # as version 0.1.0 wrote it


def begun_elsewhere(folder: Path, dead: bool) -> None:
    """A save that another process began; a dead one wrote last two days ago, or was killed here."""
    script = f"from pathlib import Path; from foam_hf.trainer.manifest import begin; begin(Path({str(folder)!r}))"
    if dead:
        subprocess.run([sys.executable, "-c", script], check=True)
    else:
        folder.mkdir()
        (folder / MANIFEST).write_text(json.dumps(UNFINISHED))


def test_old_checkpoints_go_only_when_the_new_one_is_whole(run: Path) -> None:
    begun_elsewhere(run / "checkpoint-9", dead=True)
    begun_elsewhere(run / "checkpoint-8", dead=False)
    for path in (run / "checkpoint-8" / MANIFEST, run / "checkpoint-8"):
        os.utime(path, (path.stat().st_mtime - 2 * 86400,) * 2)
    resume(run, save_total_limit=1)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]
    assert json.loads((run / "checkpoint-6" / MANIFEST).read_text())["complete"]


def test_only_a_save_that_is_surely_dead_is_deleted_and_only_for_the_limit(run: Path, caplog) -> None:
    """Of two runs in one folder, neither takes the other's checkpoint under its hands."""
    begun_elsewhere(run / "checkpoint-9", dead=True)
    begun_elsewhere(run / "checkpoint-8", dead=False)
    resume(run, save_total_limit=10)
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 4, 6, 8, 9)}
    shutil.rmtree(run / "checkpoint-6")
    resume(run, save_total_limit=1)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    assert "checkpoint-9 is deleted" in caplog.text and "checkpoint-8 is deleted" not in caplog.text
    begun_elsewhere(run / "checkpoint-10", dead=False)
    resume(run, save_steps=10, max_steps=10)
    assert "checkpoint-10 is being saved here while another save of it has not finished" in caplog.text


def test_a_damaged_manifest_stops_only_who_reads_that_checkpoint(run: Path) -> None:
    for step, content in ((2, b""), (1, b"[]"), (3, b'{"complete": true, "files": {}}'), (5, b"\xff")):
        (run / f"checkpoint-{step}").mkdir(exist_ok=True)
        (run / f"checkpoint-{step}" / MANIFEST).write_bytes(content)
    resume(run, str(run / "checkpoint-4"), save_total_limit=6)
    for step in (1, 2, 3, 5):
        with pytest.raises(ValueError, match=r"foam_checkpoint.json is damaged; if that file is deleted"):
            resume(run, str(run / f"checkpoint-{step}"))
    (run / "checkpoint-2" / MANIFEST).unlink()
    resume(run, str(run / "checkpoint-2"))


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
        with pytest.raises(ValueError, match=rf"(?s)checkpoint-4 cannot be resumed from: {name}.*checkpoint-2$"):
            resume(run)
        with pytest.raises(ValueError, match=name):
            resume(run, str(run / "checkpoint-4"))
        path.write_bytes(before)


def test_without_a_manifest_what_can_be_checked_is(whole, run: Path) -> None:
    folder = run / "checkpoint-4"
    (folder / MANIFEST).unlink()
    for name, message in (
        ("optimizer.pt", "optimizer.pt is"),
        ("scheduler.pt", "scheduler.pt is"),
        ("model.safetensors", "its header says"),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-300])
        with pytest.raises(ValueError, match=message):
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


BEST = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}


def lose(path: Path) -> None:
    """A checkpoint without the weights that are trained first, and without its manifest."""
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if "query" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    (path.parent / MANIFEST).unlink()


def reshape(path: Path) -> None:
    tensors = load_file(path)
    changed = {name: tensor[:1].clone() if "query.weight" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, path, metadata={"format": "pt"})
    (path.parent / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "model.safetensors has other contents than were saved"),
        (Path.unlink, "model.safetensors is missing, without which nothing"),
        (lose, "no values for 4 trained weights of RobertaForSequenceClassification"),
        (reshape, "query.weight has shape"),
    ],
)
def test_a_bad_best_model_does_not_lose_a_finished_training(
    monkeypatch, tmp_path: Path, caplog, damage: Any, message: str
) -> None:
    original = Trainer._load_best_model
    trained: dict[str, Any] = {}

    def after_the_last_step(self: Any) -> None:
        damage(tmp_path / "checkpoint-2" / "model.safetensors")
        trained.update(weights(self))
        original(self)

    monkeypatch.setattr(Trainer, "_load_best_model", after_the_last_step)
    worse = itertools.count(0, -1)
    settings = {**BEST, "save_total_limit": 1, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = make_trainer(tmp_path, compute_metrics=lambda _: {"score": next(worse)}, **settings)
    trainer.train()
    assert_same_bits(weights(trainer), trained)
    assert message in caplog.text and "Trainer.save_model() saves it" in caplog.text
    assert (tmp_path / "checkpoint-6").is_dir()  # Trainer deletes all but the best one, where there is one


class Touch(TrainerCallback):
    """What callbacks do to a checkpoint that was just saved."""

    def __init__(self, touch: Any) -> None:
        self.touch = touch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.touch(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def thin_out(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()


def annotate(folder: Path) -> None:
    for name in ("config.json", "trainer_state.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "trained_on": "rows"} if name[0] == "c" else content))
    torch.save({}, folder / "value_head.pt", _use_new_zipfile_serialization=False)  # torch's old format
    (folder / "note").mkdir()
    (folder / "note" / "readme.txt").write_text("mine")


@pytest.mark.parametrize("touch", [annotate, thin_out, shutil.rmtree])
def test_what_callbacks_do_in_on_save_is_no_damage(tmp_path: Path, caplog, touch: Any) -> None:
    trainer = make_trainer(tmp_path, callbacks=[Touch(touch)], **BEST)
    trainer.train()
    if touch is shutil.rmtree:
        return
    assert "is not loaded" not in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-6")
    resume(tmp_path)
    assert ("has no state of the optimizer: moments and schedule start anew" in caplog.text) == (touch is thin_out)


def test_a_file_that_comes_and_goes_while_a_checkpoint_is_sealed_stops_nothing(monkeypatch, tmp_path: Path) -> None:
    """Such as an uploader's lock, or what a network file system leaves of a file that was open."""
    original, lists = trainer_saving.files_of, itertools.count()

    def files_of(folder: Path) -> list[Path]:
        gone = [] if next(lists) % 2 else [folder / ".nfs0001"]
        return [*original(folder), *gone]

    monkeypatch.setattr(trainer_saving, "files_of", files_of)
    make_trainer(tmp_path, **SAVING).train()
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resume(tmp_path)


def test_a_folder_that_a_callback_took_away_stops_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[Touch(shutil.rmtree)], **SAVING)
    trainer.train()
    assert trainer.state.global_step == 6 and not list(tmp_path.glob("checkpoint-*"))


def change_state(folder: Path) -> None:
    content = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**content, "save_steps": 3}))


@pytest.mark.parametrize(
    ("change", "step"),
    [
        (change_state, "delete foam_checkpoint.json, and the file is read as it is"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "delete scheduler.pt and foam_checkpoint.json too"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "delete optimizer.pt and foam_checkpoint.json too"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "if that is meant, delete foam_checkpoint.json too"),
    ],
)
def test_a_refusal_names_the_step_that_accepts_a_change(run: Path, change: Any, step: str) -> None:
    folder = run / "checkpoint-4"
    change(folder)
    with pytest.raises(ValueError, match=step):
        resume(run)
    for name in ("optimizer.pt", "scheduler.pt", MANIFEST):
        if name in step:
            (folder / name).unlink()
    resume(run)


def test_what_resuming_does_not_read_is_not_checked(whole, run: Path) -> None:
    folder = run / "checkpoint-4"
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    (folder / "training_args.bin").write_bytes(b"cut off")
    torch.save({}, folder / "value_head.pt", _use_new_zipfile_serialization=False)
    content = json.loads((folder / MANIFEST).read_text())
    sums = checkpoint_manifest.checksums([folder / name for name in content["files"]], 1000)  # of another version
    files = {path.name: checksum for path, checksum in sums.items()}
    (folder / MANIFEST).write_text(json.dumps({**content, "piece": 1000, "files": files}))
    flip(folder / "training_args.bin", 0)
    assert_same_bits(resume(run), whole[1])
    shutil.rmtree(run / "checkpoint-6")
    (folder / MANIFEST).unlink()
    assert_same_bits(resume(run), whole[1])


def test_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    make_trainer(tmp_path, optim="adamw_torch", optim_args=None, **SAVING).train()
    assert not list(tmp_path.rglob(MANIFEST))
    (tmp_path / "checkpoint-6" / "rng_state.pth").unlink()
    make_trainer(tmp_path, optim="adamw_torch", optim_args=None, **SAVING).train(resume_from_checkpoint=True)


def test_large_files_have_a_checksum_for_each_piece(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom((5 << 19) + 3))
    sums = checkpoint_manifest.checksums([path], 1 << 20)[path]
    assert sums["bytes"] == (5 << 19) + 3 and len(set(sums["crc32"])) == 3
    assert sums["crc32"][2] == zlib.crc32(path.read_bytes()[2 << 20 :])
    path.write_bytes(os.urandom(3000))  # pieces that are smaller than what is read at once
    assert len(checkpoint_manifest.checksums([path], 1000)[path]["crc32"]) == 3


@pytest.mark.slow
def test_killed_processes_go_on_exactly(tmp_path: Path) -> None:
    """The fault campaign, a small one."""
    from recipes.benchmarks.robustness import faults

    found = faults.main(["--kills", "2", "--parts", "kills", "--results", str(tmp_path / "faults.json")])["kills"]
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
        patch.setattr(Trainer, "_push_from_checkpoint", trainer_saving.wrap_after_last_file(unreachable))
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
    trainer_weights.refuse_missing(frozen, [name])
    shared = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    shared["b"] = shared["a"]
    trainer_weights.refuse_missing(shared, ["a.weight", "a.bias"])
    tied = tiny_qwen2()
    trainer_weights.refuse_missing(tied, ["lm_head.weight"])
    with pytest.raises(ValueError, match="model.embed_tokens.weight the first"):
        trainer_weights.refuse_missing(tied, ["lm_head.weight", "model.embed_tokens.weight"])
