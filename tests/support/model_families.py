"""Trains a tiny random model of each family with `optim="foam"`, and writes the table in docs/models.md.

`python -m tests.support.model_families --write docs/models.md` trains all families and writes the page.
tests/trainer/test_model_families.py trains each family and compares the result with its row.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import foam_hf  # noqa: F401  registers optim="foam"
from tests.support import families_audio, families_encoders, families_multimodal, families_text, families_vision
from tests.support.family import Example, Family

PARTS = (families_text, families_encoders, families_vision, families_multimodal, families_audio)
FAMILIES = [family for part in PARTS for family in part.FAMILIES]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COMMAND = "python -m tests.support.model_families --write docs/models.md"
# Gradients up to this are rounding noise, below Adam's epsilon. The bias of keys has no other gradient.
NOISE = 1e-7
# Families that are also trained under LoRA and in INT8 -> LoRA's target modules; None if PEFT cannot save the adapter.
ALL = "all-linear"
ADAPTED: dict[str, str | list[str] | None] = {
    "Llama 1, 2, 3": ALL,
    "Qwen2, Qwen2.5": ALL,
    "Qwen3": ALL,
    "Gemma 3 (text)": ALL,
    "Phi 3, 4": ALL,
    "Falcon": ALL,
    "GPT-2": ALL,
    "GPT-NeoX (Pythia)": ALL,
    "BLOOM": ALL,
    "OPT": ALL,
    "Mixtral": ALL,
    "Qwen3-MoE": ALL,
    "DeepSeek-V3, R1": ALL,
    "GPT-OSS": ALL,
    "Llama 4 (text)": ["q_proj", "v_proj"],
    "Mamba": ["in_proj", "x_proj"],
    "Mamba 2": ["in_proj"],
    "Jamba": ALL,
    "Zamba 2": ALL,
    "LFM2": ALL,
    "Qwen3-Next": ALL,
    "RWKV": ALL,
    "T5, Flan-T5": ALL,
    "BART": ALL,
    "M2M100, NLLB": ALL,
    "BERT": ALL,
    "RoBERTa": ALL,
    "DeBERTa": ALL,
    "DeBERTa-v2, v3": ALL,
    "ModernBERT": ALL,
    "Longformer": ALL,
    "ALBERT": ALL,
    "DistilBERT": ALL,
    "ViT": ALL,
    "Swin": ALL,
    "ConvNeXT": ALL,
    "ResNet": ALL,
    "DINOv2": ALL,
    "SegFormer": ALL,
    "DETR": ALL,
    "VideoMAE": ALL,
    "CLIP": ALL,
    "SigLIP": ALL,
    "LLaVA": ALL,
    "PaliGemma": ALL,
    "Qwen2.5-VL": ALL,
    "Idefics 3, SmolVLM": ALL,
    "Gemma 3": ALL,
    "BLIP-2": ALL,
    "TrOCR, Donut, ViT-GPT2": ALL,
    "Wav2Vec2": None,
    "HuBERT": ALL,
    "Whisper": ALL,
    "Audio Spectrogram Transformer": ALL,
    "WavLM": ALL,
    "Speech2Text": ALL,
    "CLAP": ALL,
    "Qwen2-Audio": ALL,
    "PatchTST": ALL,
}


def check(family: Family, folder: Path) -> tuple[str, str, str]:
    """Train `family` in full, under LoRA and in INT8. Returns the cells of its row; AssertionError if it fails."""
    model = full(family, folder / "full")
    if family.name not in ADAPTED:
        return "works", "", ""
    return (
        "works",
        adapted(family, model, folder / "lora"),
        int8(family, folder / "full/checkpoint-2", folder / "int8"),
    )


def full(family: Family, folder: Path, optim: str = "foam") -> nn.Module:
    """Train two steps and save each. Resume the first checkpoint, and read the second one by from_pretrained."""
    trainer, moved = train(family, family.make(), folder, optim, max_steps=2)
    assert 2 * len(moved) > len(list(trained(trainer.model))), "most weights have no gradient: the sizes are wrong"
    weights, state = bits(trainer.model), optimizer_bits(trainer)
    again, _ = train(
        family, family.make().apply(_forget), folder, optim, "checkpoint-1", max_steps=2, save_strategy="no"
    )
    assert_same("resumed weights", bits(again.model), weights)
    assert_same("resumed optimizer state", optimizer_bits(again), state)
    read = type(trainer.model).from_pretrained(folder / "checkpoint-2")
    assert_same("weights read by from_pretrained", bits(read), weights)
    return read


def adapted(family: Family, model: nn.Module, folder: Path) -> str:
    if ADAPTED[family.name]:
        return lora(family, model, folder)
    fails_alike(lambda optim: lora(family, family.make(), folder / optim, optim), "`get_input_embeddings` not auto")
    return "not with AdamW either"


def lora(family: Family, model: Any, folder: Path, optim: str = "foam") -> str:
    """Train one step of LoRA, and read its adapter by PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers.pytorch_utils import Conv1D

    if not any(isinstance(module, nn.Linear | Conv1D) for module in model.base_model.modules()):
        return "-"
    model = get_peft_model(model, LoraConfig(r=2, target_modules=ADAPTED[family.name] or ALL))
    trainer, moved = train(family, model, folder, optim)
    assert moved and all("lora_" in name for name in moved), moved
    adapter = {name: p.detach().clone() for name, p in get_peft_model_state_dict(trainer.model).items()}
    read = PeftModel.from_pretrained(model.unload(), folder / "checkpoint-1")
    assert_same("adapter read by PEFT", get_peft_model_state_dict(read), adapter)
    return "yes"


