"""What quantizing changed: each layer's output, beside rounding to nearest, and the model's predictions.

T tokens of the held-out rows, N of them predicted, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatloom.batches import chunks
from chatloom.config import QuantizeParams
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.evaluation.perplexity import perplexity
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import load_on
from chatloom.models.gptq_checkpoint import GptqCheckpoint, load_layer, open_gptq
from chatloom.packing import ROWS_AT_ONCE, pack
from chatloom.tensors import LOGITS_CHUNK

log = logging.getLogger(__name__)

EVERY = "all"
"""The group of all languages."""


@dataclass(frozen=True)
class LayerError:
    """Squared errors of a layer's outputs on held-out activations, as shares of the outputs' own squares."""

    layer: int
    kind: str
    """`q_proj`, ..."""
    gptq: float
    rounded: float


@dataclass(frozen=True)
class Predictions:
    """Means over predicted tokens, in nats."""

    loss: float
    quantized_loss: float
    kl: float
    """Of the quantized model's next-token distribution from the full one's."""
    agreement: float
    """Share of tokens at which the two find the same one likeliest."""


@dataclass(frozen=True)
class Comparison:
    layers: list[LayerError]
    metrics: dict[str, float]


@torch.no_grad()
def compare(
    model: Path, quantized: Path, rows: Sequence[PreparedRow], params: QuantizeParams, device: Device
) -> Comparison:
    """Compare the checkpoint `quantized` with `model` on the first `held_out_rows` rows of each language.

    Raises:
        InputError: where a language has no held-out row, or GPTQ is worse than rounding and params say to stop then.
    """
    groups = held_out(rows, params)
    full = Role(load_on(model, device).model)
    checkpoint = open_gptq(quantized)
    layers = layer_errors(full, checkpoint, groups[EVERY], params, device)
    gptq, rounded = (sum(errors) / len(layers) for errors in zip(*((e.gptq, e.rounded) for e in layers), strict=True))
    _require_better(gptq, rounded, params)
    packed = Role(load_on(quantized, device).model)
    metrics = {
        "error/gptq": gptq,
        "error/rounded": rounded,
        "error/layers_worse": float(sum(error.gptq >= error.rounded for error in layers)),
        "held_out/rows": float(len(groups[EVERY])),
        **_sizes(full.model, packed.model, checkpoint),
    }
    for name, examples in groups.items():
        found = predictions(full, packed, examples, device.device)
        metrics |= {
            f"perplexity/full_{name}": perplexity(found.loss),
            f"perplexity/gptq_{name}": perplexity(found.quantized_loss),
            f"perplexity/ratio_{name}": perplexity(found.quantized_loss - found.loss),
            f"kl/{name}": found.kl,
            f"agreement/{name}": found.agreement,
        }
    _round_in_place(full.model, checkpoint, params)
    for name, examples in groups.items():
        loss = predictions(full, packed, examples, device.device).loss
        metrics[f"perplexity/rounded_{name}"] = perplexity(loss)
    return Comparison(layers, metrics)


def held_out(rows: Sequence[PreparedRow], params: QuantizeParams) -> dict[str, list[Example]]:
    """Examples by language, and all of them."""
    groups: dict[str, list[Example]] = {lang: [] for lang in params.languages}
    for row in rows:
        if row.responses and len(groups.get(row.lang, ())) < params.held_out_rows and row.lang in groups:
            groups[row.lang].append(Example.of_row(row))
    for lang, examples in groups.items():
        if not examples:
            raise InputError(
                f"quantize.languages names {lang!r}, and data/prepared/eval has no row with an answer in it: give "
                "prepare_data.split_weights.eval a larger share, or take the language out"
            )
    return groups | {EVERY: [example for examples in groups.values() for example in examples]}


@torch.no_grad()
def layer_errors(
    full: Role, checkpoint: GptqCheckpoint, examples: Sequence[Example], params: QuantizeParams, device: Device
) -> list[LayerError]:
    """Every quantized layer's error on what the full model feeds it, in one pass over all the examples."""
    found: list[LayerError] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], *, name: str) -> None:
        assert isinstance(module, nn.Linear)
        layer = load_layer(checkpoint, name, module)
        if layer is None:
            return
        x, weight = inputs[0].flatten(0, -2).float(), module.weight.float()  # (T, in), (out, in)
        scale = _squares(x, weight)
        gptq = _squares(x, layer.dequantized().to(weight.device) - weight)
        rounded = _squares(x, round_to_nearest(weight, params) - weight)
        found.append(LayerError(_layer_number(name), name.rpartition(".")[2], gptq / scale, rounded / scale))

    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: look(module, inputs, name=name))
        for name, module in full.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        full.hidden(pack(examples, device.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def predictions(full: Role, quantized: Role, examples: Sequence[Example], device: torch.device) -> Predictions:
    loss = quantized_loss = kl = agreement = 0.0
    count = 0
    for rows in chunks(sorted(examples, key=lambda example: len(example.input_ids)), ROWS_AT_ONCE):
        packed = pack(rows, device)
        hidden = [role.hidden(packed)[packed.predictors] for role in (full, quantized)]  # (N, H) each
        for start in range(0, len(packed.targets), LOGITS_CHUNK):
            some = slice(start, start + LOGITS_CHUNK)
            targets = packed.targets[some]
            p, q = (
                F.log_softmax(role.model.lm_head(states[some]).float(), dim=-1)  # (n, V)
                for role, states in zip((full, quantized), hidden, strict=True)
            )
            loss += float(F.nll_loss(p, targets, reduction="sum"))
            quantized_loss += float(F.nll_loss(q, targets, reduction="sum"))
            kl += float((p.exp() * (p - q)).sum())
            agreement += float((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(packed.targets)
    return Predictions(loss / count, quantized_loss / count, kl / count, agreement / count)


def round_to_nearest(weight: Tensor, params: QuantizeParams) -> Tensor:
    """(out, in) each weight at the nearest point of its group's grid, which is the one that GPTQ has too.

    The grid covers the group's smallest to its largest weight, and 0; a symmetric one is as wide on either side.
    """
    groups = weight.unflatten(1, (-1, params.group_size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    levels = 2**params.bits - 1
    if params.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = torch.where(high > low, (high - low) / levels, 1.0)
    zero = torch.full_like(scale, (levels + 1) / 2) if params.symmetric else (-low / scale).round()
    codes = ((groups / scale).round() + zero).clamp(0, levels)
    rounded: Tensor = scale * (codes - zero)
    return rounded.flatten(1)


def by_layer(errors: Sequence[LayerError]) -> dict[int, dict[str, float]]:
    """The curves of a stage: values by the layer's number."""
    curves: dict[int, dict[str, float]] = {}
    for error in errors:
        curves.setdefault(error.layer, {}).update(
            {f"gptq/{error.kind}": error.gptq, f"rounded/{error.kind}": error.rounded}
        )
    return dict(sorted(curves.items()))


def _require_better(gptq: float, rounded: float, params: QuantizeParams) -> None:
    if gptq < rounded:
        return
    message = (
        f"the layers' mean relative error is {gptq:.3g} with GPTQ and {rounded:.3g} with rounding to nearest: raise "
        "quantize.calibration_rows or quantize.damp_percent"
    )
    if params.worse_than_rounding == "stop":
        raise InputError(f"{message}, or set quantize.worse_than_rounding to warn")
    log.warning("quantize: %s", message)


def _round_in_place(model: Any, checkpoint: GptqCheckpoint, params: QuantizeParams) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.qweight" in checkpoint.files:
            module.weight.copy_(round_to_nearest(module.weight.float(), params))


def _squares(x: Tensor, weight: Tensor) -> float:
    return float((x @ weight.T).square().sum(dtype=torch.float64))


def _layer_number(name: str) -> int:
    """Of `model.layers.3.mlp.up_proj`: 3."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _sizes(full: Any, quantized: Any, checkpoint: GptqCheckpoint) -> dict[str, float]:
    """Bytes in memory; and of what 16 bits a weight take, the share of the files, and of the layers in memory."""
    replaced = [
        (module.weight.numel(), _bytes(quantized.get_submodule(name)))
        for name, module in full.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.qweight" in checkpoint.files
    ]
    weights, linear = (sum(numbers) for numbers in zip(*replaced, strict=True))
    parameters = sum(parameter.numel() for parameter in full.parameters())
    on_disk = sum(file.stat().st_size for file in set(checkpoint.files.values()))
    return {
        "resident/bytes": float(_bytes(quantized)),
        "resident/bytes_full": float(_bytes(full)),
        "ratio_16bit/files": on_disk / (2 * parameters),
        "ratio_16bit/linear": linear / (2 * weights),
    }


def _bytes(module: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())
