"""The `foam-hf` command: `run` for scripts that do not know foam_hf; `estimate`, `recipes` and `export`."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from foam_hf._version import __version__
from foam_hf.cli import estimate
from foam_hf.folders import check_destination
from foam_hf.optim_args import FOAM_NAMES

_USAGE = "foam-hf run [--summary] [--report-memory [PICTURE]] -- COMMAND ..."
_PICTURES = (".png", ".pdf", ".svg")
_PACKAGE = Path(__file__).resolve().parents[1]
_SITECUSTOMIZE = _PACKAGE / "_sitecustomize"


class CommandError(Exception):
    """A message for the user and the exit code that goes with it."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run `foam-hf` with `argv` (default: `sys.argv[1:]`) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # everything behind the first "--" belongs to the command, whatever it looks like
    ours, command = arguments, None
    if "--" in arguments:
        cut = arguments.index("--")
        ours, command = arguments[:cut], arguments[cut + 1 :]
    parser = _parser()
    try:
        _refuse_forgotten(ours, command)
    except CommandError as error:
        print(f"foam-hf {ours[0]}: {error}", file=sys.stderr)
        return error.code
    options, stray = parser.parse_known_args(ours)
    if stray and options.command != "run":
        parser.error(f"unrecognized arguments: {shlex.join(stray)}")
    if options.command is None:
        parser.print_help()
        return 0
    try:
        if options.command == "run":
            report = options.report_memory
            if command is None and report in ours and not report.lower().endswith(_PICTURES):
                stray = [report, *stray]  # the command, its "--" forgotten
            if stray:
                raise CommandError(_stray_message(ours, stray, command))
            return _run(command, _picture(report), options.summary)
        if command is not None:
            raise CommandError(f"`--` belongs to `foam-hf run`, got it after `foam-hf {options.command}`")
        if options.command == "export":
            return _export(options.source, options.destination, options.dtype)
        if options.command == "estimate":
            return _estimate(options)
        return _list_recipes() if options.action in (None, "list") else _copy_recipe(options.name, options.dest)
    except CommandError as error:
        print(f"foam-hf {options.command}: {error}", file=sys.stderr)
        return error.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foam-hf", description="FOAM for the Hugging Face Trainer: run any training command with optim=foam."
    )
    parser.add_argument("--version", action="version", version=f"foam-hf {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="{run,estimate,recipes,export}")

    run = commands.add_parser(
        "run",
        help="run a training command with optim=foam and its kin registered in it",
        description="Run an unmodified training command (python, torchrun, accelerate launch, trl, ...) with "
        f"--optim {', '.join(FOAM_NAMES)} available in it and in every python it starts.",
        usage=_USAGE,
        epilog="example: foam-hf run --report-memory -- python train.py --optim foam --optim_args level=row",
    )
    run.add_argument(
        "--summary",
        action="store_true",
        help="print which weights fold, which do not, and what their state takes, before the first step",
    )
    run.add_argument(
        "--report-memory",
        nargs="?",
        const="1",
        metavar="PICTURE",
        help="add OptimizerMemoryCallback: measure and log the optimizer's bytes; with a file name that ends in .png, "
        ".pdf or .svg, also draw the GPU's memory through a training step into it (needs matplotlib)",
    )

    estimate.add_parser(commands)

    recipes = commands.add_parser(
        "recipes",
        help="list the bundled recipes, or copy one into a folder",
        description="Without an action: list the bundled recipes.",
    )
    actions = recipes.add_subparsers(dest="action", title="actions", metavar="{list,copy}")
    actions.add_parser("list", help="list the bundled recipes")
    copy = actions.add_parser("copy", help="copy a recipe into a new folder")
    copy.add_argument("name", help="a name that `foam-hf recipes` lists")
    copy.add_argument("dest", nargs="?", help="the folder to make (default: ./NAME); it must not hold anything yet")

    export = commands.add_parser(
        "export",
        help="write a model with INT8 weights as a plain bf16 one",
        description="Write a saved model or Trainer checkpoint with INT8 weights (foam_hf.Int8Config) as plain "
        "safetensors, with its tokenizer, for tools that do not know foam_hf.",
        epilog="example: foam-hf export runs/int8/checkpoint-500 my-model-bf16",
    )
    export.add_argument("source", metavar="SRC", help="folder of the INT8 model")
    export.add_argument("destination", metavar="DEST", help="the folder to make; it must not hold anything yet")
    export.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights (bfloat16)"
    )
    return parser


def _refuse_forgotten(ours: list[str], command: list[str] | None) -> None:
    """What argparse would misread: a command behind `run` without its "--", a recipe's name in place of an action."""
    kind, rest = (ours[0], ours[1:]) if ours else ("", [])
    if kind == "run" and command is None:
        start = next((i for i, word in enumerate(rest) if not word.startswith("-")), None)
        if start and rest[start - 1] == "--report-memory" and rest[start].lower().endswith(_PICTURES):
            start = next((i for i, word in enumerate(rest) if i > start and not word.startswith("-")), None)
        asks_for_help = any(word in ("-h", "--help") for word in rest[:start])
        if start is not None and not asks_for_help and any(word in ("-h", "--help") for word in rest[start:]):
            raise CommandError(_stray_message(ours, [rest[start]], command))
    if kind == "recipes" and rest and not rest[0].startswith("-") and rest[0] not in ("list", "copy"):
        near = difflib.get_close_matches(rest[0], [*recipe_folders(), "list", "copy"], n=1)
        meant = f"foam-hf recipes {near[0]}" if near and near[0] in ("list", "copy") else ""
        meant = meant or (f"foam-hf recipes copy {near[0]}" if near else "")
        hint = f"did you mean `{shlex.join([*meant.split(), *rest[1:]])}`? " if meant else ""
        raise CommandError(f"no action {rest[0]!r}; {hint}expected `foam-hf recipes` or `foam-hf recipes copy NAME`")


