"""The table of what this package touches in transformers' Trainer, against the transformers that is installed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import trainer

from foam_hf.trainer import file_checks
from foam_hf.trainer.patches import TABLE, Row, _wrapper
from tests.trainer.test_trainer import ROOT, python

pytestmark = pytest.mark.compat

AWAITED = (
    "transformers.training_args",
    "transformers.trainer",
    "transformers.modelcard",
    "accelerate.accelerator",
)
HERE = [row for row in TABLE if row.is_in(transformers.__version__)]


def named(row: Row) -> str:
    return ".".join(filter(None, [row.module, row.owner, row.name]))


@pytest.mark.parametrize("row", TABLE, ids=named)
def test_a_row_is_where_the_table_says(row: Row) -> None:
    assert not row.wrapper or callable(_wrapper(row.wrapper))
    if importlib.util.find_spec(row.module) is None:
        assert row not in HERE
        return
    module = importlib.import_module(row.module)
    owner = getattr(module, row.owner) if row.owner else module
    if row.name == "map_pytorch_optim_to_deepspeed" and importlib.util.find_spec("deepspeed") is None:
        return  # accelerate imports it only beside DeepSpeed
    assert hasattr(owner, row.name) == (row in HERE), f"{named(row)} in transformers {transformers.__version__}"
    if row.wrapper and row in HERE:
        assert row.module in AWAITED
        assert getattr(owner, row.name)._foam_hf and getattr(owner, row.name).__wrapped__


WITHOUT = """
import importlib, json, os, sys

for module, owner, name in json.loads(sys.argv[1]):
    place = importlib.import_module(module)
    owners = getattr(place, owner).__mro__ if owner else [place]
    read, write = os.pipe()
    if os.fork() == 0:
        for each in owners:
            if name in vars(each) and each is not object:
                delattr(each, name)
        try:
            import foam_hf
            said = "went on" if hasattr(sys.modules["transformers.trainer"].Trainer.train, "_foam_hf") else "unknown"
        except ImportError as error:
            said = str(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.wait()
    print(json.dumps(os.read(read, 10000).decode()))
"""


def test_a_missing_name_is_an_error_that_tells_it_or_goes_on_as_the_table_says() -> None:
    rows = [row for row in HERE if row.module in AWAITED]
    places = [(row.module, row.owner, row.name) for row in rows]
    done = python(WITHOUT.replace("for module", "import transformers.trainer\nfor module", 1), json.dumps(places))
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for row, words in zip(rows, said, strict=True):
        owner = row.owner or row.module
        expected = "went on" if row.without else f"{owner} has no {row.name}; expected transformers 4.57 to 5.x"
        assert expected in words, named(row)
    assert {bool(row.without) for row in rows} == {True, False}


def test_files_of_a_checkpoint_have_the_names_that_trainer_gives_them() -> None:
    pair = (trainer.OPTIMIZER_NAME, trainer.SCHEDULER_NAME)
    assert (trainer.TRAINER_STATE_NAME, pair) == (file_checks._STATE, file_checks._PAIR)


# private names elsewhere

TABLES = ("trainer/patches.py", "trainer/private.py", "int8/quantizer.py", "planner/fsdp2.py")
TORCHS = ("_orig_mod", "_parameters", "_local_tensor", "_dynamo")
THEIRS = (
    *("trainer", "trainer_callback", "trainer_utils", "training_args", "trainer_optimizer", "modelcard"),
    *("modeling_utils", "core_model_loading", "conversion_mapping", "integrations/peft"),
    *("quantizers/auto", "quantizers/base", "utils/quantization_config"),
)


def private_names(tree: ast.Module) -> Iterator[str]:
    """Attributes that are read or written, also by getattr, and names that are imported from other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("foam_hf"):
            yield from (alias.name for alias in node.names)


def own_names(tree: ast.Module) -> Iterator[str]:
    """What a file defines: not the functions inside of functions, which bear the names of what they wrap."""
    for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        for node in scope.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name
            targets: list[Any] = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_private_names_of_transformers_stand_in_the_files_that_list_them_alone() -> None:
    folder = Path(transformers.__file__).parent
    files = [folder / f"{name}.py" for name in THEIRS]
    theirs = "\n".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    package = ROOT / "foam_hf"
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {*own_names(tree), *TORCHS}
        for name in {name for name in private_names(tree) if re.fullmatch(r"_[a-z]\w*", name)} - own:
            if place not in TABLES and re.search(rf"\b{name}\b", theirs):
                found.append(f"{place}: {name}")
        inner = {row.module for row in TABLE} - {"transformers.training_args"}
        imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        found += [f"{place}: {module}" for module in imports if module in inner and place not in TABLES]
    assert not found, (
        f"expected a row of foam_hf/trainer/patches.py or a function of private.py beside it for {', '.join(found)}"
    )
