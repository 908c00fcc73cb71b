"""The table of FOAM's options, with their defaults and legal values, and the parser of `optim_args`. Imports no torch.

To add an option, add a record to `OPTIONS`; if param groups have it, also add an argument to `FOAM`.
"""

from __future__ import annotations

import difflib
import numbers
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_NUMBER = 1e9  # the product of two such numbers, divided by a bias correction, is finite in float32
# With these scales AdamW's learning rate suits a rule, and Muon's learning rate suits Muon. The scale of block was
# measured (docs/choosing.md). Adam-mini has the same one, because its update has the same form.
SCALES = {"block": 6.0, "factored": 1.0, "muon": 1.0, "adam_mini": 6.0}
# Name of `optim` -> the options that it sets.
FOAM_NAMES: dict[str, dict[str, Any]] = {
    "foam": {},
    "foam_mini": {"level": "row"},
    "foam_muon": {"second_moment": "muon"},
    "foam_adam_mini": {"second_moment": "adam_mini"},
}


def default_scale(level: int | str, second_moment: str) -> float:
    """The `scale` of a rule if none is given: that of `SCALES`, or 1 at level 0, where FOAM is AdamW."""
    return 1.0 if level == 0 else SCALES[second_moment]


def embedding_rule_of(options: Mapping[str, Any], *, blocks_alone: bool = False) -> str | None:
    """The rule of embeddings and LM heads that fold, in a run with `options`; None if its `second_moment` decides.

    Args:
        options: name -> value; those that are not given are missing or None.
        blocks_alone: the run cannot have whole matrices, as under DeepSpeed's ZeRO, or adds up the gradients of
            several backward passes without keeping them.
    """
    if options.get("second_moment", option("second_moment").default) != option("embedding_rule").rule:
        return None
    given: str | None = options.get("embedding_rule")
    # At level 0 other matrices have AdamW, which embeddings get too.
    return given or ("block" if blocks_alone or options.get("level") == 0 else "factored")


def written(value: Any) -> str:
    """The text of `value` in optim_args: true, row, bfloat16."""
    return str(value).removeprefix("torch.").lower()


@dataclass(frozen=True)
class Numbers:
    """The legal values of an option of numbers.

    Attributes:
        words: the description of these values, for messages.
        holds: whether a number is legal.
        kind: reals, integers, or pairs of reals.
        word: a word that is legal too; only with integers.
    """

    words: str
    holds: Callable[[Any], bool]
    kind: Literal["real", "integer", "pair"] = "real"
    word: str = ""

    def describe(self, write: Callable[[Any], str]) -> str:
        """The legal values, for messages; `write` formats a value: `written` for optim_args, `repr` for Python."""
        return self.words + (f", or {write(self.word)}" if self.word else "")

    def read(self, text: str) -> Any:
        """The value of `text` in optim_args; ValueError, OverflowError or KeyError if it is not legal."""
        value: Any = text if text == self.word else int(text) if self.kind == "integer" else float(text)
        if self.problem(value):
            raise ValueError
        return value

    def problem(self, value: Any) -> str:
        """Why a value in Python is not legal, or an empty string."""
        if self.kind == "integer":
            if isinstance(value, str):
                return "" if self.word and value == self.word else "out of range"
            integer = not isinstance(value, bool) and isinstance(value, numbers.Integral)
            return "" if integer and self.holds(value) else "out of range"
        if self.kind == "pair" and not (isinstance(value, tuple | list) and len(value) == 2):
            return "not a pair"
        each = value if self.kind == "pair" else (value,)
        if any(isinstance(number, bool) or not isinstance(number, numbers.Real) for number in each):
            return "not a number"
        return "" if all(map(self.holds, each)) else "out of range"


@dataclass(frozen=True)
class Words:
    """The legal values of an option of words or bools."""

    values: tuple[Any, ...] = (True, False)

    def describe(self, write: Callable[[Any], str]) -> str:
        *others, last = map(write, self.values)
        return f"{', '.join(others)} or {last}"

    def read(self, text: str) -> Any:
        return {written(value): value for value in self.values}[text.lower()]

    def problem(self, value: Any) -> str:
        if any(type(value) is type(legal) and value == legal for legal in self.values):
            return ""
        return "not a bool" if self.values == (True, False) else "not valid"


class Dtypes(Words):
    """The legal values of an option of torch dtypes, which optim_args names."""

    def describe(self, write: Callable[[Any], str]) -> str:
        return super().describe(lambda name: f"torch.{name}" if write is repr else name)

    def read(self, text: str) -> Any:
        name = text.removeprefix("torch.").lower()
        return super().read({"fp32": "float32", "bf16": "bfloat16"}.get(name, name))

    def problem(self, value: Any) -> str:
        dtype = type(value).__module__ == "torch" and str(value).startswith("torch.")
        return super().problem(written(value)) if dtype else "not valid"


