"""Finds the config of a model: built into this package, in a file or folder, or on the hub. Loads no weights."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": False,
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, positions: int = 1024) -> dict[str, Any]:
    """The config of a LLaMA; the GaLore, APOLLO and FOAM papers use the same shapes."""
    return {
        **_LLAMA,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, kv: int, **others: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_window_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        **others,
    }


def _roberta(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    """The config of a RoBERTa with a classifier of two labels, as most tasks of GLUE have."""
    return {
        "architectures": ["RobertaForSequenceClassification"],
        "model_type": "roberta",
        "dtype": "float32",
        "vocab_size": 50265,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


BUILTIN: dict[str, dict[str, Any]] = {
    "llama-60m": _llama(512, 1376, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 12),
    "llama-350m": _llama(1024, 2736, 24, 16),
    "llama-1b": _llama(2048, 5461, 24, 32),
    "llama-3b": _llama(2560, 6848, 32, 32),
    "llama-7b": _llama(4096, 11008, 32, 32, 2048),
    "llama-13b": _llama(5120, 13824, 40, 40, 4096),
    "llama-3.1-8b": {
        **_llama(4096, 14336, 32, 32, 131072),
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen2.5-0.5b": _qwen(
        896, 4864, 24, 14, 2, vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True
    ),
    "qwen2.5-7b": _qwen(
        3584, 18944, 28, 28, 4, vocab_size=152064, max_position_embeddings=131072, tie_word_embeddings=False
    ),
    "roberta-base": _roberta(768, 3072, 12, 12),
    "roberta-large": _roberta(1024, 4096, 24, 16),
}


class ModelError(ValueError):
    """A model cannot be planned; the message is one line for the user."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the config of a model.

    Args:
        name: a local folder, a config.json, a built-in name or a model on the hub, looked up in this order.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ModelError: there is no such model, the hub refuses it or cannot be reached, the file is no config, or the
            model needs code of its own and `trust_remote_code` is false.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"no config.json in the folder {name}; expected the folder of a saved model")
        return _from_file(path / "config.json", trust_remote_code)
    if path.is_file():
        return _from_file(path, trust_remote_code)
    if name.lower() in BUILTIN:
        from transformers import AutoConfig

        settings = dict(BUILTIN[name.lower()])
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    if name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no such file or folder: {name}; expected a folder, a config.json, {_builtin_names()}")
    return _from_hub(name, trust_remote_code)


def _from_file(path: Path, trust_remote_code: bool, hub_name: str | None = None) -> Any:
    """Read a config file; if it came from the hub and needs code of its own, the code is loaded from `hub_name`."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = hub_name or str(path)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} is not JSON: {first_line(error)}; expected a model's config.json") from None
    if not isinstance(settings, dict) or not ("model_type" in settings or "auto_map" in settings):
        raise ModelError(f"{name} is no model's config: it has no model_type; expected a model's config.json")
    own_code = "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING
    if own_code and not trust_remote_code:
        raise ModelError(
            f"{name} brings its own code, and none of it was run; read it, then add --trust-remote-code to allow it"
        )
    source = hub_name if hub_name and own_code else str(path.parent if path.name == "config.json" else path)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, KeyError, or an error of the model's own code
        raise ModelError(f"cannot read the config of {name}: {first_line(error)}") from error


def _from_hub(name: str, trust_remote_code: bool) -> Any:
    import huggingface_hub
    from huggingface_hub import errors

    expected = f"expected a folder, a config.json, a name on the hub, {_builtin_names()}"
    unknown = f"no model {name!r}{_nearest(name)}; {expected}"
    try:
        # One request without retries first: without a network hf_hub_download retries for half a minute.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"))
        path = huggingface_hub.hf_hub_download(name, "config.json")
    except errors.GatedRepoError:
        raise ModelError(
            f"the hub gives {name} only to those who accepted its terms: accept them on its page and log in with "
            f"`hf auth login`, or use a built-in name: {', '.join(BUILTIN)}"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(unknown) from None
    except Exception as error:  # no network, a proxy, offline mode: the class depends on the hub's HTTP client
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise ModelError(f"{name} has no config.json on the hub; expected a transformers model") from None
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            raise ModelError(
                f"no model {name!r} on this machine, and the hub cannot be reached{_nearest(name)}; "
                f"expected, without the hub, a folder, a config.json, {_builtin_names()}"
            ) from None
        path = cached
    return _from_file(Path(path), trust_remote_code, name)


def _nearest(name: str) -> str:
    own = name.lower().rsplit("/", 1)[-1]
    # Qwen2.5-7B-Instruct has the shapes of qwen2.5-7b, Qwen2.5-3B has not: the size, the last number, decides.
    same_size = [known for known in BUILTIN if _NUMBER.findall(known)[-1:] == _NUMBER.findall(own)[-1:]]
    near = [known for known in BUILTIN if re.match(re.escape(known) + r"(?![a-z0-9])", own)]
    near = near or difflib.get_close_matches(own, same_size, 1, 0.9)
    return f"; did you mean {near[0]!r}?" if near else ""


def _builtin_names() -> str:
    return f"or a built-in name: {', '.join(BUILTIN)}"
