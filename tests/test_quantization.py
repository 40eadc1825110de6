"""Calibration rows, the comparison with rounding and with the unquantized model, and GPTQ itself on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch

from chatloom.config import QuantizeParams
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.errors import InputError
from chatloom.evaluation.perplexity import mean_loss
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import import_gptqmodel, load_causal_lm, quiet
from chatloom.quantization.comparison import by_layer, compare, round_to_nearest
from chatloom.quantization.figure import draw
from chatloom.quantization.gptq import calibration_rows, quantize
from tests.conftest import CPU
from tests.gptq_factory import edit_tensors, write_gptq

PARAMS = QuantizeParams(
    bits=4,
    group_size=32,
    act_order=False,
    symmetric=True,
    damp_percent=0.05,
    calibration_rows=6,
    max_calibration_tokens=24,
    languages=["en", "zh"],
    held_out_rows=2,
    worse_than_rounding="stop",
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


@pytest.mark.parametrize(("rows", "lang"), [([("en", 6), ("zh", 30)], "en"), ([("en", 30), ("fr", 30)], "zh")])
def test_a_language_without_a_row_that_is_long_enough_is_refused(rows: list[tuple[str, int]], lang: str) -> None:
    with pytest.raises(InputError, match=f"quantize.languages names '{lang}', and of the 2 rows .* has 10 tokens"):
        calibration_rows([row(i, own, length) for i, (own, length) in enumerate(rows)], PARAMS)


def test_rounding_to_nearest_by_hand() -> None:
    params = PARAMS.model_copy(update={"group_size": 4})
    # Symmetric: from -7.5 to 7.5 in 15 steps of 1 around code 8, so that 7.5 would be code 16 and becomes 15.
    weight = torch.tensor([[-7.0, 3.2, 0.4, 7.5, 0.0, 0.0, 0.0, 0.0]])
    assert round_to_nearest(weight, params).tolist() == [[-7.0, 3.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0]]
    # 2 bits, from 0 to 3.6 in 3 steps of 1.2; and from -1.2 to 2.4 around code 1.
    params = params.model_copy(update={"bits": 2, "symmetric": False})
    weight = torch.tensor([[0.5, 1.0, 2.0, 3.6], [-1.2, 0.1, 1.0, 2.4]])
    expected = torch.tensor([[0.0, 1.2, 2.4, 3.6], [-1.2, 0.0, 1.2, 2.4]])
    torch.testing.assert_close(round_to_nearest(weight, params), expected)


def held_out_rows() -> list[PreparedRow]:
    return [row(i, lang) for i, lang in enumerate(["zh", "en", "en", "fr", "zh", "en", "zh"])]


def test_a_model_quantized_without_loss_differs_in_nothing(wide_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_gptq(wide_checkpoint, tmp_path / "quantized")
    params = PARAMS.model_copy(update={"symmetric": False})
    found = compare(tmp_path / "plain", folder, held_out_rows(), params, CPU)
    assert [(error.layer, error.kind) for error in found.layers][6:9] == [
        (0, "down_proj"),
        (1, "q_proj"),
        (1, "k_proj"),
    ]
    assert all(error.gptq < 1e-10 < error.rounded for error in found.layers)
    assert found.metrics["error/layers_worse"] == 0
    assert found.metrics["held_out/rows"] == 4
    for lang in ("en", "zh", "all"):
        assert found.metrics[f"kl/{lang}"] == pytest.approx(0, abs=1e-6)
        assert found.metrics[f"agreement/{lang}"] == 1
        assert found.metrics[f"perplexity/ratio_{lang}"] == pytest.approx(1, abs=1e-5)
        assert found.metrics[f"perplexity/rounded_{lang}"] != pytest.approx(found.metrics[f"perplexity/full_{lang}"])
    # 4 bits a code, and 16 of scale and 8 of zero for 32 codes: 4.75 of 16 bits.
    assert found.metrics["ratio_16bit/linear"] == pytest.approx(4.75 / 16)
    assert list(by_layer(found.layers)) == [0, 1]
    assert draw(found.layers, found.metrics, 4).axes[0].get_xlabel()


def test_kl_and_agreement_of_two_models_by_hand(wide_checkpoint: Path, tmp_path: Path) -> None:
    """A head of zeros predicts every token alike: its loss is ln V, and KL to the full model is ln V - entropy."""
    folder = write_gptq(wide_checkpoint, tmp_path / "quantized")
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].zero_())
    params = PARAMS.model_copy(update={"symmetric": False})
    found = compare(tmp_path / "plain", folder, held_out_rows(), params, CPU)
    chat = load_causal_lm(tmp_path / "plain", "cpu", "float32")
    entropies = []
    for held_out in [r for r in held_out_rows() if r.lang == "en"][:2]:
        with torch.no_grad():
            logits = chat.model(torch.tensor([[*held_out.prompt_ids, *held_out.response_ids[0]]])).logits[0, 4:-1]
        entropies.append(torch.distributions.Categorical(logits=logits.double()).entropy())
    vocabulary = chat.model.config.vocab_size
    assert found.metrics["perplexity/gptq_en"] == pytest.approx(vocabulary, rel=1e-4)
    kl = float(torch.tensor(vocabulary).double().log() - torch.cat(entropies).mean())
    assert found.metrics["kl/en"] == pytest.approx(kl, rel=1e-3)


def test_what_is_worse_than_rounding_stops_or_warns(
    wide_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_gptq(wide_checkpoint, tmp_path / "quantized")  # random codes have nothing to do with the model
    with pytest.raises(InputError, match=r"with rounding to nearest: .* or set quantize\.worse_than_rounding to warn"):
        compare(wide_checkpoint, folder, held_out_rows(), PARAMS, CPU)
    patient = PARAMS.model_copy(update={"worse_than_rounding": "warn"})
    warned = compare(wide_checkpoint, folder, held_out_rows(), patient, CPU)
    assert warned.metrics["error/layers_worse"] == 14
    assert "quantize.calibration_rows" in caplog.text


def test_a_language_without_held_out_rows_is_refused(wide_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"names 'zh', and data/prepared/eval has no row with an answer in it"):
        compare(wide_checkpoint, tmp_path, [row(1, "en")], PARAMS, CPU)


def test_a_group_size_that_does_not_divide_is_refused_before_any_work(wide_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quantize\.group_size = 48 does not divide the model's hidden_size = 64"):
        quantize(wide_checkpoint, tmp_path / "out", [[1] * 20], PARAMS.model_copy(update={"group_size": 48}))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("bits", "act_order", "symmetric"), [(4, False, False), (4, False, True), (3, True, False), (8, False, False)]
)
def test_a_quantized_checkpoint_loads_everywhere(
    wide_checkpoint: Path, tmp_path: Path, bits: int, act_order: bool, symmetric: bool
) -> None:
    """In AutoGPTQ's layout: natively, by GPTQModel and by transformers it is one model, and close to the full one."""
    rows = [row(i, lang) for i in range(4) for lang in ("en", "zh")]
    params = PARAMS.model_copy(update={"bits": bits, "act_order": act_order, "symmetric": symmetric})
    out = tmp_path / "out"
    out.mkdir()
    metrics = quantize(wide_checkpoint, out, calibration_rows(rows, params), params)
    assert metrics["layers"] == 2 * 7
    assert metrics["calibration_rows"] == 6
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", bits, 32)
    assert (config["checkpoint_format"], config["desc_act"]) == ("gptq", act_order)
    assert not list(out.glob("*.csv")), "times would make equal work give different bytes"
    assert str(Path(gettempdir())) not in (out / "config.json").read_text() + (out / "quantize_config.json").read_text()
    full, quantized = (load_causal_lm(path, "cpu", "float32") for path in (wide_checkpoint, out))
    assert quantized.stop_ids == full.stop_ids
    examples = [Example.of_row(r) for r in rows]
    losses = [mean_loss(Role(chat.model), examples, torch.device("cpu")) for chat in (full, quantized)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)

    ids = torch.tensor([rows[0].prompt_ids + rows[0].response_ids[0]])
    with torch.no_grad():
        native = quantized.model(ids).logits
        for load in (by_gptqmodel, by_transformers):
            # In bfloat16, which is all that their kernels take here.
            error = load(out, bits)(ids).logits.float() - native
            assert float(error.norm() / native.norm()) < 0.02


def by_gptqmodel(folder: Path, bits: int) -> Any:
    gptq = import_gptqmodel()
    with quiet():
        return gptq.GPTQModel.load(str(folder), device="cpu", backend=gptq.BACKEND.TORCH, dtype=torch.bfloat16).model


def by_transformers(folder: Path, bits: int) -> Any:
    from transformers import AutoModelForCausalLM, GPTQConfig

    with quiet():
        how = GPTQConfig(bits=bits, backend="torch")
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", dtype=torch.bfloat16, quantization_config=how
        )