@dataclass(frozen=True)
class Option:
    """An option of FOAM: its default, its legal values, and which parts of the package read it."""

    name: str
    default: Any  # in FOAM; a dtype by its name; None if something else decides
    legal: Numbers | Words
    help: str  # its row in docs/options.md begins with this
    decided_by: str = ""  # describes the default of a run that is not `default`
    key: bool = True  # whether it is a key of optim_args; others are Trainer's, or are found for each weight
    field: bool = True  # whether param groups have it, and FOAM as an argument
    grouping: bool = False  # whether foam_param_groups decides by it which weights fold, and their groups
    folded: bool = False  # whether foam_param_groups takes it for the groups that fold
    plain: Any = None  # its value in groups that do not fold; None leaves it to the optimizer
    # Whether its value in a group may change between steps. If not, prepared steps and checkpoints fit one value only,
    # which is the safe choice for a new option.
    may_change: bool = False
    carried: bool = False  # whether the error about a checkpoint of other options names its value
    rule: str | None = None  # the only second_moment that reads it; None: all
    elsewhere: tuple[str, str] = ("", "")  # what other rules read in its place: in Trainer, in FOAM
    excluded: tuple[Any, str, str] | None = None  # a value, the second_moment that excludes it ({} below), and why

    def read(self, text: str) -> Any:
        """The value of `text` in optim_args; ValueError if it is not legal."""
        try:
            return self.legal.read(text)
        except (ValueError, KeyError, OverflowError):
            raise ValueError(
                f"optim_args: {self.name} must be {self.legal.describe(written)}, got {text!r}."
            ) from None

    def check(self, value: Any) -> None:
        """Raise TypeError or ValueError if a value in Python is not legal; None is legal if it is the default."""
        if (value is None and self.default is None) or not (problem := self.legal.problem(value)):
            return
        expected = self.legal.describe(repr) + (", or None" if self.default is None else "")
        error = TypeError if problem.startswith("not a ") else ValueError
        raise error(f"{self.name} is {problem}: got {value!r}; expected {expected}")


_AT_MOST = f"at most {MAX_NUMBER:g}".replace("e+0", "e")
_POSITIVE = Numbers(f"a finite number above 0, {_AT_MOST}", lambda x: 0 < x <= MAX_NUMBER and float(x) > 0)
_FROM_0 = Numbers(f"a finite number, 0 or more, {_AT_MOST}", lambda x: 0 <= x <= MAX_NUMBER)
_BELOW_1 = Numbers("a number from 0 to below 1", lambda x: 0 <= x < 1)
_PAIR = Numbers("two numbers from 0 to below 1", _BELOW_1.holds, "pair")
_LEVEL = Numbers("an integer from 0 to 16", lambda n: 0 <= n <= 16, "integer", word="row")
_ROWS = Numbers("an integer of 0 or more", lambda n: n >= 0, "integer")
_SEED = Numbers("an integer from 0 to 2**64 - 1", lambda n: 0 <= n < 2**64, "integer")
_UNREAD = ("a rule that does not read it", "")
_SCALES = f"the rule's own: {', '.join(f'{scale:g}' for scale in SCALES.values())}"