def int8(family: Family, source: Path, folder: Path) -> str:
    """Train one step with INT8 weights, and read the saved weights."""
    from foam_hf import Int8Config

    model_class = type(family.make())
    try:
        model = model_class.from_pretrained(source, quantization_config=Int8Config(block_size=16))
    except ValueError as error:
        assert re.search("no weight of .* can become INT8", str(error)), error
        return "-"
    trainer, moved = train(family, model, folder)
    weights = bits(trainer.model)
    assert any(name.removesuffix("_codes") in moved for name in weights if name.endswith("weight_codes"))
    assert_same("INT8 weights read", bits(model_class.from_pretrained(folder / "checkpoint-1")), weights)
    return "yes"


def train(
    family: Family, model: Any, folder: Path, optim: str = "foam", resume: str | None = None, **settings: Any
) -> tuple[Any, set[str]]:
    """Train, and check that each weight with a gradient moves. Returns the trainer and the names of these weights."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    moved: set[str] = set()

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            moved.update(name for name, p in trained(model) if p.grad is not None and p.grad.abs().max() > NOISE)

    defaults = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    gc.freeze()  # so that Trainer's garbage collection, slow after many imports, has less to look at
    arguments = TrainingArguments(str(folder), optim=optim, **{**defaults, **settings})
    data: Any = family.examples(4)
    trainer = Trainer(model, arguments, collate, data, callbacks=[Gradients()])
    trainer.remove_callback(PrinterCallback)
    before = {name: p.detach().clone() for name, p in trained(model)}
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    still = [name for name, p in trained(model) if name in moved and torch.equal(p, before[name])]
    assert not still, f"weights with a gradient that did not move: {still}"
    return trainer, moved


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def collate(examples: list[Example]) -> Example:
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    return {name: torch.stack(of) if isinstance(of[0], Tensor) else of for name, of in columns.items()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def optimizer_bits(trainer: Any) -> dict[str, Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, of in state.items() for key, value in of.items()}


def assert_same(what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys(), f"{what}: {sorted(actual.keys() ^ expected.keys())[:5]}"
    other = [
        name for name in actual if not torch.equal(torch.as_tensor(actual[name]), torch.as_tensor(expected[name]))
    ]
    assert not other, f"{what}: {len(other)} of {len(actual)} differ: {other[:5]}"


def _forget(module: nn.Module) -> None:
    """Set trained weights to zero, so that a checkpoint that lacks one is noticed."""
    for p in module.parameters(recurse=False):
        if p.requires_grad:
            p.data.zero_()


# The page docs/models.md


def table_row(family: Family, cells: tuple[str, str, str]) -> str:
    return f"| {family.name} | `{family.model}` | {' | '.join(cells)} |"


def cells_of(family: Family, folder: Path) -> tuple[str, str, str]:
    """The cells of the row of `family`, or that it fails under FOAM as it does under AdamW."""
    if not family.limit:
        return check(family, folder)
    fails_alike(lambda optim: full(family, folder / optim, optim), family.error)
    return f"not with AdamW either: {family.limit}", "", ""


def fails_alike(run: Callable[[str], Any], words: str) -> None:
    """AssertionError unless `run` raises the same error, with `words` in it, under both optimizers."""
    errors = []
    for optim in ("foam", "adamw_torch"):
        try:
            run(optim)
        except Exception as error:
            errors.append((type(error), str(error)))
    assert len(errors) == 2 and errors[0] == errors[1] and words in errors[0][1], errors


def page(row_of: Callable[[Family], str]) -> str:
    lines = [INTRODUCTION]
    for group in dict.fromkeys(family.group for family in FAMILIES):
        rows = [row_of(family) for family in FAMILIES if family.group == group]
        lines += [
            f"## {group}",
            "",
            "| family | trained as | full | LoRA | INT8 |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    return "\n".join(lines)


INTRODUCTION = f"""# Models

A tiny random model of each family was trained by the Trainer of transformers with `optim="foam"`, on a CPU. The table
is made by `{COMMAND}`, and a test of each family compares the result
with its row. The table shows that a family trains, saves, resumes and loads. It says nothing about quality.

* **full**: all weights are trained. `works` means that two steps move every weight that has a gradient; that a run
  resumed from the checkpoint of step 1 ends with the same bits of weights and optimizer state as the uninterrupted
  run, even if transformers saves weights under other names; and that `from_pretrained` reads the trained weights.
* **LoRA**: `yes` means that one step of LoRA (PEFT) trains, and that PEFT reads the same bits of the adapter.
  `-`: the model has no linear layer.
* **INT8**: all weights are trained, those of linear layers in INT8 (`Int8Config`). `yes` means that one step trains,
  and that `from_pretrained` reads the same bits. `-`: no weight can be INT8, because none is that of an `nn.Linear`
  with nn.Linear's own forward.
* An empty cell: not tried for this family.
* `not with AdamW either`: training fails with the same error under `optim="adamw_torch"`. Under LoRA, the reason is
  that PEFT needs the model's input embeddings to save the adapter, and the model has none.

Kernels that need a GPU, as Mamba's, were not used: the models ran on the code that transformers has for CPUs.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="the page to write")
    target = parser.parse_args().write
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows: dict[str, str] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, family in enumerate(FAMILIES):
            try:
                rows[family.name] = table_row(family, cells_of(family, Path(folder) / str(number)))
            except Exception as error:
                failed.append(f"{family.name}: {type(error).__name__}: {error}")
            print(rows.get(family.name) or failed[-1], file=sys.stderr, flush=True)
    if failed:
        sys.exit("nothing is written: these families fail\n" + "\n".join(failed))
    target.write_text(page(lambda family: rows[family.name]), encoding="utf-8")


if __name__ == "__main__":
    main()
