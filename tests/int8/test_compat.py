"""INT8 weights on a transformers that is too old for them: a refusal by name. `make test-compat` runs this on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

import foam_hf
from foam_hf.int8 import config as int8_config
from tests.support.tiny_models import tiny_llama

pytestmark = pytest.mark.compat


def test_an_older_transformers_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Version(transformers.__version__) >= Version(int8_config.OLDEST):
        monkeypatch.setattr(int8_config, "OLDEST", "99.0")
    words = rf"need transformers {int8_config.OLDEST} or newer, got {transformers.__version__}; expected: pip install"
    with pytest.raises(ImportError, match=words):
        foam_hf.Int8Config()
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "foam_int8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match=words):  # and not codes that are taken for weights
        AutoModelForCausalLM.from_pretrained(tmp_path)