def _stray_message(ours: list[str], stray: list[str], command: list[str] | None) -> str:
    if command is not None or stray[0].startswith("-"):
        return f"unknown argument {stray[0]}; expected: {_USAGE}"
    start = ours.index(stray[0], 1)
    right = ["foam-hf", *ours[:start], "--", *ours[start:]]
    return f"put -- before the command, got {shlex.join(ours[start:])}; expected: {shlex.join(right)}"


def _picture(report: str | None) -> str | None:
    """What the callback is told: "1", or a path that holds wherever the command goes. Checked before the training."""
    if report in (None, "1"):
        return report
    path = Path(report).absolute()
    if path.suffix.lower() not in _PICTURES:
        raise CommandError(
            f"--report-memory draws into a file that ends in {', '.join(_PICTURES)}, got {report!r}; "
            "expected: foam-hf run --report-memory memory.png -- COMMAND ..."
        )
    if not path.parent.is_dir():
        raise CommandError(f"no folder {path.parent} for {path.name}; expected one that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError(
            f"drawing {path.name} needs matplotlib; expected: pip install matplotlib, or --report-memory alone"
        )
    return str(path)


def _run(command: list[str] | None, report_memory: str | None, summary: bool) -> int:
    if not command:
        raise CommandError("no command given; expected: foam-hf run -- python train.py --optim foam ...")
    environment = dict(os.environ)
    inherited = environment.get("PYTHONPATH")  # an empty entry in it means the current folder; an empty one nothing
    if str(_SITECUSTOMIZE) not in (inherited or "").split(os.pathsep):
        environment["PYTHONPATH"] = os.pathsep.join([str(_SITECUSTOMIZE), *([inherited] if inherited else [])])
    environment["FOAM_HF_RUN_PREFIX"] = sys.prefix  # children of this interpreter may import foam_hf from a checkout
    if summary:
        environment["FOAM_HF_SUMMARY"] = "1"
    if report_memory is not None:
        environment["FOAM_HF_REPORT_MEMORY"] = report_memory
    try:
        if os.name == "posix":
            _replace_process(command, environment)
        return subprocess.run(command, env=environment, check=False).returncode
    except FileNotFoundError:
        raise CommandError(f"command not found: {command[0]}", code=127) from None
    except (OSError, ValueError) as error:  # ValueError: an empty command, or a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot execute {command[0]!r}: {reason}", code=126) from None


def _replace_process(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Become the command, so that signals and the exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)


def _estimate(options: argparse.Namespace) -> int:
    try:
        return estimate.run(options)
    except BrokenPipeError:  # `| head` has seen enough; nor must Python complain when it closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error


def recipe_folders() -> dict[str, Path]:
    """Recipe name -> folder: inside the installed package, or beside it in a clone."""
    inside, clone = _PACKAGE / "recipes", _PACKAGE.parent
    root = inside if inside.is_dir() or not (clone / "pyproject.toml").is_file() else clone / "recipes"
    if not root.is_dir():
        raise CommandError(f"this installation has no recipes: expected them in {root}", code=1)
    return {folder.name: folder for folder in sorted(root.iterdir()) if (folder / "README.md").is_file()}


def _list_recipes() -> int:
    recipes = recipe_folders()
    width = max(map(len, recipes), default=0)
    for name, folder in recipes.items():
        lines = (line.strip("# \t\n") for line in (folder / "README.md").read_text(encoding="utf-8").splitlines())
        print(f"{name:<{width}}  {next(filter(None, lines), '')}")
    print("\nCopy one into your folder: foam-hf recipes copy NAME [DEST]")
    return 0


def _copy_recipe(name: str, dest: str | None) -> int:
    recipes = recipe_folders()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise CommandError(f"no recipe {name!r}; {hint}expected one of {', '.join(recipes)}")
    target = Path(dest if dest is not None else name)
    try:
        check_destination(target)
    except ValueError as error:
        raise CommandError(str(error), code=1) from None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".foam-hf-", dir=target.parent) as workspace:
            copied = Path(workspace) / "recipe"
            shutil.copytree(recipes[name], copied, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            if target.is_dir():
                target.rmdir()
            copied.rename(target)  # whole or not at all
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error.strerror or error}", code=1) from None
    files = sum(path.is_file() for path in target.rglob("*"))
    print(f"Copied {name} ({files} files) to {target}. How to run it: {target / 'README.md'}")
    return 0


def _export(source: str, destination: str, dtype: str) -> int:
    import torch

    from foam_hf.int8.files import export_checkpoint

    if sum(path.stat().st_size for path in Path(source).glob("*.safetensors")) > 10**9:
        print(f"foam-hf export: writing {destination}, which may take minutes ...", file=sys.stderr, flush=True)
    try:
        count = export_checkpoint(source, destination, getattr(torch, dtype))
    except ValueError as error:
        raise CommandError(str(error), code=1) from None
    except OSError as error:
        raise CommandError(f"cannot write {destination}: {error.strerror or error}", code=1) from None
    size = sum(path.stat().st_size for path in Path(destination).glob("*.safetensors"))
    print(f"Exported {source} to {destination}: {count} INT8 weights as {dtype}, {size / 1e9:.2f} GB of safetensors.")
    return 0
