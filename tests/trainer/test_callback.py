"""OptimizerMemoryCallback in real Trainers: what it logs, prints and warns about, and that it never stops training."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import foam_hf
from foam_hf import OptimizerMemoryCallback
from foam_hf.memory import MemoryBreakdown, adamw_state_bytes, expected_state_bytes, state_bytes
from foam_hf.trainer import callback
from tests.support import tiny_models

pytestmark = [pytest.mark.long, pytest.mark.compat]

METRICS = ("optim/state_bytes", "optim/state_bytes_per_param", "optim/adamw_ratio")


def make_trainer(folder: Path, *callbacks, model=None, trainer_class=Trainer, optimizers=(None, None), **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return trainer_class(
        model or tiny_models.tiny_roberta(),
        TrainingArguments(**{**settings, **arguments}),
        train_dataset=tiny_models.classification_data(16),
        callbacks=list(callbacks) or [OptimizerMemoryCallback()],
        optimizers=optimizers,
    )


def reports(log_history: list[dict]) -> list[dict]:
    return [entry for entry in log_history if "optim/state_bytes" in entry]


def table_rows(printed: str) -> dict[str, list[str]]:
    """Label -> cells of the printed table; cells are separated by two blanks or more."""
    table = printed[printed.index("Optimizer memory:") :].splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in table[1:] if line.startswith("  ")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("optim", "arguments"),
    [
        ("foam", {"optim_args": "level=3"}),
        ("adamw_torch", {}),
        ("adafactor", {}),
        ("adamw_bnb_8bit", {}),
        ("galore_adamw", {"optim_target_modules": ["attention"], "optim_args": "rank=4"}),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_logs_once_after_the_first_step(optim, arguments, tmp_path):
    trainer = make_trainer(tmp_path, optim=optim, **arguments)
    trainer.train()
    (report,) = reports(trainer.state.log_history)
    count = sum(p.numel() for p in trainer.model.parameters())
    adamw = adamw_state_bytes(trainer.model.parameters())
    measured = state_bytes(trainer.optimizer)
    assert report == {
        "optim/state_bytes": measured,
        "optim/state_bytes_per_param": measured / count,
        "optim/adamw_ratio": measured / adamw,
        "epoch": trainer.state.log_history[0]["epoch"],
        "step": 1,
    }
    assert 0 < measured <= adamw + 2 * 256 * 4  # bitsandbytes' two tables
    if optim == "adamw_torch":
        assert report["optim/adamw_ratio"] == 1
    if optim == "foam":
        assert measured == expected_state_bytes(trainer.optimizer.param_groups) < adamw


def test_numbers_reach_trainer_state_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, optim="foam", report_to="tensorboard", save_strategy="steps", save_steps=3)
    trainer.train()
    (report,) = reports(trainer.state.log_history)
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert reports(saved["log_history"]) == [report]
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    for name in METRICS:
        (event,) = accumulator.Scalars(f"train/{name}")
        assert (event.step, event.value) == (1, pytest.approx(report[name]))


def test_trainers_own_log_of_the_first_step_survives(tmp_path):
    trainer = make_trainer(tmp_path, optim="foam", logging_steps=1)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    trainer = make_trainer(tmp_path, optim="foam", logging_steps=100)
    trainer.train()
    assert not [entry for entry in trainer.state.log_history if "loss" in entry]


def test_every_train_reports_anew_and_counts_accumulated_steps(tmp_path):
    trainer = make_trainer(tmp_path, optim="foam", gradient_accumulation_steps=2, max_steps=2)
    for _ in range(2):
        trainer.train()
        (report,) = reports(trainer.state.log_history)
        assert report["step"] == 1


def test_prints_a_table_at_the_end(tmp_path, capsys):
    trainer = make_trainer(tmp_path, optim="foam", optim_args="level=3")
    trainer.train()
    printed = capsys.readouterr().out
    count = sum(p.numel() for p in trainer.model.parameters())
    assert f"Optimizer memory: FOAM, {count:,} trainable parameters\n" in printed
    measured, adamw = state_bytes(trainer.optimizer), adamw_state_bytes(trainer.model.parameters())
    weights = 4 * count + sum(b.numel() * b.element_size() for b in trainer.model.buffers())
    twice = {  # measured, and predicted
        "weights": f"{weights / 1000:.2f} kB",
        "gradients": f"{4 * count / 1000:.2f} kB",  # as they were at the step, before they were zeroed
        "optimizer state": f"{measured / 1000:.2f} kB",
        "activations, at the peak": "unavailable",
        "peak allocated on GPU": "unavailable",
    }
    assert table_rows(printed) == {
        "measured": ["predicted"],
        **{label: [cell, cell] for label, cell in twice.items()},
        "AdamW would keep": [f"{adamw / 1000:.2f} kB"],
        "state / AdamW's": [f"{measured / adamw:.3g}"],
        "state per trainable parameter": [f"{measured / count:.3g} B"],
    }
    lines = printed[printed.index("Optimizer memory") :].splitlines()[1:10]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


@pytest.mark.parametrize(
    ("optim", "arguments"),
    [
        ("foam_mini", {}),
        ("adafactor", {}),
        ("adamw_bnb_8bit", {}),
        ("galore_adamw", {"optim_target_modules": ["attention"], "optim_args": "rank=4"}),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_predicts_what_it_measures(optim, arguments, tmp_path, capsys):
    make_trainer(tmp_path, optim=optim, **arguments).train()
    rows = table_rows(capsys.readouterr().out)
    for label in ("weights", "gradients", "optimizer state"):
        measured, predicted = rows[label]
        assert measured == predicted


def test_predicts_no_state_for_an_optimizer_of_the_script(tmp_path, capsys):
    """Whose arguments still name Trainer's default."""
    model = tiny_models.tiny_roberta()
    make_trainer(tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None)).train()
    assert table_rows(capsys.readouterr().out)["optimizer state"] == ["0 B", "unavailable"]


