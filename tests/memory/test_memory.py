"""Counting state: every optimizer that people compare, whatever it keeps, each storage once."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils._pytree import tree_leaves

from foam_hf import FOAM, foam_param_groups, memory
from foam_hf.memory import (
    adamw_state_bytes,
    breakdown,
    expected_state_bytes,
    format_bytes,
    headline,
    state_bytes,
    summarize,
)
from tests.support import tiny_models
from tests.support.rules import FOLDING
from tests.support.tiny_models import take_step


def projected_groups(model: nn.Module, **options) -> list[dict]:
    projected = [p for name, p in model.named_parameters() if "_proj" in name]
    others = [p for name, p in model.named_parameters() if "_proj" not in name]
    return [{"params": others}, {"params": projected, "rank": 4, "update_proj_gap": 200, **options}]


# --- AdamW: the yardstick, held against the real one ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("foreach", [False, True])
def test_adamw_bytes_are_those_of_torch_adamw(dtype, foreach):
    model = tiny_models.tiny_roberta().to(dtype)
    model.roberta.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    assert state_bytes(optimizer) == 0
    take_step(model, optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    by_hand = sum(2 * p.numel() * dtype.itemsize + 4 for p in trainable)
    assert state_bytes(optimizer) == adamw_state_bytes(model.parameters()) == by_hand


def test_adamw_bytes_count_a_shared_parameter_once_and_take_any_iterable():
    p = nn.Parameter(torch.zeros(3, 5))
    assert adamw_state_bytes(iter([p, p])) == 2 * 15 * 4 + 4
    assert adamw_state_bytes([]) == 0
    assert adamw_state_bytes([nn.Parameter(torch.empty(1000, 1000, device="meta"))]) == 8_000_004


# --- FOAM: expected from shapes, and measured ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("second_moment", FOLDING)
@pytest.mark.parametrize("level", [0, 1, 3, 8, 16, "row"])
def test_foam_expected_is_measured(level, second_moment, state_dtype, dtype):
    model = tiny_models.tiny_mixtral().to(dtype)  # experts of three dimensions among the weights
    groups = foam_param_groups(model, level=level, second_moment=second_moment, state_dtype=state_dtype)
    optimizer = FOAM(groups)
    expected = expected_state_bytes(optimizer.param_groups)
    assert state_bytes(optimizer) == 0, "expected before anything is allocated"
    take_step(model, optimizer)
    assert state_bytes(optimizer) == expected > 0


def test_foam_expected_by_hand_with_tails_and_frozen_parameters():
    weight, bias = nn.Parameter(torch.zeros(3, 10)), nn.Parameter(torch.zeros(10))
    frozen = nn.Parameter(torch.zeros(50, 50), requires_grad=False)
    groups = [{"params": [weight, frozen], "level": 2}, {"params": [bias]}]
    # 10 columns in blocks of 4 make 3 blocks, in 3 rows, two moments of 4 bytes; the bias keeps two of its own size.
    assert expected_state_bytes(groups) == 2 * 4 * 3 * 3 + 2 * 4 * 10
    groups[0]["second_moment"] = "factored"
    assert expected_state_bytes(groups) == 4 * (3 * 3 + 3 + 10) + 2 * 4 * 10


def test_expected_bytes_fill_in_foams_defaults_and_allocate_nothing():
    with torch.device("meta"):
        model = nn.Linear(100_000, 100_000)
    groups = foam_param_groups(model)
    assert expected_state_bytes(groups) == expected_state_bytes(FOAM(groups).param_groups)
    blocks = -(-100_000 // 256)
    assert expected_state_bytes(groups) == 2 * 4 * (100_000 * blocks + 100_000)


def test_foam_keeps_its_bytes_through_deepcopy_and_a_state_dict():
    model = tiny_models.tiny_llama()
    optimizer = FOAM(foam_param_groups(model, level=3))
    take_step(model, optimizer)
    assert state_bytes(copy.deepcopy(optimizer)) == state_bytes(optimizer)
    restored = FOAM(foam_param_groups(model, level=3))
    restored.load_state_dict(optimizer.state_dict())
    assert state_bytes(restored) == state_bytes(optimizer)


# --- Other people's optimizers ---


def test_sgd_without_momentum_keeps_nothing_and_with_momentum_one_tensor():
    model = tiny_models.tiny_mlp()
    plain, momentum = torch.optim.SGD(model.parameters()), torch.optim.SGD(model.parameters(), momentum=0.9)
    take_step(model, plain)
    take_step(model, momentum)
    assert state_bytes(plain) == 0
    assert state_bytes(momentum) == sum(p.numel() * 4 for p in model.parameters())


def test_adafactor():
    from transformers.optimization import Adafactor

    model = nn.Linear(7, 5)
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    take_step(model, optimizer)
    rms = 2 * 4  # "RMS" is a tensor of one element for each parameter
    assert state_bytes(optimizer) == (7 + 5) * 4 + 5 * 4 + rms


def bitsandbytes_state_bytes(model: nn.Module) -> int:
    """By bitsandbytes' layout: 8 bits an element with a float scale for 256 of them; small tensors stay in 32 bits."""
    expected = 2 * 256 * 4  # two tables of 256 floats, shared by all parameters
    for p in model.parameters():
        blocks = -(-p.numel() // 256)
        expected += 2 * (p.numel() * 4 if p.numel() < 4096 else p.numel() + blocks * 4)
    return expected


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes_8_bit(name):
    import bitsandbytes

    # Trainer leaves overrides for embeddings in this process-wide singleton, by position in the param groups.
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 100))
    optimizer = getattr(bitsandbytes.optim, name)(model.parameters())
    take_step(model, optimizer)
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.uint8
    assert state_bytes(optimizer) == bitsandbytes_state_bytes(model)


