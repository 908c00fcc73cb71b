"""Call a function once a module has been imported, without importing it.

The hook is a finder at the front of `sys.meta_path` that knows only the awaited names. It lets the other finders
locate the module and wraps the loader they return, for the duration of the import only: afterwards the module and its
spec carry the original loader, so `importlib.reload`, `inspect`, `importlib.resources` and pickling see nothing new.
"""

from __future__ import annotations

import importlib.machinery
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

ModuleCallback = Callable[[types.ModuleType], None]

_callbacks: dict[str, list[ModuleCallback]] = {}


def on_import(module_name: str, callback: ModuleCallback) -> None:
    """Call `callback(module)` when `module_name` has been executed: now if that is past, else after its import.

    The callback runs again if the module is reloaded, so it must be idempotent. Registering the same callback for the
    same module twice has no further effect. An exception of the module passes through untouched and the callback is
    then not called; an exception of the callback makes the import fail.

    Args:
        module_name: absolute dotted name, for example "transformers.trainer".
        callback: receives the executed module.
    """
    callbacks = _callbacks.setdefault(module_name, [])
    if callback in callbacks:
        return
    callbacks.append(callback)
    if not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())

    module = sys.modules.get(module_name)
    if module is None:
        return
    spec = getattr(module, "__spec__", None)
    if spec is not None and getattr(spec, "_initializing", False):
        _call_when_initialised(module_name, module, spec, callback)
    else:
        callback(module)


class _PostImportFinder:  # no base class: importlib.abc alone would double the cost of `import foam_hf`
    """Finds only modules that somebody awaits, by asking the finders that come after it."""

    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # other hooks of this kind search sys.meta_path from its start: the inner search must not come back here
        if fullname not in _callbacks or getattr(self._searching, "active", False):
            return None
        self._searching.active = True
        try:
            spec = self._ask_the_others(fullname, path, target)
        finally:
            self._searching.active = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = cast(importlib.machinery.SourceFileLoader, _CallingLoader(spec.loader))
        return spec

    def _ask_the_others(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        finders = list(sys.meta_path)
        later = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in later:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


class _CallingLoader:
    """Stands in for a loader until the module has been executed, then puts it back and calls the callbacks."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        name = module.__name__
        executed = sys.modules.get(name, module)  # a module may replace itself, as lazy ones do
        for callback in list(_callbacks.get(name, ())):
            callback(executed)


def _call_when_initialised(
    name: str, module: types.ModuleType, spec: importlib.machinery.ModuleSpec, callback: ModuleCallback
) -> None:
    """Wait for a module whose code is running now, somewhere up the stack or in another thread.

    importlib ends every import by setting `spec._initializing = False`: the spec's class is swapped for one that
    notices. A failed import has left `sys.modules` by then.
    """

    original_class: Any = spec.__class__

    class _WatchedSpec(original_class):
        def __setattr__(self, attribute: str, value: Any) -> None:
            super().__setattr__(attribute, value)
            if attribute == "_initializing" and not value:
                self.__class__ = original_class
                if sys.modules.get(name) is module:
                    callback(module)

    spec.__class__ = _WatchedSpec
