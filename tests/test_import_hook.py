"""The post-import hook, on small modules made for the occasion."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from foam_hf import _import_hook
from foam_hf._import_hook import on_import


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path whose modules, and whatever awaits them, are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_import_hook, "_callbacks", dict(_import_hook._callbacks))
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_callback_waits_for_the_import_and_sees_the_finished_module(modules: Path) -> None:
    (modules / "awaited.py").write_text("answer = 42\n")
    seen: list[int] = []
    on_import("awaited", lambda module: seen.append(module.answer))
    assert seen == [] and "awaited" not in sys.modules
    importlib.import_module("awaited")
    assert seen == [42]


def test_callback_runs_at_once_for_an_imported_module(modules: Path) -> None:
    (modules / "awaited.py").write_text("answer = 42\n")
    module = importlib.import_module("awaited")
    seen: list[types.ModuleType] = []
    on_import("awaited", seen.append)
    assert seen == [module]


def test_registering_the_same_callback_twice_calls_it_once(modules: Path) -> None:
    (modules / "awaited.py").write_text("")
    seen: list[types.ModuleType] = []
    on_import("awaited", seen.append)
    on_import("awaited", seen.append)
    importlib.import_module("awaited")
    assert len(seen) == 1
    assert sum(isinstance(finder, _import_hook._PostImportFinder) for finder in sys.meta_path) == 1


def test_module_that_is_importing_right_now_is_awaited_to_its_end(modules: Path) -> None:
    (modules / "outer.py").write_text("import inner\nfinished = True\n")
    (modules / "inner.py").write_text(
        "from foam_hf._import_hook import on_import\n"
        "finished = []\n"
        "on_import('outer', lambda module: finished.append(module.finished))\n"
        "assert finished == []\n"
    )
    outer = importlib.import_module("outer")
    assert outer.inner.finished == [True]
    assert type(outer.__spec__) is importlib.machinery.ModuleSpec


def test_failed_import_raises_its_own_error_and_calls_nothing(modules: Path) -> None:
    (modules / "broken.py").write_text("import innards\nraise RuntimeError('its own')\n")
    (modules / "innards.py").write_text(
        "from foam_hf._import_hook import on_import\nseen = []\non_import('broken', seen.append)\n"
    )
    seen: list[types.ModuleType] = []
    on_import("broken", seen.append)
    with pytest.raises(RuntimeError, match="its own"):
        importlib.import_module("broken")
    assert seen == [] and sys.modules["innards"].seen == [] and "broken" not in sys.modules


def test_missing_module_stays_missing(modules: Path) -> None:
    on_import("awaited_but_absent", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="awaited_but_absent"):
        importlib.import_module("awaited_but_absent")


def test_module_keeps_its_loader_source_and_pickles_and_reload_calls_again(modules: Path) -> None:
    (modules / "awaited.py").write_text("class Thing:\n    pass\n")
    seen: list[types.ModuleType] = []
    on_import("awaited", seen.append)
    module = importlib.import_module("awaited")
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader
    assert module.__spec__ is not None and module.__spec__.loader is module.__loader__
    assert inspect.getsource(module) == "class Thing:\n    pass\n"
    assert type(pickle.loads(pickle.dumps(module.Thing()))) is module.Thing
    assert importlib.reload(module) is module
    assert seen == [module, module]


def test_another_hook_that_searches_from_the_start_of_the_path_still_works(modules: Path) -> None:
    """Other post-import hooks call importlib.util.find_spec, which comes back to every finder."""
    (modules / "awaited.py").write_text("")

    class Searching:
        active = False

        def find_spec(self, name: str, path: object, target: object = None) -> object:
            if name != "awaited" or Searching.active:
                return None
            Searching.active = True
            try:
                return importlib.util.find_spec(name)
            finally:
                Searching.active = False

    seen: list[types.ModuleType] = []
    on_import("awaited", seen.append)
    for position in (0, len(sys.meta_path)):
        finder = Searching()
        sys.meta_path.insert(position, finder)  # type: ignore[arg-type]
        try:
            importlib.import_module("awaited")
        finally:
            sys.meta_path.remove(finder)  # type: ignore[arg-type]
        del sys.modules["awaited"]
    assert len(seen) == 2