def test_prints_below_an_open_progress_bar(tmp_path, capsys):
    make_trainer(tmp_path, optim="foam", disable_tqdm=False).train()
    assert "\nOptimizer memory: FOAM" in capsys.readouterr().out


# --- On a GPU, pretended here ---


def on_gpu(peak: int) -> MemoryBreakdown:
    shares = {"weights": 0.1, "gradients": 0.2, "state": 0.3, "rest": 0.4}
    return MemoryBreakdown(1000, 8004, 4000, 4000, 2000, allocated=12_000, peak=peak, shares=shares)


def test_gpu_numbers_are_logged_and_the_highest_peak_is_printed(tmp_path, monkeypatch, capsys):
    # The second peak is lower: something reset the counter in between, and what was seen before stays seen.
    peaks = iter([40_000, 30_000])
    monkeypatch.setattr(callback, "breakdown", lambda model, optimizer: on_gpu(next(peaks)))
    trainer = make_trainer(tmp_path, optim="foam")
    trainer.train()
    (report,) = reports(trainer.state.log_history)
    assert report["optim/peak_allocated_bytes"] == 40_000
    assert [report[f"optim/{part}_share"] for part in ("weights", "gradients", "state", "rest")] == [
        0.1,
        0.2,
        0.3,
        0.4,
    ]
    rows = table_rows(capsys.readouterr().out)
    assert rows["peak allocated on GPU"][0] == "40.00 kB"
    assert rows["activations, at the peak"][0] == "30.00 kB"  # the peak without the rest that is known


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_numbers_beside_trainers_own_memory_metrics(tmp_path):
    def metrics(*callbacks: TrainerCallback) -> tuple[dict, list[dict]]:
        trainer = make_trainer(tmp_path, *callbacks, optim="foam", use_cpu=False, skip_memory_metrics=False)
        result = trainer.train().metrics
        return {key: value for key, value in result.items() if "gpu" in key}, reports(trainer.state.log_history)

    metrics(TrainerCallback())  # warms the allocator's workspaces up
    without, _ = metrics(TrainerCallback())
    with_callback, (report,) = metrics(OptimizerMemoryCallback())
    assert without and with_callback == without
    parts = [report[f"optim/{part}_share"] for part in ("weights", "gradients", "state", "rest")]
    assert sum(parts) == pytest.approx(1)
    assert all(part > 0 for part in parts)


# --- It never stops training ---


class Refuses:
    """Something in an optimizer's state that cannot be walked."""

    @property
    def __dict__(self):
        raise RuntimeError("nobody looks in here")


