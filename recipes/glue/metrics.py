"""GLUE's metrics: from `evaluate` where the model hub answers, the same numbers from scikit-learn and scipy elsewhere.

Degenerate cases have one value in both: a Matthews or other correlation that is undefined, because predictions (or
labels) are all the same, is 0.0, and so is the F1 of a run that never predicts the positive class.
"""

import functools
import importlib.util
import math
import warnings

import numpy as np
from data import TASKS

from foam_hf.recipe_kit import hub_problem, say

try:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef
except ImportError as error:  # before a run, not at its first evaluation; evaluate's GLUE metric needs them too
    raise SystemExit(
        f"GLUE's metrics need scikit-learn and scipy (pip install scikit-learn scipy): {error}."
    ) from None


def score(task_name: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """GLUE's scores of model outputs: logits of shape (rows, classes), or values (rows,) or (rows, 1) for STS-B."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if not np.isfinite(predictions).all():
        print(f"{task_name}: {np.sum(~np.isfinite(predictions))} outputs of the model are not finite numbers.")
    if TASKS[task_name].labels is None:
        predictions = np.nan_to_num(predictions.reshape(-1).astype(np.float64))
    else:
        predictions = np.nan_to_num(predictions).argmax(axis=-1)
    _noted["last"] = one_class(task_name, predictions)
    if _noted["last"]:
        say(f"{task_name}: {_noted['last']}")
    metric = hub_metric(task_name)
    if metric is None:
        return local_scores(task_name, predictions, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = metric.compute(predictions=predictions, references=labels)
    return {name: _defined(value) for name, value in scores.items()}


_noted = {"last": ""}


def last_note() -> str:
    """What `one_class` said of the last predictions that were scored."""
    return _noted["last"]


def one_class(task_name: str, predictions: np.ndarray) -> str:
    """A note where all predictions are the same, of which a score says little; nothing else."""
    if len(predictions) < 2 or np.ptp(predictions) > 0:
        return ""
    labels = TASKS[task_name].labels
    what = f"the value {predictions[0]:g}" if labels is None else f"the class {labels[int(predictions[0])]}"
    return f"the model predicts {what} for all {len(predictions)} rows; a score of it says nothing of the task"


@functools.cache
def hub_metric(task_name: str):
    """`evaluate`'s GLUE metric, or None where the package or the hub is missing."""
    if importlib.util.find_spec("evaluate") is None or hub_problem():
        return None
    import evaluate

    try:
        return evaluate.load("glue", task_name)
    except Exception as error:  # whatever the hub or its script raises: the local metric gives the same numbers
        print(f"evaluate.load('glue', '{task_name}') failed ({type(error).__name__}); using scikit-learn and scipy.")
        return None


def local_scores(task_name: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The same scores without the hub: predicted classes (or values, for STS-B) against labels, both (rows,)."""
    functions = {
        "accuracy": lambda: np.mean(predictions == labels),
        "f1": lambda: f1_score(labels, predictions, zero_division=0.0),
        "matthews_correlation": lambda: matthews_corrcoef(labels, predictions),
        "pearson": lambda: pearsonr(predictions, labels)[0],
        "spearmanr": lambda: spearmanr(predictions, labels)[0],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant input is announced by its 0.0
        return {name: _defined(functions[name]()) for name in TASKS[task_name].metrics}


def _defined(value: float) -> float:
    return 0.0 if math.isnan(value) else float(value)


def main_score(task_name: str, scores: dict[str, float]) -> float:
    """The task's one number: Matthews, F1 (MRPC, QQP), mean correlation (STS-B), else accuracy (MNLI: matched)."""
    names = TASKS[task_name].main
    return sum(scores[name] for name in names) / len(names)
