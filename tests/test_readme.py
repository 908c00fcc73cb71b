"""What README.md says: its code runs, its commands exist, its links lead somewhere, its numbers are the code's."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from foam_hf import FOAM
from foam_hf.counted import count_state
from foam_hf.memory import format_bytes
from foam_hf.meta_models import meta_model
from foam_hf.model_configs import load_config
from foam_hf.optim_args import _OPTIM_ARGS, parse_optim_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

REPO = Path(__file__).resolve().parents[1]
README = REPO / "README.md"
TEXT = README.read_text(encoding="utf-8")
FIGURES = REPO / "recipes" / "figures"

# A user's model and data, then each block by itself, in order and in one folder; tracebacks show the README's lines.
DRIVER = """
import sys
from tests.tiny_models import classification_data, tiny_roberta

readme = sys.argv[1]
tiny_roberta().save_pretrained("my-model")
for line, code in BLOCKS:
    user = {"__name__": "__main__", "model": tiny_roberta(), "train_dataset": classification_data(8)}
    exec(compile("\\n" * line + code, readme, "exec"), user)
    optimizer = getattr(user.get("trainer"), "optimizer", user.get("optimizer"))
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    print("optimizer of line", line, type(optimizer).__name__)
"""


def blocks(*languages):
    """(number of lines before the code, code) of each fenced block."""
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        if match.group(1) in languages:
            found.append((TEXT.count("\n", 0, match.start(2)), match.group(2)))
    return found


def shell_lines():
    """Every command of a shell block or in backticks that starts with foam-hf or make, as words."""
    lines = [line for _, block in blocks("bash", "console", "sh") for line in block.splitlines()]
    lines += re.findall(r"`((?:foam-hf|make) [^`]+)`", TEXT)
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def run(*command, cwd=REPO):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_every_python_block_runs_for_a_user_with_a_model_and_data(tmp_path):
    script = tmp_path / "blocks.py"
    code = blocks("python")
    script.write_text(f"BLOCKS = {code!r}\n{DRIVER}", encoding="utf-8")
    done = run(sys.executable, script, README, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    trained = re.findall(r"^optimizer of line \d+ (\w+)$", done.stdout, re.MULTILINE)
    assert len(trained) == len(code)
    # The first block, Muon, the two with gradient release, INT8 weights, one without Trainer, and the resumed one.
    assert trained.count("FOAM") == 7
    assert "Optimizer memory: FOAM" in done.stdout + done.stderr  # the callback's table
    assert "at the peak, of which" in done.stdout
    assert list(tmp_path.glob("out/checkpoint-*/optimizer.pt"))


@pytest.mark.parametrize("block", [code for _, code in blocks("bash", "console", "sh")])
def test_every_shell_block_parses(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_fence_is_of_a_kind_that_is_tested():
    kinds = re.findall(r"^```(\w*)$", TEXT, re.MULTILINE)
    assert set(kinds[::2]) <= {"python", "bash", "console", "sh", "text"} and set(kinds[1::2]) == {""}


def test_every_foam_hf_command_exists():
    uses = [words[1:] for words in shell_lines() if words[0] == "foam-hf"]
    assert {words[0] for words in uses} == {"run", "estimate", "recipes", "export"}
    for words in uses:
        ours = words[: words.index("--")] if "--" in words else words
        assert ours[0] != "run" or len(ours) == len(words) or len(words) > len(ours) + 1, words
        names = [word for word in ours if not word.startswith("-")]
        actions = names[:2] if names[0] == "recipes" else names[:1]
        done = run(sys.executable, "-m", "foam_hf.cli", *actions, "--help")
        assert done.returncode == 0, done.stderr
        for flag in (word for word in ours if word.startswith("--")):
            assert re.search(rf"{flag}(?![\w-])", done.stdout), f"foam-hf {' '.join(actions)} has no {flag}"
        if actions == ["recipes", "copy"]:
            assert (REPO / "recipes" / names[2] / "README.md").is_file(), names


def test_shown_output_is_what_the_command_prints():
    """Each block of text stands under the command that prints these lines, among others."""
    shown = re.findall(r"^```bash\n(foam-hf [^\n]+)\n```\n\n```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(shown) == TEXT.count("```text\n") > 0
    for command, text in shown:
        done = run(sys.executable, "-m", "foam_hf.cli", *shlex.split(command)[1:])
        printed = [line.rstrip() for line in done.stdout.splitlines()]
        for line in text.splitlines():
            assert line in printed, done.stdout + done.stderr


def test_quoted_reserves_are_those_of_the_measured_runs():
    path = REPO / "recipes" / "benchmarks" / "results" / "activation_peaks-nvidia-h100-80gb-hbm3.json"
    measured = [row["measured"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    more = [100 * (row["reserved"] / row["total"] - 1) for row in measured]
    assert f"reserved {min(more):.0f}% to {max(more):.0f}% more" in TEXT.replace("\n", " ")


def test_figure_of_pretraining_is_what_the_planner_counts():
    done = run(sys.executable, FIGURES / "pretraining_state.py")
    assert done.returncode == 0, done.stderr
    assert "FOAM-Mini" in done.stdout
    # The figure carries the numbers that it was drawn from.
    assert done.stdout.rstrip().encode("latin-1") in (FIGURES / "pretraining_state.png").read_bytes()
    assert 'src="recipes/figures/pretraining_state.png"' in TEXT


def test_every_make_target_exists():
    targets = {words[1] for words in shell_lines() if words[0] == "make"}
    assert {"demo", "test", "test-compat", "quality"} <= targets
    for target in targets:
        done = run("make", "-n", target)
        assert done.returncode == 0, done.stderr


def test_every_script_and_extra_that_a_command_names_exists():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    scripts = []
    for words in shell_lines():
        if words[:2] == ["pip", "install"]:
            for needed in (Requirement(word) for word in words[2:] if word != "."):
                assert needed.name == "foam-hf" and needed.extras <= set(extras), needed
        elif words[0] == "python":
            copied = re.sub(r"^my_(\w+)/", r"recipes/\1/", words[1])  # by `foam-hf recipes copy NAME my_NAME`
            scripts.append(copied)
            assert (REPO / copied).is_file(), copied
    assert "recipes/glue/train.py" in scripts
    given = [words[words.index("--optim_args") + 1] for words in shell_lines() if "--optim_args" in words]
    assert given and all(parse_optim_args(text) for text in given)


def test_every_relative_link_leads_to_a_file_and_its_heading():
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert "recipes/figures/state_bytes.png" in links
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = REPO / path if path else README
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings], link


def test_memory_table_and_figure_are_what_the_code_counts():
    done = run(sys.executable, FIGURES / "state_bytes.py")
    assert done.returncode == 0, done.stderr
    table = done.stdout.strip()
    start, end = "<!-- table: made by recipes/figures/state_bytes.py -->", "<!-- end of table -->"
    assert TEXT.split(start)[1].split(end)[0].strip() == table
    # The figure carries the table that it was drawn from.
    assert table.encode("latin-1") in (FIGURES / "state_bytes.png").read_bytes()


def test_table_of_names_is_what_the_planner_counts():
    model = meta_model(load_config("qwen2.5-0.5b"))
    rows = TEXT.split("<!-- names:")[1].split("<!-- end of names -->")[0].strip().splitlines()[3:]
    assert len(rows) == 5
    for row in rows:
        what, _, _, *counted = (cell.strip() for cell in row.strip("|").split("|"))
        name, _, option = what.replace("`", "").partition(", ")
        for level, text in zip((8, 2), counted, strict=True):
            arguments = f"level={level}" + (f",{option}" if option else "")
            assert format_bytes(count_state(model, name, arguments)) == text, row


def test_table_of_options_is_that_of_optim_args_and_foam():
    rows = TEXT.split("<!-- options:")[1].split("<!-- end of options -->")[0].splitlines()[3:]
    described = {}
    for row in filter(None, rows):
        key, _, legal, default, what = (cell.strip() for cell in row.strip("|").split("|"))
        described[key.strip("`")] = (legal, default)
        assert what
    assert set(described) == set(_OPTIM_ARGS)
    defaults = {name: parameter.default for name, parameter in inspect.signature(FOAM).parameters.items()}
    for key, (legal, default) in described.items():
        for value in re.findall(r"`([^`]+)`", legal):
            assert parse_optim_args(f"{key}={value}").keys() == {key}
        if key == "seed":
            assert "seed" in default
        elif key in ("fold_embeddings", "fold_head", "gradient_release"):
            assert default == "false"
        else:
            assert default == str(defaults[key]).removeprefix("torch.")


def test_versions_are_those_of_pyproject():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = {
        name: next(s.version for s in specifiers if s.operator == ">=")
        for name, specifiers in ((r.name, r.specifier) for r in map(Requirement, project["dependencies"]))
    }
    lowest["Python"] = project["requires-python"].removeprefix(">=")
    for name, version in lowest.items():
        assert re.search(rf"^\| {name} \| {re.escape(version)} (or newer|to 5\.x) \|$", TEXT, re.MULTILINE), name