def test_a_state_that_cannot_be_walked(tmp_path, caplog, capsys):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["odd"] = Refuses()

    model = tiny_models.tiny_roberta()
    optimizer = Odd(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, logger="foam_hf"):
        trainer = make_trainer(tmp_path, model=model, optimizers=(optimizer, None))
        assert trainer.train().global_step == 3
    warnings = [record.getMessage() for record in caplog.records if record.module == "callback"]
    assert warnings == ["the report on optimizer memory fails (RuntimeError: nobody looks in here); training goes on"]
    assert not reports(trainer.state.log_history)
    assert "Optimizer memory" not in capsys.readouterr().out


def test_a_log_that_fails(tmp_path, caplog):
    class Failing(Trainer):
        def log(self, logs, *args, **kwargs):
            if "optim/state_bytes" in logs:
                raise OSError("disk full")
            super().log(logs, *args, **kwargs)

    with caplog.at_level(logging.WARNING, logger="foam_hf"):
        trainer = make_trainer(tmp_path, trainer_class=Failing, optim="foam", logging_steps=1)
        assert trainer.train().global_step == 3
    assert "OSError: disk full" in caplog.text
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]


def test_a_log_of_another_signature(tmp_path):
    class Averaging(Trainer):  # as TRL's trainers
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log({**logs, "extra": 1.0}, start_time)

    trainer = make_trainer(tmp_path, trainer_class=Averaging, optim="foam")
    trainer.train()
    assert reports(trainer.state.log_history)[0]["extra"] == 1.0


def test_without_the_plugin_the_numbers_stay_in_the_state(tmp_path, caplog):
    class Unbound(OptimizerMemoryCallback):
        trainer = property(lambda self: None, lambda self, trainer: None)

    with caplog.at_level(logging.WARNING, logger="foam_hf"):
        trainer = make_trainer(tmp_path, Unbound(), optim="adamw_torch")
        trainer.train()
        trainer.train()
    (report,) = reports(trainer.state.log_history)
    assert report["step"] == 1 and report["optim/adamw_ratio"] == 1
    warnings = [record for record in caplog.records if "does not know its Trainer" in record.getMessage()]
    assert len(warnings) == 1 and "import foam_hf" in warnings[0].getMessage()


def test_a_class_instead_of_an_instance_and_pickling(tmp_path):
    trainer = make_trainer(tmp_path, OptimizerMemoryCallback, optim="foam")
    trainer.train()
    assert reports(trainer.state.log_history)
    (bound,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, OptimizerMemoryCallback)]
    assert bound.trainer is not None
    assert pickle.loads(pickle.dumps(bound)).trainer is None


def test_events_without_model_or_optimizer(tmp_path):
    args, state, control = TrainingArguments(output_dir=str(tmp_path), report_to="none"), TrainerState(), None
    report = OptimizerMemoryCallback()
    for event in ("on_train_begin", "on_optimizer_step", "on_step_end", "on_train_end"):
        getattr(report, event)(args, state, control)
    assert state.log_history == []


def test_a_skipped_step_is_not_the_first(tmp_path):
    class Skipping(OptimizerMemoryCallback):
        steps = 0

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            Skipping.steps += 1
            optimizer._is_overflow = Skipping.steps == 1  # accelerate's, as after an overflow of fp16
            super().on_optimizer_step(args, state, control, optimizer=optimizer, **kwargs)
            optimizer._is_overflow = False

    trainer = make_trainer(tmp_path, Skipping(), optim="foam")
    trainer.train()
    assert reports(trainer.state.log_history)[0]["step"] == 2


# --- Resuming ---


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    make_trainer(tmp_path, optim="foam", max_steps=2, save_strategy="steps", save_steps=2).train()
    return tmp_path / "checkpoint-2"


def resume_warnings(caplog, folder: Path, path, **arguments) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="foam_hf"):
        trainer = make_trainer(folder, **{"optim": "foam", "max_steps": 4, **arguments})
        trainer.train(resume_from_checkpoint=path)
    assert trainer.state.global_step == 4
    assert len(reports(trainer.state.log_history)) == 2, "the run before, and this one"
    return [record.getMessage() for record in caplog.records if record.module == "callback"]


def without_optimizer(checkpoint: Path) -> Path:
    """The checkpoint as a tool would leave it that keeps the weights alone."""
    for name in ("optimizer.pt", "scheduler.pt", "foam_checkpoint.json"):
        (checkpoint / name).unlink()
    return checkpoint


