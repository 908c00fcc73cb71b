"""What README.md and docs/ say: code runs, commands exist, links lead somewhere, numbers are the code's."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from foam_hf import FOAM, foam_param_groups
from foam_hf.cli import main
from foam_hf.memory import format_bytes, headline, summarize
from foam_hf.optim_args import FOAM_NAMES, SCALES, parse_optim_args, table_of_keys
from foam_hf.optimizer.groups import foam_parameter_names
from foam_hf.planner.counting import count_state
from foam_hf.planner.meta_models import meta_model
from foam_hf.planner.model_configs import load_config
from foam_hf.rules.rule import LARGEST_STEP
from tests.support.printing import printed
from tests.support.tiny_models import tiny_llama
from tests.support.tolerances import TOLERANCES
from tests.test_imports import GROUND, MAY_IMPORT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

pytestmark = pytest.mark.long

REPO = Path(__file__).resolve().parents[2]
DOCS = sorted((REPO / "docs").glob("*.md"))
README = REPO / "README.md"
PAGES = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in [README, *DOCS]}
FIGURES = REPO / "docs" / "figures"
RESULTS = REPO / "recipes" / "benchmarks" / "results"
SHELLS = ("bash", "console", "sh")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# A user's model and data, then each block by itself, in order and in one folder; tracebacks show the page's lines.
DRIVER = """
from tests.support.tiny_models import classification_data, tiny_roberta

tiny_roberta().save_pretrained("my-model")
for page, line, code in BLOCKS:
    user = {"__name__": "__main__", "model": tiny_roberta(), "train_dataset": classification_data(8)}
    exec(compile("\\n" * line + code, page, "exec"), user)
    optimizer = getattr(user.get("trainer"), "optimizer", user.get("optimizer"))
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    print("optimizer of", page, line, type(optimizer).__name__)
"""


def blocks(*languages):
    """(page, number of lines before the code, code) of each fenced block."""
    return [
        (page, text.count("\n", 0, match.start(2)), match.group(2))
        for page, text in PAGES.items()
        for match in FENCE.finditer(text)
        if match.group(1) in languages
    ]


def shell_lines():
    """Every command of a shell block or in backticks that starts with foam-hf or make, as words."""
    lines = [line for _, _, block in blocks(*SHELLS) for line in block.splitlines()]
    for text in PAGES.values():
        if text != PAGES["docs/mistakes.md"]:
            lines += re.findall(r"`((?:foam-hf|make) [^`]+)`", text)
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def between(page, start, end):
    """What stands in `page` between two comments, stripped; the first one's line is left out."""
    (text,) = PAGES[page].split(start)[1:]
    return text.split(end)[0].partition("-->\n")[2].strip()


