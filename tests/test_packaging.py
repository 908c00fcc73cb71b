"""The wheel, the source distribution, the pinned versions and the Makefile: what somebody gets who installs this."""

import os
import re
import stat
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from foam_hf import __version__

REPO = Path(__file__).resolve().parents[1]


def run(*command, cwd=None, **environment):
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, REPO)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with nothing but what the wheel holds."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


def test_the_wheel_holds_the_package_its_types_and_the_recipes_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name == f"foam_hf-{__version__}-py3-none-any.whl"
    data = [REPO / "foam_hf" / "py.typed", REPO / "foam_hf" / "planner" / "accuracy.json"]
    for source in [*(REPO / "foam_hf").rglob("*.py"), *data]:
        assert source.relative_to(REPO).as_posix() in names
    for source in (REPO / "recipes").rglob("*"):
        name = source.relative_to(REPO).as_posix()
        if source.suffix in (".py", ".yaml", ".md") and not name.startswith("recipes/benchmarks/"):
            assert f"foam_hf/{name}" in names
    assert not [
        name for name in names if "benchmarks" in name or "/results/" in name or name.endswith((".png", ".jsonl"))
    ]
    assert f"foam_hf-{__version__}.dist-info/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"foam_hf", f"foam_hf-{__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_metadata_asks_for_what_the_package_needs(metadata):
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert {r.name for r in needed if r.marker is None} == {"torch", "transformers", "accelerate", "rich"}
    assert {"demo", "glue", "plot", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_the_installed_command_lists_and_copies_the_recipes(installed, tmp_path):
    command = installed / "bin" / "foam-hf"
    listed = run(sys.executable, command, "recipes", cwd=tmp_path, PYTHONPATH=str(installed))
    assert not re.search(r"^benchmarks\b", listed, re.MULTILINE)
    for folder in (REPO / "recipes").iterdir():
        if (folder / "README.md").is_file() and folder.name != "benchmarks":
            assert re.search(rf"^{folder.name}\s+\S", listed, re.MULTILINE), listed
    run(sys.executable, command, "recipes", "copy", "glue", cwd=tmp_path, PYTHONPATH=str(installed))
    assert (tmp_path / "glue" / "train.py").is_file()


def test_a_copied_demo_finds_the_glue_recipe_of_the_installed_package(installed, tmp_path):
    command = installed / "bin" / "foam-hf"
    run(sys.executable, command, "recipes", "copy", "demo", cwd=tmp_path, PYTHONPATH=str(installed))
    code = "import demo; print(demo.find_train_script())"
    found = run(sys.executable, "-c", code, cwd=tmp_path / "demo", PYTHONPATH=str(installed))
    assert Path(found.strip()) == installed / "foam_hf" / "recipes" / "glue" / "train.py"


def test_the_source_distribution_can_be_built_and_tested(tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=REPO)
    names = set(run("tar", "-tzf", *tmp_path.glob("*.tar.gz")).split())
    for name in (
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        "LICENSE",
        "docs/figures/state_bytes.png",
        "docs/options.md",
        "recipes/benchmarks/results/faults.json",
        "recipes/benchmarks/speed/step_speed.py",
        "tests/test_packaging.py",
    ):
        assert f"foam_hf-{__version__}/{name}" in names
    assert f"foam_hf-{__version__}/recipes/demo/demo.py" in names


def pins(name):
    lines = (REPO / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-compat.txt"])
def test_every_pin_is_exact_once_a_python_and_names_no_address(name):
    text = (REPO / name).read_text(encoding="utf-8")
    assert "/" not in text and "@" not in text
    for version in ("3.10", "3.11", "3.12", "3.13"):
        valid = [r for r in pins(name) if r.marker is None or r.marker.evaluate({"python_version": version})]
        assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in valid)
        names = [canonicalize_name(r.name) for r in valid]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "extras"), [("constraints.txt", None), ("constraints-compat.txt", {"test", "peers"})]
)
def test_every_dependency_is_pinned(metadata, name, extras):
    pinned = {canonicalize_name(r.name): r for r in pins(name)}
    for needed in map(Requirement, metadata.get_all("Requires-Dist")):
        extra = re.search(r'extra == "?\'?([a-z]+)', str(needed.marker or ""))
        if needed.name == "foam-hf" or (extras and extra and extra.group(1) not in extras):
            continue
        assert canonicalize_name(needed.name) in pinned, f"{needed} is not pinned in {name}"
        version = next(iter(pinned[canonicalize_name(needed.name)].specifier)).version
        assert needed.specifier.contains(version), f"{name} pins {version}, but pyproject.toml asks for {needed}"


def make(*arguments):
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=REPO, capture_output=True, text=True, timeout=60
    )


def test_make_alone_lists_its_targets():
    done = make()
    assert done.returncode == 0
    for target in ("demo", "test", "test-gpu", "test-compat", "style", "quality"):
        assert re.search(rf"^ *make {target}\s+\S", done.stdout, re.MULTILINE), done.stdout


def test_make_says_which_python_it_needs(tmp_path):
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && { echo Python 3.9.1; exit 0; }\nexit 1\n')
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    done = make("demo", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode and "needs Python 3.10 or newer" in done.stderr and "Python 3.9.1" in done.stderr
    done = make("test", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}")
    assert done.returncode and "no 'no-such-python' on the PATH" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_says_when_python_cannot_make_environments(tmp_path):
    lame = tmp_path / "lame-python"
    lame.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    lame.chmod(lame.stat().st_mode | stat.S_IXUSR)
    done = make("demo", f"PYTHON={lame}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode and "apt install python3-venv" in done.stderr
