"""INT8 weights in host memory that visit the device: the bits of resident ones, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from foam_hf import FOAM, Int8Config, enable_gradient_release, foam_param_groups
from foam_hf.int8 import host_memory, visits
from foam_hf.int8.offload import OffloadedWeight, layers_of
from foam_hf.int8.quantizer import quantize_model_
from foam_hf.int8.weight import Int8Weight
from foam_hf.memory import breakdown
from foam_hf.optimizer.processes import Processes
from foam_hf.trainer.run_report import BatchWatch, predict
from tests.int8.test_quantizer import assert_same_bits
from tests.support.tiny_models import (
    SHORT_RUN,
    VOCAB,
    language_data,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
    tiny_t5,
)

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("forget_mixed_precision")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEEP = {"num_hidden_layers": 6}  # more layers than slots


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Attention's backward pass on a GPU may add up in any order."""
    torch.use_deterministic_algorithms(DEVICE == "cuda", warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that the model holds, on the CPU; codes and scales on their own."""
    return {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}


def int8_model(build: Callable[..., nn.Module], where: str | None, **config: Any) -> Any:
    """A model of `build`, INT8 in blocks of 16, its weights in host memory if `where` is "cpu"."""
    return quantize_model_(build(**config), Int8Config(block_size=16, head=True, offload=where)).to(DEVICE)


def deep_t5() -> nn.Module:
    return tiny_t5(num_layers=3, num_decoder_layers=4)


def reused_llama() -> nn.Module:
    """Its second layer runs three times, at the start and at the end."""
    model: Any = tiny_llama(**DEEP)
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[i] for i in (0, 1, 2, 3, 1, 4, 1, 5)])
    return model


def frozen_llama() -> nn.Module:
    """Nothing below its second layer is trained, nor one above it: their inputs need no gradient."""
    model: Any = tiny_llama(**DEEP)
    for part in (model.model.embed_tokens, model.model.layers[0], model.model.layers[3]):
        part.requires_grad_(False)
    return model


def checkpointed(reentrant: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: Any = tiny_llama(**DEEP).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    return build


def train(model: Any, steps: int = 3, accumulation: int = 1, evaluate: bool = False, **options: Any) -> Any:
    """The optimizer after some steps of random tokens, with gradient release."""
    model.train()
    optimizer = FOAM(foam_param_groups(model), lr=0.01, level=3, weight_decay=0.1)
    handle = enable_gradient_release(model, optimizer, accumulation=accumulation, **options)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of dropout
    for _ in range(steps):
        for _ in range(accumulation):
            tokens = torch.randint(3, VOCAB, (2, 8), generator=generator).to(DEVICE)
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if evaluate:
            with torch.no_grad():
                model(input_ids=tokens)
                model.eval().generate(tokens[:, :3], max_new_tokens=3, do_sample=False)
            model.train()
    handle.remove()
    return optimizer


def assert_same_training(build: Callable[[], nn.Module], **options: Any) -> Any:
    models = [int8_model(build, where) for where in (None, "cpu")]
    before = bits(models[0])
    resident, visiting = (train(model, **options) for model in models)
    assert_same_bits(bits(models[1]), bits(models[0]))
    assert any(not torch.equal(before[name], x) for name, x in bits(models[0]).items())
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert all(
            torch.equal(torch.as_tensor(x), visiting.state[q][name])
            for name, x in resident.state[p].items()
            if name != "step"
        )
    return models[1]


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: tiny_llama(**DEEP), {"evaluate": True}),
        (checkpointed(False), {"accumulation": 2}),
        (checkpointed(True), {"clip_by": "weight", "max_grad_norm": 0.1}),
        (deep_t5, {"max_grad_norm": 0.1}),
        (lambda: tiny_qwen2(**DEEP), {}),
        (reused_llama, {"accumulation": 2, "max_grad_norm": 0.1}),
        (frozen_llama, {"accumulation": 2}),
    ],
    ids=["evaluation", "checkpointing", "reentrant checkpointing", "two lists", "tied", "reused", "frozen"],
)
def test_training_has_the_bits_of_resident_weights(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    assert_same_training(build, **options)


def test_only_slots_are_on_the_device_and_layers_are_copied_no_more_than_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = int8_model(lambda: tiny_llama(**DEEP), "cpu")
    streamed = next(p for p in model.parameters() if isinstance(p, OffloadedWeight)).foam_layer.visits
    copies: list[tuple[bool, int]] = []
    original = visits.Layer._copy

    def counted(layer: Any, start: int, end: int, *, to_device: bool) -> None:
        copies.append((to_device, end - start))
        original(layer, start, end, to_device=to_device)

    monkeypatch.setattr(visits.Layer, "_copy", counted)
    late: list[int] = []
    bring = visits.Visits._to

    def watched(self: Any, layer: Any, device: torch.device) -> None:
        if layer.slot is not None and layer.slot.holder is not layer:
            late.append(layer.index)
        bring(self, layer, device)

    monkeypatch.setattr(visits.Visits, "_to", watched)
    train(model, steps=1)
    late.clear(), copies.clear()
    optimizer = train(model, steps=3)
    assert not late  # once their order is known, layers are on their way before they are needed
    assert len(streamed.layers) == 6 and len(streamed.slots) == visits.SLOTS
    largest = max(layer.nbytes for layer in streamed.layers)
    assert sum(slot.numel() for slot in streamed.slots) == 3 * largest < streamed.host_bytes
    # Down to the last layer and up again, of which three are there when the direction changes; back when updated.
    assert sum(comes for comes, _ in copies) <= 3 * (2 * 6 - visits.SLOTS + 1) + visits.SLOTS
    back = sum(size for comes, size in copies if not comes)
    assert back == 3 * streamed.host_bytes  # with the first layer of the step before, without that of the last
    held = breakdown(model, optimizer).weights
    args = TrainingArguments("unused", optim="foam", optim_args="gradient_release=true", use_cpu=DEVICE == "cpu")
    assert predict(model, optimizer, args, BatchWatch(model), on_gpu=False).weights == held
    resident = breakdown(int8_model(lambda: tiny_llama(**DEEP), None), optimizer).weights
    assert held < resident - (streamed.host_bytes - 3 * largest) + 6 * 14 * visits.ALIGNMENT


def test_layers_are_elements_of_the_outermost_lists() -> None:
    names = [name for name, p in deep_t5().named_parameters() if p.dim() == 2]
    found = layers_of(deep_t5(), names)
    assert [*found] == [*(f"encoder.block.{i}" for i in range(3)), *(f"decoder.block.{i}" for i in range(4))]
    assert all(name.startswith(f"{layer}.") for layer, mine in found.items() for name in mine)
    assert sum(map(len, found.values())) < len(names)  # embedding and head are in none


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_llama(**DEEP).save_pretrained(folder)
    return folder


def load(folder: Path, where: str | None = "cpu", **arguments: Any) -> Any:
    config = Int8Config(block_size=16, offload=where)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, **arguments)


def make_trainer(folder: Path, model: Any, **settings: Any) -> Trainer:
    settings = {**SHORT_RUN, "optim_args": "level=3,gradient_release=true", "max_steps": 6, **settings}
    settings["use_cpu"] = DEVICE == "cpu"
    args = TrainingArguments(output_dir=str(folder), **settings)
    data = {"train_dataset": language_data(32), "eval_dataset": language_data(8, seed=1)}
    return Trainer(model=model, args=args, **data)


def test_runs_of_the_trainer_evaluate_save_resume_and_load_the_best_model(plain: Path, tmp_path: Path) -> None:
    settings = {
        "gradient_checkpointing": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "load_best_model_at_end": True,
    }
    place = {"device_map": {"": DEVICE}}  # a GPU may quantize to other last bits than a CPU
    resident = make_trainer(tmp_path / "resident", load(plain, None, **place), **settings)
    resident.train()
    whole = make_trainer(tmp_path / "whole", load(plain, **place), **settings)
    whole.train()
    assert_same_bits(bits(whole.model), bits(resident.model))
    logged = [[entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (whole, resident)]
    assert logged[0] == logged[1] and len(logged[0]) == 2
    checkpoint = tmp_path / "whole/checkpoint-3"
    resumed = make_trainer(tmp_path / "resumed", load(plain), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(bits(resumed.model), bits(resident.model))
    from_files = load(tmp_path / "whole/checkpoint-6")
    assert isinstance(from_files.model.layers[0].mlp.up_proj.weight, OffloadedWeight)
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "resident/checkpoint-6")
    assert not isinstance(last.model.layers[0].mlp.up_proj.weight, OffloadedWeight)
    assert_same_bits(bits(from_files), bits(last))


def test_a_weight_looks_like_an_int8_weight_wherever_it_is() -> None:
    weights = [int8_model(tiny_llama, where).model.layers[1].mlp.up_proj.weight for where in (None, "cpu")]
    resident, visiting = weights
    assert isinstance(visiting, OffloadedWeight) and isinstance(visiting, nn.Parameter)
    assert (visiting.shape, visiting.dtype, visiting.device) == (resident.shape, resident.dtype, resident.device)
    assert visiting.block_size == resident.block_size == 16
    assert repr(visiting) == repr(resident)
    assert torch.equal(visiting.dequantize(), resident.dequantize())
    assert torch.equal(visiting[:3], resident[:3]) and torch.equal(visiting + 1, resident + 1)
    with pytest.raises(NotImplementedError, match="cannot compile .* offloaded; expected Int8Config"):
        visiting.__tensor_flatten__()
    clone = visiting.detach().clone()
    assert type(clone) is Int8Weight and torch.equal(clone.codes, resident.codes)
    with torch.no_grad():
        visiting.copy_(2 * resident.dequantize())
    assert torch.equal(visiting.stored()[0].to(DEVICE), visiting.codes) and not torch.equal(
        clone.scales, visiting.scales
    )
    half = visiting.detach().to(torch.bfloat16)
    assert type(half) is Int8Weight and half.dtype == torch.bfloat16
    assert torch.equal(half.dequantize(), visiting.dequantize(torch.bfloat16))
    with torch.no_grad():
        visiting.copy_(resident)
    assert not torch.equal(half.scales, visiting.scales)  # a copy, as of any other tensor
    meta = visiting.detach().to("meta")
    assert meta.is_meta and meta.codes.shape == visiting.shape
    file = io.BytesIO()
    torch.save(visiting, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert type(read) is Int8Weight and torch.equal(read.codes, visiting.stored()[0])
    moved = nn.ParameterList([visiting]).to(torch.bfloat16)[0]
    assert isinstance(moved, OffloadedWeight) and moved.dtype == torch.bfloat16
    moved.data = moved.data
    with pytest.raises(TypeError, match="cannot make a Int8Weight the data of an INT8 weight that is offloaded"):
        visiting.data = clone
    with pytest.raises(NotImplementedError, match="cannot split an INT8 weight .* as fully_shard does"):
        torch.chunk(visiting, 2)
    with pytest.raises(NotImplementedError, match="cannot copy an INT8 weight .* expected another from_pretrained"):
        copy.deepcopy(visiting)


def test_memory_goes_with_the_model() -> None:
    model = int8_model(tiny_llama, "cpu")
    pages = weakref.ref(model.model.layers[0].mlp.up_proj.weight.foam_layer.pages)
    state = model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight_codes"
    assert state[name].untyped_storage().data_ptr() == state[name].data_ptr()  # no file takes layers for tied weights
    train(model, steps=1)
    del model, state
    gc.collect()
    assert pages() is None


def test_a_first_visit_in_inference_mode_is_no_obstacle() -> None:
    model = int8_model(tiny_llama, "cpu")
    with torch.inference_mode():
        model(input_ids=torch.arange(4, device=DEVICE).view(1, -1))
    train(model, steps=1)


def test_steps_without_release_are_refused() -> None:
    model = int8_model(tiny_llama, "cpu")
    optimizer = FOAM(foam_param_groups(model))
    tokens = torch.arange(8, device=DEVICE).view(1, -1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    before = bits(model)
    with pytest.raises(
        RuntimeError, match="offloaded are updated one layer at a time.* got step.* expected gradient_r"
    ):
        optimizer.step()
    assert_same_bits(bits(model), before)
    with pytest.raises(ValueError, match="are trained in one process: got a process group, and 14 of them"):
        Processes(model, model.parameters(), object())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim_args": None}, "updated in the backward pass: got optim_args=None; expected gradient_release=true"),
        ({"torch_compile": True}, "which no compiled model follows: got torch_compile=True; expected False"),
        (
            {"optim": "adamw_torch", "optim_args": None},
            "got optim='adamw_torch'; expected optim='foam'",
        ),
    ],
)
def test_runs_that_cannot_train_offloaded_weights_are_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = int8_model(tiny_llama, "cpu")
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, model, **settings).train()


def test_adapters_on_offloaded_weights_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(int8_model(tiny_llama, "cpu"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="are all trained: got adapters of PEFT on them; expected Int8Config"):
        make_trainer(tmp_path, adapted).train()


def test_models_and_machines_that_cannot_offload_are_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLayers(type(tiny_llama())):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers = nn.Sequential(*self.model.layers)

    with pytest.raises(ValueError, match="layers of an nn.ModuleList .* NoLayers has none with INT8 weights"):
        quantize_model_(NoLayers(tiny_llama().config), Int8Config(block_size=16, offload="cpu"))
    with pytest.raises(ValueError, match="offload is not valid, got 'disk'; expected 'cpu' or None"):
        Int8Config(offload="disk")
    with pytest.raises(ValueError, match="trains on one device, got a device_map with 0, 1; expected one"):
        load(plain, device_map={"model": 0, "lm_head": 1})
    with pytest.raises(ValueError, match="no weight of GPT2LMHeadModel can become INT8"):
        quantize_model_(tiny_gpt2(), Int8Config(offload="cpu"))
    monkeypatch.setattr(host_memory, "available", lambda: 10_000)
    with pytest.raises(RuntimeError, match=r"in host memory: got 10.00 kB of it left; expected \d+\.\d\d kB"):
        load(plain)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="offload='cpu' trains in one process, got WORLD_SIZE=2"):
        load(plain)


def test_the_memory_left_is_that_of_the_machine_and_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host_memory.available() is None or host_memory.available() > 0
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "own")
    assert host_memory.available() is None
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:  700 kB\n")
    assert host_memory.available() == 700 * 1024
    for name, text in (("max", "500000\n"), ("current", "300000\n"), ("stat", "anon 1\ninactive_file 50000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert host_memory.available() == 250_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available() == 700 * 1024
    (tmp_path / "own").write_text("4:cpu,memory:/job\n0::/user/job 1/step\n")
    job, older = tmp_path / "user/job 1", tmp_path / "memory/job"  # of both versions of control groups
    job.mkdir(parents=True), older.mkdir(parents=True)
    for name, text in (("max", "90000"), ("current", "20000"), ("stat", "inactive_file 1000")):
        (job / f"memory.{name}").write_text(text)
    assert host_memory.available() == 71_000
    for name, text in (("limit_in_bytes", "8000"), ("usage_in_bytes", "3000"), ("stat", "total_inactive_file 0")):
        (older / f"memory.{name}").write_text(text)
    assert host_memory.available() == 5_000


def test_pages_that_cannot_be_locked_are_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_memory.Pages, "lock", lambda self: False)
    host_memory.lock_all([host_memory.Pages(3_000_000), host_memory.Pages(1_000_000)])
    assert "4.00 MB of host memory could not be locked (pinned)" in caplog.text and "ulimit -l" in caplog.text


# ---- kernels, and streams of a GPU ----


def test_kernels_write_to_the_slot_and_it_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOAM_HF_KERNEL", "triton")
    assert_same_training(lambda: tiny_llama(num_hidden_layers=4), steps=1)


def wide_llama() -> nn.Module:
    model: Any = tiny_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=8).to(torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["", "into", "back", "work"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_streams_wait_for_each_other(late: str, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits are those of resident weights, however late copies or the work on the device are."""
    copies = {"into": ("copy_in", visits.Layer.copy_in), "back": ("copy_back", visits.Layer.copy_back)}
    name, original = copies.get(late, ("", None))

    def copy_late(layer: Any) -> None:
        torch.cuda._sleep(3_000_000)
        original(layer)

    if original is not None:
        monkeypatch.setattr(visits.Layer, name, copy_late)

    def forward_late(*_: Any) -> None:
        if late == "work":
            torch.cuda._sleep(3_000_000)

    handle = nn.modules.module.register_module_forward_pre_hook(forward_late) if late == "work" else None
    try:
        model = assert_same_training(wide_llama, steps=6, accumulation=accumulation)
    finally:
        if handle is not None:
            handle.remove()
    layer = model.model.layers[0].mlp.up_proj.weight.foam_layer
    assert layer.pages.locked and layer.slot.into != layer.slot.back


@pytest.mark.gpu
def test_on_a_gpu_loading_and_training_hold_slots_alone(tmp_path: Path) -> None:
    tiny_llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=16).to(torch.bfloat16).save_pretrained(
        tmp_path
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    config = Int8Config(offload="cpu")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map={"": 0}
    )
    assert torch.cuda.max_memory_allocated() - before < 6 * 4096 * 1024 * 4  # one weight in float32, on its way
    assert model.model.embed_tokens.weight.device.type == "cuda"
    streamed = model.hf_quantizer.offload.visits
    train(model)
    assert torch.cuda.memory_allocated() - before < 0.5 * streamed.host_bytes
    assert sum(map(Tensor.numel, streamed.slots)) == 3 * streamed.layers[0].nbytes