# fmt: off
OPTIONS: tuple[Option, ...] = (
    Option("lr", 1e-3, _FROM_0, "the learning rate", key=False, may_change=True),
    Option("betas", (0.9, 0.999), _PAIR, "decay rates of the moments", key=False, may_change=True),
    Option("eps", 1e-8, _FROM_0, "added to the root of the second moment", key=False, may_change=True),
    Option("weight_decay", 0.0, _FROM_0, "decoupled, as in AdamW", key=False, may_change=True),
    Option("level", 8, _LEVEL, "a block has 2**level adjacent columns; row makes a whole row one block; 0 "
           "folds nothing", folded=True, plain=0, carried=True),
    Option("scale", None, _POSITIVE, "multiplies the step of folded weights but factored embeddings, not their decay: "
           "the paper's alpha",
           decided_by=_SCALES, folded=True, plain=1.0, may_change=True),
    Option("second_moment", "block", Words(tuple(SCALES)), "the rule: block is the paper's, factored keeps means over "
           "rows and columns instead", grouping=True, folded=True, plain="block", carried=True),
    Option("residual_scale", 1.0, _FROM_0, "weight of what a block's mean loses of the gradient; 0 leaves it out",
           folded=True, may_change=True, carried=True),
    Option("stochastic_rounding", "auto", Words(("auto", True, False)), "auto rounds stochastically where weights or "
           "state are bf16; true is an error if no weight is", folded=True, may_change=True),
    Option("state_dtype", "float32", Dtypes(("float32", "bfloat16")), "of all state, the unfolded weights' too",
           folded=True, may_change=True),  # state that exists keeps its dtype
    Option("nonfinite", "error", Words(("error", "skip", "ignore")), "what NaN and infinite gradients do",
           may_change=True),
    Option("fold_embeddings", None, Words(), "false keeps embeddings plain", decided_by="true", field=False,
           grouping=True),
    Option("fold_head", None, Words(), "the same for an LM head that is not tied to the embedding", decided_by="true",
           field=False, grouping=True),
    Option("embedding_scale", None, _POSITIVE, "the scale of embeddings and LM heads that fold",
           decided_by="1; scale where the rule is block", field=False, grouping=True, rule="block",
           elsewhere=_UNREAD),
    Option("embedding_rule", None, Words(("block", "factored")), "the rule of embeddings and LM heads that fold",
           decided_by="factored; block where a run updates by blocks alone", field=False, grouping=True, rule="block",
           elsewhere=_UNREAD),
    Option("gradient_release", False, Words(), "updates weights inside the backward pass, and frees their gradients",
           field=False),
    Option("clip_by", "all", Words(("all", "weight")), "of gradient_release: max_grad_norm bounds the norm of all "
           "gradients, or that of each weight's alone", field=False),
    Option("momentum", 0.95, _BELOW_1, "Muon's, of foam_muon alone", folded=True, may_change=True, carried=True,
           rule="muon", elsewhere=("Adam's adam_beta1", "betas")),
    Option("mini_rows", 1, _ROWS, "adjacent rows that share a second moment of Adam-mini; 0 for all", key=False,
           rule="adam_mini"),
    Option("plain_state", "full", Words(("full", "8bit")), "8bit quantizes the moments of what does not fold, by "
           "bitsandbytes", carried=True, excluded=(
               "8bit", "adam_mini", "quantizes AdamW's moments, and with {} what does not fold has Adam-mini's")),
    Option("seed", 0, _SEED, "of stochastic rounding", decided_by="the run's seed", may_change=True),
)
# fmt: on


RELEASE_KEYS = ("gradient_release", "clip_by")  # of how a run trains, and no arguments of FOAM


def option(name: str) -> Option:
    return next(each for each in OPTIONS if each.name == name)


def names_of(test: Callable[[Option], Any]) -> tuple[str, ...]:
    """The names of the options for which `test` is true, in the order of the table."""
    return tuple(each.name for each in OPTIONS if test(each))


def table_of_keys() -> list[tuple[str, str, str, str]]:
    """(name, legal values, default, help) of each key of optim_args, for `--help` and docs/options.md."""
    keys = [each for each in OPTIONS if each.key]
    return [
        (each.name, each.legal.describe(written), each.decided_by or written(each.default), each.help) for each in keys
    ]


