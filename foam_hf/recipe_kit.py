"""What the scripts of `recipes/` share, wherever they are copied to: a run says what it replaces or starts over.

Private to them: no promise is made on these names.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SENTENCE_LENGTH = 3  # names in a hint


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """What may have been meant by `name`: names that begin with it, else that contain it, else the most similar."""
    known = sorted(names)
    for found in ([n for n in known if n.startswith(name)], [n for n in known if name and name in n]):
        if found:
            return found[:SENTENCE_LENGTH]
    return difflib.get_close_matches(name, known, 1, 0.0)


def find_config(path: Path, here: Path) -> Path:
    """`path`, or where there is none, the config of that name beside the script in `here` or in a recipe beside it."""
    if path.is_file() or path.is_absolute():
        return path
    places = (here / path, here / path.name, here.parent / path, here.parent / "quantized" / path.name)
    return next((place for place in places if place.is_file()), path)


def said_optimizer(message: str) -> str:
    """argparse's message on --optim with what was meant, where it is a misspelling of ours."""
    from foam_hf.optim_args import ours_like

    wrong = re.search(r"argument --optim: invalid choice: '([^']*)'", message)
    meant = ours_like(wrong[1]) if wrong else None
    return f"--optim: no optimizer {wrong[1]!r}; did you mean {meant!r}?" if wrong and meant else message


def replaced_optim_args(given: str | None, config: str | None, name: str) -> str | None:
    """A note where --optim_args drops keys of the config `name`: it replaces the whole of them."""
    if not given or not config:
        return None
    kept, had = ({pair.partition("=")[0].strip() for pair in text.split(",")} for text in (given, config))
    dropped = [pair.strip() for pair in config.split(",") if pair.partition("=")[0].strip() in had - kept]
    if not dropped:
        return None
    return f"--optim_args {given} replaces all optim_args of {name}: without {','.join(dropped)} from now on."


def keep_earlier(output_dir: str | Path, resumes: bool, say: Callable[[str], None]) -> None:
    """Say what an earlier run left in `output_dir` that this one replaces; results are kept under another name.

    Args:
        output_dir: of this run; it need not exist.
        resumes: this run goes on from a checkpoint.
        say: prints on the first process only.
    """
    folder = Path(output_dir)
    results = folder / "results.json"
    if results.is_file():
        number = next(n for n in range(1, 10**6) if not (folder / f"results-{n}.json").exists())
        kept = folder / f"results-{number}.json"
        if int(os.environ.get("RANK", "0")) == 0:
            results.rename(kept)
        say(f"{folder} holds an earlier run: its results.json is now {kept.name}, and its model will be replaced.")
    steps = [int(m[1]) for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    if steps and not resumes:
        say(
            f"{folder} holds checkpoints of an earlier run, the newest of step {max(steps)}: this one starts at step "
            "0; --resume_from_checkpoint true goes on from it instead."
        )


def differing_settings(args: Any, model: Any, optimizer: Any) -> list[str]:
    """Settings that `args` ask for and a resumed `optimizer` has otherwise, as "learning_rate=1e-05 (not 0.0001)"."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's
    groups = optimizer.param_groups
    found = {}
    for group in groups:
        if "initial_lr" in group and group["initial_lr"] != args.learning_rate:
            found["learning_rate"] = (group["initial_lr"], args.learning_rate)
    for mine, asked in zip(groups, _asked_groups(args, model, groups), strict=False):
        for name, value in asked.items():
            if name not in ("params", "lr", "initial_lr") and name in mine and _plain(mine[name]) != _plain(value):
                found[name] = (mine[name], value)
    return [f"{name}={_plain(used)} (not {_plain(asked)})" for name, (used, asked) in found.items()]


def _asked_groups(args: Any, model: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups that FOAM would have by the arguments alone; none for another optimizer."""
    import logging

    from transformers import Trainer

    from foam_hf.optim_args import FOAM_NAMES
    from foam_hf.optimizer.foam import FOAM

    if getattr(args.optim, "value", args.optim) not in FOAM_NAMES:
        return []
    log = logging.getLogger("foam_hf")
    before, log.disabled = log.disabled, True
    try:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    finally:
        log.disabled = before
    if cls is not FOAM:
        return []
    decided = kwargs.pop("decided")
    asked = FOAM(decided.groups, **kwargs).param_groups
    return asked if len(asked) == len(groups) else []


def _plain(value: Any) -> Any:
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return tuple(value) if isinstance(value, list) else value


def resumed_callback(say: Callable[[str], None]) -> Any:
    """A TrainerCallback that says, before the first step of a resumed run, which settings are the checkpoint's."""
    from transformers import TrainerCallback

    class SaysWhatIsUsed(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            if state.global_step and optimizer is not None:
                model = getattr(model, "module", model)
                if differing := differing_settings(args, model, optimizer):
                    say(f"Resumed at step {state.global_step} with the checkpoint's {', '.join(differing)}.")

    return SaysWhatIsUsed()
