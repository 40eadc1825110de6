"""GPTQ checkpoints, ours, GPTQModel's or AutoGPTQ's, read a layer at a time: never is a file in memory twice.

A folder with config.json and safetensors in which a quantized layer has `qweight`, `qzeros`, `scales` and, in newer
ones, `g_idx`. Served here are LLaMA models of 2, 3, 4 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from chatloom.errors import InputError
from chatloom.files import read_json
from chatloom.kernels import LANES
from chatloom.models.quantized_linear import BITS, Packed, QuantizedLinear

FORMATS = {"gptq": True, "gptq_v2": False}
"""Formats by their name, and whether they store zeros less one."""
KEYS = ("qweight", "qzeros", "scales", "g_idx", "bias")
NOT_WEIGHTS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Buffers that older checkpoints hold and that follow from the config."""
INDEX = "model.safetensors.index.json"
"""Beside several shards: which holds each tensor."""
NO_CHECKPOINT = "give the folder of a checkpoint"


@dataclass(frozen=True)
class GptqCheckpoint:
    folder: Path
    settings: dict[str, Any]
    """config.json without what it says of quantization"""
    bits: int
    group_size: int | None
    """None where a layer's inputs are one group."""
    format: str
    files: dict[str, Path]
    """By the name of each tensor."""


def open_gptq(folder: Path) -> GptqCheckpoint:
    """What a checkpoint says of itself, and where its tensors are.

    Raises:
        InputError: naming the file, for a checkpoint that is damaged, incomplete or of a kind that is not served.
    """
    file = folder / "config.json"
    settings = read_json(file, NO_CHECKPOINT)
    told = settings.pop("quantization_config", None)
    if told is None and (folder / "quantize_config.json").is_file():
        file = folder / "quantize_config.json"
        told = read_json(file, NO_CHECKPOINT)
    if not isinstance(told, dict):
        raise InputError(f"{file}: has no quantization_config, and there is no quantize_config.json beside it")
    if told.get("quant_method", "gptq") != "gptq":
        raise InputError(f"{file}: quant_method = {told['quant_method']!r}: only gptq is served")
    format = told.get("checkpoint_format") or told.get("format") or "gptq"
    if format not in FORMATS:
        raise InputError(f"{file}: checkpoint_format = {format!r}: served are {', '.join(FORMATS)}")
    bits, group_size = told.get("bits"), told.get("group_size")
    if bits not in BITS:
        raise InputError(f"{file}: bits = {bits!r}: no kernel serves them; there are kernels for {BITS}")
    if not isinstance(group_size, int) or (group_size != -1 and (group_size < 8 or group_size % 8)):
        raise InputError(f"{file}: group_size = {group_size!r}: served are multiples of 8, and -1 for the whole input")
    files = _files(folder)
    if "lm_head.qweight" in files:
        raise InputError(f"{files['lm_head.qweight']}: lm_head is quantized: only heads of 16 or 32 bits are served")
    return GptqCheckpoint(folder, settings, bits, None if group_size == -1 else group_size, format, files)


def load_gptq(checkpoint: GptqCheckpoint, dtype: torch.dtype) -> Any:
    """The model, for inference on a CPU. At its peak the memory is that of the model and one layer.

    Raises:
        InputError: naming file and tensor, where one is damaged, missing, or of another shape than the config says.
    """
    model = _empty_model(checkpoint)
    for name, module, tensors in _layers(checkpoint, model):
        if isinstance(tensors, Packed):
            model.set_submodule(name, _quantized(checkpoint, module, tensors, dtype))
        else:
            for key, tensor in tensors.items():
                # A copy: the tensor is a view of the file, and would keep all of it open.
                setattr(module, key, nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False))
    model.tie_weights()
    model.eval()
    return model


def check_gptq(checkpoint: GptqCheckpoint) -> int:
    """Look at every tensor as `load_gptq` does, and keep none; the number of quantized layers.

    Raises:
        InputError: as `load_gptq`, and where no layer is quantized.
    """
    layers = _layers(checkpoint, _empty_model(checkpoint))
    count = sum(isinstance(tensors, Packed) for _, _, tensors in layers)
    if not count:
        raise InputError(f"{checkpoint.folder}: no layer has a qweight: this is no GPTQ checkpoint")
    return count


def load_layer(checkpoint: GptqCheckpoint, name: str, layer: nn.Linear) -> QuantizedLinear | None:
    """What stands in the checkpoint for a layer of any model; None where that one is not quantized.

    Raises:
        InputError: as `load_gptq`.
    """
    if f"{name}.qweight" not in checkpoint.files:
        return None
    tensors = _read(checkpoint, name, KEYS, optional={"g_idx", "bias"})
    return _quantized(checkpoint, layer, _packed(checkpoint, name, layer, tensors), torch.float32)


def _quantized(checkpoint: GptqCheckpoint, layer: nn.Linear, packed: Packed, dtype: torch.dtype) -> QuantizedLinear:
    group_size, less_one = checkpoint.group_size or layer.in_features, FORMATS[checkpoint.format]
    return QuantizedLinear(packed, checkpoint.bits, group_size, zeros_less_one=less_one, dtype=dtype)


def _empty_model(checkpoint: GptqCheckpoint) -> Any:
    """Layers without memory, but for what is no weight."""
    file = checkpoint.folder / "config.json"
    if checkpoint.settings.get("model_type") != "llama":
        raise InputError(f"{file}: model_type = {checkpoint.settings.get('model_type')!r}: only llama is served")
    try:
        config = LlamaConfig.from_dict(checkpoint.settings)
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: no config of a LLaMA: {error}") from error
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


