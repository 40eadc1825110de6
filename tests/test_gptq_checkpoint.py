"""GPTQ checkpoints, read natively: the same model as with plain weights, and errors that say what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatloom.errors import InputError
from chatloom.models.checkpoint import load_causal_lm
from chatloom.models.generation import generate, open_decoder
from chatloom.models.gptq_checkpoint import check_gptq, open_gptq
from chatloom.models.quantized_linear import QuantizedLinear
from chatloom.models.sampling import Sampling
from tests.conftest import ROOT
from tests.gptq_factory import edit_tensors, write_gptq

IDS = [[1, 20, 35, 7, 150, 42, 9, 60], [5, 6, 7]]


@pytest.fixture
def quantized(wide_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder to spoil."""
    return write_gptq(wide_checkpoint, tmp_path / "quantized")


def logits(folder: Path, dtype: str = "float32") -> Tensor:
    model = load_causal_lm(folder, "cpu", dtype).model
    with torch.no_grad():
        out: Tensor = model(torch.tensor(IDS[:1])).logits
    return out


@pytest.mark.parametrize(
    ("bits", "layout"), [(4, {}), (8, {"less_one": False}), (3, {"act_order": True}), (2, {})], ids=str
)
def test_the_model_is_the_one_with_plain_weights(
    wide_checkpoint: Path, tmp_path: Path, bits: int, layout: dict[str, bool]
) -> None:
    folder = write_gptq(wide_checkpoint, tmp_path / "quantized", bits=bits, **layout)
    torch.testing.assert_close(logits(folder), logits(tmp_path / "plain"), rtol=1e-4, atol=1e-5)
    config = open_gptq(folder)
    assert (config.bits, config.group_size, check_gptq(config)) == (bits, 32, 14)


def test_older_settings_and_tensors(wide_checkpoint: Path, tmp_path: Path) -> None:
    """AutoGPTQ wrote quantize_config.json alone, and early GPTQ no g_idx, but biases of zeros."""
    folder = write_gptq(wide_checkpoint, tmp_path / "quantized")
    expected = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    told = config.pop("quantization_config")
    del told["checkpoint_format"], told["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(told))

    def age(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]
            tensors[name.replace("g_idx", "bias")] = torch.zeros(tensors[name.replace("g_idx", "scales")].shape[1])
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_tensors(folder, age)
    assert check_gptq(open_gptq(folder)) == 14
    assert torch.equal(logits(folder), expected)


def test_shards_are_read_as_one(quantized: Path) -> None:
    expected = logits(quantized)
    tensors = load_file(quantized / "model.safetensors")
    (quantized / "model.safetensors").unlink()
    halves = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for index, name in enumerate(sorted(tensors)):  # a layer's tensors in both
        list(halves.values())[index % 2][name] = tensors[name]
    for file, half in halves.items():
        save_file(half, quantized / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (quantized / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(quantized), expected)
    (quantized / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"index\.json: names model-2\.safetensors, which is not in the folder"):
        open_gptq(quantized)


def test_the_decoder_answers_as_the_model_with_plain_weights_does(quantized: Path, tmp_path: Path) -> None:
    greedy, answers = Sampling(12, temperature=0.0), []
    for folder in (quantized, tmp_path / "plain"):
        chat = load_causal_lm(folder, "cpu", "float32")
        answers.append(generate(chat.model, IDS, greedy, stop_ids=[]))
    assert answers[0] == answers[1]
    chat = load_causal_lm(quantized, "cpu", "float32")
    one, many = (open_decoder(chat.model, 2, snapshot=snapshot).extend([], IDS) for snapshot in (False, True))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
    assert isinstance(chat.model.model.layers[0].mlp.down_proj, QuantizedLinear)


def test_a_fresh_process_needs_no_quantization_library(quantized: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('gptqmodel', 'optimum', 'auto_gptq'): sys.modules[name] = None\n"
        "from pathlib import Path; from chatloom.models.checkpoint import load_causal_lm; import torch\n"
        f"model = load_causal_lm(Path({str(quantized)!r}), 'cpu', 'float32').model\n"
        f"print(float(model(torch.tensor({IDS[:1]})).logits.double().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(float(logits(quantized).double().sum()), rel=1e-5)


Q = "model.layers.1.mlp.up_proj"


def spoil(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        changed = change(tensors[name])
        if changed is None:
            del tensors[name]
        else:
            tensors[name] = changed

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(f"{Q}.scales", lambda _: None), rf"{Q}\.scales is missing: the checkpoint is not whole"),
        (spoil("model.norm.weight", lambda _: None), r"model\.norm\.weight is missing"),
        (
            spoil(f"{Q}.qweight", lambda t: t[:-1]),
            rf"{Q}\.qweight has the shape \(7, 128\), and by the config",
        ),
        (spoil(f"{Q}.scales", lambda t: t / 0), rf"model\.safetensors: {Q}\.scales holds values that are no numbers"),
        (spoil(f"{Q}.qweight", lambda t: t.float()), rf"{Q}\.qweight holds torch\.float32"),
        (spoil(f"{Q}.g_idx", lambda t: t + 1), rf"{Q}\.g_idx does not put 32 inputs into each of 2 groups"),
        (lambda t: t.update({"lost.weight": torch.ones(1)}), r"lost\.weight belongs to no layer"),
    ],
)
def test_tensors_that_were_changed_are_named(
    quantized: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    edit_tensors(quantized, change)
    with pytest.raises(InputError, match=message):
        load_causal_lm(quantized, "cpu", "float32")
    with pytest.raises(InputError, match=message):
        check_gptq(open_gptq(quantized))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, r"bits = 5: no kernel serves them; there are kernels for \(2, 3, 4, 8\)"),
        ({"group_size": 0}, "group_size = 0: served are multiples of 8, and -1"),
        ({"group_size": 48}, r"group_size = 48 has to divide the inputs"),
        ({"quant_method": "awq"}, "quant_method = 'awq': only gptq is served"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin': served are gptq, gptq_v2"),
    ],
)
def test_settings_that_are_not_served_are_named(quantized: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"].update(change)
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_causal_lm(quantized, "cpu", "float32")


def test_a_file_that_was_cut_off_is_named(quantized: Path) -> None:
    file = quantized / "model.safetensors"
    data = file.read_bytes()
    for size in (len(data) - 100, 20, 4):
        file.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"model\.safetensors: cannot be read, it is cut off or damaged"):
            load_causal_lm(quantized, "cpu", "float32")
    file.unlink()
    with pytest.raises(InputError, match=r"no \.safetensors file; pickled weights \(\.pt, \.bin\) are not opened"):
        load_causal_lm(quantized, "cpu", "float32")
