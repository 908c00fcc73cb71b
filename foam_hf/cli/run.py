"""`foam-hf run`: runs an unmodified training command in which optim="foam" is registered."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NoReturn

from foam_hf.cli.errors import CommandError
from foam_hf.display import PICTURES
from foam_hf.optim_args import FOAM_NAMES, ours_like, table_of_keys

USAGE = "foam-hf run [--summary] [--report-memory [PICTURE]] -- COMMAND ..."
SITECUSTOMIZE = Path(__file__).resolve().parents[1] / "_sitecustomize"


def add_parser(commands: Any) -> None:
    """Add `run` to the subparsers of `foam-hf`."""
    parser = commands.add_parser(
        "run",
        help="run a training command, which then knows optim=foam and FOAM's other names",
        description=_wrap_text(
            "Run an unmodified training command (python, torchrun, accelerate launch, trl, ...) with "
            f"--optim {', '.join(FOAM_NAMES)} available in it and in every python it starts."
        ),
        usage=USAGE,
        epilog=_keys_of_optim_args(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--summary",
        action="store_true",
        help="print which weights fold, which do not, and what their state takes, before the first step",
    )
    parser.add_argument(
        "--report-memory",
        nargs="?",
        const="1",
        metavar="PICTURE",
        help="add OptimizerMemoryCallback: measure and log the optimizer's bytes; with a file name that ends in .png, "
        ".pdf or .svg, also draw the GPU's memory through a training step into it (needs matplotlib)",
    )


def _wrap_text(text: str, indent: str = "") -> str:
    """`text` in lines as wide as argparse's own; all but the first are indented."""
    return textwrap.fill(text, shutil.get_terminal_size().columns - 2, subsequent_indent=indent)


def _keys_of_optim_args() -> str:
    keys = [
        _wrap_text(f"  {name} ({legal}; default: {default}): {text}", indent=6 * " ")
        for name, legal, default, text in table_of_keys()
    ]
    example = "example: foam-hf run --report-memory -- python train.py --optim foam --optim_args level=row"
    return "\n".join(["keys of --optim_args, as key=value,key=value:", *keys, "", example])


def refuse_misread(words: list[str], command: list[str] | None) -> None:
    """Raise CommandError for a command with --help and without "--": argparse would print the help of foam-hf.

    Args:
        words: the words after `foam-hf run`, up to "--".
        command: the words after "--"; None if there is no "--".
    """
    if command is not None:
        return
    start = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
    if start and words[start - 1] == "--report-memory" and words[start].lower().endswith(PICTURES):
        start = next((i for i, word in enumerate(words) if i > start and not word.startswith("-")), None)
    if start is None:
        return
    ours, theirs = (any(word in ("-h", "--help") for word in some) for some in (words[:start], words[start:]))
    if theirs and not ours:
        raise CommandError(_explain_unexpected(words, words[start], command))


def main(options: argparse.Namespace, words: list[str], stray: list[str], command: list[str] | None) -> int:
    """Run the command and return its exit code; on POSIX the command replaces this process.

    Args:
        options: as parsed.
        words, command: as for `refuse_misread`.
        stray: the words that the parser does not know.

    Raises:
        CommandError: an unknown argument, or a command that cannot be run.
    """
    report = options.report_memory
    if command is None and report in words and not report.lower().endswith(PICTURES):
        stray = [report, *stray]  # argparse took the command for the picture, because "--" is missing
    if stray:
        raise CommandError(_explain_unexpected(words, stray[0], command))
    report = _checked_report(report)
    if not command:
        raise CommandError("no command given; expected: foam-hf run -- python train.py --optim foam ...")
    _refuse_misspelt_optim(command)
    environment = _environment(report, options.summary)
    try:
        if os.name == "posix":
            _replace_process(command, environment)
        return subprocess.run(command, env=environment, check=False).returncode
    except FileNotFoundError:
        hint = f"; a script needs its Python: python {command[0]} ..." if command[0].endswith(".py") else ""
        raise CommandError(f"command not found: {command[0]}{hint}", code=127) from None
    except (OSError, ValueError) as error:  # ValueError: an empty command, or a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot execute {command[0]!r}: {reason}", code=126) from None


def _refuse_misspelt_optim(command: list[str]) -> None:
    """Raise CommandError for `--optim FOAM`: a Trainer's parser would print all its options and some forty names."""
    given = [after for word, after in itertools.pairwise(command) if word == "--optim"]
    given += [word.removeprefix("--optim=") for word in command if word.startswith("--optim=")]
    for name in given:
        if name not in FOAM_NAMES and (similar := ours_like(name)):
            raise CommandError(f"--optim {name!r} is no optimizer of the Trainer; did you mean {similar!r}?")


def _explain_unexpected(words: list[str], word: str, command: list[str] | None) -> str:
    if command is not None or word.startswith("-"):
        return f"unknown argument {word}; expected: {USAGE}"
    start = words.index(word)
    right = ["foam-hf", "run", *words[:start], "--", *words[start:]]
    return f"put -- before the command, got {shlex.join(words[start:])}; expected: {shlex.join(right)}"


def _checked_report(report: str | None) -> str | None:
    """The value of FOAM_HF_REPORT_MEMORY: None, "1", or the absolute path of a picture that can be written.

    Raises:
        CommandError: the path has another suffix, its folder or matplotlib is missing.
    """
    if report in (None, "1"):
        return report
    path = Path(report).absolute()
    if path.suffix.lower() not in PICTURES:
        raise CommandError(
            f"--report-memory draws into a file that ends in {', '.join(PICTURES)}, got {report!r}; "
            "expected: foam-hf run --report-memory memory.png -- COMMAND ..."
        )
    if not path.parent.is_dir():
        raise CommandError(f"no folder {path.parent} for {path.name}; expected one that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError(
            f"drawing {path.name} needs matplotlib; expected: pip install matplotlib, or --report-memory alone"
        )
    return str(path)


def _environment(report: str | None, summary: bool) -> dict[str, str]:
    environment = dict(os.environ)
    inherited = environment.get("PYTHONPATH")  # if it is empty, it must stay out: an empty entry is the current folder
    if str(SITECUSTOMIZE) not in (inherited or "").split(os.pathsep):
        environment["PYTHONPATH"] = os.pathsep.join([str(SITECUSTOMIZE), *([inherited] if inherited else [])])
    environment["FOAM_HF_RUN_PREFIX"] = sys.prefix  # only this interpreter may import foam_hf from a checkout
    if summary:
        environment["FOAM_HF_SUMMARY"] = "1"
    if report is not None:
        environment["FOAM_HF_REPORT_MEMORY"] = report
    return environment


def _replace_process(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Replace this process by the command, which then gets the signals and sets the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)
