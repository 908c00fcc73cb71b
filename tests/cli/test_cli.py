"""`foam-hf run` and `foam-hf recipes` as real subprocesses, on scripts that have never heard of foam_hf."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import foam_hf
from foam_hf.cli import command as cli
from foam_hf.cli import recipes
from foam_hf.cli.run import SITECUSTOMIZE

pytestmark = [pytest.mark.long, pytest.mark.compat]

ROOT = Path(__file__).resolve().parents[2]

UNAWARE_SCRIPT = """
import os
import sys
import torch
from transformers import HfArgumentParser, RobertaConfig, RobertaForSequenceClassification, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
model = RobertaForSequenceClassification(
    RobertaConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20,
    )
)
data = [{"input_ids": torch.arange(2, 10), "labels": torch.tensor(i % 2)} for i in range(16)]
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
print(f"TRAINED by {type(optimizer).__name__} for {trainer.state.global_step} steps, rank {args.process_index}")
if torch.distributed.is_initialized():  # gloo's threads may abort the interpreter's end (pytorch pull request 179291)
    sys.stdout.flush()
    os._exit(0)
"""
TRAINING = "--output_dir out --optim foam --max_steps 2 --per_device_train_batch_size 4 --use_cpu --report_to none"
TRAINING_ARGUMENTS = [*TRAINING.split(), "--save_strategy", "no", "--disable_tqdm", "true"]


def foam_hf_command(
    *arguments: str, cwd: Path, path: list[Path] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `foam-hf` from this checkout, which the children do not have on their path unless `foam-hf` sees to it."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from foam_hf.cli import main; sys.exit(main())"
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        inherited["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        cwd=cwd,
        env={**inherited, "USE_TF": "0", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "their_script.py").write_text(UNAWARE_SCRIPT)
    return tmp_path / "their_script.py"


# run


def test_unaware_script_trains_with_foam_reports_memory_and_keeps_its_sitecustomize(script: Path) -> None:
    """Under `foam-hf run` inside `foam-hf run`, with a sitecustomize of the user's own."""
    theirs = script.parent / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text("print('THEIR SITECUSTOMIZE ran')\nmark = 'theirs'\n")
    script.write_text("import sitecustomize\nassert sitecustomize.mark == 'theirs'\n" + UNAWARE_SCRIPT)
    inner = [sys.executable, "-m", "foam_hf.cli", "run", "--", sys.executable, str(script), *TRAINING_ARGUMENTS]
    done = foam_hf_command("run", "--report-memory", "--", *inner, cwd=script.parent, path=[theirs, ROOT])
    assert done.returncode == 0, done.stderr
    assert "TRAINED by FOAM for 2 steps" in done.stdout
    assert done.stdout.count("THEIR SITECUSTOMIZE ran") == 3  # foam-hf twice and the script: once each
    assert "optim/state_bytes" in done.stdout
    assert "AdamW" in done.stdout + done.stderr  # the table at the end of training


