"""Functions that the scripts in `recipes/` share, also after they are copied: configs, flags, results, resuming.

They are private to those scripts and may change in any version.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import re
import tempfile
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn, get_origin

SENTENCE_LENGTH = 3  # names in a hint


def say(*words: object) -> None:
    """Print on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*words, flush=True)


def one_line(error: BaseException) -> str:
    """An error's text on one line, at most 400 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The names that a user may have meant: those that begin with `name`, else contain it, else the most similar."""
    known = sorted(names)
    for found in ([n for n in known if n.startswith(name)], [n for n in known if name and name in n]):
        if found:
            return found[:SENTENCE_LENGTH]
    return difflib.get_close_matches(name, known, 1, 0.0)


def find_config(path: Path, here: Path) -> Path:
    """`path` if the file exists, else the config of that name in `here`, the script's folder, or in another recipe."""
    if path.is_file() or path.is_absolute():
        return path
    places = (here / path, here / path.name, here.parent / path, here.parent / "quantized" / path.name)
    return next((place for place in places if place.is_file()), path)


def with_optimizer_hint(message: str) -> str:
    """argparse's `message`; if it is about a misspelt name of FOAM, a message with the right name instead."""
    from foam_hf.optim_args import ours_like

    wrong = re.search(r"argument --optim: invalid choice: '([^']*)'", message)
    meant = ours_like(wrong[1]) if wrong else None
    return f"--optim: no optimizer {wrong[1]!r}; did you mean {meant!r}?" if wrong and meant else message


def replaced_optim_args(given: str | None, config: str | None, name: str) -> str | None:
    """A note if --optim_args drops keys of the config `name`, because it replaces all of them; else None."""
    if not given or not config:
        return None
    kept, had = ({pair.partition("=")[0].strip() for pair in text.split(",")} for text in (given, config))
    dropped = [pair.strip() for pair in config.split(",") if pair.partition("=")[0].strip() in had - kept]
    if not dropped:
        return None
    return f"--optim_args {given} replaces all optim_args of {name}: without {','.join(dropped)} from now on."


def read_config(path: Path) -> dict[str, Any]:
    """The values of a YAML config, with optim_args as text; SystemExit if the file cannot be read or has no keys."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"Cannot read the config {path}: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise SystemExit(f"{path}: expected lines of 'key: value', got {type(config).__name__}.")
    return {key: pairs(value) if key == "optim_args" else value for key, value in config.items()}


def pairs(value: Any) -> Any:
    """A mapping as the text "key=value,key=value"; any other value unchanged."""
    return ",".join(f"{key}={one}" for key, one in value.items()) if isinstance(value, dict) else value


def config_values(
    config: dict[str, Any], path: Path, parser: ArgumentParser, own: Collection[str], lists: Collection[str] = ()
) -> dict[str, Any]:
    """A config's values, checked and converted as the flags of the same names; SystemExit if one is wrong.

    Args:
        config: from `read_config`.
        path: of the config, for messages.
        parser: of the recipe's flags and TrainingArguments.
        own: names of the recipe's own flags, which take no mappings and no lists.
        lists: names of the recipe's own flags that do take a list.
    """
    names = {action.dest for action in parser._actions} - {"help"}
    structured = {a.dest for a in parser._actions if a.type is str or a.nargs == "+" or get_origin(a.type)}
    flags, unconverted = [], {}
    for key, value in config.items():
        if key not in names:
            near = ", ".join(map(repr, nearest(str(key), names)))
            raise SystemExit(f"{path}: unknown key {key!r}; nearest: {near}.")
        if key in lists:
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        elif isinstance(value, (dict, list)):
            if key not in structured or key in own:
                raise SystemExit(f"{path}: {key}: got {value}; expected one value.")
            unconverted[key] = value  # TrainingArguments takes a mapping as it is (lr_scheduler_kwargs)
        elif value is not None:
            flags += [f"--{key}={value}"]
    return {**parse_flags(parser, flags, str(path)), **unconverted}


def parse_flags(parser: ArgumentParser, flags: list[str], source: str) -> dict[str, Any]:
    """The given flags, without defaults: argparse sets no default if the namespace already has the name."""

    def fail(message: str) -> NoReturn:
        raise SystemExit(f"{source}: {with_optimizer_hint(message)}")

    parser.error = fail  # type: ignore[method-assign]  # argparse would print a page of usage
    names = {action.dest for action in parser._actions} - {"help"}
    found, unknown = parser.parse_known_args(flags, Namespace(**dict.fromkeys(names)))
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        fail(f"unknown argument {unknown[0]}; nearest: --{', --'.join(nearest(name, names))}.")
    return {name: value for name, value in vars(found).items() if value is not None}


def drop_foreign_settings(config: dict[str, Any], given: Collection[str], optim: str, name: str) -> list[str]:
    """Remove the optim_args from a config that was written for another optimizer than `optim`.

    Args:
        config: changed in place.
        given: names of the flags that the user gave.
        optim: the optimizer of this run.
        name: of the config, for the notes.

    Returns:
        Notes for the user on what is dropped and what is kept.
    """
    notes, of = [], config.get("optim")
    dropped = config.pop("optim_args", None)
    if dropped and "optim_args" not in given:
        notes.append(f"optim_args {dropped} of {name} are for {of}: dropped for {optim}.")
    if "learning_rate" in config and "learning_rate" not in given:
        notes.append(f"learning_rate {config['learning_rate']} of {name} is for {of}: kept.")
    return notes


def settle_pairs(
    exclusive: Iterable[tuple[str, str]], given: dict[str, Any], config: dict[str, Any], path: Path
) -> None:
    """Of flags that exclude each other, remove both from the config if the user gave one.

    Args:
        exclusive: pairs of names.
        given: the flags that the user gave.
        config: changed in place.
        path: of the config, for messages.

    Raises:
        SystemExit: the user's flags, or the config, have both of a pair.
    """
    for pair in exclusive:
        for source, where in ((given, "train.py"), (config, path)):
            if set(pair) <= source.keys():
                raise SystemExit(f"{where}: got both {pair[0]} and {pair[1]}; expected one of them.")
        if set(pair) & given.keys():
            for name in pair:
                config.pop(name, None)


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
