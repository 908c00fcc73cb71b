"""What the host gives a kernel goes by names: columns of its table, arguments, constants."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import triton
import triton.language as tl

from foam_hf import FOAM
from foam_hf.int8 import block_kernel as int8_block_kernel
from foam_hf.int8 import micro_batches_kernel as int8_micro_batches_kernel
from foam_hf.kernels.calls import KernelCall
from foam_hf.kernels.columns import count_of, filled, number_of, row_of
from foam_hf.kernels.tables import owner_table
from foam_hf.kernels.uploads import PINNED, share_tables
from foam_hf.optimizer import watched
from foam_hf.rules import block_kernel, factored_means_kernel, micro_batches_kernel, narrow_block_kernel
from tests.support.tolerances import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@triton.jit
def scaled_kernel(source, target, factor, N: tl.constexpr, NEGATED: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(source + at) * factor
    tl.store(target + at, -x if NEGATED else x)


def test_a_kernel_is_called_by_names_and_its_constants_may_change_from_call_to_call():
    call = KernelCall(scaled_kernel, {"N": 8}, num_warps=1)
    source, target = torch.arange(8.0, device=DEVICE), torch.zeros(8, device=DEVICE)
    for factor, negated in ((2.0, False), (3.0, True), (5.0, False)):
        call(1, {"source": source, "target": target, "factor": factor}, {"NEGATED": negated})
        assert torch.equal(target, source * (-factor if negated else factor))


@pytest.mark.parametrize(
    ("arguments", "fixed", "constants"),
    [
        (("target", "source", "factor"), ("N",), ("NEGATED",)),  # which would be taken for each other
        (("source", "target", "factor"), ("NEGATED",), ("N",)),
        (("source", "target"), ("N",), ("NEGATED",)),
        (("source", "target", "factor", "more"), ("N",), ("NEGATED",)),
    ],
)
def test_names_that_are_not_the_parameters_of_a_kernel_are_refused(arguments, fixed, constants):
    call = KernelCall(scaled_kernel, dict.fromkeys(fixed, 8))
    with pytest.raises(TypeError, match="the names are not the parameters of scaled_kernel: got .*; expected"):
        call(1, dict.fromkeys(arguments, 1.0), dict.fromkeys(constants, False))


def test_a_row_is_filled_by_names_wherever_its_columns_stand():
    row = row_of("scales", "rows")
    values = {name: [10 * i, 10 * i + 1] for i, name in enumerate(sorted({*row.names} - {"step", "inv_c1", "inv_c2"}))}
    table = filled(row, values).view(numpy.int64).reshape(2, -1)
    assert table.shape == (2, count_of(row))
    for name, found in values.items():
        assert table[:, number_of(row, name).value].tolist() == found
    for broken in ({**values, "row": [1, 2]}, {name: found for name, found in values.items() if name != "rows"}):
        with pytest.raises(ValueError, match="values are not those of a row: got .*; expected "):
            filled(row, broken)


MODULES = [
    block_kernel,
    narrow_block_kernel,
    micro_batches_kernel,
    int8_block_kernel,
    int8_micro_batches_kernel,
    factored_means_kernel,
]


@pytest.mark.parametrize("module", MODULES)
def test_every_column_that_a_kernel_reads_is_the_one_of_its_name(module):
    constants = {name: x.value for name, x in vars(module).items() if isinstance(x, tl.constexpr)}
    numbers = {name: value for name, value in constants.items() if name.lower() in module.ROW.names}
    if hasattr(module, "head_of"):
        numbers |= {name: number_of(narrow_block_kernel.ROW, name.lower()).value for name in ("EXP_AVG_SQ", "ROWS")}
    if hasattr(module, "place_of"):
        places = ("FIRST_ROW", "FIRST_COLUMN", "WHOLE_COLUMNS")
        numbers |= {name: number_of(narrow_block_kernel.ROW, name.lower()).value for name in places}
    assert len(numbers) >= 4
    assert numbers == {name: module.ROW.names.index(name.lower()) for name in numbers}


def test_programs_are_those_of_the_tensors_that_are_here():
    counts = numpy.array([2, 0, 3, 1])
    for here in ([True] * 4, [True, True, False, True], [False, False, True, False], [False] * 4):
        expected = [[i, j] for i, count in enumerate(counts) if here[i] for j in range(count)]
        found = owner_table(counts, numpy.array(here), torch.device(DEVICE))
        assert found.dtype == torch.int32 and found.tolist() == expected and found.shape[1] == 2


class Table:
    """A table that only the host writes."""

    def __init__(self, words: int) -> None:
        self.words, self.device, self.changed = words, torch.zeros(1, device=DEVICE).device, True

    def place(self, host: numpy.ndarray, table: torch.Tensor) -> None:
        host[:] = numpy.arange(self.words)
        self.host, self.table = host, table


def test_tables_in_one_memory_are_apart_and_follow_the_host():
    tables = [Table(words) for words in (3, 4, PINNED // 8 + 1, 1)]
    (memory,) = share_tables(tables)
    for change in range(3):
        for i, table in enumerate(tables):
            if change:
                table.host[:] += 1000 * change + i
                table.changed = i == change
        memory.upload()
        assert not any(table.changed for table in tables)
        for table in tables:
            assert table.table.data_ptr() % 16 == 0  # what kernels are compiled for
            assert table.table.tolist() == table.host.tolist()


@pytest.mark.parametrize("bulk", [True, False])
def test_addresses_are_those_of_before_or_not(monkeypatch, bulk):
    """By torch's comparison of all at once where it has one, and one by one."""
    if not bulk:
        monkeypatch.setattr(watched, "_ALL_EQUAL", None)
    tensors = [torch.zeros(4, device=DEVICE) for _ in range(5)]
    addresses = [x.data_ptr() for x in tensors]
    assert watched.have_addresses(tensors, addresses)
    assert not watched.have_addresses(tensors[:4], addresses) and not watched.have_addresses(tensors, addresses[:4])
    tensors[4].data = torch.ones(4, device=DEVICE)
    assert not watched.have_addresses(tensors, addresses)
    with pytest.raises((RuntimeError, TypeError)):
        watched.have_addresses([*tensors[:4], None], addresses)


