"""FOAM on flat vectors: which blocks of the model's weights DeepSpeed's ZeRO gave to this process.

``FlatWeights`` remembers the weights that an optimizer was made for, finds where ZeRO has put them, and checks that as
many weights and blocks fold as were planned. ``flat_step`` updates them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from foam_hf.optimizer.deepspeed import flats_of, is_of_zero3, is_partitioned
from foam_hf.optimizer.flat_parts import FlatParts, Group, Weight
from foam_hf.optimizer.state import CheckpointMismatchError, check_checkpoint, field_problem
from foam_hf.optimizer.tables import LeftOpen
from foam_hf.rules.all import rule_of, shardable_options
from foam_hf.rules.rule import StateTensor
from foam_hf.tensors.places import whole

logger = logging.getLogger("foam_hf")

RECORD = "flat"  # what a param group of a checkpoint says of its flat vectors
LAYOUT = "layout"  # a number in the state of a flat vector that says which parts of which weights it is of


def _reference(p: Any) -> Callable[[], Tensor | None]:
    """What gives ``p`` back as long as it is alive, without keeping it so.

    ZeRO holds no INT8 weights and no DTensors. ``model.to()`` cannot swap those if there is a weak reference to them.
    """
    return (lambda: None) if is_traceable_wrapper_subclass(p) else ref(p)


class FlatWeights:
    """The weights that an optimizer was made for, and the flat vectors that ZeRO has made of them, if it has."""

    def __init__(self, left_open: LeftOpen | None = None) -> None:
        self._left_open = left_open or LeftOpen()
        self._groups: list[tuple[Group, list[int]]] = []
        self.weights: list[Weight] = []
        self.parts: dict[int, FlatParts] = {}  # id of a flat vector -> its parts; empty without ZeRO
        self.names: dict[int, str] = {}  # id of a weight -> its name, for checkpoints; empty if it is not known

    def add(self, group: Group) -> None:
        """Remember the weights of a new param group."""
        numbers = []
        for p in group["params"]:
            like = whole(p)
            rule, level = rule_of(like, group)
            numbers.append(len(self.weights))
            self.weights.append(Weight(_reference(p), like.shape, p.requires_grad, rule.name, level))
        self._groups.append((group, numbers))

    def follow(self, groups: list[Group]) -> None:
        """Take ``groups`` for those that were added: a checkpoint replaces the dicts."""
        if len(groups) == len(self._groups):
            self._groups = [(group, numbers) for group, (_, numbers) in zip(groups, self._groups, strict=True)]

    def are_flat(self, groups: list[Group]) -> bool:
        """Whether ``groups`` hold flat vectors of ZeRO instead of weights. Finds out where all weights lie, if so.

        Raises:
            ValueError: a rule needs whole matrices, or another number of weights or blocks fold than was planned.
            ImportError: this version of DeepSpeed is not known.
        """
        if self.parts:
            return True
        if not self.looks_flat(groups):
            return False
        self._find(groups)
        return True

    def looks_flat(self, groups: list[Group]) -> bool:
        """Whether ZeRO holds the weights."""
        if self.parts:
            return True
        for group in groups:
            if not group["params"]:
                continue
            p = group["params"][0]
            numbers = next((numbers for known, numbers in self._groups if known is group), None)
            if is_traceable_wrapper_subclass(p) or (numbers and self.weights[numbers[0]].p() is p):
                return False
            # A group that is not known may still hold a vector, and then its weights must not be taken for one row.
            alive = [weight.p() for weight in self.weights]
            return not any(weight is p for weight in alive) and any(map(is_partitioned, alive))
        return False

    def _find(self, groups: list[Group]) -> None:
        known = {id(group) for group, _ in self._groups}
        if strangers := [group for group in groups if id(group) not in known]:
            raise ValueError(
                f"{len(strangers)} of {len(groups)} param groups are not those that FOAM was made with, so it cannot "
                "tell which weights lie in their flat vectors; expected the dicts of FOAM.param_groups"
            )
        for number, fields in self._left_open.of([group for group, _ in self._groups]).items():
            logger.info("FOAM under DeepSpeed's ZeRO: embeddings and heads have the block rule, not the factored one")
            group, weights = self._groups[number]
            group.update(fields)
            for i in weights:
                self.weights[i] = self.weights[i]._replace(rule=group["second_moment"])
        self._groups = [(group, numbers) for group, numbers in self._groups if numbers]
        for group, numbers in self._groups:
            refuse_whole_weights_rules(group, "DeepSpeed's ZeRO")
            if any(self.weights[i].p() is None for i in numbers):
                raise ValueError(
                    "weights that FOAM was made for are gone, or are INT8 weights or DTensors, which ZeRO does not "
                    "hold; expected the model that DeepSpeed trains, of bfloat16 or float32 weights"
                )
        alive = [[(i, self._alive(i)) for i in numbers] for _, numbers in self._groups]
        flats = flats_of([group for group, _ in self._groups], alive)
        for flat in flats:
            _refuse_lost_rounding(self._groups[flat.group][0], flat.tensor)
        found = [FlatParts(flat, self.weights, self._groups[flat.group][0]) for flat in flats]
        self._compare_with_plan(found)
        self.parts = {id(each.flat.tensor): each for each in found}

    def _alive(self, number: int) -> Tensor:
        p = self.weights[number].p()
        assert p is not None
        return p

    def _compare_with_plan(self, found: list[FlatParts]) -> None:
        """Raise ValueError if over all processes another number of weights, blocks or elements is found than planned.

        ``found`` has the rule of each part by the fields that its group has now.
        """
        trained = [w for w in self.weights if w.trained and w.shape.numel()]
        folded = [w for w in trained if w.level != 0]
        planned = [len(folded), sum(w.blocks for w in folded), sum(w.shape.numel() for w in trained)]
        mine = [sum(counts) for counts in zip(*(each.counted for each in found), strict=True)] or [0, 0, 0]
        groups = list(dict.fromkeys(each.flat.process_group for each in found))
        if len(groups) > 1:
            raise ValueError(
                f"param groups are shared by {len(groups)} different groups of processes, as with expert parallelism; "
                "expected one group of processes for all weights"
            )
        device = found[0].flat.device if found else torch.device("cpu")
        total = torch.tensor(mine, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(total, group=groups[0] if groups else None)
        counted = total.tolist()
        if counted != planned:
            raise ValueError(
                f"DeepSpeed's ZeRO holds {_counts(counted)}, and FOAM was made for {_counts(planned)}; expected the "
                "same: weights frozen or unfrozen, or fields of param groups changed, after FOAM was made?"
            )
        if found and found[0].flat.rank == 0:
            cuts = sum(len(each.cuts) for each in found)
            logger.info(
                f"FOAM under DeepSpeed's ZeRO: {_counts(counted)} over {len(found[0].flat.spans)} processes, as "
                f"planned; process 0 holds {mine[1]:,} blocks and shares {cuts} of them with others"
            )

    def spec(self, p: Tensor, group: Group) -> dict[str, StateTensor]:
        """Shape and dtype of each tensor of state of a flat vector, as ``expected_state`` has it of a weight."""
        return self.parts[id(p)].spec

    def as_groups(self) -> list[Group]:
        """The param groups with the weights themselves in place of flat vectors, for messages."""
        return [{**group, "params": [self._alive(i) for i in numbers]} for group, numbers in self._groups]

    def saved(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """``state_dict`` as a checkpoint holds it: each param group says of which vectors its state is."""
        states = {
            key: {name: x for name, x in state.items() if name != LAYOUT} for key, state in state_dict["state"].items()
        }
        groups = [{**group, RECORD: self._record(i)} for i, group in enumerate(state_dict["param_groups"])]
        return {**state_dict, "state": states, "param_groups": groups}

    def refuse_other(self, state_dict: Any, flat: bool) -> None:
        """Refuse a checkpoint whose state is not that of the present vectors, or of weights if not ``flat``.

        What is no checkpoint of FOAM is left to other checks.

        Raises:
            CheckpointMismatchError: it is of other options or weights. The error has the checkpoint's groups of whole
                weights, with which the groups that other options make can be compared.
            ValueError: it is of another engine or number of processes, or of the same weights and options but of
                other shapes or cuts, which no options mend.
        """
        groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
        saved_groups = [each for each in (groups if isinstance(groups, list) else []) if isinstance(each, dict)]
        if not flat:
            records = [group[RECORD] for group in saved_groups if group.get(RECORD) is not None]
            if records:
                raise ValueError(
                    "the checkpoint holds the state of flat vectors of DeepSpeed's ZeRO over "
                    f"{records[0]['processes']} processes, and here no ZeRO holds the weights; expected the engine "
                    "and the number of processes that wrote it, or training from the weights alone"
                )
            return
        ours = [(i, each) for i, each in enumerate(saved_groups[: len(self._groups)]) if "level" in each]
        for number, group in ours:
            if problem := self._engine_problem(number, group):
                raise ValueError(problem)
        for number, group in ours:
            if problem := self._options_problem(number, group):
                raise CheckpointMismatchError(problem, _of_whole_weights(state_dict))
        for number, group in ours:
            if problem := self._layout_problem(number, group):
                raise ValueError(problem)

    def _record(self, number: int) -> dict[str, Any]:
        found = [each for each in self.parts.values() if each.flat.group == number]
        numbers = self._groups[number][1]
        return {
            "processes": len(found[0].flat.spans) if found else 0,
            "process": found[0].flat.rank if found else 0,
            LAYOUT: [each.layout for each in found],
            "names": [self.names.get(id(self._alive(i)), "") for i in numbers] if self.names else [],
            "shapes": [list(self.weights[i].shape) for i in numbers],
        }

    def _engine_problem(self, number: int, saved_group: Group) -> str:
        """Why a group in a checkpoint is not of so many processes of ZeRO, or nothing."""
        here, saved = self._record(number), saved_group.get(RECORD)
        if not isinstance(saved, dict):
            return (
                "the checkpoint holds the state of whole weights, and here DeepSpeed's ZeRO holds them; expected a "
                "checkpoint that ZeRO wrote, or training from the weights alone"
            )
        for name in ("processes", "process"):
            if saved.get(name) != here[name]:
                return (
                    f"the checkpoint's flat vectors are those of {name}={saved.get(name)}, and here {name}="
                    f"{here[name]}, so they are cut elsewhere; expected as many processes as wrote it"
                )
        return ""

    def _options_problem(self, number: int, saved_group: Group) -> str:
        """Why a group in a checkpoint of as many processes is not of these weights and options, or nothing."""
        here, saved, group = self._record(number), saved_group[RECORD], self._groups[number][0]
        names = [each.get("names") or [] for each in (here, saved)]
        for own, other in itertools.zip_longest(*names, fillvalue="no weight") if all(names) else ():
            if own != other and own and other:
                return (
                    f"the checkpoint holds the state of {other} where this model has {own}; expected the same model "
                    "and the same choice of folded weights, of embedding_scale and of embedding_rule"
                )
        return field_problem(number, group, saved_group)

    def _layout_problem(self, number: int, saved_group: Group) -> str:
        """Why the vectors of a group of these weights and options are not those in a checkpoint, or nothing."""
        here, saved = self._record(number), saved_group[RECORD]
        if saved.get(LAYOUT) == here[LAYOUT]:
            return ""
        shapes = saved.get("shapes")  # an earlier checkpoint has none
        for i, (own, other) in enumerate(zip(here["shapes"], shapes or [], strict=False)):
            if own != other:
                name = here["names"][i] if here["names"] else f"number {i} of param group {number}"
                return (
                    f"the checkpoint has {name} as a weight of shape {tuple(other)}, and here it has shape "
                    f"{tuple(own)}; expected the model that wrote it, or training from the start"
                )
        return (
            f"the checkpoint's flat vectors are cut otherwise than those of param group {number} here"
            + ("" if shapes else ", or are of other shapes")
            + "; expected the model and the DeepSpeed config that wrote it (sub_group_size under ZeRO 3, "
            "round_robin_gradients under ZeRO 1 and 2), or training from the weights alone"
        )

    def refuse_other_stage(self, by_zero3: bool) -> None:
        """Raise ValueError if ZeRO 3 holds the weights and did not write a checkpoint, or the other way round."""
        held = [p for weight in self.weights if is_partitioned(p := weight.p())]
        if held and any(map(is_of_zero3, held)) != by_zero3:
            wrote, here = ("ZeRO 3", "ZeRO 1 or 2") if by_zero3 else ("ZeRO 1 or 2", "ZeRO 3")
            raise ValueError(
                f"{wrote} wrote the checkpoint, and here {here} holds the weights, cut elsewhere; expected {wrote}, "
                "or training from the weights alone"
            )


def check_flat_groups(optimizer: Any, groups: list[Group], by_zero3: bool) -> None:
    """Raise an error if ``groups`` of a checkpoint that ZeRO wrote are not those of ``optimizer``, a FOAM under ZeRO.

    Under ZeRO 3, which wrote the checkpoint if ``by_zero3``, only that is compared: its vectors are in the optimizer
    only while DeepSpeed loads state or steps, and FOAM compares them then.

    Raises:
        CheckpointMismatchError, ValueError: as ``FlatWeights.refuse_other`` and ``refuse_other_stage``; ValueError if
            they are not FOAM's.
    """
    weights: FlatWeights = optimizer._weights
    weights.refuse_other_stage(by_zero3)
    if any(group["params"] for group in optimizer.param_groups):
        saved = {"state": {}, "param_groups": groups}
        weights.refuse_other(saved, weights.are_flat(optimizer.param_groups))
        check_checkpoint(saved, optimizer.param_groups, weights.spec)


def _of_whole_weights(state_dict: Any) -> dict[str, Any]:
    """A checkpoint's param groups with the weights, by their names, in place of flat vectors; without state.

    A group without such names stays as it is.
    """
    groups = []
    for group in state_dict["param_groups"]:
        if names := (group.get(RECORD) or {}).get("names"):
            group = {**group, "params": [*range(len(names))], "param_names": names}
        groups.append({name: value for name, value in group.items() if name != RECORD})
    return {"state": {}, "param_groups": groups}


def _counts(numbers: list[int]) -> str:
    weights, blocks, elements = numbers
    return f"{weights:,} weights that fold in {blocks:,} blocks, {elements:,} elements in all"


def _refuse_lost_rounding(group: Group, vector: Tensor) -> None:
    if group["stochastic_rounding"] is True and vector.dtype != torch.bfloat16:
        raise ValueError(
            f"stochastic_rounding=True is for bfloat16 weights, and ZeRO keeps these in {vector.dtype}, from which it "
            "rounds the model's to nearest; expected 'auto', or bf16_master_weights_and_grads in the DeepSpeed config"
        )


def refuse_whole_weights_rules(options: Mapping[str, Any], by: str) -> None:
    """Raise ValueError if ``options`` ask for a rule that needs whole rows, columns or tensors, which ``by`` cuts."""
    shardable = shardable_options(("rows and columns",))
    for field, legal in {**shardable, "embedding_rule": shardable["second_moment"]}.items():
        if options.get(field, legal[0]) not in legal:
            raise ValueError(
                f"{field}={options[field]!r} needs whole matrices, and {by} cuts them anywhere; expected "
                f"{field}={' or '.join(map(repr, legal))}{_of_tables(options, field)}, or DDP"
                + (" or FSDP2" if options[field] == "factored" else "")
            )


def _of_tables(options: Mapping[str, Any], field: str) -> str:
    """The option of `foam_param_groups` for a param group of embeddings, which `field` may be of."""
    in_group = field == "second_moment" and "params" in options and options[field] == "factored"
    return " (for embeddings and heads embedding_rule='block')" if in_group else ""
