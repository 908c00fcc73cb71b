"""`foam-hf run` puts this folder first on PYTHONPATH, so every python it starts runs this file at start-up.

It imports foam_hf, which waits for transformers, and runs the sitecustomize that it hides, if there is one.
"""

import importlib.machinery
import importlib.util
import os
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def _run_hidden_sitecustomize() -> None:
    # only what comes later on the path: two folders of this kind must not call each other for ever
    folders = [os.path.abspath(entry) for entry in sys.path]
    later = sys.path[folders.index(_FOLDER) + 1 :] if _FOLDER in folders else []
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", later)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module  # `import sitecustomize` finds the user's own
    spec.loader.exec_module(module)


def _import_foam_hf() -> None:
    try:
        import foam_hf
    except ModuleNotFoundError as error:
        if error.name != "foam_hf":
            raise
    else:
        return
    if os.environ.get("FOAM_HF_RUN_PREFIX") == sys.prefix:
        # the interpreter of foam-hf itself, which runs from a checkout that is not on this path
        root = os.path.dirname(os.path.dirname(_FOLDER))
        sys.path.insert(0, root)
        try:
            import foam_hf  # noqa: F401
        finally:
            sys.path.remove(root)
    elif importlib.util.find_spec("transformers") is not None:
        print(
            f"foam-hf run: {sys.executable} has transformers but not foam_hf, so optim=foam is unknown to it; "
            "install foam_hf there too: pip install . in its clone",
            file=sys.stderr,
        )


try:
    _import_foam_hf()
finally:  # python reports what goes wrong in either, and goes on
    _run_hidden_sitecustomize()