class Compiled:
    """What Triton has compiled, as far as a launch asks it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple] = []
        self.calls: list[tuple] = []

    def run(self, *arguments: object) -> None:
        self.runs.append(arguments)

    def __getitem__(self, grid: tuple) -> Any:
        return lambda *arguments: self.calls.append((grid, *arguments))


def test_a_launch_after_the_first_gives_addresses_unless_somebody_listens(monkeypatch):
    call, compiled = KernelCall(scaled_kernel, {"N": 8}, num_warps=1), Compiled()
    source, target = torch.arange(8.0, device=DEVICE), torch.zeros(8, device=DEVICE)
    arguments = {"source": source, "target": target, "factor": 2.0}
    call(3, arguments, {"NEGATED": False})
    call._compiled, call._device = {(False,): compiled}, 0
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_stream=lambda device: 7))
    call(3, arguments, {"NEGATED": False})
    addresses = source.data_ptr(), target.data_ptr()
    assert compiled.runs == [(3, 1, 1, 7, "function", "metadata", None, None, None, *addresses, 2.0, 8, False)]
    assert arguments["source"] is source and not compiled.calls
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", SimpleNamespace(calls=[print]))
    call(3, arguments, {"NEGATED": False})
    assert len(compiled.runs) == 1
    assert compiled.calls == [((3, 1, 1), source, target, 2.0, 8, False)]


def test_tensors_of_the_same_kinds_are_known_at_once_and_no_others():
    tensors = [torch.zeros(4, 4, device=DEVICE), torch.zeros(3, 2, device=DEVICE)]
    same = watched.SameKinds()
    assert not same.found_in(tensors)
    same.learn(tensors)
    assert same.found_in([torch.ones(4, 4, device=DEVICE), tensors[1]])
    for other in (
        tensors[0].t(),
        tensors[0].double(),
        torch.zeros(4, 5, device=DEVICE),
        None,
        torch.zeros(4, 4).to("meta"),
    ):
        assert not same.found_in([other, tensors[1]])
    assert not same.found_in(tensors[:1]) and not same.found_in([*tensors, tensors[0]])
    kept = weakref.ref(tensors[0])
    tensors.clear()
    assert kept() is None


@pytest.mark.parametrize("known", [True, False])
def test_memory_and_kinds_that_changed_under_the_same_tensors_are_followed(monkeypatch, known):
    """With torch's comparison of all gradients in one call, and without."""
    if not known:
        monkeypatch.setattr(watched, "_GUARDS", None)
    weight, grad = torch.randn(16, 16, device=DEVICE), torch.randn(16, 16, device=DEVICE)

    def trained(kernel: str) -> list[torch.Tensor]:
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        p = torch.nn.Parameter(weight.clone())
        optimizer = FOAM([p], lr=0.01, level=2)
        p.grad = grad.clone()
        optimizer.step()
        optimizer.step()
        p.grad.data = p.grad.data.t()  # the same address and size
        optimizer.step()
        p.grad.data = grad.to(torch.bfloat16)
        optimizer.step()
        p.grad.data = grad.clone()
        optimizer.step()
        moments = optimizer.state[p]
        kept = [
            p.detach(),
            *(x.detach() for name, x in moments.items() if name != "step"),
        ]  # or an error would be a crash
        before = {name: x.clone() for name, x in moments.items() if name != "step"}
        for name in before:
            moments[name].data = before[name]
        optimizer.step()
        p.data = p.data.clone()
        optimizer.step()
        assert not torch.equal(p, kept[0])
        return [p.detach(), moments["folded_exp_avg"], moments["folded_exp_avg_sq"]]

    for found, expected in zip(trained("triton"), trained("reference"), strict=True):
        assert_within(found, expected, "five steps against float64, float32 weights")


