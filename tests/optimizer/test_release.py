"""Gradient release in a training loop of one's own: the bits of the ordinary loop, what is freed, every refusal."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

from foam_hf import FOAM, enable_gradient_release, foam_param_groups
from foam_hf.int8.weight import Int8Weight
from foam_hf.optimizer import buckets
from foam_hf.optimizer.clipping import BY_SIZE
from tests.support.rules import FUSED
from tests.support.rules import OPTIONS as RULES
from tests.support.tiny_models import (
    BUILDERS,
    classification_data,
    language_data,
    quantized,
    tiny_llama,
    tiny_mlp,
    tiny_qwen2,
)
from tests.support.tolerances import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.long, *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


@pytest.fixture(autouse=True, scope="module")
def _repeatable() -> Iterator[None]:
    """Two runs are compared bit by bit, and some of torch's backward kernels on a GPU add up in any order."""
    torch.use_deterministic_algorithms(DEVICE == "cuda", warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention only warn
        yield
    torch.use_deterministic_algorithms(False)


def tiny_int8_llama() -> nn.Module:
    return quantized(tiny_llama())


def make(build: Callable[[], nn.Module] = tiny_llama, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model on its device without dropout, and its optimizer."""
    model = build().to(DEVICE, dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    groups = foam_param_groups(model, weight_decay=0.1, level=3)
    return model, FOAM(groups, **{"lr": 1e-2, **options})


def make_mlp(int8: bool = False, **options: Any) -> Any:
    """The plain model in bfloat16, with ``int8`` one weight of it in INT8, and its optimizer without groups."""
    model = tiny_mlp().to(DEVICE, torch.bfloat16)
    if int8:
        model.input.weight = nn.Parameter(Int8Weight.from_float(model.input.weight, 16))
    return model, FOAM(model.parameters(), **{"lr": 1e-2, "level": 3, **options})


def batches(model: nn.Module, count: int = 4) -> Iterator[dict[str, Tensor]]:
    classifies = type(model).__name__ in ("TinyMLP", "RobertaForSequenceClassification")
    data = classification_data() if classifies else language_data()
    for i in range(0, 4 * count, 4):
        batch = default_collate([data[j] for j in range(i, i + 4)])
        if type(model).__name__ == "TinyMLP":
            batch.pop("attention_mask")
        yield {name: column.to(DEVICE) for name, column in batch.items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 4) -> None:
    for batch in batches(model, count):
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(model: nn.Module, optimizer: FOAM, other: nn.Module, its_optimizer: FOAM) -> None:
    """The same bits in weights and state."""
    others = dict(other.named_parameters())
    assert [name for name, p in model.named_parameters() if not torch.equal(p, others[name])] == []
    states, theirs = optimizer.state_dict()["state"], its_optimizer.state_dict()["state"]
    assert states.keys() == theirs.keys()
    for key, state in states.items():
        assert state.keys() == theirs[key].keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key][name])), (key, name)


CHECKPOINTING = {"no checkpointing": None, "checkpointing": False, "reentrant checkpointing": True}


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*BUILDERS, "int8"])
def test_weights_and_state_have_the_bits_of_the_ordinary_loop(
    name: str, dtype: torch.dtype, reentrant: bool | None
) -> None:
    if name == "mlp" and reentrant is not None:
        return  # it is no model of transformers
    runs = []
    for released in (False, True):
        model, optimizer = make(tiny_int8_llama if name == "int8" else BUILDERS[name], dtype)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if released:
            enable_gradient_release(model, optimizer)
        train(model, optimizer)
        runs += [model, optimizer]
    assert_same(*runs)


@pytest.mark.parametrize(
    "options",
    [*RULES.values(), {"level": "row", "state_dtype": torch.bfloat16}, {"int8": True}],
    ids=[*RULES, "row, bfloat16 state", "INT8"],
)
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_every_rule_and_the_kernels_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, kernel: str, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    runs = []
    for released in (False, True):
        model, optimizer = make_mlp(**options)
        if released:
            enable_gradient_release(model, optimizer)
        train(model, optimizer, count=3)
        runs += [model, optimizer]
    assert_same(*runs)


def test_few_gradients_live_at_any_time() -> None:
    model, optimizer = make()
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad.numel() for p in model.parameters() if p.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    enable_gradient_release(model, optimizer)
    largest = max(p.numel() for p in model.parameters())
    train(model, optimizer, count=1)
    assert largest <= most < 2 * largest < sum(p.numel() for p in model.parameters()) / 2
    assert all(p.grad is None for p in model.parameters())


def test_all_is_updated_when_the_backward_pass_ends() -> None:
    """Also what still waits for others then."""
    model, optimizer = make()
    enable_gradient_release(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(**next(batches(model)))["loss"].backward()
    for name, p in model.named_parameters():
        assert p.grad is None and not torch.equal(p, before[name]), name


@pytest.mark.skipif(DEVICE == "cpu", reason="counts what a GPU allocates")
def test_the_peak_of_a_backward_pass_holds_few_gradients() -> None:
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(16)]).to(DEVICE, torch.bfloat16)
    optimizer = FOAM(model.parameters(), lr=1e-3)
    enable_gradient_release(model, optimizer, max_grad_norm=1.0)
    x = torch.randn(8, 2048, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(2):
        loss = model(x).sum()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 3 * 2 * 2048**2


def test_a_kept_plan_follows_gradients_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' tables are made once, not at every step, and gradients that wait for each other share them."""
    from foam_hf.rules import block_kernel as kernels

    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    made = []
    original = kernels.make_launches
    monkeypatch.setattr(kernels, "make_launches", lambda members: made.append(1) or original(members))
    model, optimizer = make(tiny_mlp)
    enable_gradient_release(model, optimizer)
    train(model, optimizer, count=1)
    tables = len(made)
    assert 1 < tables < len(list(model.parameters()))
    train(model, optimizer, count=3)
    assert len(made) == tables


# what a loop may do


def test_learning_rates_of_a_schedule_are_those_of_the_ordinary_loop() -> None:
    runs = []
    for released in (False, True):
        model, optimizer = make()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        if released:
            enable_gradient_release(model, optimizer)
        for batch in batches(model):
            model(**batch)["loss"].backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        runs += [model, optimizer]
    assert_same(*runs)


def test_a_closure_is_evaluated_by_the_step() -> None:
    model, optimizer = make()
    enable_gradient_release(model, optimizer)
    for batch in batches(model):

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    plain = make()
    train(*plain)
    assert_same(model, optimizer, *plain)


def test_parameters_without_a_gradient_stay_as_without_release() -> None:
    """Here the LM head's input is cut off from everything below it, and one weight is frozen."""
    runs = []
    for released in (False, True):
        model, optimizer = make()
        model.model.norm.weight.requires_grad_(False)
        if released:
            enable_gradient_release(model, optimizer)
        for batch in batches(model):
            hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state.detach()
            nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), batch["labels"].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs += [model, optimizer]
    assert_same(*runs)
    assert len(runs[3].state_dict()["state"]) == 1


def test_a_gradient_that_no_hook_saw_is_updated_by_the_step(caplog: pytest.LogCaptureFixture) -> None:
    runs = []
    for released in (False, True):
        model, optimizer = make()
        model.model.norm.weight.requires_grad_(False)
        if released:
            enable_gradient_release(model, optimizer)
        model.model.norm.weight.requires_grad_(True)
        train(model, optimizer)
        runs += [model, optimizer]
    assert_same(*runs)
    (record,) = caplog.records
    assert "1 gradients were kept until optimizer.step(), the first of them model.norm.weight" in record.getMessage()


def test_hooks_that_moving_the_model_has_dropped_are_missed(caplog: pytest.LogCaptureFixture) -> None:
    """`model.to()` swaps tensor subclasses, and their hooks are gone."""
    runs = []
    for released in (False, True):
        model, optimizer = make(tiny_int8_llama, torch.bfloat16)
        if released:
            enable_gradient_release(model, optimizer)
        model.to(DEVICE)
        train(model, optimizer)
        runs += [model, optimizer]
    assert_same(*runs)
    (record,) = caplog.records
    assert "14 gradients were kept until optimizer.step()" in record.getMessage()
    assert "need enable_gradient_release anew" in record.getMessage()


def test_a_group_added_later_is_updated(caplog: pytest.LogCaptureFixture) -> None:
    runs = []
    for released in (False, True):
        model = tiny_mlp().to(DEVICE)
        optimizer = FOAM(model.input.parameters(), lr=1e-2)
        if released:
            enable_gradient_release(model, optimizer)
        optimizer.add_param_group({"params": list(model.output.parameters())})
        train(model, optimizer)
        runs += [model, optimizer]
    assert_same(*runs)


def test_accelerates_loop_works_as_it_is() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer before in this process may have set bf16
    plain = make()
    train(*plain)
    model, optimizer = make()
    accelerator = Accelerator(cpu=DEVICE == "cpu")
    wrapped_model, wrapped = accelerator.prepare(model, optimizer)
    enable_gradient_release(wrapped_model, wrapped)
    for batch in batches(model):
        with accelerator.accumulate(wrapped_model):
            accelerator.backward(wrapped_model(**batch)["loss"])
            wrapped.step()
            wrapped.zero_grad()
    assert_same(model, optimizer, *plain)


def test_a_checkpoint_goes_either_way() -> None:
    """Saved with or without release, resumed with or without it: always the bits of the uninterrupted run."""
    whole, its_optimizer = make(dtype=torch.bfloat16)
    train(whole, its_optimizer)
    for first, second in ((True, True), (True, False), (False, True)):
        model, optimizer = make(dtype=torch.bfloat16)
        if first:
            enable_gradient_release(model, optimizer)
        for batch in batches(model, 2):
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, optimizer = make(dtype=torch.bfloat16)
        model.load_state_dict(saved["model"])
        if second:  # before the state is loaded, which replaces the groups
            enable_gradient_release(model, optimizer)
        optimizer.load_state_dict(saved["optimizer"])
        for batch in list(batches(model))[2:]:
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(model, optimizer, whole, its_optimizer)


def test_copies_of_model_and_optimizer_are_ordinary() -> None:
    model, optimizer = make()
    enable_gradient_release(model, optimizer)
    train(model, optimizer, count=1)
    for twin, its_optimizer in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        before = {name: p.detach().clone() for name, p in twin.named_parameters()}
        twin(**next(batches(twin)))["loss"].backward()
        assert all(torch.equal(p, before[name]) and p.grad is not None for name, p in twin.named_parameters())
        its_optimizer.step()
        assert any(not torch.equal(p, before[name]) for name, p in twin.named_parameters())


def test_remove_restores_the_ordinary_loop() -> None:
    model, optimizer = make()
    handle = enable_gradient_release(model, optimizer)
    train(model, optimizer, count=2)
    handle.remove()
    handle.remove()
    for batch in list(batches(model))[2:]:
        model(**batch)["loss"].backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    plain = make()
    train(*plain)
    assert_same(model, optimizer, *plain)
    enable_gradient_release(model, optimizer)


# clipping


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_clipping_bounds_each_gradient_on_its_own(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """With eps far above the gradient, a step is as long as it."""
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    model, optimizer = make(eps=1.0)
    handle = enable_gradient_release(model, optimizer, max_grad_norm=0.05, clip_by="weight")
    plain, its_optimizer = make(eps=1.0)
    clipped = 0
    for batch in batches(model):
        model(**batch)["loss"].backward()
        plain(**batch)["loss"].backward()
        norms = [torch.nn.utils.clip_grad_norm_([p], 0.05) for p in plain.parameters()]
        clipped += sum(float(norm) > 0.05 for norm in norms)
        assert float(handle.grad_norm) == pytest.approx(float(torch.stack(norms).norm()), rel=1e-5)
        for each in (optimizer, its_optimizer):
            each.step()
            each.zero_grad()
        assert handle.grad_norm is None
    assert 0 < clipped < 4 * len(list(model.parameters()))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_within(p.detach(), q.detach(), "clipping in the hook against clipping before the step, 4 steps")


@pytest.mark.parametrize("options", [*({"second_moment": rule} for rule in FUSED), {"int8": True}], ids=str)
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_gradients_clipped_in_one_launch_give_the_bits_of_one_by_one(
    monkeypatch: pytest.MonkeyPatch, kernel: str, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    runs, launches = [], []
    for limit in (0, 2**20):  # with 0, none waits
        monkeypatch.setattr(buckets, "WAITING", limit)
        model, optimizer = make_mlp(**options)
        handle = enable_gradient_release(model, optimizer, max_grad_norm=0.05, clip_by="weight")
        model(**next(batches(model)))["loss"].backward()
        launches.append(len(handle._updates.clip_each.norms))
        optimizer.step()
        train(model, optimizer, count=2)
        runs += [model, optimizer]
    assert_same(*runs)
    assert launches[0] == len(list(model.parameters())) > launches[1]


@pytest.mark.parametrize("rule", ["block", "factored"])
def test_the_norm_of_steady_gradients_is_expected_rightly_whatever_the_rule_of_embeddings(rule: str) -> None:
    """From the first of them on: an expectation by the numbers of elements would give embeddings too large a share."""
    model = tiny_llama().to(DEVICE)
    optimizer = FOAM(foam_param_groups(model, level=3, embedding_rule=rule), lr=0.0)
    handle = enable_gradient_release(model, optimizer, max_grad_norm=1e9)
    batch = {name: x.to(DEVICE) for name, x in default_collate([*language_data(4)]).items()}
    for _ in range(3):
        model(**batch).loss.backward()
        squares = float(handle.grad_norm) ** 2
        optimizer.step()
    handle._updates.begin([p for p in model.parameters() if p.dim() > 1], 1)
    shares = handle._updates.clip_all._shares
    model(**batch).loss.backward()  # the hooks free gradients, so find them without
    handle.remove()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    found = torch.tensor([float(p.grad.square().sum()) for p in model.parameters() if p.dim() > 1])
    assert squares == pytest.approx(float(sum(p.grad.square().sum() for p in model.parameters())), rel=1e-3)
    sizes = torch.tensor([float(p.numel()) for p in model.parameters() if p.dim() > 1])
    expected = torch.lerp(found / found.sum(), sizes / sizes.sum(), BY_SIZE)
    assert_within(shares.cpu(), expected, "expected shares of a norm")


def test_a_bound_that_is_never_reached_changes_no_bit() -> None:
    for bound in (None, 0, 1e9, float("inf")):
        model, optimizer = make(tiny_qwen2, torch.bfloat16)
        enable_gradient_release(model, optimizer, max_grad_norm=bound)
        train(model, optimizer)
        plain = make(tiny_qwen2, torch.bfloat16)
        train(*plain)
        assert_same(model, optimizer, *plain)


# what goes wrong


def test_a_second_backward_before_the_step_is_an_error_that_names_the_weight() -> None:
    model, optimizer = make()
    enable_gradient_release(model, optimizer)
    first, second = batches(model, 2)
    model(**first)["loss"].backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"lm_head.weight got a second gradient before optimizer.step\(\)"):
        model(**second)["loss"].backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_weight_shared_by_reentrant_checkpoints_is_an_error() -> None:
    """Each checkpoint is a backward pass of its own there, and its gradient is not the whole one."""
    shared, head = nn.Linear(8, 8).to(DEVICE), nn.Linear(8, 1).to(DEVICE)
    model = nn.Sequential(shared, head)
    for reentrant in (False, True):
        optimizer = FOAM(model.parameters(), lr=1e-2)
        handle = enable_gradient_release(model, optimizer)
        hidden = torch.ones(2, 8, device=DEVICE, requires_grad=True)
        for _ in range(2):
            hidden = torch.utils.checkpoint.checkpoint(shared, hidden, use_reentrant=reentrant)
        loss = head(hidden).sum()
        if reentrant:
            with pytest.raises(RuntimeError, match=r"0\.\w+ got a second gradient .* use_reentrant=False"):
                loss.backward()
        else:
            loss.backward()
            assert optimizer.state[shared.weight]["step"] == 1
        handle.remove()
        model.zero_grad()


def test_a_loop_goes_on_after_a_backward_pass_that_failed() -> None:
    model, optimizer = make()
    enable_gradient_release(model, optimizer)

    def fail(_: Any) -> None:
        raise ArithmeticError("a failure in the middle")

    broken = model.model.layers[0].mlp.down_proj.weight.register_hook(fail)
    with pytest.raises(ArithmeticError, match="a failure in the middle"):
        model(**next(batches(model)))["loss"].backward()
    broken.remove()
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, count=2)
    assert optimizer.state[model.lm_head.weight]["step"] == 3
    assert optimizer.state[model.model.embed_tokens.weight]["step"] == 2


def test_a_weight_that_is_still_needed_cannot_be_updated_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first product saves the weight without waiting for its gradient: the update comes too early for it."""
    for kernel in ("reference", "triton"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        weight = nn.Parameter(torch.randn(8, 8, device=DEVICE))
        model = nn.ParameterList([weight])
        enable_gradient_release(model, FOAM([weight], lr=1e-2))
        x = torch.randn(2, 8, device=DEVICE, requires_grad=True)
        loss = ((x @ weight.detach()) @ weight).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(5, 4, sparse=True)
    enable_gradient_release(model, FOAM(model.parameters()))
    with pytest.raises(TypeError, match="dense real gradients"):
        model(torch.tensor([1])).sum().backward()


@pytest.mark.filterwarnings("ignore:.*GradScaler")
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_grad_scaler_is_refused_at_its_first_step(unscaled: bool) -> None:
    model, optimizer = make(tiny_mlp)
    enable_gradient_release(model, optimizer)
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(model(**next(batches(model)))["loss"]).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="cannot be combined with a GradScaler"):
        scaler.step(optimizer)


def test_what_it_cannot_serve_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make(tiny_mlp)
    with pytest.raises(TypeError, match=r"got AdamW; expected foam_hf\.FOAM"):
        enable_gradient_release(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="8 of the optimizer's 8 parameters are not the model's"):
        enable_gradient_release(tiny_mlp(), optimizer)
    for value in (True, "1.0"):
        with pytest.raises(TypeError, match="max_grad_norm is not a number"):
            enable_gradient_release(model, optimizer, max_grad_norm=value)
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm is out of range"):
            enable_gradient_release(model, optimizer, max_grad_norm=value)
    with pytest.raises(ValueError, match="got DataParallel; expected one process with one GPU"):
        enable_gradient_release(nn.DataParallel(model), optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="got 2 processes"):
        enable_gradient_release(model, optimizer)


def test_enabling_twice_is_refused() -> None:
    model, optimizer = make(tiny_mlp)
    handle = enable_gradient_release(model, optimizer)
    for second in (optimizer, FOAM(model.parameters())):
        with pytest.raises(RuntimeError, match="enabled for these parameters already"):
            enable_gradient_release(model, second)
    handle.remove()
    enable_gradient_release(model, second)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_a_layer_that_is_skipped_in_some_steps_has_its_own_step_count(monkeypatch, kernel: str) -> None:
    """A kept launch of both layers would give the second the first one's bias correction."""
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    found = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in "ab"})
        model["big"] = nn.Linear(16, 64, bias=False)  # so that the others wait for each other
        model.to(DEVICE)
        optimizer = FOAM(model.parameters(), lr=1e-2, level=2)
        handle = enable_gradient_release(model, optimizer) if release else None
        for step in range(6):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step)).to(DEVICE)
            hidden = model["b"](x)
            (model["a"](hidden) if step % 2 == 0 else hidden).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle is None or len(handle._updates._prepared) <= 2  # none that holds state of before
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_a_step_that_raised_ends_the_step() -> None:
    model = nn.Linear(8, 8).to(DEVICE)
    optimizer = FOAM(model.parameters(), lr=1e-2, level=1)
    enable_gradient_release(model, optimizer, max_grad_norm=1.0)
    raised = 0
    for step in range(4):
        x = torch.full((2, 8), float("nan") if step == 1 else 1.0, device=DEVICE)
        model(x).square().sum().backward()
        try:
            optimizer.step()
            optimizer.check_gradients()
        except FloatingPointError:
            raised += 1
    assert raised == 1 and optimizer.state[model.weight]["step"] == 4

    def closure() -> Tensor:
        loss = model(torch.ones(2, 8, device=DEVICE)).square().sum()
        loss.backward()
        if fails:
            raise ValueError("a bad batch")
        return loss

    fails = True
    with pytest.raises(ValueError, match="a bad batch"):
        optimizer.step(closure)
    fails = False
    optimizer.step(closure)
    assert optimizer.state[model.weight]["step"] == 6


def drop_the_first(optimizer: FOAM) -> None:
    del optimizer.param_groups[0]


def turn_around(optimizer: FOAM) -> None:
    optimizer.param_groups[:] = optimizer.param_groups[::-1]


def move_one(optimizer: FOAM) -> None:
    first, *_, last = optimizer.param_groups
    last["params"] = [*first["params"], *last["params"]]
    first["params"] = []


def take_one_out(optimizer: FOAM) -> None:
    optimizer.param_groups[0]["params"] = []


@pytest.mark.parametrize("change", [drop_the_first, turn_around, move_one, take_one_out])
def test_groups_that_change_between_steps_count_as_without_release(change: Callable[[FOAM], None]) -> None:
    found = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "abc"}).to(DEVICE)
        rates = zip(model.values(), (1e-1, 1e-2, 1e-3), strict=True)
        optimizer = FOAM([{"params": [layer.weight], "lr": lr} for layer, lr in rates], level=1)
        if release:
            enable_gradient_release(model, optimizer)
        for step in range(2):
            if step:
                change(optimizer)
            sum(layer(torch.ones(2, 8, device=DEVICE)).square().sum() for layer in model.values()).backward()
            optimizer.step()
            for p in model.parameters():
                p.grad = None
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
