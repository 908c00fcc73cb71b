"""Reads, checks and exports checkpoints with INT8 weights: safetensors files with two plain tensors a weight."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foam_hf.folders import MANIFEST, check_destination, whole_folder
from foam_hf.int8.weight import Int8Weight

METHOD = "foam_int8"  # quantization_config["quant_method"] of such a checkpoint
CODES, SCALES = "weight_codes", "weight_scales"  # not "weight": other tools would load the codes as weights
SMALLEST_BLOCK = 16

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
_CHAT_TEMPLATES = "additional_chat_templates"
# An export does not copy training state, and weights in other formats.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_NOT_COPIED_NAMES = ("trainer_state.json", "config.json", MANIFEST)
_DTYPE_NAMES = {"I8": "int8", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "U8": "uint8"}


def int8_block(width: int, block_size: int) -> int | None:
    """Columns of a block in rows of `width`: `block_size`, or the largest smaller power of two that divides `width`.

    None if no power of two from 16 on divides `width`.
    """
    if width % block_size == 0:
        return block_size
    block = width & -width  # the largest power of two that divides `width`
    while block > block_size:
        block //= 2
    return block if block >= SMALLEST_BLOCK else None


ShapeAndDtype = tuple[tuple[int, ...], str]  # the dtype as in "float32"


def shape_and_dtype(tensor: Tensor) -> ShapeAndDtype:
    """Shape and dtype of a tensor, for `pair_problem`."""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def pair_problem(codes: ShapeAndDtype, scales: ShapeAndDtype, block_size: int) -> str:
    """Why codes and scales do not make an INT8 weight with blocks of at most `block_size` columns, or ""."""
    shape, dtype = codes
    if dtype != "int8" or len(shape) != 2:
        return f"codes are {_describe(codes)}; expected int8 of two dimensions"
    block = int8_block(shape[1], block_size)
    if block is None:
        return f"codes are {_describe(codes)}; expected a width that {SMALLEST_BLOCK} divides"
    expected = ((shape[0], shape[1] // block), "float32")
    if scales != expected:
        return (
            f"scales are {_describe(scales)} for codes of {_describe(codes)}; "
            f"expected {_describe(expected)}, for blocks of {block}"
        )
    return ""


def _describe(tensor: ShapeAndDtype) -> str:
    shape, dtype = tensor
    return f"{dtype} {list(shape)}"


class TensorFiles:
    """The tensors of several safetensors files by name. Values are read from the disk by `read` only.

    Attributes:
        kinds: name -> shape and dtype of each tensor, from the headers.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        """Read the headers of `files`.

        Raises:
            ValueError: a file is not safetensors, or cannot be read.
        """
        self.kinds: dict[str, ShapeAndDtype] = {}
        self._holders: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                self.kinds[name] = (tuple(part.get_shape()), _DTYPE_NAMES.get(dtype, dtype))
                self._holders[name] = opened

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        return self._holders[name].get_tensor(name)

    def int8_weights(self, block_size: int) -> list[str]:
        """The names of the INT8 weights, as in a model: `X.weight`.

        Raises:
            ValueError: codes without scales or scales without codes, or another dtype, shape or block size.
        """
        stems: dict[str, set[str]] = {}
        for name in self.kinds:
            for part in (CODES, SCALES):
                if name == part or name.endswith(f".{part}"):
                    stems.setdefault(name.removesuffix(part), set()).add(part)
        for stem, parts in stems.items():
            if parts != {CODES, SCALES}:
                (here,) = parts
                (absent,) = {CODES, SCALES} - parts
                raise ValueError(f"the checkpoint holds {stem}{here} without {stem}{absent}; expected both")
            problem = pair_problem(self.kinds[stem + CODES], self.kinds[stem + SCALES], block_size)
            if problem:
                raise ValueError(f"the checkpoint's INT8 weight {stem}weight does not fit its config: {problem}")
        return [f"{stem}weight" for stem in stems]


