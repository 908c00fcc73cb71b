"""The fused kernels against float64 and against the plain path: on a GPU, or by Triton's interpreter without one."""

from __future__ import annotations

import pytest
import torch

from foam_hf.kernels import tables as kernel_tables
from foam_hf.kernels.choice import use_kernels
from foam_hf.optim_args import OPTIONS
from foam_hf.optimizer import FOAM
from foam_hf.optimizer.members import member_of
from foam_hf.rules import block_kernel as kernels
from foam_hf.rules import factored_kernel as factored_kernels
from foam_hf.tensors.places import Place
from tests.support.reference import Reference
from tests.support.rules import FUSED
from tests.support.tolerances import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole segments, a tail of 16 columns, an odd tail, three dimensions, a vector, one element.
SHAPES = [(3, 512), (2, 272), (4, 37), (3, 2, 11), (33,), (1, 1)]
LEVELS = [0, 1, 2, 5, 8, "row"]

# Lanes outside a tensor hold what is never stored.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)


def train(monkeypatch, kernel, weights, gradients, **options):
    """Weights and optimizer after a step for each list of gradients; ``None`` is a parameter without a gradient."""
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = FOAM(params, **{"lr": 0.01, "weight_decay": 0.1, **options})
    for step in gradients:
        for p, grad in zip(params, step, strict=True):
            p.grad = None if grad is None else grad.clone()
        optimizer.step()
    return params, optimizer


