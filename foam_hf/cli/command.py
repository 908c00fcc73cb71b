"""The `foam-hf` command: parses the command line and calls the file of the chosen subcommand."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from foam_hf._version import __version__
from foam_hf.cli import estimate, estimate_options, export, recipes, run
from foam_hf.cli.errors import CommandError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `foam-hf` with `argv` (default: `sys.argv[1:]`) and return its exit code."""
    ours = list(sys.argv[1:] if argv is None else argv)
    command = None
    if "--" in ours:  # all words after the first "--" belong to the command that `foam-hf run` starts
        cut = ours.index("--")
        ours, command = ours[:cut], ours[cut + 1 :]
    name = ours[0] if ours else ""
    try:
        if name == "run":
            run.refuse_misread(ours[1:], command)
        elif name == "recipes":
            recipes.refuse_misread(ours[1:])
        parser = _parser()
        options, stray = parser.parse_known_args(ours)
        if stray and options.command != "run":
            raise CommandError(f"unrecognized arguments: {shlex.join(stray)}{_with_dashes(stray, options)}")
        if options.command is None:
            parser.print_help()
            return 0
        name = options.command
        if name == "run":
            return run.main(options, ours[1:], stray, command)
        if command is not None:
            raise CommandError(f"`--` belongs to `foam-hf run`, got it after `foam-hf {name}`")
        others = {"estimate": estimate.main, "recipes": recipes.main, "export": export.main}
        return others[name](options)
    except CommandError as error:
        print(f"foam-hf {name}: {error}", file=sys.stderr)
        return error.code


def _with_dashes(stray: list[str], options: argparse.Namespace) -> str:
    """The hint on a flag that is written with underscores, as the Trainer's are; "" if there is none."""
    for word in stray:
        flag = word.partition("=")[0]
        if "_" in flag and hasattr(options, flag.removeprefix("--")):
            return f"; did you mean {flag.replace('_', '-')}?"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foam-hf", description="FOAM for the Hugging Face Trainer: run any training command with optim=foam."
    )
    parser.add_argument("--version", action="version", version=f"foam-hf {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="{run,estimate,recipes,export}")
    for each in (run, estimate_options, recipes, export):
        each.add_parser(commands)
    return parser
