"""GPTQ layers and checkpoints with random codes, packed with numpy's bits: an oracle of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatloom.models.quantized_linear import Packed


@dataclass(frozen=True)
class Layer:
    packed: Packed
    weight: Tensor
    """(out, in) float64, what the packed tensors stand for"""


def bit_stream(codes: Any, bits: int) -> Any:
    """(n, columns) codes as (n * bits / 32, columns) int32: the bits of a column, lowest first."""
    each = np.unpackbits(codes[..., None].astype(np.uint8), axis=-1, bitorder="little")[
        ..., :bits
    ]  # (n, columns, bits)
    stream = each.transpose(1, 0, 2).reshape(codes.shape[1], -1)
    return np.ascontiguousarray(np.packbits(stream, axis=-1, bitorder="little").view("<i4").T)


def random_layer(
    num_inputs: int,
    num_outputs: int,
    *,
    bits: int,
    group_size: int,
    less_one: bool = True,
    act_order: bool = False,
    seed: int = 0,
) -> Layer:
    generator = np.random.default_rng(seed)
    groups = num_inputs // group_size
    codes = generator.integers(0, 2**bits, (num_inputs, num_outputs))
    zeros = generator.integers(int(less_one), 2**bits, (groups, num_outputs))
    scales = generator.uniform(0.5, 1.5, (groups, num_outputs)).astype(np.float16) * np.float16(0.1 / 2**bits)
    group_of = np.arange(num_inputs) // group_size
    if act_order:
        group_of = generator.permutation(group_of)
    weight = scales.astype(np.float64)[group_of] * (codes - zeros[group_of])
    packed = Packed(
        torch.from_numpy(bit_stream(codes, bits)),
        torch.from_numpy(np.ascontiguousarray(bit_stream((zeros - less_one).T, bits).T)),
        torch.from_numpy(scales),
        torch.from_numpy(group_of.astype(np.int32)),
        None,
    )
    return Layer(packed, torch.from_numpy(weight.T.copy()))


def write_gptq(source: Path, out: Path, *, bits: int = 4, group_size: int = 32, **layout: Any) -> Path:
    """The checkpoint `source` with random quantized layers; `out.with_name("plain")` has the same as plain weights."""
    plain = out.with_name("plain")
    shutil.copytree(source, out)
    shutil.copytree(source, plain)
    tensors = load_file(source / "model.safetensors")
    packed, full = dict(tensors), dict(tensors)
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        if "_proj." not in name:
            continue
        layer = random_layer(tensor.shape[1], tensor.shape[0], bits=bits, group_size=group_size, seed=seed, **layout)
        del packed[name]
        for key in ("qweight", "qzeros", "scales", "g_idx"):
            packed[name.replace("weight", key)] = getattr(layer.packed, key)
        full[name] = layer.weight.float()
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    save_file(full, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": layout.get("act_order", False),
        "sym": False,
        "checkpoint_format": "gptq" if layout.get("less_one", True) else "gptq_v2",
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


def edit_tensors(folder: Path, change: Any) -> None:
    """Rewrite model.safetensors after `change(tensors)`."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