def test_module_started_with_dash_m_knows_the_names_from_a_checkout(tmp_path: Path) -> None:
    code = "from transformers.training_args import OptimizerNames as N\nprint(N('foam'), N.FOAM_MINI)\n"
    (tmp_path / "their_module.py").write_text(code)
    done = foam_hf_command("run", "--", sys.executable, "-m", "their_module", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "OptimizerNames.FOAM OptimizerNames.FOAM_MINI"


def test_torchrun_trains_on_two_processes(script: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = foam_hf_command(
        "run", "--", *command, str(script), *TRAINING_ARGUMENTS, cwd=script.parent, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0" in done.stdout and "rank 1" in done.stdout
    assert done.stdout.count("TRAINED by FOAM") == 2


def test_accelerate_launch_trains(script: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = foam_hf_command("run", "--", *command, str(script), *TRAINING_ARGUMENTS, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    assert "TRAINED by FOAM for 2 steps" in done.stdout


@pytest.mark.parametrize("code", [0, 3, 255])
def test_exit_code_is_the_commands(tmp_path: Path, code: int) -> None:
    done = foam_hf_command("run", "--", sys.executable, "-c", f"raise SystemExit({code})", cwd=tmp_path)
    assert done.returncode == code


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_signal_reaches_the_command_itself(tmp_path: Path) -> None:
    done = foam_hf_command(
        "run", "--", sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)", cwd=tmp_path
    )
    assert done.returncode == -signal.SIGTERM


def test_arguments_of_the_command_pass_untouched(tmp_path: Path) -> None:
    code = "import sys; print(sys.argv[1:])"
    arguments = ["--report-memory", "--", "run", "a b", "--version"]
    done = foam_hf_command("run", "--", sys.executable, "-c", code, *arguments, cwd=tmp_path)
    assert done.stdout.strip() == str(arguments)


@pytest.mark.parametrize("theirs", [None, "", os.pathsep + "/theirs", "/theirs"])
def test_the_users_own_path_is_kept(tmp_path: Path, theirs: str | None) -> None:
    """An empty entry means the current folder."""
    code = "import sys; print(sys.path)"
    environment = {} if theirs is None else {"PYTHONPATH": theirs}
    done = foam_hf_command("run", "--", sys.executable, "-c", code, cwd=tmp_path, **environment)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**inherited, **environment}, capture_output=True, text=True
    )
    expected = ast.literal_eval(alone.stdout)
    assert ast.literal_eval(done.stdout) == [expected[0], str(SITECUSTOMIZE), *expected[1:]]


def test_interpreter_without_foam_hf_runs_silently_or_says_one_line(tmp_path: Path) -> None:
    """Another interpreter: here this one, with another prefix and without the checkout on its path."""
    code = "import sys; assert 'foam_hf' not in sys.modules"
    hook = str(SITECUSTOMIZE)

    def start(path: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "FOAM_HF_RUN_PREFIX": "/another"}
        # no site-packages: nothing of the tests' environment is importable
        return subprocess.run(
            [sys._base_executable, "-c", code],  # type: ignore[attr-defined]
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    silent = start([hook])
    assert (silent.returncode, silent.stderr) == (0, "")
    (tmp_path / "site" / "transformers").mkdir(parents=True)
    (tmp_path / "site" / "transformers" / "__init__.py").touch()
    warned = start([hook, str(tmp_path / "site")])
    assert warned.returncode == 0
    assert warned.stderr.count("\n") == 1 and "has transformers but not foam_hf" in warned.stderr


def test_failing_sitecustomize_of_the_user_does_not_keep_foam_hf_out(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('theirs')\n")
    code = "import sys; print('foam_hf' in sys.modules, 'torch' in sys.modules)"
    done = foam_hf_command("run", "--", sys.executable, "-c", code, cwd=tmp_path, path=[tmp_path])
    assert done.stdout.strip() == "True False"
    assert "theirs" in done.stderr  # as python itself reports it


def test_two_hook_folders_on_the_path_do_not_call_each_other_for_ever(tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    copied.mkdir()
    (copied / "sitecustomize.py").write_text((SITECUSTOMIZE / "sitecustomize.py").read_text())
    done = foam_hf_command("run", "--", sys.executable, "-c", "print('fine')", cwd=tmp_path, path=[copied, ROOT])
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "fine", "")


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        (["run"], 2, ["no command given", "foam-hf run -- python"]),
        (["run", "--"], 2, ["no command given"]),
        (
            ["run", "--report-memory", "python", "train.py"],
            2,
            ["put -- before the command", "foam-hf run --report-memory -- python train.py"],
        ),
        (
            ["run", "torchrun", "--standalone", "train.py", "--optim", "foam"],
            2,
            ["put -- before the command", "foam-hf run -- torchrun --standalone train.py --optim foam"],
        ),
        (["run", "--report", "--memory", "--", "python"], 2, ["unknown argument --memory", "-- COMMAND"]),
        (["run", "--", "no-such-command-here"], 127, ["command not found: no-such-command-here"]),
        (["run", "--", "their_train.py", "--optim", "foam"], 127, ["needs its Python: python their_train.py"]),
        (["run", "--", "python", "train.py", "--optim", "FOAM"], 2, ["--optim 'FOAM'", "did you mean 'foam'?"]),
        (["run", "--", "trl", "sft", "--optim=foam-mini"], 2, ["--optim 'foam-mini'", "did you mean 'foam_mini'?"]),
        (["estimate", "llama-60m", "--int8_weights"], 2, ["--int8_weights; did you mean --int8-weights?"]),
        (["export", "a", "b", "--d_type"], 2, ["unrecognized arguments: --d_type\n"]),
        (["run", "--", "/"], 126, ["cannot execute '/'"]),
        (["run", "--", ""], 126, ["cannot execute ''", "empty"]),
        (["recipes", "copy", "glu"], 2, ["no recipe 'glu'", "did you mean 'glue'"]),
        (["recipes", "copy", "../tests"], 2, ["no recipe '../tests'"]),
        (["recipes", "--", "x"], 2, ["`--` belongs to `foam-hf run`"]),
    ],
)
def test_wrong_use_says_what_is_right(
    arguments: list[str],
    code: int,
    fragments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundled: Path,
) -> None:
    assert cli.main(arguments) == code
    printed = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in printed


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert "run" in printed and "recipes" in printed
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.strip() == f"foam-hf {foam_hf.__version__}"


# recipes


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with two recipes, and a current folder of the user's own."""
    package = tmp_path / "site-packages" / "foam_hf"
    for name, title in (("glue", "# Fine-tune on GLUE\n\nMore."), ("demo", "\nThe demo\n")):
        (package / "recipes" / name / "__pycache__").mkdir(parents=True)
        (package / "recipes" / name / "__pycache__" / "train.pyc").touch()
        (package / "recipes" / name / "README.md").write_text(title)
        (package / "recipes" / name / "train.py").write_text(f"print('{name}')\n")
    monkeypatch.setattr(recipes, "_PACKAGE", package)
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    return tmp_path / "user"


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
def test_recipes_are_listed_with_one_line_each(
    bundled: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["demo  The demo", "glue  Fine-tune on GLUE"]


@pytest.mark.parametrize("dest", [None, "deep/er/mine"])
def test_recipe_is_copied_whole_and_ready_to_run(
    bundled: Path, capsys: pytest.CaptureFixture[str], dest: str | None
) -> None:
    assert cli.main(["recipes", "copy", "glue", *([dest] if dest else [])]) == 0
    folder = bundled / (dest or "glue")
    assert sorted(path.name for path in folder.rglob("*")) == ["README.md", "train.py"]
    assert "README.md" in capsys.readouterr().out
    assert list(bundled.glob("**/.foam-hf-*")) == []


def test_copy_into_an_empty_folder_fills_it(bundled: Path) -> None:
    (bundled / "empty").mkdir()
    assert cli.main(["recipes", "copy", "glue", "empty"]) == 0
    assert (bundled / "empty" / "train.py").is_file()


def test_copy_never_overwrites(bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundled / "glue").mkdir()
    (bundled / "glue" / "train.py").write_text("mine")
    assert cli.main(["recipes", "copy", "glue"]) == 1
    assert "glue exists already" in capsys.readouterr().err
    (bundled / "file").write_text("mine")
    assert cli.main(["recipes", "copy", "glue", "file"]) == 1
    assert "file exists already" in capsys.readouterr().err
    Path("here").mkdir()
    os.chdir("here")
    assert cli.main(["recipes", "copy", "glue", "."]) == 1
    assert ". is the folder you are in, which cannot be replaced; expected a new one" in capsys.readouterr().err
    os.chdir("..")
    assert [path.read_text() for path in bundled.rglob("*") if path.is_file()] == ["mine", "mine"]


def test_copy_that_fails_half_way_leaves_nothing(
    bundled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_two(source: str, dest: str) -> None:
        if Path(source).name == "train.py":
            raise OSError(28, "No space left on device")
        Path(dest).touch()

    monkeypatch.setattr("shutil.copy2", copy_two)
    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, copy_two, False, False))
    assert cli.main(["recipes", "copy", "glue"]) == 1
    assert "cannot write glue" in capsys.readouterr().err
    assert list(bundled.iterdir()) == []


def test_clone_offers_its_recipes_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert (ROOT / "recipes").is_dir()
    assert cli.main(["recipes"]) == 0
    assert "glue" in capsys.readouterr().out


def test_installation_without_recipes_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes" / "of-somebody-else").mkdir(parents=True)
    (tmp_path / "recipes" / "of-somebody-else" / "README.md").touch()
    monkeypatch.setattr(recipes, "_PACKAGE", tmp_path / "foam_hf")
    assert cli.main(["recipes"]) == 1
    assert "no recipes" in capsys.readouterr().err


# --- Wrong moves of a new user ---


def test_a_command_without_its_dashes_gets_the_hint_also_when_it_asks_for_help(capsys):
    assert cli.main(["run", "trl", "sft", "--help"]) == 2
    assert "expected: foam-hf run -- trl sft --help" in capsys.readouterr().err
    assert cli.main(["run", "--report-memory", "trl", "sft", "-h"]) == 2
    assert "expected: foam-hf run --report-memory -- trl sft -h" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--help"])
    assert stop.value.code == 0 and "--summary" in capsys.readouterr().out


def test_a_recipe_in_place_of_an_action_is_what_copy_takes(capsys):
    assert cli.main(["recipes", "glue", "my_glue"]) == 2
    assert "did you mean `foam-hf recipes copy glue my_glue`?" in capsys.readouterr().err
    assert cli.main(["recipes", "lst"]) == 2
    assert "did you mean `foam-hf recipes list`?" in capsys.readouterr().err
