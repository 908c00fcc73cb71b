"""`foam-hf export`: writes a model with INT8 weights as a plain floating point model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from foam_hf.cli.errors import CommandError
from foam_hf.display import format_bytes


def add_parser(commands: Any) -> None:
    """Add `export` to the subparsers of `foam-hf`."""
    parser = commands.add_parser(
        "export",
        help="write a model with INT8 weights as a plain bf16 one",
        description="Write a saved model or Trainer checkpoint with INT8 weights (foam_hf.Int8Config) as plain "
        "safetensors, with its tokenizer, for tools that do not know foam_hf.",
        epilog="example: foam-hf export runs/int8/checkpoint-500 my-model-bf16",
    )
    parser.add_argument("source", metavar="SRC", help="folder of the INT8 model")
    parser.add_argument("destination", metavar="DEST", help="the folder to make; it must not hold anything yet")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights (bfloat16)"
    )


def main(options: argparse.Namespace) -> int:
    """Write the model; return the exit code.

    Raises:
        CommandError: the source cannot be read, or the destination cannot be written.
    """
    import torch

    from foam_hf.int8.files import export_checkpoint

    source, destination = options.source, options.destination
    if sum(path.stat().st_size for path in Path(source).glob("*.safetensors")) > 10**9:
        print(f"foam-hf export: writing {destination}, which may take minutes ...", file=sys.stderr, flush=True)
    try:
        count = export_checkpoint(source, destination, getattr(torch, options.dtype))
    except ValueError as error:
        raise CommandError(str(error), code=1) from None
    except OSError as error:
        raise CommandError(f"cannot write {destination}: {error.strerror or error}", code=1) from None
    size = sum(path.stat().st_size for path in Path(destination).glob("*.safetensors"))
    print(
        f"Exported {source} to {destination}: {count} INT8 weights as {options.dtype}, "
        f"{format_bytes(size)} of safetensors."
    )
    return 0