def test_bitsandbytes_paged_tensors():
    """On the CPU bitsandbytes does not page: its paged tensors are built here as `get_paged` does it on a GPU."""
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    for name in ("state1", "state2"):
        managed = np.zeros((8, 8), dtype=np.uint8)
        paged = torch.frombuffer(managed, dtype=torch.uint8, count=64).view(8, 8)
        paged.is_paged, paged.page_deviceid = True, 0
        optimizer.state[model.weight][name] = paged
    optimizer.state[model.weight]["the same memory again"] = torch.frombuffer(managed, dtype=torch.uint8, count=32)
    assert state_bytes(optimizer) == 2 * 64


@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")
def test_galore_counts_its_projectors():
    from galore_torch import GaLoreAdamW

    model = tiny_models.tiny_llama()
    groups = projected_groups(model, scale=0.25, proj_type="std")
    optimizer = GaLoreAdamW(groups)
    take_step(model, optimizer)
    expected = sum(2 * p.numel() * 4 for p in groups[0]["params"])
    for p in groups[1]["params"]:
        rows, columns = p.shape
        # Two moments of rank 4 along the longer side. The projection is a slice of a square factor of the gradient's
        # SVD, and keeps all of it alive.
        expected += 4 * (2 * 4 * max(rows, columns) + min(rows, columns) ** 2)
    assert state_bytes(optimizer) == expected


@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")
def test_apollo_counts_what_it_keeps():
    from apollo_torch import APOLLOAdamW

    model = tiny_models.tiny_llama()
    groups = projected_groups(model, scale=1.0, proj="random", proj_type="std", scale_type="channel")
    optimizer = APOLLOAdamW(groups)
    take_step(model, optimizer)
    kept = [optimizer.state[p] for group in groups for p in group["params"]]
    tensors = [t for state in kept for t in tree_leaves(state) if isinstance(t, torch.Tensor)]
    projections = [t for state in kept for t in vars(state.get("projector", SimpleNamespace())).values()]
    tensors += [t for t in projections if isinstance(t, torch.Tensor)]
    assert len(tensors) > 3 * len(groups[1]["params"])
    assert state_bytes(optimizer) == sum(t.numel() * t.element_size() for t in tensors)


# --- Whatever else a state may hold ---


@pytest.fixture
def holder() -> SimpleNamespace:
    """An optimizer with one parameter, and a place to put things into its state."""
    p = nn.Parameter(torch.zeros(4, 4))
    p.grad = torch.zeros(4, 4)
    optimizer = torch.optim.SGD([p])
    return SimpleNamespace(p=p, optimizer=optimizer, state=optimizer.state[p])


def test_nested_containers_and_objects(holder):
    class Slotted:
        __slots__ = ("values", "unset")

        def __init__(self, values: torch.Tensor) -> None:
            self.values = values

    quantized = SimpleNamespace(codes=torch.zeros(10, dtype=torch.uint8), scales={"absmax": torch.zeros(2)})
    holder.state["deep"] = {"list": [torch.zeros(3), (torch.zeros(5, dtype=torch.float64), None, "text", 7)]}
    holder.state["quantized"] = [quantized, Slotted(torch.zeros(6))]
    holder.state["cycle"] = holder.state
    assert state_bytes(holder.optimizer) == 3 * 4 + 5 * 8 + 10 + 2 * 4 + 6 * 4


def test_a_storage_counts_once_and_whole(holder):
    flat = torch.zeros(100)
    holder.state.update(a=flat[:10], b=flat[10:30].view(4, 5), c=flat.view(torch.int32), d={"e": flat.t()})
    assert state_bytes(holder.optimizer) == 400