def on_both_paths(monkeypatch, steps) -> None:
    """``steps`` trains two parameters, of which the first is compared; kernels do as the updates in torch do."""
    found = []
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        torch.manual_seed(0)
        p, other = (torch.nn.Parameter(torch.randn(16, 16, device=DEVICE)) for _ in range(2))
        optimizer = FOAM([p, other], lr=0.01, level=2)
        found.append(steps(optimizer, p, other).clone())
    assert_within(*found, "five steps against float64, float32 weights")


def stepped(optimizer: FOAM, *params: torch.nn.Parameter, shape: tuple[int, ...] = (16, 16)) -> None:
    for p in params:
        p.grad = torch.randn(shape, device=DEVICE)
    optimizer.step()


@pytest.mark.parametrize("known", [True, False])
def test_a_weight_that_lies_in_another_way_at_its_address_is_followed(monkeypatch, known):
    if not known:
        monkeypatch.setattr(watched, "_GUARDS", None)

    def steps(optimizer, p, other):
        stepped(optimizer, p, other)
        p.data = p.data.t()
        stepped(optimizer, p, other)
        p.data = p.data.t()
        stepped(optimizer, p, other)
        return p.detach()

    on_both_paths(monkeypatch, steps)


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_a_weight_that_was_cut_at_its_address_is_refused_and_nothing_is_written(monkeypatch, kernel):
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    p = torch.nn.Parameter(torch.randn(32, 16, device=DEVICE))
    optimizer = FOAM([p], level=2)
    stepped(optimizer, p, shape=(32, 16))
    memory = p.data
    p.data = memory[:8]
    before, p.grad = memory.clone(), None
    with pytest.raises(ValueError, match=r"folded_exp_avg has shape \(32, 4\); expected \(8, 4\)"):
        stepped(optimizer, p, shape=(8, 16))
    assert torch.equal(memory, before)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "a later one"])
@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_a_gradient_of_another_shape_than_its_weight_is_refused(monkeypatch, kernel, first):
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    p = torch.nn.Parameter(torch.randn(32, 16, device=DEVICE))
    optimizer = FOAM([p], level=2)
    if not first:
        stepped(optimizer, p, shape=(32, 16))
    before = p.detach().clone()
    p.grad = torch.zeros(32, 16, device=DEVICE)
    p.grad.data = torch.zeros(8, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"got a gradient of shape \(8, 16\) on .* for a weight of shape \(32, 16\)"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("change", ["transposed", "first in bfloat16"])
def test_state_that_kernels_cannot_read_is_read_plainly(monkeypatch, change):
    def steps(optimizer, p, other):
        stepped(optimizer, p, other)
        state = optimizer.state[p]
        if change == "transposed":
            state.update({name: x.t().contiguous().t() for name, x in state.items() if name != "step"})
        else:
            state["folded_exp_avg"] = state["folded_exp_avg"].to(torch.bfloat16)
        stepped(optimizer, p, other)
        return p.detach()

    on_both_paths(monkeypatch, steps)


@pytest.mark.parametrize("known", [True, False])
def test_a_number_that_autograd_has_left_to_be_negated_is_negated(monkeypatch, known):
    """As the gradient of an imaginary part behind a conjugate; the kernels read memory as it lies."""
    if not known:
        monkeypatch.setattr(watched, "_GUARDS", None)

    def steps(optimizer, p, other):
        (phase,) = phases = [torch.nn.Parameter(torch.ones(1, device=DEVICE))]
        optimizer.add_param_group({"params": phases})
        for negated in (True, False, True):
            z = torch.complex(torch.ones(1, device=DEVICE), phase)
            (z.conj() if negated else z).mul(1 + 3j).imag.sum().backward()
            assert phase.grad.is_neg() == negated
            optimizer.step()
            optimizer.zero_grad()
        return phase.detach()

    on_both_paths(monkeypatch, steps)


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_state_on_another_device_is_refused_unless_its_weight_has_no_gradient(monkeypatch, kernel):
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    p, frozen = (torch.nn.Parameter(torch.randn(16, 16, device=DEVICE)) for _ in range(2))
    optimizer = FOAM([p, frozen], level=2)
    stepped(optimizer, p, frozen)
    state = optimizer.state[frozen]
    kept = dict(state)
    state.update({name: x.to("meta") for name, x in state.items() if name != "step"})
    before, frozen.grad = frozen.detach().clone(), None
    stepped(optimizer, p)
    with pytest.raises(
        ValueError, match=r"got folded_exp_avg on meta for a weight of shape \(16, 16\) on .*; expected"
    ):
        stepped(optimizer, p, frozen)
    assert torch.equal(frozen, before)
    state.update(kept)
    optimizer.step()
    assert not torch.equal(frozen, before)