def export_checkpoint(source: str | Path, destination: str | Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write the INT8 checkpoint in folder `source` as a plain one of `dtype` into the new folder `destination`.

    `destination` gets safetensors files of at most 5 GB, config.json without its quantization_config, the tokenizer,
    and the other files of `source` that are no training state. After an error no folder is left. One output file is in
    memory at a time.

    Returns:
        The number of INT8 weights that were converted.

    Raises:
        ValueError: `source` is no INT8 checkpoint or a damaged one, or a link in it or its index of weights leads out
            of the folder and of the hub's cache; or `destination` is not empty, or is the current folder.
        OSError: a file cannot be read or written.
    """
    source, destination = Path(source), Path(destination)
    check_destination(destination)
    config = _int8_config(source)
    files = TensorFiles(_weight_files(source))
    converted = files.int8_weights(config["quantization_config"].get("block_size", 128))
    if not converted:
        raise ValueError(f"{source} holds no INT8 weights, though its config.json says so")
    parts = {name: (name.removesuffix("weight") + CODES, name.removesuffix("weight") + SCALES) for name in converted}
    plain = [name for name in files.kinds if not any(name in pair for pair in parts.values())]
    main = config.get("dtype", config.get("torch_dtype"))

    def tensor(name: str) -> Tensor:
        if name in parts:
            codes, scales = map(files.read, parts[name])
            return Int8Weight(codes, scales, dtype=torch.float32).dequantize(dtype)
        value = files.read(name)
        # A tensor in another dtype than the model's keeps it, because somebody chose it on purpose.
        return value.to(dtype) if shape_and_dtype(value)[1] == main else value

    def size(name: str) -> int:
        shape, held = files.kinds[parts[name][0] if name in parts else name]
        cast = name in parts or held == main
        return math.prod(shape) * (dtype if cast else getattr(torch, held, torch.float32)).itemsize

    sizes = {name: size(name) for name in sorted([*converted, *plain])}
    with whole_folder(destination) as folder:
        _copy_others(source, folder)
        _write_config(config, dtype, folder)
        _write_shards(sizes, tensor, folder)
    return len(converted)


def _int8_config(source: Path) -> dict[str, Any]:
    """Read config.json of an INT8 checkpoint; ValueError if `source` is none."""
    if not source.is_dir():
        raise ValueError(f"no folder {source}; expected the folder of an INT8 model that save_pretrained wrote")
    _check_inside(source / "config.json", source)
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{source} holds no config.json; expected a folder that save_pretrained wrote") from None
    except ValueError as error:
        raise ValueError(f"{source / 'config.json'} is not JSON: {error}") from None
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != METHOD:
        found = f"its quant_method is {method!r}" if method else "its config.json has no quantization_config"
        raise ValueError(f"{source} is not a model with INT8 weights of foam_hf: {found}; expected {METHOD!r}")
    return config


def _weight_files(source: Path) -> list[Path]:
    index = source / _INDEX
    _check_inside(index, source)
    _check_inside(source / _SINGLE, source)
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is damaged; expected JSON with a weight_map of tensors to files") from None
        for name in names:
            _check_inside(source / name, source)
        return [source / name for name in names]
    if not (source / _SINGLE).is_file():
        raise ValueError(f"{source} holds neither {_SINGLE} nor {_INDEX}; expected one of them")
    return [source / _SINGLE]


def _check_inside(path: Path, source: Path) -> None:
    """Raise ValueError if `path` leads out of `source`, except into the hub's cache, where files are links to blobs.

    A model's folder may come from a stranger, and its links must not export other files of this machine.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    real, folder = path.resolve(), source.resolve()
    allowed = [folder, Path(HF_HUB_CACHE).resolve()]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        allowed.append(folder.parent.parent)  # `source` is in another cache of the hub
    if not any(real.is_relative_to(place) for place in allowed):
        how = "a link" if path.is_symlink() else "listed"
        raise ValueError(
            f"{path} is {how}, and leads out of the model's folder, to {real}; expected files inside {source}: put a "
            "copy there if it belongs to the model"
        )


def _copy_others(source: Path, folder: Path) -> None:
    """Copy every file that is neither weights nor training state: tokenizer, chat templates, code and so on."""
    for path in source.iterdir():
        if path.is_dir() and path.name == _CHAT_TEMPLATES:
            for inner in (path, *path.rglob("*")):
                _check_inside(inner, source)
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and path.name not in _NOT_COPIED_NAMES and not path.name.endswith(_NOT_COPIED):
            _check_inside(path, source)
            shutil.copyfile(path, folder / path.name)


def _write_config(config: dict[str, Any], dtype: torch.dtype, folder: Path) -> None:
    name, main = str(dtype).removeprefix("torch."), config.get("dtype", config.get("torch_dtype"))

    def plain(value: Any) -> Any:
        """The config, and the configs in it, without quantization_config and with the new dtype."""
        if not isinstance(value, dict):
            return value
        kept = {key: plain(inner) for key, inner in value.items() if key != "quantization_config"}
        return kept | {key: name for key in ("dtype", "torch_dtype") if main is not None and kept.get(key) == main}

    text = json.dumps(plain(config), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write_shards(sizes: Mapping[str, int], tensor: Callable[[str], Tensor], folder: Path) -> None:
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        try:
            save_file({name: tensor(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # raised when the disk is full, for example
            raise OSError(f"{file}: {error}") from error
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
