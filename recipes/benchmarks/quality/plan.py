"""The plan of a quality study: a YAML file of tasks, seeds and arms, read, expanded and checked.

A plan has the keys of PLAN. Each arm gets as many learning rates as every other, tried on the tuning seeds, which no
result uses; with `widen`, one rule for all adds others where the best lies at an end. An arm's `grid` makes one arm of
every combination of its values; `name` is then a format, as in "block, level {level}". An arm with `times: 4` is not
tuned: it runs at four times the rate chosen for the base arm.
"""

import itertools
from pathlib import Path

import yaml

from foam_hf.optim_args import FOAM_NAMES
from recipes.benchmarks.quality.before import options_before

PLAN = {
    "model": "its name in the tables; the folder is the launcher's --model",
    "base": "name of the arm that the others are paired with",
    "settings": "of every run: flags of recipes/glue/train.py, or keys of tiny_language.py",
    "tuning_seeds": "seeds of the runs that choose learning rates",
    "widen": "how often an arm whose best rate lies at an end of those tried gets one more beyond it (default: 0)",
    "seeds": "seeds of the runs that are reported",
    "tasks": "name -> runner, better, settings, tuning",
    "arms": "list of arms, or the file name of the plan whose arms they are",
}
TASK = {
    "runner": "glue, or pydoc for tiny_language.py",
    "better": "higher or lower",
    "settings": "over the plan's",
    "tuning": "over both, in tuning runs alone",
}
ARM = {
    "name": "in the tables",
    "optim": "as in TrainingArguments, or candidate, or adam_mini",
    "optim_args": "its options; a candidate's are its arguments and switches",
    "settings": "over the task's",
    "lora": "arguments of peft's LoraConfig: adapters are trained, not the weights",
    "rates": "learning rates to try, a list or one for each task",
    "times": "instead of rates: so many times the base arm's chosen rate",
    "tasks": "some of the plan's (default: all)",
    "grid": "option -> values, into optim_args; 'settings.NAME' into settings, 'times' where it belongs",
}
RUNNERS = ("glue", "pydoc")


def read_plan(path: Path) -> dict:
    """The plan of a file, its arms expanded; SystemExit names what is wrong in it."""
    try:
        plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if isinstance(plan, dict) and isinstance(plan.get("arms"), str):
            other = yaml.safe_load((Path(path).parent / plan["arms"]).read_text(encoding="utf-8"))
            if not isinstance(other, dict) or not isinstance(other.get("arms"), list):
                raise SystemExit(
                    f"{path}: arms names {plan['arms']}, which has none; expected a plan with a list of arms"
                )
            plan["arms"] = other["arms"]
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"Cannot read the plan {path}: {' '.join(str(error).split())}") from None
    try:
        return expand(plan)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None


def expand(plan: dict) -> dict:
    """The same plan with every grid written out and defaults filled in. ValueError for what cannot be right."""
    _known(plan, PLAN, "the plan")
    plan = {"model": "", "settings": {}, "widen": 0, **plan}
    if missing := [name for name in PLAN if name not in plan]:
        raise ValueError(f"the plan has no {missing[0]}: {PLAN[missing[0]]}")
    shared = sorted(set(plan["tuning_seeds"]) & set(plan["seeds"]))
    if shared:
        raise ValueError(f"seed {shared[0]} is both in tuning_seeds and in seeds; expected none in both")
    for what in ("tuning_seeds", "seeds"):
        if not plan[what] or len(set(plan[what])) < len(plan[what]):
            raise ValueError(f"{what}: got {plan[what]}; expected seeds that differ")
    tasks = {}
    for name, task in plan["tasks"].items():
        _known(task or {}, TASK, f"task {name}")
        tasks[name] = {"runner": "glue", "better": "higher", "settings": {}, "tuning": {}, **(task or {})}
        if tasks[name]["runner"] not in RUNNERS:
            raise ValueError(f"task {name}: unknown runner, got {tasks[name]['runner']!r}; expected one of {RUNNERS}")
        if tasks[name]["better"] not in ("higher", "lower"):
            raise ValueError(f"task {name}: better is {tasks[name]['better']!r}; expected 'higher' or 'lower'")
    arms = [_filled(arm, tasks) for given in plan["arms"] for arm in _expanded(given)]
    names = [arm["name"] for arm in arms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two arms are called {twice[0]!r}; expected names that differ")
    if plan["base"] not in names:
        raise ValueError(f"base is {plan['base']!r}; expected the name of an arm, as {names[0]!r}")
    base = arms[names.index(plan["base"])]
    if "times" in base or set(base["tasks"]) != set(tasks):
        raise ValueError(f"the base arm {base['name']!r} needs learning rates of its own, and every task")
    counts = {len(rates): arm["name"] for arm in arms if "rates" in arm for rates in arm["rates"].values()}
    if len(counts) > 1:
        (few, one), (many, other) = sorted(counts.items())[:2]
        raise ValueError(f"arm {one!r} has {few} learning rates, {other!r} has {many}; expected as many for each")
    return {**plan, "tasks": tasks, "arms": arms}


def _known(given: dict, legal: dict, where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: got {given!r}; expected keys and values")
    if unknown := sorted(map(str, given.keys() - legal.keys())):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; expected some of {', '.join(legal)}")


def _expanded(arm: dict) -> list[dict]:
    _known(arm, ARM, f"arm {arm.get('name') if isinstance(arm, dict) else arm}")
    arm = dict(arm)
    grid = arm.pop("grid", {})
    arms = []
    for values in itertools.product(*grid.values()):
        one = {**arm, "optim_args": dict(arm.get("optim_args") or {}), "settings": dict(arm.get("settings") or {})}
        for option, value in zip(grid, values, strict=True):
            where = one["settings"] if option.startswith("settings.") else one["optim_args"]
            where = one if option == "times" else where
            where[option.removeprefix("settings.")] = value
        labels = {option.split(".")[-1]: value for option, value in zip(grid, values, strict=True)}
        one["name"] = str(arm["name"]).format(**labels)
        arms.append(one)
    return arms


def _filled(arm: dict, tasks: dict) -> dict:
    name = arm["name"]
    if not arm.get("optim"):
        raise ValueError(f"arm {name!r} has no optim: {ARM['optim']}")
    if ("rates" in arm) == ("times" in arm):
        raise ValueError(f"arm {name!r} needs either rates or times")
    wanted = arm.get("tasks") or list(tasks)
    if unknown := [task for task in wanted if task not in tasks]:
        raise ValueError(f"arm {name!r}: unknown task {unknown[0]!r}; expected some of {', '.join(tasks)}")
    filled = {"optim_args": {}, "settings": {}, "lora": None, **arm, "tasks": wanted}
    if arm["optim"] in FOAM_NAMES:
        try:
            options_before(arm["optim"], filled["optim_args"])
        except ValueError as error:
            raise ValueError(f"arm {name!r}: {error}") from None
    if "rates" in arm:
        rates = arm["rates"]
        per_task = rates if isinstance(rates, dict) else dict.fromkeys(wanted, rates)
        if missing := [task for task in wanted if not per_task.get(task)]:
            raise ValueError(f"arm {name!r} has no learning rates for {missing[0]}")
        filled["rates"] = {task: [float(rate) for rate in per_task[task]] for task in wanted}
    return filled


def next_rate(rates: list[float], best: float) -> float | None:
    """The rate beyond `best` at the distance of the two at that end, to two digits; None if `best` is inside."""
    ordered = sorted(rates)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    first, second = ordered[:2] if best == ordered[0] else ordered[:-3:-1]
    return float(f"{first * first / second:.2g}")
