"""Models that transformers saves under other names than it trains: they resume exactly, the best weights load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from foam_hf import Int8Config
from foam_hf.trainer import weights as trainer_weights
from tests.support.tiny_models import language_data, tiny_lora_llama, tiny_mixtral
from tests.trainer.test_runs import assert_same_bits, make_trainer, weights

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


class Images(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": image, "labels": torch.tensor(i % 2)}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))


def llava() -> nn.Module:
    """Its text model in bfloat16, its vision tower, which text alone does not train, in float32."""
    torch.manual_seed(0)
    vision, text = transformers.CLIPVisionConfig(**VIT), transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    return model


def gpt_neox() -> nn.Module:
    torch.manual_seed(0)
    settings = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings))


class FirstIsBest(TrainerCallback):
    """Whatever was measured, checkpoint-2 is the best; keeps what the weights were then and after the last step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Any]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.at[state.global_step] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.best_model_checkpoint = str(Path(args.output_dir) / "checkpoint-2")


def trainer_of(folder: Path, model: nn.Module, **settings: Any) -> Trainer:
    data = Images() if "ViT" in type(model).__name__ else language_data(16)
    defaults = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    trainer = make_trainer(folder, model=model, train_dataset=data, **{**defaults, **settings})
    trainer.eval_dataset = data
    return trainer


BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}


@pytest.mark.parametrize("make", [vit, llava, gpt_neox, tiny_mixtral])
def test_resuming_is_exact_and_the_best_weights_come_back(tmp_path: Path, make: Any) -> None:
    seen = FirstIsBest()
    trainer = trainer_of(tmp_path, make(), callbacks=[seen], **BEST)
    trainer.train()
    assert_same_bits(weights(trainer), seen.at[2])
    dtypes = {name: p.dtype for name, p in make().named_parameters()}
    assert {name: p.dtype for name, p in trainer.model.named_parameters()} == dtypes
    again = trainer_of(tmp_path, make().apply(_other_values))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(weights(again), seen.at[4])


def _other_values(module: nn.Module) -> None:
    """What a checkpoint does not bring, frozen or not, is seen."""
    for p in module.parameters(recurse=False):
        p.data.zero_()


def test_int8_weights_under_other_names_resume_exactly(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "base")

    def int8() -> nn.Module:
        config = Int8Config(block_size=16)
        return transformers.ViTForImageClassification.from_pretrained(tmp_path / "base", quantization_config=config)

    first = trainer_of(tmp_path, int8())
    first.train()
    again = trainer_of(tmp_path, int8())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(weights(again), weights(first))


def test_a_checkpoint_in_shards_is_read_too(tmp_path: Path) -> None:
    first = trainer_of(tmp_path, tiny_mixtral())
    first.train()
    folder = tmp_path / "checkpoint-4"
    first.model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "foam_checkpoint.json").unlink()
    assert len(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())) > 1
    again = trainer_of(tmp_path, tiny_mixtral(seed=1))
    again.train(resume_from_checkpoint=str(folder))
    assert_same_bits(weights(again), weights(first))


def rebuilt() -> nn.Module:
    """A model that was changed after it was made: no config tells of its head."""
    model = vit()
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
    return model


RENAMED = not hasattr(Trainer, "_rotate_checkpoints")  # transformers 4.57 saves a ViT under the names that it trains


def test_what_no_one_could_load_is_said_before_training_or_at_the_first_save(tmp_path: Path, caplog) -> None:
    if not RENAMED:
        trainer_of(tmp_path, rebuilt(), **BEST).train()
        return
    trainer = trainer_of(tmp_path, rebuilt(), **BEST)
    with pytest.raises(ValueError, match=r"load_best_model_at_end: transformers saves ViTFor.* under other"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer_of(tmp_path, rebuilt()).train()
    assert caplog.text.count("will not resume: transformers saves ViTForImageClassification under other names") == 1
    with pytest.raises(ValueError, match="cannot be loaded: transformers saves .* from_pretrained"):
        trainer_of(tmp_path, rebuilt()).train(resume_from_checkpoint=True)


def test_random_numbers_go_on_as_if_nothing_had_been_made(tmp_path: Path) -> None:
    model = vit()
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer_weights._read(model, tmp_path)
    trainer_weights._rebuilding_problem(model)
    assert torch.equal(before, torch.get_rng_state())


def test_adapters_keep_their_own_way(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainer_weights, "_read", None)
    first = trainer_of(tmp_path, tiny_lora_llama())
    first.train()
    again = trainer_of(tmp_path, tiny_lora_llama())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(weights(again), weights(first))
