"""TRL's own command line, which knows nothing of foam_hf, under `foam-hf run`, as recipes/integrations.md gives it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.long

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *["the", "a", "cat", "dog", "sits", "runs", "on", "mat", "grass"]]
ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--model_name_or_path model --dataset_name data --optim_args level=3 --max_steps 2 --report_to none --use_cpu "
    "--per_device_train_batch_size 4 --bf16 false --save_strategy no"
)


def test_trl_sft_trains_with_foam(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": "the cat sits on the mat"}) for _ in range(16)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows) + "\n")
    text = (ROOT / "recipes" / "integrations.md").read_text(encoding="utf-8")
    (documented,) = re.findall(r"^foam-hf (run .* -- trl sft .*)$", text, re.MULTILINE)
    words = shlex.split(documented)
    words[words.index("trl")] = str(Path(sys.executable).with_name("trl"))
    command = [sys.executable, "-m", "foam_hf.cli", *words, *TINY.split()]  # the last of a repeated flag counts
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Optimizer memory: FOAM" in result.stdout + result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
