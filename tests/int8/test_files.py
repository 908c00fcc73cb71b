"""`foam-hf export`, and INT8 weights in state dicts and files without transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from foam_hf import Int8Config
from foam_hf.cli import main
from foam_hf.display import format_bytes
from foam_hf.int8 import files as int8_checkpoint
from foam_hf.int8.files import int8_block
from tests.int8.test_quantizer import DAMAGE, assert_same_bits, bits, rewrite, split_codes_from_scales
from tests.support.tiny_models import tiny_llama

EXPORTED = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What a Trainer leaves behind, with INT8 weights in a bfloat16 model."""
    tiny_llama().save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=Int8Config(head=True), dtype=torch.bfloat16
    )
    folder = tmp_path / "int8"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "chat_template.jinja", "trainer_state.json", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_text("{}")
    (folder / "training_args.bin").write_text("")
    (folder / "runs").mkdir()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("tools")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["export", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_an_export_is_the_dequantized_model_for_any_tool(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, checkpoint, tmp_path / "new/plain")
    assert (code, err) == (0, "")
    size = format_bytes((tmp_path / "new/plain/model.safetensors").stat().st_size)
    assert size.endswith(" kB")
    assert (
        out
        == f"Exported {checkpoint} to {tmp_path / 'new/plain'}: 15 INT8 weights as bfloat16, {size} of safetensors.\n"
    )
    assert sorted(path.name for path in (tmp_path / "new/plain").iterdir()) == ["additional_chat_templates", *EXPORTED]
    assert (tmp_path / "new/plain/additional_chat_templates/tools.jinja").read_text() == "tools"
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=Int8Config(dequantize=True))
    expected.save_pretrained(tmp_path / "expected")
    assert_same_bits(
        load_file(tmp_path / "new/plain/model.safetensors"), load_file(tmp_path / "expected/model.safetensors")
    )
    config = json.loads((tmp_path / "new/plain/config.json").read_text())
    assert config == json.loads((tmp_path / "expected/config.json").read_text())
    script = (
        "import sys, transformers, torch\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'new/plain')!r})\n"
        "assert not any(name.startswith('foam_hf') for name in sys.modules)\n"
        "assert {type(p.data) for p in model.parameters()} == {torch.Tensor}\n"
        "print(model.dtype)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.stdout == "torch.bfloat16\n", found.stderr


def test_an_export_of_many_files_into_many_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=Int8Config(dequantize=True))
    split_codes_from_scales(checkpoint)
    monkeypatch.setattr(int8_checkpoint, "SHARD_BYTES", 4096)
    assert run(capsys, checkpoint, tmp_path / "plain")[0] == 0
    files = sorted((tmp_path / "plain").glob("model-*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "plain/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    assert_same_bits(bits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), bits(expected))


def test_an_export_of_another_dtype_keeps_what_was_kept_on_purpose(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    assert run(capsys, checkpoint, tmp_path / "plain", "--dtype", "float16")[0] == 0
    held = load_file(tmp_path / "plain/model.safetensors")
    assert held.pop("model.norm.weight").dtype == torch.float32
    assert {tensor.dtype for tensor in held.values()} == {torch.float16}
    assert json.loads((tmp_path / "plain/config.json").read_text())["dtype"] == "float16"


def test_an_export_overwrites_nothing(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "full/mine.txt", checkpoint):
        code, out, err = run(capsys, checkpoint, target)
        assert (code, out) == (1, "")
        assert (
            err == f"foam-hf export: {target} exists already and is left as it is; expected a new or an empty folder\n"
        )
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert run(capsys, checkpoint, tmp_path / "empty")[0] == 0


def test_an_export_that_fails_half_way_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(int8_checkpoint, "save_file", full)
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, checkpoint, tmp_path / "plain")
    assert (code, err) == (1, f"foam-hf export: cannot write {tmp_path / 'plain'}: No space left on device\n")
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_in_the_words_of_safetensors(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: File too large")

    monkeypatch.setattr(int8_checkpoint, "save_file", full)
    code, _, err = run(capsys, checkpoint, tmp_path / "plain")
    assert code == 1 and err.endswith("plain: model.safetensors: I/O error: File too large\n")


def test_a_training_checkpoint_is_exported_without_its_manifest_and_a_damaged_index_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "foam_checkpoint.json").write_text("{}")
    assert run(capsys, checkpoint, tmp_path / "plain")[0] == 0
    assert not (tmp_path / "plain/foam_checkpoint.json").exists()
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    code, _, err = run(capsys, checkpoint, tmp_path / "other")
    assert code == 1 and "model.safetensors.index.json is damaged; expected JSON with a weight_map" in err


def test_what_cannot_be_exported_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(source: Path) -> str:
        code, out, err = run(capsys, source, tmp_path / "plain")
        assert (code, out) == (1, "") and err.count("\n") == 1 and not (tmp_path / "plain").exists()
        return err

    assert "no folder" in refusal(tmp_path / "nowhere")
    assert "its config.json has no quantization_config; expected 'foam_int8'" in refusal(tmp_path / "source")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert "its quant_method is 'awq'; expected 'foam_int8'" in refusal(checkpoint)
    (checkpoint / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "model.safetensors").write_bytes(b"not safetensors")
    assert "cannot be read as safetensors" in refusal(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "holds no config.json" in refusal(checkpoint)


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_checkpoint_is_not_exported(
    damage: Any, words: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(checkpoint, damage)
    code, _, err = run(capsys, checkpoint, tmp_path / "plain")
    assert code == 1 and words.replace("\\", "") in err and not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("width", "block_size", "expected"),
    [
        (4096, 128, 128),
        (576, 128, 64),
        (576, 64, 64),
        (48, 128, 16),
        (32, 128, 32),
        (40, 128, None),
        (16, 16, 16),
        (17, 16, None),
    ],
)
def test_the_block_of_a_width(width: int, block_size: int, expected: int | None) -> None:
    assert int8_block(width, block_size) == expected


def test_the_folder_one_is_in_is_not_replaced(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = run(capsys, checkpoint, ".")
    assert code == 1 and ". is the folder you are in, which cannot be replaced; expected a new one" in err


@pytest.mark.parametrize("name", ["vocab.txt", "additional_chat_templates/more.jinja", "model.safetensors"])
def test_a_link_out_of_the_models_folder_is_not_followed(checkpoint, tmp_path, capsys, name):
    secret = tmp_path / "secret"
    secret.write_text("private")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(secret)
    code, _, err = run(capsys, checkpoint, tmp_path / "plain")
    assert code == 1 and "leads out of the model's folder" in err and str(secret) in err
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("listed", ["../outside.safetensors", "/etc/passwd"])
def test_a_list_of_weights_names_no_file_elsewhere(checkpoint, tmp_path, capsys, listed):
    (checkpoint / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": listed}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, err = run(capsys, checkpoint, tmp_path / "plain")
    assert code == 1 and "leads out of the model's folder" in err


def test_links_inside_the_folder_and_of_the_hubs_cache_are_followed(checkpoint, tmp_path, capsys):
    snapshot = tmp_path / "cache" / "models--me--mine" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in checkpoint.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "again.txt").symlink_to("tokenizer.json")
    code, _, err = run(capsys, snapshot, tmp_path / "plain")
    assert (code, err) == (0, "")
    assert (tmp_path / "plain/again.txt").read_text() == "{}"