def rows(page, start, end):
    """The cells of each row of a table between two comments, its head left out."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in between(page, start, end).splitlines()[2:]
    ]


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


def run_figure(name, monkeypatch):
    """What the script of a figure prints."""
    monkeypatch.setattr(sys, "argv", [name])
    return printed(lambda: runpy.run_path(str(FIGURES / name), run_name="__main__"))


@pytest.mark.slow
def test_every_python_block_runs_for_a_user_with_a_model_and_data(tmp_path):
    script = tmp_path / "blocks.py"
    code = blocks("python")
    script.write_text(f"BLOCKS = {code!r}\n{DRIVER}", encoding="utf-8")
    done = run(sys.executable, script, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    trained = re.findall(r"^optimizer of \S+ \d+ (\w+)$", done.stdout, re.MULTILINE)
    assert len(trained) == len(code)
    # README's first block and the one without Trainer, resuming, two with gradient release, two of INT8 weights, Muon.
    assert trained.count("FOAM") == 8
    assert done.stderr.count("of optimizer state, ") >= 6  # the line that a run begins with
    assert "Optimizer memory: FOAM" in done.stdout + done.stderr  # the callback's table
    assert "at the peak, of which" in done.stdout
    assert list(tmp_path.glob("out/checkpoint-*/optimizer.pt"))


@pytest.mark.parametrize("block", [code for _, _, code in blocks(*SHELLS)])
def test_every_shell_block_parses(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_is_of_a_kind_that_is_tested(page):
    kinds = re.findall(r"^```(\w*)$", PAGES[page], re.MULTILINE)
    assert set(kinds[::2]) <= {"python", *SHELLS, "text"} and set(kinds[1::2]) <= {""}


def test_the_readme_is_short_and_begins_with_the_recommended_setting():
    assert len(PAGES["README.md"].splitlines()) <= 220
    first = next(code for _, _, code in blocks("python"))
    assert 'optim="foam"' in first and "optim_args" not in first and "learning_rate=2e-5" in first


def test_every_page_is_reached_from_the_readme():
    for path in DOCS:
        assert f"](docs/{path.name}" in PAGES["README.md"], path.name


def test_every_foam_hf_command_exists():
    uses = [words[1:] for words in shell_lines() if words[0] == "foam-hf"]
    assert {words[0] for words in uses} == {"run", "estimate", "recipes", "export"}
    flags = {}
    for words in uses:
        ours = words[: words.index("--")] if "--" in words else words
        assert ours[0] != "run" or len(ours) == len(words) or len(words) > len(ours) + 1, words
        names = [word for word in ours if not word.startswith("-")]
        actions = tuple(names[:2] if names[0] == "recipes" else names[:1])
        flags.setdefault(actions, set()).update(word for word in ours if word.startswith("--"))
        if actions == ("recipes", "copy"):
            assert (REPO / "recipes" / names[2] / "README.md").is_file(), names
    for actions, named in flags.items():
        said = printed(main, [*actions, "--help"])
        for flag in named:
            assert re.search(rf"{flag}(?![\w-])", said), f"foam-hf {' '.join(actions)} has no {flag}"


@pytest.mark.slow
def test_shown_output_is_what_the_command_prints():
    """Each block of text stands under the command that prints these lines, among others."""
    command_and_text = re.compile(r"^```bash\n(foam-hf [^\n]+)\n```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    shown = [found for text in PAGES.values() for found in command_and_text.findall(text)]
    assert len(shown) == sum(text.count("```text\n") for text in PAGES.values()) > 0
    for command, text in shown:
        found = printed(main, shlex.split(command)[1:])
        lines = [line.rstrip() for line in found.splitlines()]
        for line in text.splitlines():
            assert line in lines, found


def test_quoted_reserves_are_those_of_the_measured_runs():
    path = REPO / "recipes" / "benchmarks" / "results" / "activation_peaks-nvidia-h100-80gb-hbm3.json"
    measured = [row["measured"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    more = [100 * (row["reserved"] / row["total"] - 1) for row in measured]
    said = PAGES["docs/memory.md"].replace("\n", " ")
    assert f"reserved {min(more):.0f}% to {max(more):.0f}% more" in said


def test_figure_of_pretraining_is_what_the_planner_counts(monkeypatch):
    numbers = run_figure("pretraining_state.py", monkeypatch).rstrip()
    assert "FOAM-Muon" in numbers
    # The figure carries the numbers that it was drawn from.
    assert numbers.encode("latin-1") in (FIGURES / "pretraining_state.png").read_bytes()
    assert 'src="figures/pretraining_state.png"' in PAGES["docs/memory.md"]


def test_every_make_target_exists():
    targets = {words[1] for words in shell_lines() if words[0] == "make"}
    assert {"demo", "check", "test", "test-compat"} <= targets
    for target in targets:
        done = run("make", "-n", target)
        assert done.returncode == 0, done.stderr


def test_every_script_and_extra_that_a_command_names_exists():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    scripts = []
    for words in shell_lines():
        if words[:2] == ["pip", "install"]:  # from a clone: the package is on no index
            for word in words[2:]:
                local = re.fullmatch(r"\.(?:\[([a-z,]+)\])?", word)
                assert local and set(filter(None, (local[1] or "").split(","))) <= set(extras), words
        elif words[0] == "python":
            copied = re.sub(r"^my_(\w+)/", r"recipes/\1/", words[1])  # by `foam-hf recipes copy NAME my_NAME`
            scripts.append(copied)
            assert (REPO / copied).is_file(), copied
    assert "recipes/glue/train.py" in scripts
    given = [words[words.index("--optim_args") + 1] for words in shell_lines() if "--optim_args" in words]
    for text in PAGES.values():  # in a table or a sentence too
        given += re.findall(r"optim_args=['\"]([^'\"]+=[^'\"]+)['\"]", text)
        given += re.findall(r"`((?:\w+=[\w.-]+,)+\w+=[\w.-]+)`", text)
    given = [text for text in given if "key=value" not in text]
    assert all(parse_optim_args(text) for text in given) and len(given) > 5


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_its_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) + re.findall(r'<img [^>]*src="([^"]+)"', PAGES[page])
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings], link


def test_the_architecture_names_every_folder_and_file_at_the_root_and_what_folders_may_import():
    page = PAGES["docs/architecture.md"]
    table = page.split("<!-- imports")[1].split("<!-- end of imports")[0]
    ground = {"the ground": GROUND}
    allowed = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            folder, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
            names = [name.strip("` ") for name in imports.split(",") if name.strip() != "torch alone"]
            allowed[folder.strip("`/")] = {each for name in names for each in ground.get(name, (name,))}
    assert list(allowed.items()) == [(folder, set(names)) for folder, names in MAY_IMPORT.items()]
    inside = {path.name for path in (REPO / "foam_hf").iterdir() if path.is_dir() or path.suffix == ".py"}
    named = {name.rstrip("/") for name in re.findall(r"`([\w.]+/?)`", page)}
    assert inside - {"__init__.py", "__pycache__", "recipes"} <= named


def test_files_that_the_architecture_names_exist():
    for name in re.findall(r"`([\w/]+\.py)`", PAGES["docs/architecture.md"]):
        assert (REPO / name).is_file() or (REPO / "foam_hf" / name).is_file() or name == "all.py", name


def test_links_of_other_pages_to_the_readme_and_docs_lead_to_headings_too():
    for path in [REPO / "CONTRIBUTING.md", *(REPO / "recipes").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            target = (path.parent / link.partition("#")[0]).resolve()
            if "://" in link or target.parent not in (REPO, REPO / "docs") or target.suffix != ".md":
                continue
            assert target.is_file(), f"{path}: {link}"
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert "#" not in link or link.partition("#")[2] in anchors, f"{path}: {link}"


def test_memory_table_and_figure_are_what_the_code_counts(monkeypatch):
    table = run_figure("state_bytes.py", monkeypatch).strip()
    start, end = "<!-- table: made by docs/figures/state_bytes.py", "<!-- end of table -->"
    assert between("README.md", start, end) == table
    # The figure carries the table that it was drawn from.
    assert table.encode("latin-1") in (FIGURES / "state_bytes.png").read_bytes()


def test_table_of_names_is_what_the_planner_counts():
    model = meta_model(load_config("qwen2.5-0.5b"))
    found = rows("docs/rules.md", "<!-- names:", "<!-- end of names -->")
    assert {what.split("`")[1] for what, *_ in found} == set(FOAM_NAMES) - {"foam_mini"}
    for what, _, _, *counted in found:
        name, _, option = what.replace("`", "").partition(", ")
        for level, text in zip((8, 2), counted, strict=True):
            arguments = f"level={level}" + (f",{option}" if option else "")
            assert format_bytes(count_state(model, name, arguments)) == text, what
    assert f"and keeps {format_bytes(count_state(model, 'foam_mini', ''))}." in PAGES["docs/rules.md"]
    assert f"where AdamW keeps {format_bytes(count_state(model, 'adamw_torch', ''))}:" in PAGES["docs/rules.md"]
    of_step = format_bytes(count_state(meta_model(load_config("llama-1b")), "foam", ""))
    assert f"by default {of_step} of it are left" in PAGES["docs/memory.md"]


def test_what_a_run_says_first_is_what_the_pages_show():
    optimizer = FOAM(foam_param_groups(meta_model(load_config("qwen2.5-7b"))))
    assert f"\n\n    {headline(optimizer)}\n" in PAGES["README.md"]
    shown = between("docs/options.md", "<!-- summary:", "\n\n**")
    assert [line.strip() for line in shown.splitlines()] == summarize(optimizer).splitlines()


def test_peaks_with_and_without_micro_batches_are_those_of_the_measured_runs():
    rows = json.loads((RESULTS / "memory_peak-nvidia-h200.json").read_text(encoding="utf-8"))["rows"]
    peak = {row["case"]: row["peak_bytes"] / 2**30 for row in rows}
    added, plain = peak["8b-int8-release-accumulation"], peak["8b-int8-release"]
    said = f"peaks at {added:.2f} GiB with four micro-batches, and at {plain:.2f} without"
    assert said in PAGES["docs/gradient_release.md"] and added / plain < 1.05


def test_bounds_of_a_step_are_those_of_the_tests():
    names = {"AdamW, for what does not fold": "adam", "AdamW in 8 bits, `plain_state=8bit`": "8bit"}
    found = {}
    for what, *numbers in rows("docs/rules.md", "<!-- bounds:", "<!-- end of bounds -->"):
        found[names.get(what, what.strip("`"))] = [float(number) for number in numbers]
    start = "largest step in units of lr * scale, "
    assert found == {case.removeprefix(start): list(t) for case, t in TOLERANCES.items() if case.startswith(start)}
    assert max(bound for bound, _ in found.values()) == LARGEST_STEP
    assert f"by more than {LARGEST_STEP:g} times learning rate x scale" in PAGES["README.md"]


def test_the_table_of_options_says_what_the_code_does():
    described = [
        [cell.replace("`", "") for cell in cells]
        for cells in rows("docs/options.md", "<!-- options:", "<!-- end of options -->")
    ]
    table = table_of_keys()
    assert [cells[:3] for cells in described] == [[name, legal, default] for name, legal, default, _ in table]
    for (*_, words), (*_, sentence) in zip(described, table, strict=True):
        assert words.startswith(sentence)
    # What decides where the table has no default of its own.
    folded = foam_parameter_names(tiny_llama())["folded/decay"]
    assert "model.embed_tokens.weight" in folded and "lm_head.weight" in folded


def test_table_of_names_in_the_readme_has_every_name():
    section = PAGES["README.md"].split("## Names and options")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(foam\w*)` \|", section, re.MULTILINE) == list(FOAM_NAMES)
    assert f"`scale={SCALES['block']:g}`" in section


def test_versions_are_those_of_pyproject():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = {
        name: next(s.version for s in specifiers if s.operator == ">=")
        for name, specifiers in ((r.name, r.specifier) for r in map(Requirement, project["dependencies"]))
    }
    lowest["Python"] = project["requires-python"].removeprefix(">=")
    for name, version in lowest.items():
        line = rf"^\| {name} \| {re.escape(version)} (or newer|to 5\.x) \|$"
        assert re.search(line, PAGES["README.md"], re.MULTILINE), name


def test_the_steps_that_the_readme_states_were_measured():
    rows = json.loads((RESULTS / "step_speed-nvidia-h200.json").read_text(encoding="utf-8"))["rows"]
    ms = {row["optimizer"]: row["ms"] for row in rows if (row["shapes"], row["dtype"]) == ("llama-7b", "bf16")}
    text = " ".join(PAGES["README.md"].split())
    assert f"FOAM {ms['foam']:.2f} ms a step, as long as a plain copy of its bytes" in text
    assert f"fused AdamW {ms['adamw-fused']:.2f} ms, FlashAdamW {ms['flash']:.1f} ms" in text
    foam = next(row for row in rows if row["optimizer"] == "foam" and row["shapes"] == "llama-7b")
    assert foam["floor_ratio"] <= 1.0