def drawn(dtype, steps, shapes=SHAPES):
    def draw(shape):
        return torch.randn(shape).to(DEVICE, dtype)

    return [draw(s) for s in shapes], [[draw(s) for s in shapes] for _ in range(steps)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("second_moment", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_follows_the_float64_reference(monkeypatch, dtype, second_moment, level):
    weights, gradients = drawn(dtype, steps=3)
    options = {"level": level, "second_moment": second_moment}
    trained, optimizer = train(monkeypatch, "triton", weights, gradients, stochastic_rounding=False, **options)
    assert not optimizer._prepared.plain
    case = {
        torch.float32: "five steps against float64, float32 weights",
        torch.bfloat16: "five steps against float64, bfloat16 weights to nearest",
        torch.float16: "five steps against float64, float16 weights to nearest",
    }[dtype]
    for i, weight in enumerate(weights):
        reference = Reference(weight.cpu(), lr=0.01, weight_decay=0.1, **options)
        for step in gradients:
            expected = reference.step(step[i].cpu())
            reference.weight = expected.to(dtype).double()
        assert_within(trained[i].detach().cpu().float(), reference.weight, case)


@pytest.mark.parametrize(
    ("level", "shape"),
    [(3, (20, 272)), (3, (9, 1300)), (3, (2, 5, 2064)), (8, (19, 1296)), (8, (2, 5, 2048)), (9, (9, 512))],
)
def test_matrices_of_several_programs_follow_the_float64_reference(monkeypatch, level, shape):
    monkeypatch.setattr(factored_kernels, "STRIPE", 8)
    weight, gradients = drawn(torch.float32, steps=2, shapes=[shape])
    for step in gradients:  # dead units, and rows that a batch has left out
        step[0][..., :3] = 0
        step[0][..., -2:, :] = 0
    trained, _ = train(monkeypatch, "triton", weight, gradients, level=level, second_moment="factored")
    reference = Reference(weight[0].cpu(), lr=0.01, weight_decay=0.1, level=level, second_moment="factored")
    for step in gradients:
        expected = reference.step(step[0].cpu())
    assert_within(trained[0].detach().cpu(), expected, "five steps against float64, float32 weights")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("second_moment", FUSED)
@pytest.mark.parametrize("level", [0, 2, 8, "row"])
def test_kernel_draws_the_bits_of_the_plain_path(monkeypatch, level, second_moment, state_dtype):
    weights, gradients = drawn(torch.bfloat16, steps=3)
    options = {"level": level, "second_moment": second_moment, "state_dtype": state_dtype, "seed": 2**40 + 7}
    fused, a = train(monkeypatch, "triton", weights, gradients, **options)
    plain, b = train(monkeypatch, "reference", weights, gradients, **options)
    for p, q in zip(fused, plain, strict=True):
        # A last bit of the update may round the other way: rarely, and then by one spacing.
        assert (p != q).float().mean().item() <= 0.02
        assert_within(p.float(), q.float(), "five steps against float64, bfloat16 weights to nearest")
        for name, x in a.state[p].items():
            if name != "step":
                assert_within(x.float(), b.state[q][name].float(), "kernel state against the plain path's")


@pytest.mark.parametrize("second_moment", FUSED)
@pytest.mark.parametrize("level", [0, 2, 8, "row"])
def test_kernel_writes_all_of_a_tensor_and_nothing_else(monkeypatch, level, second_moment):
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    for shape, pad in (((6, 512), 8), ((5, 272), 3), ((4, 37), 1)):
        rows, n = shape
        poisoned = torch.full((rows * n + 2 * pad,), float("nan"), device=DEVICE)
        inside = poisoned[pad:-pad].view(shape)
        inside.fill_(1.0)
        p = torch.nn.Parameter(inside)
        p.grad = torch.randn(shape, device=DEVICE)
        optimizer = FOAM([p], lr=0.01, level=level, second_moment=second_moment)
        optimizer.step()
        assert p.data_ptr() == inside.data_ptr()  # an address that may not be a multiple of 16
        assert bool((inside != 1.0).all()) and bool(inside.isfinite().all())
        assert bool(poisoned[:pad].isnan().all()) and bool(poisoned[-pad:].isnan().all())
        assert all(bool(x.isfinite().all()) for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))


# Of level 8 and row: several programs; a row of 4 + 2 chunks and of 2 + 1; a tail of half a block; an odd row.
WIDE = [(40, 512), (9, 768), (3, 1440), (5, 2432), (18, 296), (3, 1501)]


@pytest.mark.parametrize(
    ("dtype", "level"),
    [(x, level) for x in (torch.float32, torch.bfloat16) for level in (8, "row")]
    + [(torch.bfloat16, 6), (torch.float32, 10)],
    ids=str,
)
def test_wide_blocks_follow_the_plain_path_and_write_nothing_else(monkeypatch, dtype, level):
    weights, gradients = drawn(dtype, steps=2, shapes=WIDE)
    plain, b = train(monkeypatch, "reference", weights, gradients, level=level)
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    rooms = [torch.full((w.numel() + 64,), float("nan"), device=DEVICE, dtype=dtype) for w in weights]
    params = [torch.nn.Parameter(room[32:-32].view_as(w).copy_(w)) for room, w in zip(rooms, weights, strict=True)]
    a = FOAM(params, lr=0.01, weight_decay=0.1, level=level)
    for step in gradients:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        a.step()
    assert not a._prepared.plain
    case = {torch.float32: "float32 weights", torch.bfloat16: "bfloat16 weights to nearest"}[dtype]
    for p, q, room in zip(params, plain, rooms, strict=True):
        assert dtype == torch.float32 or (p != q).float().mean().item() <= 0.02
        assert_within(p.float(), q.float(), f"five steps against float64, {case}")
        assert bool(room[:32].isnan().all()) and bool(room[-32:].isnan().all())
        for name, x in a.state[p].items():
            if name != "step":
                assert_within(x.float(), b.state[q][name].float(), "kernel state against the plain path's")


def test_a_weight_that_is_nan_stays_so_alone_and_its_neighbours_train(monkeypatch):
    weights, gradients = drawn(torch.bfloat16, steps=1, shapes=[(6, 512)])
    weights[0][2, 7] = float("nan")
    weights[0][4, 300] = float("inf")
    (p,), _ = train(monkeypatch, "triton", weights, gradients)
    assert p.isnan().nonzero().tolist() == [[2, 7]] and p.isinf().nonzero().tolist() == [[4, 300]]
    assert bool(((p != weights[0]) | ~p.isfinite()).float().mean() > 0.9)


@pytest.mark.parametrize("level", [8, "row"])
def test_rows_draw_the_same_bits_wherever_a_launch_begins(monkeypatch, level):
    """A process that holds some rows alone writes what one with all of them does."""
    weights, gradients = drawn(torch.bfloat16, steps=1, shapes=[(24, 768)])
    whole, _ = train(monkeypatch, "triton", weights, gradients, level=level)
    p = torch.nn.Parameter(weights[0][5:19].clone())
    p.grad = gradients[0][0][5:19].clone()
    optimizer = FOAM([p], lr=0.01, weight_decay=0.1, level=level)
    place = Place(5, 0, 24, 24, 768)
    monkeypatch.setattr(kernel_tables.Member, "place", property(lambda member: place))
    optimizer.step()
    assert torch.equal(p, whole[0][5:19])


@pytest.mark.parametrize("second_moment", FUSED)
def test_same_inputs_give_equal_bits(monkeypatch, second_moment):
    weights, gradients = drawn(torch.bfloat16, steps=2, shapes=[*SHAPES, (20, 300)])
    first, _ = train(monkeypatch, "triton", weights, gradients, level=3, second_moment=second_moment)
    second, _ = train(monkeypatch, "triton", weights, gradients, level=3, second_moment=second_moment)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("second_moment", FUSED)
def test_gradients_that_come_go_and_move(monkeypatch, second_moment):
    weights, gradients = drawn(torch.float32, steps=5, shapes=[(4, 64), (7, 24), (40,)])
    gradients[1][0] = gradients[2][2] = gradients[3][0] = None
    options = {"level": 3, "second_moment": second_moment}
    fused, a = train(monkeypatch, "triton", weights, gradients, **options)
    plain, b = train(monkeypatch, "reference", weights, gradients, **options)
    for p, q in zip(fused, plain, strict=True):
        assert a.state[p]["step"] == b.state[q]["step"]
        assert_within(p, q, "five steps against float64, float32 weights")


@pytest.mark.parametrize("device", dict.fromkeys([DEVICE, "cpu"]))  # a scaler has one, a model may be on several
@pytest.mark.parametrize("second_moment", FUSED)
def test_scaled_gradients_are_unscaled_in_the_kernel(monkeypatch, second_moment, device):
    weights, gradients = drawn(torch.float16, steps=1)
    plain, _ = train(monkeypatch, "triton", weights, gradients, level=3, second_moment=second_moment)
    monkeypatch.setattr(FOAM, "grad_scale", torch.tensor(8.0, device=device), raising=False)
    scaled = [[8 * grad for grad in step] for step in gradients]
    unscaled, _ = train(monkeypatch, "triton", weights, scaled, level=3, second_moment=second_moment)
    assert all(torch.equal(p, q) for p, q in zip(plain, unscaled, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU captures graphs")
def test_capture_in_a_cuda_graph_is_refused(monkeypatch):
    weights, gradients = drawn(torch.float32, steps=1)
    params, optimizer = train(monkeypatch, "triton", weights, gradients)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: .* as numbers of the host"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    optimizer.step()


def test_a_loaded_checkpoint_continues_in_the_loaded_state(monkeypatch):
    weights, gradients = drawn(torch.bfloat16, steps=4, shapes=[(4, 64), (40,)])
    whole, _ = train(monkeypatch, "triton", weights, gradients, level=3)
    half, optimizer = train(monkeypatch, "triton", weights, gradients[:2], level=3)
    _, resumed = train(monkeypatch, "triton", [p.detach() for p in half], gradients[:1], level=3)
    params = resumed.param_groups[0]["params"]
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(params, half, strict=True):
            p.copy_(q)
    for step in gradients[2:]:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(params, whole, strict=True))


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("second_moment", FUSED)
def test_the_order_of_a_checkpoints_keys_does_not_matter(monkeypatch, second_moment, kernel):
    weights, gradients = drawn(torch.float32, steps=3, shapes=[(4, 64)])
    options = {"level": 3, "second_moment": second_moment}
    whole, _ = train(monkeypatch, kernel, weights, gradients, **options)
    half, optimizer = train(monkeypatch, kernel, weights, gradients[:2], **options)
    saved = optimizer.state_dict()
    saved["state"] = {i: dict(reversed(state.items())) for i, state in saved["state"].items()}
    p = torch.nn.Parameter(half[0].detach().clone())
    resumed = FOAM([p], lr=0.01, weight_decay=0.1, **options)
    resumed.load_state_dict(saved)
    p.grad = gradients[2][0].clone()
    resumed.step()
    assert torch.equal(p, whole[0])


def test_what_the_kernel_does_not_take_still_trains(monkeypatch):
    monkeypatch.setattr(kernel_tables, "MAX_COLUMNS", 64)
    weights = [
        torch.randn(8, 12, device=DEVICE).t(),
        torch.randn(2, 300, device=DEVICE),
        torch.randn(3, 40, device=DEVICE),
    ]
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(2)]
    fused, _ = train(monkeypatch, "triton", weights, gradients)
    plain, _ = train(monkeypatch, "reference", weights, gradients)
    for p, q in zip(fused, plain, strict=True):
        assert_within(p, q, "five steps against float64, float32 weights")


@pytest.mark.parametrize("second_moment", FUSED)
def test_moved_gradients_keep_the_tables(monkeypatch, second_moment):
    weights, gradients = drawn(torch.float32, steps=4, shapes=[(4, 64), (40,)])
    keep = []  # so that every step's gradients are at addresses of their own
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = FOAM(params, lr=0.01, weight_decay=0.1, level=3, second_moment=second_moment)
    prepared = set()
    for step in gradients:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
            keep.append(p.grad)
        optimizer.step()
        prepared.add(id(optimizer._prepared))
    assert len(prepared) == 1
    plain, _ = train(monkeypatch, "reference", weights, gradients, level=3, second_moment=second_moment)
    for p, q in zip(params, plain, strict=True):
        assert_within(p, q, "five steps against float64, float32 weights")


def test_a_param_group_put_in_place_of_another_counts_at_once(monkeypatch):
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    p = torch.nn.Parameter(torch.randn(4, 64, device=DEVICE))
    optimizer = FOAM([p], lr=0.01, level=3)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0}
    optimizer.step()
    assert torch.equal(p, before)


