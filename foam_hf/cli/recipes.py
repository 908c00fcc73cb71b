"""`foam-hf recipes`: lists the bundled training scripts, or copies one into a folder."""

from __future__ import annotations

import argparse
import difflib
import shlex
import shutil
from pathlib import Path
from typing import Any

from foam_hf.cli.errors import CommandError
from foam_hf.folders import whole_folder

_PACKAGE = Path(__file__).resolve().parents[1]
_ACTIONS = ("list", "copy")


def add_parser(commands: Any) -> None:
    """Add `recipes` to the subparsers of `foam-hf`."""
    parser = commands.add_parser(
        "recipes",
        help="list the bundled recipes, or copy one into a folder",
        description="Without an action: list the bundled recipes.",
    )
    actions = parser.add_subparsers(dest="action", title="actions", metavar="{list,copy}")
    actions.add_parser("list", help="list the bundled recipes")
    copy = actions.add_parser("copy", help="copy a recipe into a new folder")
    copy.add_argument("name", help="a name that `foam-hf recipes` lists")
    copy.add_argument("dest", nargs="?", help="the folder to make (default: ./NAME); it must not hold anything yet")


def refuse_misread(words: list[str]) -> None:
    """Raise CommandError, with the right command, if a recipe's name stands in place of the action."""
    if not words or words[0].startswith("-") or words[0] in _ACTIONS:
        return
    near = difflib.get_close_matches(words[0], [*recipe_folders(), *_ACTIONS], n=1)
    meant = f"foam-hf recipes {near[0]}" if near and near[0] in _ACTIONS else ""
    meant = meant or (f"foam-hf recipes copy {near[0]}" if near else "")
    hint = f"did you mean `{shlex.join([*meant.split(), *words[1:]])}`? " if meant else ""
    raise CommandError(f"no action {words[0]!r}; {hint}expected `foam-hf recipes` or `foam-hf recipes copy NAME`")


def main(options: argparse.Namespace) -> int:
    """List or copy; return the exit code.

    Raises:
        CommandError: there is no such recipe, or the folder cannot be written.
    """
    return _copy(options.name, options.dest) if options.action == "copy" else _list()


def recipe_folders() -> dict[str, Path]:
    """Recipe name -> folder, inside the installed package, or beside it in a clone.

    Raises:
        CommandError: the installation has no recipes.
    """
    inside, clone = _PACKAGE / "recipes", _PACKAGE.parent
    root = inside if inside.is_dir() or not (clone / "pyproject.toml").is_file() else clone / "recipes"
    if not root.is_dir():
        raise CommandError(f"this installation has no recipes: expected them in {root}", code=1)
    folders = {folder.name: folder for folder in sorted(root.iterdir()) if (folder / "README.md").is_file()}
    folders.pop("benchmarks", None)  # in a clone; benchmarks run from there and are not copied
    return folders


def _list() -> int:
    recipes = recipe_folders()
    width = max(map(len, recipes), default=0)
    for name, folder in recipes.items():
        lines = (line.strip("# \t\n") for line in (folder / "README.md").read_text(encoding="utf-8").splitlines())
        print(f"{name:<{width}}  {next(filter(None, lines), '')}")
    print("\nCopy one into your folder: foam-hf recipes copy NAME [DEST]")
    return 0


def _copy(name: str, dest: str | None) -> int:
    recipes = recipe_folders()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise CommandError(f"no recipe {name!r}; {hint}expected one of {', '.join(recipes)}")
    target = Path(dest if dest is not None else name)
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    try:
        with whole_folder(target) as folder:
            shutil.copytree(recipes[name], folder, ignore=ignore, dirs_exist_ok=True)
    except ValueError as error:
        raise CommandError(str(error), code=1) from None
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error.strerror or error}", code=1) from None
    files = sum(path.is_file() for path in target.rglob("*"))
    print(f"Copied {name} ({files} files) to {target}. How to run it: {target / 'README.md'}")
    return 0