def _layers(checkpoint: GptqCheckpoint, model: Any) -> Iterator[tuple[str, Any, Packed | dict[str, Tensor]]]:
    """Every layer that has weights, by name, with its checked tensors: they are gone when the next one is asked for."""
    seen: set[str] = set()
    tied = {"lm_head"} if model.config.tie_word_embeddings else set()
    for name, module in list(model.named_modules()):
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if not own or name in tied:
            continue
        if isinstance(module, nn.Linear) and f"{name}.qweight" in checkpoint.files:
            tensors = _read(checkpoint, name, KEYS, optional={"g_idx"} if "bias" in own else {"g_idx", "bias"})
            seen.update(f"{name}.{key}" for key in tensors)
            yield name, module, _packed(checkpoint, name, module, tensors)
        else:
            tensors = _read(checkpoint, name, own)
            seen.update(f"{name}.{key}" for key in tensors)
            for key, tensor in tensors.items():
                _require_shape(checkpoint, f"{name}.{key}", tensor, tuple(getattr(module, key).shape))
            yield name, module, tensors
    unknown = [key for key in checkpoint.files if key not in seen and not key.endswith(NOT_WEIGHTS)]
    unknown = [key for key in unknown if key.rpartition(".")[0] not in tied]
    if unknown:
        raise InputError(
            f"{checkpoint.files[unknown[0]]}: {unknown[0]} belongs to no layer of the model in config.json "
            f"({len(unknown)} such tensors): the two are of different models"
        )


def _packed(checkpoint: GptqCheckpoint, name: str, layer: nn.Linear, tensors: dict[str, Tensor]) -> Packed:
    """The layer's tensors, all of the shapes and values that the kernel relies on."""
    rows, columns, bits = layer.in_features, layer.out_features, checkpoint.bits
    group_size = checkpoint.group_size or rows
    if rows % group_size or rows % 32 or columns % LANES or columns * bits % 32:
        raise InputError(
            f"{checkpoint.folder}: {name} has {rows} inputs and {columns} outputs: multiples of 32 are served, and "
            f"group_size = {group_size} has to divide the inputs"
        )
    groups = rows // group_size
    shapes = {
        "qweight": (rows * bits // 32, columns),
        "qzeros": (groups, columns * bits // 32),
        "scales": (groups, columns),
        "g_idx": (rows,),
        "bias": (columns,),
    }
    for key, tensor in tensors.items():
        _require_shape(checkpoint, f"{name}.{key}", tensor, shapes[key])
        if (key in ("qweight", "qzeros", "g_idx")) != (tensor.dtype == torch.int32):
            raise _fault(checkpoint, f"{name}.{key}", f"holds {tensor.dtype}")
    scales, g_idx, bias = tensors["scales"].half(), tensors.get("g_idx"), tensors.get("bias")
    if not bool(scales.isfinite().all()):
        raise _fault(checkpoint, f"{name}.scales", "holds values that are no numbers, or none that float16 has")
    if g_idx is not None and not torch.equal(g_idx.sort().values.long(), torch.arange(rows) // group_size):
        raise _fault(checkpoint, f"{name}.g_idx", f"does not put {group_size} inputs into each of {groups} groups")
    # Early GPTQ checkpoints have a bias of zeros where the model has none.
    bias = bias if bias is not None and bool(bias.any()) else None
    return Packed(tensors["qweight"], tensors["qzeros"], scales, g_idx, bias)


def _require_shape(checkpoint: GptqCheckpoint, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise _fault(checkpoint, name, f"has the shape {tuple(tensor.shape)}, and by the config it is {shape}")


def _fault(checkpoint: GptqCheckpoint, name: str, what: str) -> InputError:
    return InputError(f"{checkpoint.files[name]}: {name} {what}: the file was changed, or is of another model")


def _read(
    checkpoint: GptqCheckpoint, layer: str, keys: Sequence[str], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """A layer's tensors by key, as views of their files, which are closed with the last of them."""
    tensors = {}
    for key in keys:
        name = f"{layer}.{key}"
        if name in checkpoint.files:
            with _open(checkpoint.files[name]) as file:
                tensors[key] = file.get_tensor(name)
        elif key not in optional:
            raise InputError(f"{checkpoint.folder}: the tensor {name} is missing: the checkpoint is not whole")
    return tensors


def _files(folder: Path) -> dict[str, Path]:
    """File of each tensor, as their headers say; the index, where there is one, must agree."""
    index = folder / INDEX
    if index.is_file():
        expected: dict[str, str] = read_json(index, NO_CHECKPOINT).get("weight_map", {})
        shards = sorted(set(expected.values()))
    else:
        expected, shards = {}, sorted(file.name for file in folder.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{folder}: no .safetensors file; pickled weights (.pt, .bin) are not opened: convert them")
    files = {}
    for shard in shards:
        path = folder / shard
        if Path(shard).name != shard or not path.is_file():
            raise InputError(f"{index}: names {shard}, which is not in the folder: the download is not whole")
        with _open(path) as file:
            files.update(dict.fromkeys(file.keys(), path))
    for name, shard in expected.items():
        if files.get(name) != folder / shard:
            raise InputError(f"{index}: says that {shard} holds {name}, and it does not")
    return files


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read, it is cut off or damaged: {error}") from error
