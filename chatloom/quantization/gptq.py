"""GPTQ (Frantar 2022) through GPTQModel."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from chatloom.config import QuantizeParams
from chatloom.data.prepared import PreparedRow
from chatloom.errors import InputError
from chatloom.files import write_json
from chatloom.models.checkpoint import import_gptqmodel, quiet, save_tokenizer_files
from chatloom.progress import progress

MIN_TOKENS = 10
"""Shorter calibration rows are dropped by GPTQModel."""


def calibration_rows(rows: Sequence[PreparedRow], params: QuantizeParams) -> list[list[int]]:
    """Templated conversations of `languages` in turn, drawn with the seed, cut to `max_calibration_tokens`.

    Never raw or random text: a model calibrated on it forgets the behaviour it was tuned for.

    Raises:
        InputError: where a language has no row that is long enough.
    """
    generator = random.Random(params.seed)
    by_lang: dict[str, list[list[int]]] = {lang: [] for lang in params.languages}
    for row in rows:
        ids = [*row.prompt_ids, *row.response_ids[0]][: params.max_calibration_tokens]
        if len(ids) >= MIN_TOKENS and row.lang in by_lang:
            by_lang[row.lang].append(ids)
    for lang, own in by_lang.items():
        if not own:
            raise InputError(
                f"quantize.languages names {lang!r}, and of the {len(rows)} rows in data/prepared/ptx none is in it "
                f"and has {MIN_TOKENS} tokens: give prepare_data.split_weights.ptx a larger share, add rows, or take "
                "the language out"
            )
        generator.shuffle(own)
    chosen: list[list[int]] = []
    while len(chosen) < params.calibration_rows and any(by_lang.values()):
        for own in by_lang.values():
            if own and len(chosen) < params.calibration_rows:
                chosen.append(own.pop())
    return chosen


def quantize(model: Path, out: Path, calibration: Sequence[Sequence[int]], params: QuantizeParams) -> dict[str, float]:
    """Write `model` quantized to `out`, in the layout that anything which loads AutoGPTQ checkpoints can load.

    Raises:
        InputError: where `quantize.group_size` does not divide a layer's input size.
    """
    _require_divisible(model, params)
    gptq = import_gptqmodel()
    config = gptq.QuantizeConfig(
        bits=params.bits,
        group_size=params.group_size,
        desc_act=params.act_order,
        sym=params.symmetric,
        damp_percent=params.damp_percent,
        format="gptq",
        method="gptq",
    )
    torch.manual_seed(params.seed)
    with quiet():
        loaded = gptq.GPTQModel.load(str(model), config, trust_remote_code=False)
        rows = [{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in calibration]
        with progress("quantize", loaded.model.config.num_hidden_layers) as advance:
            done: set[int] = set()

            def layer_complete(layer_idx: int, submodule_finalized: bool) -> None:
                # GPTQModel calls it twice a layer: after the layer, and once more when its weights are in place.
                if layer_idx not in done:
                    done.add(layer_idx)
                    advance()

            loaded.layer_callback = layer_complete
            layers = loaded.quantize(rows, batch_size=1)
        loaded.save(str(out))
    save_tokenizer_files(out, model)
    (out / "quant_log.csv").unlink(missing_ok=True)  # it holds times: equal work would not give equal bytes
    _forget_places(out)
    full, packed = _size(model), _size(out)
    losses = [float(layer["loss"]) for layer in _layer_rows(layers)]
    return {
        "calibration_rows": len(calibration),
        "calibration_tokens": sum(map(len, calibration)),
        "layers": len(losses),
        "layer_loss_mean": sum(losses) / max(len(losses), 1),
        "bytes": packed,
        "bytes_full": full,
        "size_ratio": packed / full,
    }


def _forget_places(out: Path) -> None:
    """Take the name of GPTQModel's temporary folder out of the settings: equal work would not give equal bytes."""
    for name in ("config.json", "quantize_config.json"):
        settings = json.loads((out / name).read_text(encoding="utf-8"))
        settings.get("quantization_config", settings).get("meta", {}).pop("offload_to_disk_path", None)
        write_json(out / name, settings)


def _layer_rows(report: object) -> list[dict[str, str]]:
    """The per-layer rows of GPTQModel's report, whatever it groups them under."""
    groups = report.values() if isinstance(report, dict) else [report]
    return [
        row for group in groups if isinstance(group, list) for row in group if isinstance(row, dict) and "loss" in row
    ]


def _require_divisible(model: Path, params: QuantizeParams) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for key in ("hidden_size", "intermediate_size"):
        if config[key] % params.group_size:
            raise InputError(
                f"quantize.group_size = {params.group_size} does not divide the model's {key} = {config[key]}; "
                f"the largest that does is {_largest_group(config)}"
            )


def _largest_group(config: dict[str, int]) -> int:
    sizes = (config["hidden_size"], config["intermediate_size"])
    return next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if all(value % size == 0 for value in sizes))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
