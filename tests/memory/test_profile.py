"""Memory through a training step: sampled from an allocator that counts CPU tensors in place of a GPU's, and drawn."""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback, TrainingArguments

from foam_hf import FOAM, OptimizerMemoryCallback, foam_param_groups
from foam_hf.cli import command as cli
from foam_hf.memory import MemoryBreakdown
from foam_hf.memory import profile as step_profile
from foam_hf.memory.profile import BACKWARD, FORWARD, OPTIMIZER, Sample, StepRecorder, draw
from foam_hf.trainer import callback
from tests.support import tiny_models
from tests.trainer.test_callback import make_trainer, table_rows

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


class Allocator(TorchDispatchMode):
    """Counts the CPU tensors that live while it is entered, as CUDA's allocator does its own; called, it tells."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.watched: dict[int, Any] = {}
        self.allocated = self.peak = 0
        self._count(there)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._count(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _count(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.watched[key] = weakref.ref(storage, lambda _, key=key: self._free(key))
                self.allocated += storage.nbytes()
                self.peak = max(self.peak, self.allocated)

    def _free(self, key: int) -> None:
        self.allocated -= self.sizes.pop(key)
        del self.watched[key]

    def __call__(self) -> tuple[int, int]:
        return self.allocated, self.peak


def recorded(checkpointing: bool = False, passes: int = 1) -> tuple[list[Sample], nn.Module, Any, Allocator]:
    """The samples of the second of three steps."""
    model = tiny_models.tiny_llama(hidden_size=64, intermediate_size=176, num_hidden_layers=4, vocab_size=500).train()
    model.config.use_cache = False
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    optimizer = FOAM(foam_param_groups(model))
    tokens = torch.randint(3, 60, (8, 32))
    samples: list[Sample] = []
    with Allocator([*model.parameters(), *model.buffers(), tokens]) as allocator:
        for step in range(3):
            recorder = StepRecorder(model, optimizer, {CPU}, allocator) if step == 1 else None
            if recorder:
                recorder.start()
            for _ in range(passes):
                model(input_ids=tokens, labels=tokens)["loss"].backward()
            if recorder:
                recorder.before_optimizer()
            optimizer.step()
            if recorder:
                recorder.after_optimizer()
            model.zero_grad()
            if recorder:
                samples = recorder.stop()
    return samples, model, optimizer, allocator


def phases(samples: list[Sample]) -> list[str]:
    return [s.phase for i, s in enumerate(samples) if i == 0 or s.phase != samples[i - 1].phase]


def test_kinds_are_what_they_are_called_and_add_up():
    samples, model, optimizer, allocator = recorded()
    weights = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])
    gradients = sum(4 * p.numel() for p in model.parameters())
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    assert {s.weights for s in samples} == {weights} and {s.state for s in samples} == {state}
    by_phase = {phase: [s for s in samples if s.phase == phase] for phase in (FORWARD, BACKWARD, OPTIMIZER)}
    assert {s.gradients for s in by_phase[FORWARD]} == {0}
    growing = [s.gradients for s in by_phase[BACKWARD]]
    assert growing == sorted(growing) and len(set(growing)) > 10
    assert by_phase[OPTIMIZER][0].gradients == gradients and by_phase[OPTIMIZER][-1].gradients == 0
    first, last = samples[0], samples[-1]
    assert first.activations == last.activations < 0.01 * max(s.activations for s in samples), "only the batch"
    rising = [s.activations for s in by_phase[FORWARD]]
    assert rising[-1] > 0.9 * max(rising)
    assert phases(samples) == [FORWARD, BACKWARD, OPTIMIZER]


def test_the_peak_between_two_samples_is_seen():
    """That of the loss: no module begins or ends while the log-probabilities and their gradients live."""
    samples, _, _, allocator = recorded()
    highest = max(samples, key=lambda s: s.total)
    assert highest.total == allocator.peak
    without = [s.total for s in samples if s is not highest]
    assert max(without) < allocator.peak


def test_checkpointing_shows_as_teeth_in_the_backward_pass():
    whole, _, _, _ = recorded()
    saved, _, _, _ = recorded(checkpointing=True)
    assert phases(saved) == [FORWARD, BACKWARD, OPTIMIZER], "layers computed again belong to the backward pass"
    forward = [max(s.activations for s in run if s.phase == FORWARD) for run in (saved, whole)]
    assert forward[0] < 0.6 * forward[1]


def test_accumulated_gradients_stay_through_the_next_forward_pass():
    samples, _, _, _ = recorded(passes=2)
    assert phases(samples) == [FORWARD, BACKWARD, FORWARD, BACKWARD, OPTIMIZER]
    second = [s for i, s in enumerate(samples) if s.phase == FORWARD and samples[i - 1].gradients]
    assert second and all(s.gradients for s in second)


def test_no_hook_stays():
    _, model, _, _ = recorded()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# --- the picture ---


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_picture_is_written_whole(tmp_path, ending):
    samples, _, _, _ = recorded()
    path = tmp_path / "new" / f"step.{ending}"
    draw(samples, path, title="A model")
    draw(samples, path, title="A model")
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert path.stat().st_size > 5000


def test_picture_of_very_many_samples_keeps_the_peak(tmp_path):
    sample = Sample(FORWARD, 10, 1, 0, 5)
    samples = [sample] * 20_000 + [Sample(BACKWARD, 10, 1, 3, 50)] + [sample] * 20_000
    thinned = step_profile._thinned(samples)
    assert len(thinned) <= 4000 and max(s.total for s in thinned) == 64
    draw(samples, tmp_path / "many.png", title="Many")


def test_failing_to_write_leaves_nothing(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def half(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space left"):
        draw([Sample(FORWARD, 1, 1, 1, 1)] * 2, tmp_path / "step.png", title="A model")
    assert list(tmp_path.iterdir()) == []


# --- in a Trainer ---


def gpu_breakdown(model: nn.Module, optimizer: Any) -> MemoryBreakdown:
    parts = {"weights": 0.1, "gradients": 0.2, "state": 0.3, "rest": 0.4}
    return MemoryBreakdown(1000, 8004, 4000, 4000, 2000, allocated=12_000, peak=40_000, shares=parts)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """The CPU in place of a GPU, with an allocator that counts; enter it around the training."""
    allocator = Allocator([])
    monkeypatch.setattr(callback, "_gpus", lambda model: {CPU})
    monkeypatch.setattr(callback, "breakdown", gpu_breakdown)
    monkeypatch.setattr(step_profile, "cuda_counter", lambda devices: allocator)
    return allocator


def test_trainer_draws_its_second_step_and_tells_the_prediction(tmp_path, pretended_gpu, capsys, caplog):
    trainer = make_trainer(tmp_path, OptimizerMemoryCallback(plot=tmp_path / "step.png"), optim="foam", bf16=True)
    with pretended_gpu:
        trainer.train()
    assert (tmp_path / "step.png").is_file()
    printed = capsys.readouterr().out
    assert f"Memory through step 2 is drawn in {tmp_path / 'step.png'}" in printed
    measured, predicted = table_rows(printed)["activations, at the peak"]
    assert measured == "30.00 kB" and predicted.endswith("MB")  # the workspace of cuBLAS is predicted too
    assert "predicted for 4 x 12 tokens, the largest batch seen; activations " in printed
    assert not [record for record in caplog.records if record.module == "callback"]
    model = trainer.model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_trainer_tells_that_one_step_is_not_enough(tmp_path, pretended_gpu, caplog):
    trainer = make_trainer(tmp_path, OptimizerMemoryCallback(plot=tmp_path / "step.png"), max_steps=1)
    with caplog.at_level(logging.WARNING, logger="foam_hf"), pretended_gpu:
        trainer.train()
    assert "step.png is not drawn: training had no second step" in caplog.text
    assert not (tmp_path / "step.png").exists()


def test_a_picture_that_fails_does_not_stop_training(tmp_path, pretended_gpu, caplog):
    (tmp_path / "file").touch()
    trainer = make_trainer(tmp_path, OptimizerMemoryCallback(plot=tmp_path / "file" / "step.png"))
    with caplog.at_level(logging.WARNING, logger="foam_hf"), pretended_gpu:
        assert trainer.train().global_step == 3
    assert "training goes on" in caplog.text


def test_without_matplotlib_it_is_said_before_training(tmp_path, pretended_gpu, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    said_at: list[int] = []

    class Listening(OptimizerMemoryCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            said_at.append("pip install matplotlib" in caplog.text)

    with caplog.at_level(logging.WARNING, logger="foam_hf"), pretended_gpu:
        make_trainer(tmp_path, Listening(plot=tmp_path / "step.png")).train()
    assert said_at[0]


def test_plot_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"plot is no picture, got 'step.jpg'; expected a file ending in .png"):
        OptimizerMemoryCallback(plot="step.jpg")


# --- foam-hf run --report-memory ---

SCRIPT = """
import sys
from tests.support import tiny_models
from transformers import Trainer, TrainerCallback, TrainingArguments
args = TrainingArguments(output_dir="out", max_steps=3, use_cpu=True, report_to="none", save_strategy="no",
                         optim="foam", disable_tqdm=True)
