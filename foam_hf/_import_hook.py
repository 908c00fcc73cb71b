"""Calls a function after a module was imported, without importing the module itself.

The hook is a finder at the front of `sys.meta_path` that answers only for the awaited names. It lets the other finders
locate the module, and wraps the loader that they return during the import. Afterwards the module and its spec have the
original loader, so `importlib.reload`, `inspect`, `importlib.resources` and pickling work as before.
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
    """Call `callback(module)` now if `module_name` is imported already, else after its import.

    The callback runs again if the module is reloaded, so it must be idempotent. Registering the same callback for the
    same module twice has no further effect. If the module raises an exception, the callback is not called. If the
    callback raises one, the import fails.

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


class _PostImportFinder:  # no base class: importing importlib.abc would double the time of `import foam_hf`
    """Finds only modules with callbacks, by asking the finders that come after it."""

    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # Other hooks of this kind search sys.meta_path from its start; the search must not call this finder again.
        if fullname not in _callbacks or getattr(self._searching, "active", False):
            return None
        self._searching.active = True
        try:
            spec = self._find_by_later_finders(fullname, path, target)
        finally:
            self._searching.active = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = cast(importlib.machinery.SourceFileLoader, _CallingLoader(spec.loader))
        return spec

    def _find_by_later_finders(
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
    """Replaces a loader until the module is executed, then restores the loader and calls the callbacks."""

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
        executed = sys.modules.get(name, module)  # a lazy module replaces itself
        for callback in list(_callbacks.get(name, ())):
            callback(executed)


def _call_when_initialised(
    name: str, module: types.ModuleType, spec: importlib.machinery.ModuleSpec, callback: ModuleCallback
) -> None:
    """Call `callback` when the code of a module has run that is running now, up the stack or in another thread.

    importlib ends every import by setting `spec._initializing = False`. So the spec gets a class that intercepts this.
    A failed import has removed the module from `sys.modules` by then, and the callback is not called.
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