def test_parameters_and_gradients_in_state_do_not_count(holder):
    holder.state.update(p=holder.p, view=holder.p.data.view(-1), grad=holder.p.grad, own=torch.zeros(2))
    assert state_bytes(holder.optimizer) == 8


def test_meta_fake_and_sparse_tensors(holder):
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = torch.zeros(10, 10, device="meta")
    holder.state.update(meta=meta, view=meta[2:], empty=torch.zeros(0))
    assert state_bytes(holder.optimizer) == 400
    with FakeTensorMode():
        holder.state["fake"] = torch.zeros(5)
    assert state_bytes(holder.optimizer) == 400 + 20
    holder.state["coo"] = torch.sparse_coo_tensor([[0, 2], [1, 0]], [1.0, 2.0], (3, 3))
    assert state_bytes(holder.optimizer) == 420 + 2 * 2 * 8 + 2 * 4
    csr = torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2), (2, 2))
    holder.state["csr"] = csr
    assert state_bytes(holder.optimizer) == 460 + (3 + 2) * 8 + 2 * 4


class Quantized(torch.Tensor):
    """A tensor of int8 codes and a scale, as quantization libraries build them."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"counting must not compute: {func}")


def test_tensor_subclass_counts_what_it_is_made_of(holder):
    holder.state["quantized"] = Quantized(torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4))
    assert state_bytes(holder.optimizer) == 16 + 16


def test_dtensor_counts_its_local_shard(holder, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        # As the first of two ranks would hold it: 4 local rows of 8.
        shape = {"shape": torch.Size((8, 6)), "stride": (6, 1)}
        holder.state["exp_avg"] = DTensor.from_local(torch.zeros(4, 6), mesh, [Shard(0)], run_check=False, **shape)
        assert holder.state["exp_avg"].shape == (8, 6)
        assert state_bytes(holder.optimizer) == 4 * 6 * 4
        p = nn.Parameter(DTensor.from_local(torch.zeros(4, 6), mesh, [Shard(0)], run_check=False, **shape))
        assert adamw_state_bytes([p]) == 2 * 4 * 6 * 4 + 4
        p = nn.Parameter(distribute_tensor(torch.zeros(4, 6), mesh, [Shard(0)]))
        line = headline(SimpleNamespace(param_groups=[{"params": [p], "level": 0}]))
        assert line == (
            "FOAM: 192 B of optimizer state, 98% of AdamW's 196 B, for 24 trained parameters, this process's share"
        )
    finally:
        torch.distributed.destroy_process_group()


def test_state_in_attributes_of_the_optimizer():
    class KeepsItsOwn(torch.optim.SGD):  # as AdaLomo does
        def __init__(self, params) -> None:
            super().__init__(params)
            self.exp_avg_sq_row = {"weight": torch.zeros(5)}
            self.manager = SimpleNamespace(tensors_of_all_optimizers=[torch.zeros(100)])

    assert state_bytes(KeepsItsOwn(nn.Linear(2, 2).parameters())) == 20


# --- Wrappers ---


def test_accelerates_wrapper_is_looked_through():
    Accelerator(cpu=True)  # the wrapper asks for one
    model = tiny_models.tiny_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer)
    wrapped = AcceleratedOptimizer(optimizer)
    assert state_bytes(wrapped) == state_bytes(optimizer) == adamw_state_bytes(model.parameters())


def test_layerwise_dummy_optimizer_is_looked_through():
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    model = tiny_models.tiny_mlp()
    inner = {p: torch.optim.AdamW([p]) for p in model.parameters()}
    dummy = LayerWiseDummyOptimizer(optimizer_dict=inner)
    for optimizer in inner.values():
        take_step(model, optimizer)
    assert state_bytes(dummy) == adamw_state_bytes(model.parameters())


def test_not_an_optimizer():
    for thing in (None, nn.Linear(2, 2), {"state": {}}):
        with pytest.raises(TypeError, match="not an optimizer, got"):
            state_bytes(thing)


# --- Breakdown, text ---


def test_breakdown_counts_every_storage_in_one_place_only():
    model = tiny_models.tiny_qwen2()  # a tied LM head
    optimizer = FOAM(foam_param_groups(model, level=2))
    take_step(model, optimizer)
    parts = breakdown(model, optimizer)
    count = sum(p.numel() for p in model.parameters())
    assert parts.parameters == count
    assert parts.weights == 4 * count + sum(b.numel() * b.element_size() for b in model.buffers())
    assert parts.gradients == 4 * count
    assert parts.state == state_bytes(optimizer) == expected_state_bytes(optimizer.param_groups)
    assert parts.adamw == adamw_state_bytes(model.parameters())
    assert parts.adamw_ratio == parts.state / parts.adamw
    assert parts.state_per_parameter == parts.state / count
    model.zero_grad()
    assert breakdown(model, optimizer).gradients == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_counters_that_do_not_exist_are_none():
    model = nn.Linear(2, 2).requires_grad_(False)
    parts = breakdown(model, torch.optim.SGD(model.parameters()))
    assert (parts.allocated, parts.peak, parts.shares) == (None, None, None)
    assert (parts.adamw_ratio, parts.state_per_parameter) == (None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_shares_add_up_and_nothing_is_reset():
    model = nn.Linear(1024, 1024, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer)
    before = torch.cuda.max_memory_allocated()
    parts = breakdown(model, optimizer)
    assert parts.peak == torch.cuda.max_memory_allocated() == before >= parts.allocated
    assert sum(parts.shares.values()) == pytest.approx(1)
    assert parts.shares["weights"] == parts.weights / parts.peak
    assert parts.shares["rest"] >= 0


def test_counters_of_a_gpu_become_shares(monkeypatch):
    """Counters of a pretended GPU: what lives elsewhere, as paged state does, is no share of its memory."""
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer)
    optimizer.state[model.weight]["offloaded"] = torch.zeros(1000)
    gpu = torch.device("cuda", 0)

    def on_gpu(tensor):
        key, size, device = real(tensor)
        return key, size, device if size in (4, 4000) else gpu  # the step and the offloaded tensor stay on the CPU

    real = memory.storages._storage
    monkeypatch.setattr(memory.storages, "_storage", on_gpu)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1500)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2048)
    parts = breakdown(model, optimizer)
    assert (parts.allocated, parts.peak, parts.state) == (1500, 2048, 2 * 256 + 4 + 4000)
    assert parts.shares == {"weights": 0.125, "gradients": 0.125, "state": 0.25, "rest": 0.5}


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_234_567, "1.23 MB"),
        (999_994, "999.99 kB"),
        (999_996, "1.00 MB"),
        (999_999_999, "1.00 GB"),
        (5_210_000_000_000, "5.21 TB"),
        (7_000_000_000_000_000, "7000.00 TB"),
        (-1500, "-1.50 kB"),
        (None, "unavailable"),
    ],
)
def test_format_bytes(n, text):
    assert format_bytes(n) == text


def test_summary_says_what_folds_what_stays_and_what_it_costs():
    weight, other = nn.Parameter(torch.zeros(100, 512)), nn.Parameter(torch.zeros(10, 512))
    embedding, bias = nn.Parameter(torch.zeros(1000, 4)), nn.Parameter(torch.zeros(5))
    groups = [{"params": [weight]}, {"params": [other], "level": "row", "scale": 0.5}]
    groups += [{"params": [embedding, bias], "level": 0, "scale": 1.0}]
    lines = summarize(FOAM(groups)).splitlines()
    assert lines == [
        "FOAM: folded (level 8, scale 6, second moment block): 1 tensor, 51,200 parameters, 1.60 kB of state",
        "FOAM: folded (level row, scale 0.5, second moment block): 1 tensor, 5,120 parameters, 80 B of state",
        "FOAM: unfolded (plain AdamW): 2 tensors, 4,005 parameters, 32.04 kB of state, of which 32.00 kB for the "
        "largest tensor, [1000, 4]",
        "FOAM: 33.72 kB of state in all, 6.99% of AdamW's 482.62 kB; weights are rounded: float32 to nearest",
    ]
    assert summarize(FOAM([bias])).startswith("FOAM: no weight folds\nFOAM: unfolded")
    # Blocks of one column, but scaled: not plain AdamW.
    scaled = summarize(FOAM([other, bias], level=0, scale=0.25)).splitlines()
    assert scaled[0].startswith("FOAM: folded (level 0, scale 0.25, second moment block): 1 tensor, 5,120 parameters")
    assert scaled[1].startswith("FOAM: unfolded (plain AdamW): 1 tensor, 5 parameters")


@pytest.mark.parametrize(
    ("option", "text"),
    [("auto", "bfloat16 stochastically"), (True, "bfloat16 stochastically"), (False, "bfloat16 to nearest")],
)
def test_summary_says_how_weights_are_rounded(option, text):
    model = tiny_models.tiny_mlp().bfloat16()
    model.norm.float()
    summary = summarize(FOAM(foam_param_groups(model), stochastic_rounding=option))
    assert summary.endswith(f"weights are rounded: {text}, float32 to nearest")


def test_expected_bytes_of_a_level_that_foam_refuses():
    with pytest.raises(ValueError, match="level is out of range: got 'x'"):
        expected_state_bytes([{"params": [nn.Parameter(torch.zeros(4, 4))], "level": "x"}])
