"""``FOAM`` as a torch optimizer: what a training loop, a scheduler or a checkpoint expects of one."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import numpy
import pytest
import torch

from foam_hf.optimizer import FOAM
from foam_hf.optimizer.state import expected_state
from tests.support.rules import FOLDING, OPTIONS
from tests.support.tolerances import assert_within


def model() -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 3))


def run(net, optimizer, steps, start=0):
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(t)
        dtype = next(net.parameters()).dtype
        x = torch.randn(8, 24, generator=generator).to(dtype)
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()


def weights(net):
    return torch.cat([p.detach().float().flatten() for p in net.parameters()])


def through_disk(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def kinds(state):
    return {name: (x.shape, x.dtype) for name, x in state.items() if isinstance(x, torch.Tensor)}


SETTINGS = [
    *({"level": 3, **options} for options in OPTIONS.values()),
    {"level": "row"},
    {"level": 2, "state_dtype": torch.bfloat16},
    {"level": 2, "second_moment": "muon", "momentum": 0.9},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_resumed_run_is_bit_identical(options, dtype):
    straight = model().to(dtype)
    run(straight, FOAM(straight.parameters(), weight_decay=0.1, **options), 10)
    first = model().to(dtype)
    optimizer = FOAM(first.parameters(), weight_decay=0.1, **options)
    run(first, optimizer, 4)
    second = copy.deepcopy(first)
    resumed = FOAM(second.parameters(), weight_decay=0.1, **options)
    resumed.load_state_dict(through_disk(optimizer.state_dict()))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert kinds(optimizer.state[p]) == kinds(resumed.state[q])
    run(second, resumed, 6, start=4)
    assert torch.equal(weights(second), weights(straight))


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_as_the_original_would(copier):
    net = model()
    optimizer = FOAM(net.parameters(), level=2)
    run(net, optimizer, 3)
    net2, optimizer2 = copier((net, optimizer))
    run(net, optimizer, 3, start=3)
    run(net2, optimizer2, 3, start=3)
    assert torch.equal(weights(net), weights(net2))


def test_state_is_what_the_specification_says():
    for options in SETTINGS:
        net = model()
        optimizer = FOAM(net.parameters(), **options)
        run(net, optimizer, 1)
        for p in net.parameters():
            expected = expected_state(p, optimizer.param_groups[0])
            spec = {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
            assert kinds(optimizer.state[p]) == spec and optimizer.state[p]["step"] == 1
    group = {**optimizer.defaults, "second_moment": "factored"}
    assert set(expected_state(torch.empty(8, 16, device="meta"), group)) == {
        "folded_exp_avg", "row_exp_avg_sq", "col_exp_avg_sq"}  # fmt: skip


def test_groups_have_their_own_level_and_a_group_can_be_added_later():
    net = model()
    optimizer = FOAM([{"params": [net[0].weight], "level": 1}, {"params": [net[2].weight], "level": "row", "lr": 0.0}])
    frozen = net[2].weight.detach().clone()
    run(net, optimizer, 2)
    optimizer.add_param_group({"params": [net[0].bias, net[1].weight], "level": 0})
    run(net, optimizer, 2, start=2)
    assert optimizer.state[net[0].weight]["folded_exp_avg"].shape == (20, 12)
    assert optimizer.state[net[2].weight]["folded_exp_avg"].shape == (3, 1)
    assert torch.equal(net[2].weight, frozen)
    assert optimizer.state[net[0].weight]["step"] == 4 and optimizer.state[net[0].bias]["step"] == 2


def test_scale_is_for_matrices_only():
    matrix, vector = torch.nn.Parameter(torch.zeros(1, 4)), torch.nn.Parameter(torch.zeros(4))
    for p in (matrix, vector):
        p.grad = torch.ones_like(p)
    FOAM([matrix, vector], lr=1.0, level=2, scale=0.25).step()
    assert_within(matrix, torch.full((1, 4), -0.25), "one step against float64, float32 weights")
    assert_within(vector, torch.full((4,), -1.0), "one step against float64, float32 weights")


def test_parameters_without_a_gradient_stay_and_hold_no_state():
    net = model()
    optimizer = FOAM(net.parameters())
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    run(net, optimizer, 2)
    assert torch.equal(net[0].weight, before) and not optimizer.state[net[0].weight]
    resumed = FOAM(model().parameters())
    resumed.load_state_dict(through_disk(optimizer.state_dict()))


def test_random_stream_belongs_to_the_parameter_not_to_who_has_a_gradient():
    def last_weight(with_first):
        ps = [torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = FOAM(ps, lr=1e-3)
        ps[1].grad = torch.ones_like(ps[1])
        if with_first:
            ps[0].grad = torch.ones_like(ps[0])
        optimizer.step()
        return ps

    both = last_weight(True)
    assert torch.equal(both[1], last_weight(False)[1])
    assert not torch.equal(both[0], both[1])  # equal weights, other bits


def test_seed_changes_the_rounding_and_nothing_else():
    def trained(seed, dtype):
        net = model().to(dtype)
        run(net, FOAM(net.parameters(), seed=seed), 3)
        return weights(net)

    assert torch.equal(trained(0, torch.float32), trained(1, torch.float32))
    assert not torch.equal(trained(0, torch.bfloat16), trained(1, torch.bfloat16))


def test_learning_rate_as_a_tensor_and_under_schedulers():
    nets = [model() for _ in range(2)]
    optimizers = [FOAM(nets[0].parameters(), lr=torch.tensor(1e-2)), FOAM(nets[1].parameters(), lr=1e-2)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in optimizers]
    for t in range(5):
        for net, optimizer, scheduler in zip(nets, optimizers, schedulers, strict=True):
            run(net, optimizer, 1, start=t)
            scheduler.step()
    assert_within(weights(nets[0]), weights(nets[1]), "one step against float64, float32 weights")


def test_groups_that_a_scheduler_has_written_to_make_another_optimizer():
    net = model()
    optimizer = FOAM(net.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    again = FOAM([dict(group) for group in optimizer.param_groups])
    assert again.param_groups[0]["max_momentum"] == optimizer.param_groups[0]["max_momentum"]
    with pytest.raises(ValueError, match=r"'momentun'; did you mean 'momentum'"):
        FOAM([{"params": [torch.nn.Parameter(torch.ones(2))], "momentun": 0.9}])


def test_closure_is_evaluated_with_gradients_and_its_loss_returned():
    net = model()
    optimizer = FOAM(net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 24)).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert closure().item() != pytest.approx(before, rel=1e-9)


def scaled_training(scaled, infinite_at=None):
    net = model()
    optimizer = FOAM(net.parameters(), level=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
    for t in range(5):
        optimizer.zero_grad()
        scaler.scale(net(torch.randn(8, 24, generator=torch.Generator().manual_seed(t))).square().mean()).backward()
        if t == infinite_at:
            if not scaled:
                continue
            net[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    return weights(net), optimizer.state[net[0].weight]["step"]


def test_grad_scaler_changes_nothing_and_a_skipped_step_leaves_everything():
    whole, steps = scaled_training(scaled=True)
    expected, _ = scaled_training(scaled=False)
    assert torch.equal(whole, expected) and steps == 5  # the scale is a power of two
    skipped, steps = scaled_training(scaled=True, infinite_at=2)
    expected, _ = scaled_training(scaled=False, infinite_at=2)
    assert torch.equal(skipped, expected) and steps == 4
    assert scaled_training(scaled=True, infinite_at=0)[1] == 4


def test_step_inside_a_compiled_training_step():
    def trained(compiler):
        net = model()
        optimizer = FOAM(net.parameters(), level=2)

        def training_step(x):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

        training_step = compiler(training_step)
        for t in range(4):
            training_step(torch.randn(8, 24, generator=torch.Generator().manual_seed(t)))
        assert optimizer.state[net[0].weight]["step"] == 4
        return weights(net)

    plain = trained(lambda f: f)
    assert_within(
        trained(lambda f: torch.compile(f, backend="eager")), plain, "one step against float64, float32 weights"
    )


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
@pytest.mark.parametrize("second_moment", FOLDING)
def test_empty_parameters_pass_through(shape, second_moment):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.zeros(shape)
    optimizer = FOAM([p], second_moment=second_moment)
    optimizer.step()
    optimizer.load_state_dict(through_disk(optimizer.state_dict()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 17}, r"level .*got 17; expected an integer from 0 to 16, or 'row'"),
        ({"level": -1}, "level"),
        ({"level": 2.0}, "level"),
        ({"level": True}, "level"),
        ({"level": "8"}, "level.*got '8'"),
        ({"level": None}, "level"),
        ({"scale": 0}, r"scale .*expected a finite number above 0, at most 1e9, or None"),
        ({"scale": math.nan}, "scale.*nan"),
        ({"scale": math.inf}, "scale"),
        ({"scale": "0.5"}, "scale is not a number"),
        ({"residual_scale": -1}, "residual_scale"),
        ({"lr": -1.0}, "lr .*got -1.0"),
        ({"lr": math.nan}, "lr"),
        ({"lr": torch.ones(2)}, "lr has 2 elements"),
        ({"lr": torch.tensor(True)}, "1 elements of torch.bool"),
        ({"lr": torch.tensor(1j)}, "torch.complex64"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, r"betas .*got \(0\.9, 1\.0\); expected two numbers from 0 to below 1"),
        ({"betas": (math.nan, 0.9)}, r"betas .*got \(nan, 0\.9\)"),
        ({"betas": 0.9}, "betas is not a pair"),
        ({"second_moment": "row"}, "second_moment.*'block', 'factored'"),
        ({"stochastic_rounding": "yes"}, "stochastic_rounding"),
        ({"stochastic_rounding": 1}, "stochastic_rounding"),
        ({"stochastic_rounding": True}, "no parameter is bfloat16"),
        ({"state_dtype": torch.float16}, "state_dtype"),
        ({"state_dtype": "float32"}, "state_dtype"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"nonfinite": "raise"}, "nonfinite is not valid: got 'raise'; expected 'error', 'skip' or 'ignore'"),
        ({"nonfinite": True}, "nonfinite"),
        ({"lr": 10**400}, "lr is out of range: got 1000.*at most 1e"),
        ({"residual_scale": 1e300}, "residual_scale is out of range"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused_in_constructor_and_group(options, message):
    p = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises((TypeError, ValueError), match=message):
        FOAM([p], **options)
    if options == {"stochastic_rounding": True}:
        return  # a statement about the whole model
    optimizer = FOAM([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1


def test_numpy_integers_are_levels():
    optimizer = FOAM([torch.nn.Parameter(torch.zeros(2, 2))], level=numpy.int64(3))
    assert optimizer.param_groups[0]["level"] == 3


def test_bad_parameters_are_refused():
    p = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="empty"):
        FOAM([])
    with pytest.raises(ValueError, match="twice"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own word on the same
        FOAM([p, p])
    with pytest.raises(ValueError, match="more than one"):
        FOAM([{"params": [p]}, {"params": [p]}])
    with pytest.raises(TypeError, match="complex64"):
        FOAM([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="float64.*expected dense float32, bfloat16 or float16"):
        FOAM([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))])
    with pytest.raises(ValueError, match="no parameter is bfloat16"):
        FOAM([{"params": [p], "stochastic_rounding": True}])
    with pytest.raises(ValueError, match=r"'levle'; did you mean 'level'"):
        FOAM([{"params": [p], "levle": 2}])
    FOAM([{"params": [p], "name": "decoder", "lr_scale": 0.5}])  # other tools' tags


def test_sparse_gradients_are_refused_before_anything_moves():
    first, embedding = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = FOAM([first, embedding.weight])
    first.grad = torch.ones(2, 2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"sparse_coo for parameter 1 of shape \(4, 2\)"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2, 2)) and not optimizer.state


def checkpoint_of(factory):
    net = model()
    optimizer = factory(net.parameters())
    run(net, optimizer, 2)
    return through_disk(optimizer.state_dict())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda p: torch.optim.AdamW(p), "another optimizer.*exp_avg"),
        (lambda p: torch.optim.SGD(p), "another optimizer"),
        (lambda p: FOAM(p, level=3), "level=3 .*this optimizer has level=2"),
        (lambda p: FOAM(p, level="row"), "level='row'"),
        (lambda p: FOAM(p, level=2, second_moment="factored"), "second_moment='factored'"),
        (lambda p: FOAM(p, level=2, second_moment="muon"), "second_moment='muon'"),
        (lambda p: FOAM(p, level=2, second_moment="adam_mini"), "second_moment='adam_mini'"),
        (lambda p: FOAM(p, level=2, mini_rows=2), "mini_rows=2 .*this optimizer has mini_rows=1"),
        (lambda p: FOAM(list(p)[:3], level=2), r"groups of \[3\] parameters, this optimizer of \[6\]"),
        (lambda p: FOAM([{"params": [x]} for x in p], level=2), r"\[1, 1, 1, 1, 1, 1\]"),
    ],
)
def test_foreign_checkpoints_are_refused_before_anything_changes(factory, message):
    saved = checkpoint_of(factory)
    net = model()
    optimizer = FOAM(net.parameters(), level=2)
    run(net, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert str(before) == str(after)


def test_damaged_checkpoints_are_refused():
    saved = checkpoint_of(lambda p: FOAM(p, level=2))
    optimizer = FOAM(model().parameters(), level=2)
    wrong_shape = copy.deepcopy(saved)
    wrong_shape["state"][0]["folded_exp_avg"] = torch.zeros(20, 5)
    with pytest.raises(ValueError, match=r"parameter 0 .*folded_exp_avg has shape \(20, 5\); expected \(20, 6\)"):
        optimizer.load_state_dict(wrong_shape)
    missing = copy.deepcopy(saved)
    del missing["state"][2]["exp_avg"]
    with pytest.raises(ValueError, match="parameter 2 of the checkpoint does not fit: it holds"):
        optimizer.load_state_dict(missing)
    counted = copy.deepcopy(saved)
    counted["state"][1]["step"] = torch.tensor(2.0)
    with pytest.raises(ValueError, match=r"parameter 1 .*its step is tensor\(2.\); expected an integer"):
        optimizer.load_state_dict(counted)
    with pytest.raises(ValueError, match="not an optimizer's state dict.*'model'"):
        optimizer.load_state_dict({"model": 1})
    for name, value in (("param_groups", 3), ("param_groups", [{"level": 2}]), ("state", []), ("state", {0: 1})):
        with pytest.raises(
            ValueError, match="not an optimizer's state dict: .*expected a list of dicts with 'params'"
        ):
            optimizer.load_state_dict({**saved, name: value})
    poisoned = copy.deepcopy(saved)
    poisoned["param_groups"][0]["lr"] = math.nan
    with pytest.raises(ValueError, match="param group 0 of the checkpoint is not valid: lr is out of range: got nan"):
        optimizer.load_state_dict(poisoned)
    unknown = copy.deepcopy(saved)
    unknown["param_groups"][0]["state_dtype"] = "float31"
    with pytest.raises(ValueError, match="param group 0 of the checkpoint is not valid: state_dtype .*'float31'"):
        optimizer.load_state_dict(unknown)
    assert not optimizer.state


def test_checkpoint_replaces_hyperparameters_and_says_so():
    saved = checkpoint_of(lambda p: FOAM(p, level=2, lr=0.5, scale=0.75))
    optimizer = FOAM(model().parameters(), level=2, lr=0.1)
    with pytest.warns(UserWarning, match=r"with the hyperparameters of its checkpoint: scale=0\.75, not 6\.0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["scale"] == 0.75 and optimizer.param_groups[0]["lr"] == 0.5


def test_checkpoint_of_a_version_with_fewer_options_still_trains():
    saved = checkpoint_of(lambda p: FOAM(p, level=2))
    del saved["param_groups"][0]["seed"]
    net = model()
    optimizer = FOAM(net.parameters(), level=2, seed=5)
    optimizer.load_state_dict(saved)
    run(net, optimizer, 1, start=2)
    assert optimizer.param_groups[0]["seed"] == 5


@pytest.mark.parametrize("change", [{"level": 3}, {"second_moment": "factored"}, {"second_moment": "muon"}])
def test_a_level_or_rule_changed_in_training_is_refused(change):
    net = model()
    optimizer = FOAM(net.parameters(), level=2)
    run(net, optimizer, 1)
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=r"do not fit the state of a parameter of shape \(20, 24\)"):
        run(net, optimizer, 1, start=1)


def test_untrained_state_dict_round_trips():
    optimizer = FOAM(model().parameters(), level=2)
    optimizer.load_state_dict(through_disk(optimizer.state_dict()))
    assert not optimizer.state


def test_learns_a_real_function():
    torch.manual_seed(0)
    x = torch.randn(256, 24)
    y = x[:, :3] * 2 - x[:, 3:6]
    net = model()
    optimizer = FOAM(net.parameters(), lr=1e-2, level=8, scale=1.0)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def start_anew(state: dict[str, Any]) -> None:
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    state["step"] = 0


@pytest.mark.parametrize("edit", [start_anew, dict.clear])
def test_state_that_is_reset_between_steps_counts(monkeypatch, edit) -> None:
    found = []
    for kernel in ("reference", "triton"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        torch.manual_seed(0)
        a, b = (torch.nn.Parameter(torch.randn(4, 8)) for _ in range(2))
        optimizer = FOAM([a, b], lr=1e-2, level=1)
        for step in range(5):
            for p in (a, b):
                p.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            if step == 3:
                edit(optimizer.state[b])
            optimizer.step()
        assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (5, 2)
        found.append(b.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_a_parameter_that_moves_to_the_next_group_has_its_learning_rate(monkeypatch, kernel: str) -> None:
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    a, b, c = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(3))
    optimizer = FOAM([{"params": [a, b], "lr": 1e-2}, {"params": [c], "lr": 0.0}], level=1)
    for moves in (False, True):
        if moves:  # the order of all parameters stays the same
            optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = [a], [b, c]
        before = b.detach().clone()
        for p in (a, b, c):
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(b, before) == moves


def test_hooks_of_loading_may_change_the_state() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = FOAM([weight], level=1)
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    saved = optimizer.state_dict()

    def without(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "folded_exp_avg": torch.zeros_like(state["folded_exp_avg"])}

    before = optimizer.register_load_state_dict_pre_hook(
        lambda _, content: {**content, "state": {key: without(state) for key, state in content["state"].items()}}
    )
    optimizer.load_state_dict(saved)
    assert not optimizer.state[weight]["folded_exp_avg"].any()
    before.remove()
    optimizer.register_load_state_dict_post_hook(lambda it: it.state[weight]["folded_exp_avg"].fill_(2.0))
    optimizer.load_state_dict(saved)
    assert bool((optimizer.state[weight]["folded_exp_avg"] == 2.0).all())
    assert saved["state"][0]["folded_exp_avg"].any()
