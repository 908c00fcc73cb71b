"""``FOAM``, the optimizer: its arguments, param groups, ``step`` and checkpoints, as in any ``torch.optim.Optimizer``.

The arithmetic is in ``foam_hf.rules``. ``optimizer.state`` says what a checkpoint must hold.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from foam_hf.optim_args import names_of, option, refuse_unread
from foam_hf.optimizer.checks import check_field_names, check_options, check_parameter, check_rule, fill_in
from foam_hf.optimizer.decided import Decided
from foam_hf.optimizer.flat import LAYOUT, RECORD, FlatWeights
from foam_hf.optimizer.flat_parts import FlatParts
from foam_hf.optimizer.flat_step import FlatSteps
from foam_hf.optimizer.members import Micro, Numbering, Owned, members_of, members_of_one, parameters_of
from foam_hf.optimizer.nonfinite import LeftOutReport
from foam_hf.optimizer.releases import expect_release, is_released
from foam_hf.optimizer.sharding import as_state_of, pieces_of
from foam_hf.optimizer.state import (
    check_checkpoint,
    expected_state,
    list_as_tuple,
    with_dtype,
)
from foam_hf.optimizer.step import PreparedStep, refuse_capture
from foam_hf.optimizer.tables import LeftOpen, like_others
from foam_hf.rules.all import asked_rules, rule_of
from foam_hf.tensors.folding import Level
from foam_hf.tensors.places import is_sharded, whole
from foam_hf.tensors.rows import PLAIN, kind_of
from foam_hf.tensors.step import Member, State


class FOAM(torch.optim.Optimizer):
    """FOAM (Wen et al., arXiv 2512.07112): Adam whose moments are means over blocks of ``2**level`` adjacent columns.

    Parameters of two or more dimensions fold along their last dimension. The others get AdamW as
    ``torch.optim.AdamW`` computes it, and so does every group with ``level=0`` and ``second_moment="block"``. The
    groups of :func:`foam_hf.foam_param_groups` leave classifiers unfolded, because these are trained from scratch.
    Every argument but ``decided`` is also a field of a param group.

    Args:
        params: parameters or param groups, as for any torch optimizer. Floating dtypes, any shape and strides.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled, as in AdamW, >= 0.
        level: blocks have ``2**level`` columns; 0 to 16, or ``"row"`` for one block a row (FOAM-Mini).
        scale: the paper's alpha, > 0. It multiplies the step of parameters with two or more dimensions. None is the
            default of the rule, with which a learning rate for AdamW is right: ``foam_hf.optim_args.SCALES``, and 1
            at ``level=0``. Param groups hold the number. The paper has 0.25 with unfolded embeddings and heads.
        second_moment: the rule of the weights that fold. ``"block"`` is the paper's. ``"factored"`` keeps means over
            each row and each column. ``"muon"`` keeps no second moment and orthogonalises, see
            :mod:`foam_hf.rules.muon`. ``"adam_mini"`` keeps one value for each of Adam-mini's blocks of rows, see
            :mod:`foam_hf.rules.adam_mini`.
        residual_scale: weight of the residual, which is the gradient minus the mean over its block; >= 0.
        stochastic_rounding: ``"auto"`` rounds stochastically when bfloat16 or quantized weights, such as INT8, are
            written. ``False`` never does, and INT8 weights then hardly learn. ``True`` is ``"auto"`` with an error if
            no weight is of these types.
        state_dtype: ``torch.float32`` or ``torch.bfloat16``.
        nonfinite: what to do if a gradient is NaN or infinite. With ``"error"`` and ``"skip"`` its block (of
            parameters that do not fold: the element) keeps its weights and moments, and all other blocks are updated.
            ``"error"`` then raises :class:`foam_hf.optimizer.NonfiniteGradientError`, a FloatingPointError: at the end
            of that ``step`` on a CPU, in a later step on a GPU, and always before ``state_dict`` returns. ``"skip"``
            logs a warning with a count, rarer and rarer. ``"ignore"`` lets the gradient into weights and moments, as
            AdamW does. Finite gradients beyond 1.8e19 count as infinite, because their squares overflow float32.
        momentum: of ``second_moment="muon"``, in [0, 1), as in ``torch.optim.Muon``. ``betas`` are then for the
            parameters that do not fold.
        mini_rows: of ``second_moment="adam_mini"``: how many adjacent rows share a second moment, 0 for the whole
            tensor. ``foam_param_groups`` finds it for each weight of a model.
        plain_state: ``"full"``, or ``"8bit"`` for moments of 8 bits by bitsandbytes, for tensors that do not fold and
            have 4096 elements or more, see :mod:`foam_hf.rules.adam_8bit`.
        seed: of the stochastic rounding. Its random bits depend on seed, step, parameter and element alone.
        decided: the fields of each weight, for all that a group in ``params`` does not say. A group whose weights have
            different fields is split. It is not a field of a group.

    The state of a folded parameter of shape (..., n), with b = ceil(n / 2**level), is

    * block: ``folded_exp_avg`` and ``folded_exp_avg_sq``, (..., b);
    * factored: ``folded_exp_avg`` (..., b), ``row_exp_avg_sq`` (...,), and ``col_exp_avg_sq`` (..., n) without the
      second last dimension;
    * Muon: ``folded_momentum`` (..., b);
    * Adam-mini: ``folded_exp_avg`` (..., b) and ``row_block_exp_avg_sq``, one value for each block of rows.

    The state of other parameters is ``exp_avg`` and ``exp_avg_sq`` in the shape of the parameter, or with 8 bits
    their codes and scales. All have ``step``, an integer.

    Raises:
        ValueError: a hyperparameter is out of range, there are no parameters, one is listed twice, or ``decided`` does
            not know a trainable one.
        TypeError: a parameter is not a floating point tensor, or a hyperparameter is of the wrong type.
        ImportError: ``plain_state="8bit"`` without bitsandbytes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        level: Level = 8,
        scale: float | None = None,
        second_moment: str = "block",
        residual_scale: float = 1.0,
        stochastic_rounding: bool | str = "auto",
        state_dtype: torch.dtype = torch.float32,
        nonfinite: str = "error",
        momentum: float = 0.95,
        mini_rows: int = 1,
        plain_state: str = "full",
        seed: int = 0,
        decided: Decided | None = None,
    ) -> None:
        arguments = locals()
        defaults = {name: arguments[name] for name in names_of(lambda each: each.field)}
        check_options(defaults)
        self._prepared: PreparedStep | None = None  # holds addresses: never copied, pickled or resumed
        self._left_out = LeftOutReport()
        self.left_open = LeftOpen()
        self._weights, self._flat_steps = FlatWeights(self.left_open), FlatSteps()
        super().__init__(params if decided is None else decided.applied_to(params), defaults)
        if decided is not None and decided.released:
            expect_release(self)
        if any(p.device.type != "meta" for p in parameters_of(self.param_groups)):
            for group in self.param_groups:
                for rule in asked_rules(group):
                    rule.require()
        of_rules = names_of(lambda each: each.field and each.rule is not None)
        given = {name: defaults[name] for name in of_rules if defaults[name] != option(name).default}
        refuse_unread(given, {group["second_moment"] for group in self.param_groups})
        asked = [p for group in self.param_groups if group["stochastic_rounding"] is True for p in group["params"]]
        if asked and not any(p.dtype == torch.bfloat16 or kind_of(p) != PLAIN for p in asked):
            raise ValueError(
                "stochastic_rounding=True is for bfloat16 and quantized weights, and no parameter is bfloat16 or "
                f"quantized: got {sorted({f'{kind_of(p)} {p.dtype}' for p in asked})}; expected a bfloat16 or "
                "quantized model, or 'auto'"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch. If the group is not valid, this raises and the optimizer stays as it was.

        Raises:
            ValueError: a field or a parameter that is not legal, or a parameter that is listed twice.
            TypeError: a field or a parameter of the wrong type.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_field_names(group, self.defaults)
            check_options(group)
            fill_in(group, self.defaults)
            if len({id(p) for p in group["params"]}) < len(group["params"]):
                raise ValueError("a parameter is listed twice in one param group; expected each parameter once")
            for p in group["params"]:
                check_parameter(p)
                check_rule(whole(p), group)
            _check_shards(group)
            self._weights.add(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.left_open.add(group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``step`` divides gradients by the scale of a torch.amp.GradScaler.

        The scaler should do that itself, as gradients are clipped after it. It cannot for float16 weights. It fails
        too if gradient release has freed the gradients; ``step`` then raises an error that explains this.
        """
        return any(p.dtype == torch.float16 for p in parameters_of(self.param_groups)) or is_released(self)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. ``closure`` re-evaluates the model and returns the loss.

        Raises:
            TypeError: a sparse or complex gradient; nothing is updated then.
            FloatingPointError: a gradient is NaN or infinite, in this step or on a GPU in one before, and
                ``nonfinite`` is ``"error"``; all other blocks are updated then.
            RuntimeError: a CUDA graph is being captured.
        """
        refuse_capture()  # first, as any question to the GPU would break the capture
        self._report()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Set by torch.amp.GradScaler, which leaves unscaling and skipping to an optimizer that can do both.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if self._weights.are_flat(self.param_groups):
            self._flat_steps.run(self._weights, self.param_groups, self.state, self._left_out, grad_scale)
            self._left_out.send()
            self._report()
            return loss
        if found_inf is not None and bool(found_inf):
            members_of(self._owned)  # as in torch's fused AdamW, state exists after a first step that was skipped
            return loss
        owned, params, states = self._owned, list(parameters_of(self.param_groups)), list(self.state.values())
        if self._prepared is None or not self._prepared.holds(self.param_groups, params, states):
            members = members_of(owned)
            self._prepared = PreparedStep(self.param_groups, params, list(self.state.values()), members)
        self._prepared.run(grad_scale, self._left_out, len(params))
        self._left_out.send()
        self._report()
        return loss

    def _report(self, wait: bool = False) -> None:
        """Report gradients that were not finite, as ``nonfinite`` says."""
        groups = self._weights.as_groups() if self._weights.parts else self.param_groups
        self._left_out.report(groups, wait)

    def name_weights(self, model: torch.nn.Module) -> None:
        """Let checkpoints under DeepSpeed's ZeRO, whose flat vectors have no names, hold the names in ``model``."""
        self._weights.names = {id(p): name for name, p in model.named_parameters()}

    def check_gradients(self) -> None:
        """Report gradients that were NaN or infinite in the steps so far, as ``nonfinite`` says. Waits for the GPU.

        Raises:
            FloatingPointError: there was one that was not reported yet, and ``nonfinite`` is ``"error"``.
        """
        self._report(wait=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "left_open": self.left_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch adds this default, which FOAM does not have. Groups with it would not match those of a checkpoint.
        self.defaults.pop("differentiable", None)
        self._prepared, self._left_out, self._flat_steps = None, LeftOutReport(), FlatSteps()
        for group in self.param_groups:  # a checkpoint of an older version lacks newer options
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if "left_open" not in self.__dict__:  # pickled by an older version
            self.left_open = LeftOpen(None for _ in self.param_groups)
        if "_weights" not in self.__dict__:  # it was copied or unpickled
            self._weights = FlatWeights(self.left_open)
            for group in self.param_groups:
                self._weights.add(group)
        self._weights.follow(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, but gradients that were not finite are reported before, so that no checkpoint hides them.

        Param groups have the names of dtypes, as torch.distributed.checkpoint cannot gather dtypes.

        Raises:
            FloatingPointError: as in :meth:`check_gradients`. A second call returns the state.
        """
        self.check_gradients()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
        return self._weights.saved(saved) if self._weights.are_flat(self.param_groups) else saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint. Hyperparameters come from it, as in torch. State keeps the dtypes it was saved in.

        ``nonfinite`` is not loaded: it stays as it is here, so that a run that a gradient has stopped can be resumed
        with ``"skip"``.

        Raises:
            ValueError: the checkpoint is of another optimizer, level or rule, or of parameters of other shapes.
                Nothing is changed then.
        """
        pre_hooks, post_hooks = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
        for pre_hook in pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        flat = self._weights.are_flat(self.param_groups)
        self._weights.refuse_other(state_dict, flat)
        expected = self._weights.spec if flat else expected_state
        here = self.left_open.as_saved(self.param_groups, state_dict)
        saved_states = check_checkpoint(state_dict, here, expected)
        groups = [with_dtype(group) for group in state_dict["param_groups"]]
        for mine, group in zip(here, groups, strict=True):
            group["nonfinite"] = mine["nonfinite"]
            group.pop(RECORD, None)
            if "param_names" not in mine:  # torch would require names of every later group
                group.pop("param_names", None)
        state_dict = {**state_dict, "param_groups": groups}
        replaced = {
            f"{name}={saved[name]}, not {mine[name]}"
            for mine, saved in zip(here, state_dict["param_groups"], strict=True)
            for name in self.defaults
            if name != "lr" and name in saved and list_as_tuple(saved[name]) != list_as_tuple(mine[name])
        }
        # torch would call the post hooks before the dtypes of state are corrected below, so all hooks are called here.
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:
            super().load_state_dict(state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = pre_hooks
            self._optimizer_load_state_dict_post_hooks = post_hooks
        if replaced:
            differences = "; ".join(sorted(replaced))
            warnings.warn(f"FOAM goes on with the hyperparameters of its checkpoint: {differences}", stacklevel=2)
        # torch has cast state to the dtype of its parameter, which rounds float32 moments of bfloat16 weights.
        members = ((p, group) for group in self.param_groups for p in group["params"])
        for (p, group), saved in zip(members, saved_states, strict=True):
            for name, tensor in expected(p, group).items():
                if saved:
                    self.state[p][name] = as_state_of(p, name, tensor, saved[name])
            if saved and flat:
                self.state[p][LAYOUT] = self._weights.parts[id(p)].layout
        self._prepared, self._left_out, self._flat_steps = None, LeftOutReport(), FlatSteps()
        for post_hook in post_hooks.values():
            post_hook(self)

    @property
    def flat_parts(self) -> list[FlatParts]:
        """The flat vectors of this process that DeepSpeed's ZeRO has made of the weights; empty without ZeRO."""
        return [*self._weights.parts.values()]

    @property
    def _owned(self) -> Owned:
        return Owned(self.param_groups, self.state, self._left_out)


@torch.no_grad()
def step_some(
    optimizer: FOAM,
    params: list[Tensor],
    numbering: Numbering,
    prepared: PreparedStep | None,
    grad_scale: Tensor | None,
    micro: Micro | None = None,
    pending: Mapping[int, tuple[Tensor, ...]] | None = None,
) -> PreparedStep:
    """Update some parameters by their gradients, now, as ``optimizer.step()`` would; the bits are the same.

    Reports of gradients that are not finite wait for that step.

    Args:
        params: of the optimizer, each with a gradient that ``check_gradient`` lets pass.
        numbering: of all parameters, from ``numbering_of``.
        prepared: what the last step of the same parameters returned, if there was one.
        grad_scale: what to divide each gradient by, float32 (len(params),); None is 1.
        micro: which of several micro-batches the gradients are of; None if they are all of the step.
        pending: what the step has collected of each parameter, by its id, if there are several micro-batches.

    Returns:
        what to pass as ``prepared`` at their next step.

    Raises:
        ValueError: the state of a parameter does not fit its group.
        RuntimeError: in the capture of a CUDA graph.
    """
    refuse_capture()
    owned = optimizer._owned
    states: list[State] = [owned.state[p] for p in params]
    if prepared is None or not prepared.holds(owned.groups, params, states):
        members: list[list[Member]] = [[] for _ in owned.groups]
        for p in params:
            index, stream = numbering[id(p)]
            mine = members_of_one(owned, p, owned.groups[index], stream)
            members[index] += [each._replace(pending=pending[id(p)]) for each in mine] if pending else mine
        prepared = PreparedStep(owned.groups, params, states, members)
    prepared.run(grad_scale, owned.left_out, len(numbering), micro)
    return prepared


def _check_shards(group: dict[str, Any]) -> None:
    """Raise ValueError for shards that the rule of ``group`` cannot have; embeddings get blocks if these can."""
    try:
        for p in filter(is_sharded, group["params"]):
            pieces_of(p, *rule_of(p, group))
    except ValueError:
        if not like_others(group):
            raise
        _check_shards(group)