Trainer(tiny_models.tiny_roberta(), args, train_dataset=tiny_models.classification_data(16)).train()
"""


def test_run_without_a_gpu_says_that_there_is_nothing_to_draw(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-m", "foam_hf.cli", "run", "--report-memory", "step.png", "--"]
    done = subprocess.run(
        [*command, sys.executable, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'step.png'} will not be drawn: the model is not on a CUDA device" in done.stderr
    assert "Optimizer memory: FOAM" in done.stdout
    assert not (tmp_path / "step.png").exists()


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--report-memory", "step.jpg", "--", "x"], ["ends in .png, .pdf, .svg, got 'step.jpg'"]),
        (["--report-memory", "nowhere/step.png", "--", "x"], ["no folder", "nowhere for step.png"]),
        (["--report-memory", "step.png", "python", "x.py"], ["foam-hf run --report-memory step.png -- python x.py"]),
        (["--report-memory", "python", "x.py"], ["foam-hf run --report-memory -- python x.py"]),
        (["--report-memory=python"], ["ends in .png, .pdf, .svg, got 'python'"]),
    ],
)
def test_wrong_use_says_what_is_right(arguments, fragments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", *arguments]) == 2
    printed = capsys.readouterr().err
    assert all(fragment in printed for fragment in fragments), printed


def test_run_without_matplotlib_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert cli.main(["run", "--report-memory", "step.png", "--", "x"]) == 2
    assert "drawing step.png needs matplotlib; expected: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "value"), [([], "1"), (["step.png"], "step.png"), (["a/step.SVG"], "a/step.SVG")])
def test_command_learns_the_picture(given, value, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    seen: dict[str, str] = {}
    monkeypatch.setattr("os.execvpe", lambda file, args, env: seen.update(env) or sys.exit(0))
    with pytest.raises(SystemExit):
        cli.main(["run", "--report-memory", *given, "--", "x"])
    assert seen["FOAM_HF_REPORT_MEMORY"] == (value if value == "1" else str(tmp_path / value))


@pytest.mark.parametrize("already_there", [False, True])
def test_environment_names_the_picture(tmp_path, monkeypatch, pretended_gpu, already_there):
    monkeypatch.setenv("FOAM_HF_REPORT_MEMORY", str(tmp_path / "step.png"))
    trainer = make_trainer(tmp_path, OptimizerMemoryCallback() if already_there else TrainerCallback())
    with pretended_gpu:
        trainer.train()
    assert (tmp_path / "step.png").is_file()
    reports = [found for found in trainer.callback_handler.callbacks if isinstance(found, OptimizerMemoryCallback)]
    assert len(reports) == 1


def test_the_script_of_the_figure_draws_its_step(tmp_path, pretended_gpu):
    path = Path(__file__).resolve().parents[2] / "docs" / "figures" / "step_memory.py"
    script = runpy.run_path(str(path))
    tiny_models.tiny_llama().config.save_pretrained(tmp_path / "model")
    sizes = {"model": str(tmp_path / "model"), "batch": 1, "seq": 8, "gradient_checkpointing": False}
    options = argparse.Namespace(figure=tmp_path / "step.png", optim="foam", optim_args="level=2", **sizes)
    with pretended_gpu:
        script["train"](options, use_cpu=True)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_step_is_drawn_and_the_predicted_peak_is_near(tmp_path, capsys):
    config = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 32000}
    model = tiny_models.tiny_llama(**config, max_position_embeddings=512).to("cuda", torch.bfloat16)
    tokens = torch.randint(3, 32000, (48, 512))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]
    settings = {"max_steps": 3, "per_device_train_batch_size": 16, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(output_dir=str(tmp_path), optim="foam", disable_tqdm=True, **settings)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    report = OptimizerMemoryCallback(plot=tmp_path / "step.png")
    Trainer(model=model, args=args, train_dataset=rows, callbacks=[report]).train()
    printed = capsys.readouterr().out
    assert (tmp_path / "step.png").stat().st_size > 5000
    measured, predicted = (float(cell.split()[0]) for cell in table_rows(printed)["peak allocated on GPU"])
    assert predicted == pytest.approx(measured, rel=0.10), printed
