"""Calibration rows, and GPTQ itself on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chatloom.config import QuantizeParams
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.errors import InputError
from chatloom.evaluation.perplexity import mean_loss
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import load_causal_lm
from chatloom.quantization import calibration_rows, quantize

PARAMS = QuantizeParams(
    bits=4,
    group_size=32,
    act_order=False,
    symmetric=True,
    damp_percent=0.05,
    calibration_rows=6,
    max_calibration_tokens=24,
    seed=0,
)


def row(number: int, lang: str, length: int = 30) -> PreparedRow:
    ids = [(number * 7 + i) % 250 + 4 for i in range(length)]
    return PreparedRow(f"{lang}-{number}", lang, [], ids[:5], [False] * 5, ["x"], [ids[5:]])


def test_languages_take_turns_and_long_rows_are_cut() -> None:
    rows = [row(i, "en") for i in range(20)] + [row(100 + i, "zh") for i in range(2)] + [row(200, "zh", 6)]
    chosen = calibration_rows(rows, PARAMS)
    assert len(chosen) == 6
    assert all(len(ids) == 24 for ids in chosen)
    chinese = [[*r.prompt_ids, *r.response_ids[0]][:24] for r in rows if r.lang == "zh"]
    assert [ids in chinese for ids in chosen] == [False, True, False, True, False, False]
    assert chosen == calibration_rows(rows, PARAMS)
    assert chosen != calibration_rows(rows, PARAMS.model_copy(update={"seed": 1}))


def test_rows_that_are_all_too_short_are_refused() -> None:
    with pytest.raises(InputError, match="none of the 1 rows in data/prepared/ptx has 10 tokens"):
        calibration_rows([row(1, "en", 6)], PARAMS)


def test_a_group_size_that_does_not_divide_is_refused_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quantize\.group_size = 48 does not divide the model's hidden_size = 32"):
        quantize(checkpoint, tmp_path / "out", [[1] * 20], PARAMS.model_copy(update={"group_size": 48}))


@pytest.mark.smoke
def test_quantized_checkpoint_has_the_autogptq_layout_and_stays_close(checkpoint: Path, tmp_path: Path) -> None:
    rows = [row(i, "en") for i in range(8)]
    out = tmp_path / "out"
    out.mkdir()
    metrics = quantize(checkpoint, out, calibration_rows(rows, PARAMS), PARAMS)
    assert metrics["layers"] == 2 * 7
    assert metrics["calibration_rows"] == 6
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 32)
    assert config["checkpoint_format"] == "gptq"
    assert not list(out.glob("*.csv")), "times would make equal work give different bytes"
    full, quantized = (load_causal_lm(path, "cpu", "float32") for path in (checkpoint, out))
    assert quantized.stop_ids == full.stop_ids
    examples = [Example.of_row(r) for r in rows]
    losses = [mean_loss(Role(chat.model), examples, torch.device("cpu")) for chat in (full, quantized)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
