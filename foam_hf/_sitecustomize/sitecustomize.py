"""Imports foam_hf at the start of every Python in `foam-hf run`, which puts this folder first on PYTHONPATH.

Then it runs the user's own sitecustomize, which Python no longer finds because of this file.
"""

import importlib.machinery
import importlib.util
import os
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def _run_hidden_sitecustomize() -> None:
    # Search later entries of the path only: two folders of this kind would call each other without end.
    folders = [os.path.abspath(entry) for entry in sys.path]
    later = sys.path[folders.index(_FOLDER) + 1 :] if _FOLDER in folders else []
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", later)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module  # so that `import sitecustomize` finds the user's file
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
        # This is the interpreter of foam-hf itself, which runs from a checkout that is not on sys.path.
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
finally:  # Python prints an error in this file and continues
    _run_hidden_sitecustomize()