def check_fields(group: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError if a field of `group` is not legal; the parameters are not checked."""
    for each in OPTIONS:
        if each.field:
            each.check(group[each.name])
    refuse_excluded(group, group["second_moment"])


def refuse_excluded(options: Mapping[str, Any], rule: str, optim: str | None = None) -> None:
    """Raise ValueError for an option whose value the rule excludes.

    Args:
        options: name -> value.
        rule: the `second_moment`.
        optim: the run's `optim`, if the options come from optim_args; None if they are arguments of FOAM.
    """
    for each in OPTIONS:
        if each.excluded is not None and (options.get(each.name), rule) == each.excluded[:2]:
            write = repr if optim is None else written
            value, default, other = map(write, (each.excluded[0], each.default, rule))
            why = each.excluded[2].format(f"second_moment={other}")
            right = f"{each.name}={default}, or another second_moment"
            raise _refusal(f"{each.name}={value} {why}: got both; expected {right}", optim)


def refuse_unread(given: Mapping[str, Any], rules: Collection[str], optim: str | None = None) -> None:
    """Raise ValueError for a key in `given` that no rule of `rules` reads; `optim` as in `refuse_excluded`."""
    for each in OPTIONS:
        if each.key and each.rule is not None and each.name in given and each.rule not in rules:
            default = option("second_moment").default
            owner = each.rule.capitalize().replace("_", "-")  # adam_mini is Adam-mini
            owner = f"the {default} rule" if each.rule == default else owner
            name = next(name for name, fixed in FOAM_NAMES.items() if fixed.get("second_moment", default) == each.rule)
            others, right = f"optim={optim!r} has {each.elsewhere[0]}", f"optim={name!r}, or no {each.name}"
            if optim == name:  # another rule by second_moment
                others, right = f"this run has {each.elsewhere[0]}", f"second_moment={each.rule}, or no {each.name}"
            if optim is None:
                others = f"no param group has second_moment={each.rule!r}"
                right = f"{each.elsewhere[1]}, for the other rules"
            raise _refusal(f"{each.name}={given[each.name]} is {owner}'s, and {others}; expected {right}", optim)


def _refusal(message: str, optim: str | None) -> ValueError:
    return ValueError(message if optim is None else f"optim_args: {message}.")


# An optimizer's name for a setting of the Trainer -> the field of TrainingArguments that sets it.
_TRAINERS = {
    **dict.fromkeys(("lr", "learning_rate"), "learning_rate"),
    **dict.fromkeys(("beta1", "adam_beta1"), "adam_beta1"),
    **dict.fromkeys(("beta2", "adam_beta2"), "adam_beta2"),
    **dict.fromkeys(("betas", "adam_betas"), "adam_beta1 and adam_beta2"),
    **dict.fromkeys(("eps", "epsilon", "adam_eps", "adam_epsilon"), "adam_epsilon"),
    **dict.fromkeys(("weight_decay", "wd", "decay"), "weight_decay"),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("optim_target_modules", "target_modules"), "optim_target_modules"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), "lr_scheduler_type"),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_ratio"), "warmup_steps"),
}


def ours_like(name: str) -> str | None:
    """The name of FOAM of which `name` is a misspelling ("FOAM", "foam-mini"), or None."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(plain, FOAM_NAMES, n=1, cutoff=0.8)
    return near[0] if near else None


def one_of_ours() -> str:
    """The names of FOAM, for messages: 'foam', 'foam_mini' or ..."""
    *names, last = map(repr, FOAM_NAMES)
    return f"{', '.join(names)} or {last}"


def foam_options(optim: str, optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that `optim`, one of `FOAM_NAMES`, and `optim_args` set; all others have FOAM's defaults.

    Raises:
        ValueError: as `parse_optim_args`, or `optim` and `optim_args` contradict each other.
    """
    parsed = parse_optim_args(optim_args)
    for key, value in FOAM_NAMES[optim].items():
        if parsed.setdefault(key, value) != value:
            raise ValueError(
                f"optim_args: {key}={parsed[key]} contradicts optim={optim!r}, which is {key}={value}; "
                f"expected optim='foam' with {key}={parsed[key]}, or {optim!r} without {key}."
            )
    rule = parsed.get("second_moment", option("second_moment").default)
    refuse_unread(parsed, {rule}, optim)
    refuse_excluded(parsed, rule, optim)
    if "clip_by" in parsed and not parsed.get("gradient_release"):
        raise ValueError(
            f"optim_args: clip_by={parsed['clip_by']} is of gradient_release=true, which is not asked for; expected "
            "both, or no clip_by: without it max_grad_norm bounds the norm of all gradients."
        )
    return parsed


def parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that `TrainingArguments.optim_args` sets, as values of Python, but dtypes by their names.

    Args:
        optim_args: "key=value,key=value" with blanks allowed around keys and values, a mapping, or None.

    Raises:
        ValueError: an unknown or repeated key, a missing "=", an empty pair, or a value that is not legal.
    """
    keys, parsed = names_of(lambda each: each.key), {}
    for key, text in split_optim_args(optim_args):
        if key.lower() in _TRAINERS:
            field = _TRAINERS[key.lower()]
            raise ValueError(
                f"optim_args: {key}={text} is TrainingArguments' own; expected {field} of TrainingArguments "
                f"(--{field.replace(' and ', ', --')}), and no {key} in optim_args."
            )
        if key not in keys:
            near = difflib.get_close_matches(key.lower(), keys, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"optim_args: unknown key {key!r}.{hint} The keys of FOAM are {', '.join(keys)}.")
        parsed[key] = option(key).read(text)
    return parsed


def split_optim_args(optim_args: str | Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The pairs of key and value in `optim_args`, without blanks around them.

    Raises:
        ValueError: a pair without "=", key or value, or a key that is given twice.
    """
    if optim_args is None or (isinstance(optim_args, str) and not optim_args.strip()):
        return []
    if isinstance(optim_args, Mapping):
        return [(str(key), str(value)) for key, value in optim_args.items()]
    if not isinstance(optim_args, str):
        raise ValueError(f"optim_args must be a string like 'level=row,scale=2' or a dict, got {optim_args!r}.")
    pairs: dict[str, str] = {}
    for piece in optim_args.split(","):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not (key and equals and value):
            raise ValueError(
                f"optim_args: {piece.strip()!r} in {optim_args!r} is not of the form key=value; "
                "expected something like 'level=row,scale=2'."
            )
        if "=" in value or ";" in value:
            right = ",".join(re.split(r"[;|&\s]+", optim_args.strip().strip(";")))
            raise ValueError(
                f"optim_args: pairs are separated by commas, got {optim_args!r}; expected something like {right!r}."
            )
        if key in pairs:
            raise ValueError(f"optim_args: {key!r} is given twice, in {optim_args!r}; expected each key once.")
        pairs[key] = value
    return list(pairs.items())
