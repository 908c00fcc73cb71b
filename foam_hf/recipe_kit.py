"""Functions that the scripts in `recipes/` share, also after they are copied: messages, the hub, results, resuming.

Those on configs and flags are in `recipe_config.py`. All are private to those scripts and may change in any version.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def say(*words: object) -> None:
    """Print on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*words, flush=True)


def one_line(error: BaseException) -> str:
    """An error's text on one line, at most 400 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."


@functools.cache
def hub_problem() -> str | None:
    """Why the model hub cannot be used, or None if it answers one request within 4 seconds.

    After a failed request the Hugging Face libraries of this process are switched to offline mode. Otherwise each of
    them would spend minutes on retries. Files in their caches still load.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "offline mode is set (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
    problems = [f"{constants.ENDPOINT} does not answer within 4 seconds"]

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=3).status_code
        except Exception as error:  # the session is of requests or of httpx, whose errors have no common class
            problems.append(f"{constants.ENDPOINT} does not answer ({type(error).__name__})")
        else:
            bad = status >= 500 or status == 407  # 407: a proxy that wants a password
            problems.append(f"{constants.ENDPOINT} answers with HTTP status {status}" if bad else "")

    # In a thread, because the timeout does not cover a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout=4)
    if problems[-1]:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
    return problems[-1] or None


def resumes_newest(wanted: object) -> bool:
    """Whether --resume_from_checkpoint asks for the newest checkpoint of a run."""
    return str(wanted).lower() in ("true", "1", "yes")


def checkpoint_to_resume(wanted: str | None, output_dir: str | Path) -> str | None:
    """The checkpoint that --resume_from_checkpoint asks for, or None; SystemExit if its folder does not exist."""
    if not wanted or str(wanted).lower() in ("false", "0", "no"):
        return None
    if not resumes_newest(wanted):
        if not os.path.isdir(wanted):
            raise SystemExit(f"--resume_from_checkpoint: no folder {wanted}; expected a checkpoint, or true.")
        return wanted
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(output_dir)) if os.path.isdir(output_dir) else None
    say(f"Resuming from {found}." if found else f"No checkpoint in {output_dir}: starting anew.")
    return found


def finished_results(output_dir: str | Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results in `output_dir` if they are of a run with the same settings, whatever its folder; else None."""
    file = Path(output_dir) / "results.json"
    if not file.is_file():
        return None
    results = json.loads(file.read_text(encoding="utf-8"))
    keys = {**settings, **results["settings"]}.keys() - {"output_dir", "resume_from_checkpoint"}
    if any(settings.get(key) != results["settings"].get(key) for key in keys):
        return None
    say(f"{output_dir} is finished: its results are kept.")
    return results


def keep_earlier(output_dir: str | Path, resumes: bool, say: Callable[[str], None]) -> None:
    """Rename the results of an earlier run in `output_dir`, and report what this run will replace.

    Args:
        output_dir: of this run; it need not exist.
        resumes: whether this run resumes from a checkpoint.
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
    """Settings in which a resumed `optimizer` differs from `args`, as "learning_rate=1e-05 (not 0.0001)"."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    groups = optimizer.param_groups
    found = {}
    for group in groups:
        if "initial_lr" in group and group["initial_lr"] != args.learning_rate:
            found["learning_rate"] = (group["initial_lr"], args.learning_rate)
    for mine, asked in zip(groups, _groups_of_arguments(args, model, groups), strict=False):
        for name, value in asked.items():
            if name not in ("params", "lr", "initial_lr") and name in mine and _plain(mine[name]) != _plain(value):
                found[name] = (mine[name], value)
    return [f"{name}={_plain(used)} (not {_plain(asked)})" for name, (used, asked) in found.items()]


def _groups_of_arguments(args: Any, model: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The param groups that FOAM would have without the checkpoint; [] for another optimizer."""
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
    """A TrainerCallback that reports, when a run resumes, which settings come from the checkpoint."""
    from transformers import TrainerCallback

    class CheckpointSettingsReport(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            if state.global_step and optimizer is not None:
                model = getattr(model, "module", model)
                if differing := differing_settings(args, model, optimizer):
                    say(f"Resumed at step {state.global_step} with the checkpoint's {', '.join(differing)}.")

    return CheckpointSettingsReport()


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity of a diverged run, which JSON does not have."""
    return value if math.isfinite(value) else None


def write_json(path: Path, value: object, ensure_ascii: bool = True) -> None:
    """Write a JSON file by a rename, so that an error leaves the old file as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, allow_nan=False, ensure_ascii=ensure_ascii)
            stream.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def put_between(page: str, start: str, end: str, text: str) -> str:
    """`page` with `text` between the lines `start` and `end`; ValueError if `page` lacks them."""
    before, first, rest = page.partition(start)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"expected a page with the lines {start} and {end}")
    return f"{before}{start}\n{text}\n{end}{after}"


def renew_page(path: Path, start: str, end: str, text: str) -> None:
    """Replace the text between the lines `start` and `end` of a file; SystemExit if the file lacks them."""
    try:
        page = put_between(path.read_text(encoding="utf-8"), start, end, text)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None
    path.write_text(page, encoding="utf-8")