def test_a_gradient_of_another_alignment_is_followed(monkeypatch):
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    weight, (first, second) = drawn(torch.float32, steps=2, shapes=[(3, 512)])
    p = torch.nn.Parameter(weight[0].clone())
    optimizer = FOAM([p], lr=0.01, weight_decay=0.1, level=3)
    room = torch.empty(3 * 512 + 1, device=DEVICE)
    for grad, offset in ((first[0], 0), (second[0], 1)):
        p.grad = room[offset : offset + grad.numel()].view_as(grad).copy_(grad)
        optimizer.step()
    plain, _ = train(monkeypatch, "reference", weight, [first, second], level=3)
    assert_within(p, plain[0], "five steps against float64, float32 weights")


def test_a_backward_pass_that_needs_the_weight_before_the_step_fails(monkeypatch):
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    p = torch.nn.Parameter(torch.ones(2, 16, device=DEVICE))
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    FOAM([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", [*({"second_moment": rule} for rule in FUSED), {"level": 0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_missed_steps_share_a_launch(monkeypatch, dtype, options):
    """Experts and skipped layers: each has a step, bias corrections and random bits of its own."""
    weights, gradients = drawn(dtype, steps=5, shapes=[(3, 64)] * 4)
    gradients[0][3] = gradients[1][0] = gradients[2][0] = gradients[2][2] = None
    options = {"level": 3, "state_dtype": dtype, **options}
    fused, a = train(monkeypatch, "triton", weights, gradients, **options)
    plain, b = train(monkeypatch, "reference", weights, gradients, **options)
    assert len(a._prepared.launches) == 1 and not a._prepared.plain
    assert [state["step"] for state in a.state.values()] == [state["step"] for state in b.state.values()]
    assert {state["step"] for state in a.state.values()} == {3, 4, 5}
    case = "five steps against float64, " + (
        "float32 weights" if dtype == torch.float32 else "bfloat16 weights to nearest"
    )
    for p, q in zip(fused, plain, strict=True):
        assert dtype == torch.float32 or (p != q).float().mean().item() <= 0.02
        assert_within(p.float(), q.float(), case)


@pytest.mark.parametrize("options", [*({"second_moment": rule} for rule in FUSED), {"level": 0, "lr": 0.3}], ids=str)
def test_tables_serve_while_gradients_come_and_go(monkeypatch, options):
    """Uneven routing: which experts have a gradient changes in every step, and tables are made for new ones alone."""
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    weights, gradients = drawn(torch.bfloat16, steps=7, shapes=[(3, 64), (5, 64), (2, 64), (40, 64)])
    for missing, found in zip(([3], [1, 2], [0], [0, 1, 2, 3], [], [2, 3], [0, 1, 2]), gradients, strict=True):
        for i in missing:
            found[i] = None
    made: list[int] = []
    for module in (kernels, factored_kernels):
        original = module.make_launches
        monkeypatch.setattr(
            module, "make_launches", lambda members, original=original: made.append(1) or original(members)
        )

    def trained(anew: bool) -> tuple[list[torch.Tensor], list[int]]:
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        optimizer = FOAM(params, **{"lr": 0.01, "weight_decay": 0.1, "level": 3, **options})
        for found in gradients:
            before = [p.detach().clone() for p in params]
            versions = [p._version for p in params]
            for p, grad in zip(params, found, strict=True):
                p.grad = None if grad is None else grad.clone()
            optimizer._prepared = None if anew else optimizer._prepared
            optimizer.step()
            for p, was, version in zip(params, before, versions, strict=True):
                assert p.grad is not None or (torch.equal(p, was) and p._version == version)
        return params, [state["step"] for state in optimizer.state.values()]

    kept, steps = trained(anew=False)
    assert len(made) == 2, "with the first gradients, and with the fourth weight's first one"
    fresh, again = trained(anew=True)
    assert steps == again == [4, 4, 3, 4] and all(map(torch.equal, kept, fresh))


# Of every field of a group a value that somebody may set between steps.
LATER = {
    "lr": 0.02,
    "betas": (0.8, 0.9),
    "eps": 1e-3,
    "weight_decay": 0.5,
    "level": 2,
    "scale": 2.0,
    "second_moment": "factored",
    "residual_scale": 0.5,
    "stochastic_rounding": False,
    "state_dtype": torch.bfloat16,
    "nonfinite": "ignore",
    "momentum": 0.5,
    "mini_rows": 2,
    "plain_state": "8bit",
    "seed": 7,
}
# Those that the next step of this rule does not show.
UNSEEN = ("state_dtype", "nonfinite", "momentum")


@pytest.mark.parametrize("name", [option.name for option in OPTIONS if option.field])
def test_a_prepared_step_follows_what_a_group_says_now(monkeypatch, name):
    weights, gradients = drawn(torch.bfloat16, steps=2, shapes=[(3, 64), (5, 64)])

    def second_step(anew=False, **changed):
        params, optimizer = train(monkeypatch, "triton", weights, gradients[:1], level=3)
        optimizer.param_groups[0].update(changed)
        for p, grad in zip(params, gradients[1], strict=True):
            p.grad = grad.clone()
        optimizer._prepared = None if anew else optimizer._prepared
        return params, optimizer

    params, optimizer = second_step(**{name: LATER[name]})
    holds = optimizer._prepared.holds(optimizer.param_groups, params, list(optimizer.state.values()))
    assert holds == next(option.may_change for option in OPTIONS if option.name == name)
    if not holds:
        return
    optimizer.step()
    fresh, other = second_step(anew=True, **{name: LATER[name]})
    other.step()
    assert all(map(torch.equal, params, fresh))
    unchanged, other = second_step()
    other.step()
    assert all(map(torch.equal, params, unchanged)) == (name in UNSEEN)


def test_one_group_of_equal_geometry_is_one_launch():
    params = [torch.nn.Parameter(torch.zeros(rows, 512, device=DEVICE)) for rows in (3, 8, 300)]
    optimizer = FOAM(params)
    for p in params:
        p.grad = torch.ones_like(p)
    members = [member_of(optimizer._owned, p, optimizer.param_groups[0], i) for i, p in enumerate(params)]
    launches, unfit = kernels.make_launches(members)
    assert len(launches) == 1 and not unfit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_vectors_share_a_launch_and_have_the_bits_that_each_has_alone(monkeypatch, dtype):
    """Norms and biases of any length."""
    monkeypatch.setattr(kernel_tables, "VECTOR", 1000)
    lengths = [(2,), (16,), (33,), (512,), (1000,), (1024,)]
    weights, gradients = drawn(dtype, steps=3, shapes=lengths)
    together, optimizer = train(monkeypatch, "triton", weights, gradients, state_dtype=dtype)
    assert [len(each.members) for each in optimizer._prepared.launches] == [5, 1]
    monkeypatch.setattr(kernel_tables, "VECTOR", 0)
    apart, optimizer = train(monkeypatch, "triton", weights, gradients, state_dtype=dtype)
    assert len(optimizer._prepared.launches) > 2
    assert all(map(torch.equal, together, apart))


def test_the_environment_chooses_the_path(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("FOAM_HF_KERNEL", raising=False)
    assert not use_kernels(cpu) and use_kernels(cuda) and use_kernels(torch.device("xpu"))  # ROCm is "cuda" in torch
    monkeypatch.setenv("FOAM_HF_KERNEL", "reference")
    assert not use_kernels(cuda)
    monkeypatch.setenv("FOAM_HF_KERNEL", "fast")
    with pytest.raises(ValueError, match="FOAM_HF_KERNEL is not valid: got 'fast'; expected 'auto'"):
        use_kernels(cpu)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
def test_learning_rate_and_step_count_never_recompile(monkeypatch):
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    p = torch.nn.Parameter(torch.zeros(8, 512, device=DEVICE))
    optimizer = FOAM([p])
    compiled = set()
    for t in range(20):
        optimizer.param_groups[0]["lr"] = float(t) / 7
        p.grad = torch.ones_like(p)
        optimizer.step()
        compiled.add(sum(len(caches[0]) for caches in kernels._update_kernel.device_caches.values()))
    assert len(compiled) == 1
