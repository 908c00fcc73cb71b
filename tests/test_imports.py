"""What each folder of the package may import, so that a reader can learn them from the bottom up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "foam_hf"
# Files at the root that a wing may need; none of them imports another part of the package.
GROUND = ("_version", "_import_hook", "display", "folders", "optim_args", "wrapping")
# By folder, from the bottom up: what its files import of the package besides their own folder.
MAY_IMPORT = {
    "tensors": (),
    "kernels": ("tensors",),
    "rules": ("kernels", "tensors", "optim_args"),
    "optimizer": ("rules", "kernels", "tensors", "optim_args"),
    "memory": ("optimizer", "rules", "tensors", *GROUND),
    "int8": ("optimizer", "rules", "kernels", "tensors", *GROUND),
    "planner": ("int8", "memory", "optimizer", "rules", "tensors", *GROUND),
    "trainer": ("planner", "memory", "int8", "optimizer", "rules", "tensors", *GROUND),
    "cli": ("planner", "int8", "memory", *GROUND),
}
# Files at the root that import a wing: the package itself, what only recipes use, and paths of earlier versions.
ROOT_FILES = {
    "__init__": ("_import_hook", "_version", *MAY_IMPORT),
    "axolotl_plugin": ("optim_args", "__init__"),
    "recipe_kit": ("optim_args", "optimizer"),
    "recipe_config": ("optim_args", "recipe_kit"),
    "trainer_plugin": ("trainer",),
    "callback": ("trainer",),
    "int8_models": ("int8",),
    "int8_quantizer": ("int8",),
    "int8_weights": ("int8",),
    "nonfinite": ("optimizer",),
    "plan": ("planner",),
}


def _imports(path: Path, *, when_run: bool = False) -> Iterator[str]:
    """Modules of the package that the file at ``path`` imports, anywhere in it, as "rules.block" or "display".

    ``when_run`` leaves out what only type checkers import.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in list(tree.body):
        if when_run and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            tree.body.remove(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "foam_hf":
            inside = node.module.partition(".")[2]
            for alias in node.names:
                name = f"{inside}.{alias.name}" if inside else alias.name
                yield name if _file_of(name) else inside or "__init__"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "foam_hf":
                    yield alias.name.partition(".")[2] or "__init__"


def _file_of(name: str) -> Path | None:
    """The file of a module, as "rules.block"; of a folder its face."""
    path = PACKAGE.joinpath(*name.split("."))
    face = path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else face if face.is_file() else None


def _files() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if "recipes" not in path.relative_to(PACKAGE).parts and "_sitecustomize" not in path.parts
    }


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_what_lies_below_it(folder: str) -> None:
    allowed = {folder, *MAY_IMPORT[folder]}
    wrong = [
        f"{name} imports {target}"
        for name, path in _files().items()
        if name.split(".")[0] == folder
        for target in _imports(path)
        if target.split(".")[0] not in allowed
    ]
    assert not wrong, f"{folder}/ may import {sorted(allowed - {folder})}: {wrong}"


def test_files_at_the_root_import_nothing_but_what_they_are_for() -> None:
    for name, path in _files().items():
        if "." not in name:
            allowed = ROOT_FILES.get(name, ())
            assert {target.split(".")[0] for target in _imports(path)} <= set(allowed), name
            assert name in ROOT_FILES or name in GROUND, f"{name}.py is new at the root: say here what it may import"


def test_no_file_imports_itself_by_way_of_others() -> None:
    files = _files()
    graph = {
        name: {
            target for target in _imports(path, when_run=True) if not (target in MAY_IMPORT or target == "__init__")
        }
        for name, path in files.items()
        if not name.endswith("__init__")
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_int8_and_what_is_above_it_names_int8() -> None:
    for name, path in _files().items():
        if name.split(".")[0] in ("tensors", "kernels", "rules", "optimizer", "memory"):
            assert "foam_hf.int8" not in path.read_text(encoding="utf-8"), name


def test_folders_are_all_listed() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)


def test_every_message_is_logged_under_the_name_of_the_package() -> None:
    for name, path in _files().items():
        loggers = re.findall(r"getLogger\((.*?)\)", path.read_text(encoding="utf-8"))
        assert set(loggers) <= {'"foam_hf"'}, f"{name} logs under {loggers}; users set the level of foam_hf alone"