def test_resuming_with_the_optimizer_is_silent(checkpoint, caplog):
    assert resume_warnings(caplog, checkpoint.parent, str(checkpoint)) == []
    assert resume_warnings(caplog, checkpoint.parent, True) == []


@pytest.mark.parametrize("path", ["the folder", "True", "argument"])
def test_resuming_without_optimizer_pt_warns(checkpoint, caplog, path):
    without_optimizer(checkpoint)
    arguments = {"resume_from_checkpoint": str(checkpoint)} if path == "argument" else {}
    (warning,) = resume_warnings(caplog, checkpoint.parent, True if path == "True" else str(checkpoint), **arguments)
    assert f"training resumes at step 2 from {checkpoint}, which has no optimizer.pt" in warning


def test_resuming_from_a_folder_elsewhere_without_optimizer_pt_warns(checkpoint, caplog, tmp_path):
    elsewhere = tmp_path / "moved" / "here"
    elsewhere.parent.mkdir()
    without_optimizer(checkpoint).rename(elsewhere)
    # Nothing tells a callback of this folder; that the state was empty and then was not, says enough.
    (warning,) = resume_warnings(caplog, tmp_path / "new", str(elsewhere))
    assert "training resumes at step 2 but the optimizer's state was not restored" in warning


def test_resuming_without_scheduler_pt_warns_because_trainer_loads_neither(tmp_path, caplog):
    make_trainer(tmp_path, optim="adamw_torch", max_steps=2, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    (warning,) = resume_warnings(caplog, tmp_path, True, optim="adamw_torch")
    assert "was not restored" in warning and "scheduler.pt" in warning


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "optimizer.bin", "optimizer_0", "rank0-of-2-optimizer.pt", "global_step2", None]
)
def test_optimizers_saved_under_other_names_count(name, tmp_path, caplog):
    """The names that FSDP, XLA and DeepSpeed write; None of them is the control."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    if name is not None:
        (folder / name).touch()
    args, state = TrainingArguments(output_dir=str(tmp_path), report_to="none"), TrainerState(global_step=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
    with caplog.at_level(logging.WARNING, logger="foam_hf"):
        OptimizerMemoryCallback().on_train_begin(args, state, None, optimizer=optimizer)
    assert ("which has no optimizer.pt" in caplog.text) == (name is None)


def test_resuming_an_optimizer_that_keeps_nothing_is_silent(tmp_path, caplog):
    make_trainer(tmp_path, optim="sgd", max_steps=2, save_strategy="steps", save_steps=2).train()
    assert resume_warnings(caplog, tmp_path, True, optim="sgd") == []


# --- Several processes ---

TWO_RANKS = """
    import os, sys
    import torch
    import foam_hf
    from tests.support import tiny_models
    from transformers import Trainer, TrainingArguments

    if int(os.environ["RANK"]) == 1:  # what this rank holds beside: the largest rank is not the first
        class FOAM(foam_hf.FOAM):
            def step(self, closure=None):
                super().step(closure)
                self.extra = torch.zeros(1000)
        foam_hf.optimizer.foam.FOAM = FOAM
    args = TrainingArguments(
        output_dir=sys.argv[1], optim="foam", max_steps=2, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, ddp_backend="gloo", per_device_train_batch_size=4,
    )
    trainer = Trainer(
        tiny_models.tiny_roberta(), args, train_dataset=tiny_models.classification_data(16),
        callbacks=[foam_hf.OptimizerMemoryCallback()],
    )
    trainer.train()
    print("state of this process", foam_hf.memory.state_bytes(trainer.optimizer), flush=True)
    os._exit(0)  # gloo's threads may abort the interpreter's end (pytorch pull request 179291)
"""


@pytest.mark.slow
def test_two_processes_are_summed_and_the_largest_is_shown(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    root = str(Path(foam_hf.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "out")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    states = [int(re.search(r"state of this process (\d+)", out).group(1)) for out, _ in outputs]
    assert states[1] == states[0] + 4000
    rows = table_rows(outputs[0][0])
    assert rows["sum of 2 processes"] == ["largest process", "predicted for one"]
    sum_and_largest = [f"{sum(states) / 1000:.2f} kB", f"{states[1] / 1000:.2f} kB"]
    assert rows["optimizer state"][:2] == sum_and_largest
    assert "Optimizer memory" not in outputs[1][0], "only the main process prints"


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
