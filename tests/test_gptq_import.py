"""`chatloom import-gptq`: checkpoints as other projects leave them, and what is wrong with some."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from chatloom.cli import app
from chatloom.errors import InputError
from chatloom.models.checkpoint import load_causal_lm
from chatloom.models.gptq_import import Chat, import_gptq
from tests.conftest import ROOT
from tests.gptq_factory import write_gptq

TEMPLATE = ROOT / "data/templates/chatml.jinja"
IDS = torch.tensor([[1, 20, 35, 7, 150, 42]])


@pytest.mark.parametrize("less_one", [True, False], ids=["v1", "v2"])
def test_a_single_file_beside_its_base_model_becomes_a_folder_to_serve(
    wide_checkpoint: Path, tmp_path: Path, less_one: bool
) -> None:
    """As GPTQ-for-LLaMa leaves it: only the weights, whose name says the rest."""
    quantized = write_gptq(wide_checkpoint, tmp_path / "quantized", less_one=less_one)
    source = tmp_path / "download" / "model-4bit-32g.safetensors"
    source.parent.mkdir()
    shutil.copy(quantized / "model.safetensors", source)
    out = tmp_path / "imported"
    settings = f"--bits 4 --group-size 32 --format {'gptq' if less_one else 'gptq_v2'}".split()
    places = [str(source), str(out), "--base", str(wide_checkpoint), "--chat-template", str(TEMPLATE)]
    done = CliRunner().invoke(app, ["import-gptq", *places, *settings])
    assert done.exit_code == 0, done.output
    assert "14 layers of 4 bits, group size 32" in done.output
    imported, plain = (load_causal_lm(folder, "cpu", "float32") for folder in (out, tmp_path / "plain"))
    torch.testing.assert_close(imported.model(IDS).logits, plain.model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert imported.stop_ids == (imported.tokenizer.eos_token_id,)


def test_a_folder_of_autogptq_says_all_itself(wide_checkpoint: Path, tmp_path: Path) -> None:
    source = write_gptq(wide_checkpoint, tmp_path / "quantized")
    config = json.loads((source / "config.json").read_text())
    told = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    (source / "quantize_config.json").write_text(json.dumps({key: told[key] for key in ("bits", "group_size")}))
    (source / "model.safetensors").rename(source / "gptq_model-4bit-32g.safetensors")
    chat = Chat(stop_tokens=["<|im_end|>", "<|endoftext|>"], pad_token="<file_sep>")
    imported = import_gptq(source, tmp_path / "out", chat)
    assert (imported.num_layers, imported.checkpoint.format) == (14, "gptq")
    loaded = load_causal_lm(tmp_path / "out", "cpu", "float32")
    assert loaded.stop_ids == tuple(loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


def test_what_is_wrong_is_said_and_nothing_is_left(wide_checkpoint: Path, tmp_path: Path) -> None:
    source, out = write_gptq(wide_checkpoint, tmp_path / "quantized"), tmp_path / "out"
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(InputError, match="cannot be read, it is cut off or damaged"):
        import_gptq(source, out, Chat())
    (source / "model.safetensors").write_bytes(data)
    for chat, message in (
        (Chat(stop_tokens=["<stop>"]), "--stop-token <stop>: is not in the vocabulary"),
        (Chat(pad_token="<|im_end|>"), "no pad token that is no stop token: give --pad-token"),
        (Chat(template=tmp_path / "none.jinja"), "--chat-template .*none.jinja: no such file"),
    ):
        with pytest.raises(InputError, match=message.replace("|", r"\|")):
            import_gptq(source, out, chat)
    with pytest.raises(InputError, match="bits = 16: no kernel serves them"):
        import_gptq(source, out, Chat(), settings={"bits": 16})
    (source / "model.pt").touch()
    with pytest.raises(InputError, match=r"model\.pt: pickled weights can run code"):
        import_gptq(source / "model.pt", out, Chat())
    with pytest.raises(InputError, match=r"no config\.json in .*: give --base"):
        import_gptq(Path(shutil.copy(source / "model.safetensors", tmp_path)), out, Chat())
    with pytest.raises(InputError, match=r"says its bits: give --bits"):
        import_gptq(tmp_path / "model.safetensors", out, Chat(), base=wide_checkpoint)
    with pytest.raises(InputError, match="no layer has a qweight"):
        import_gptq(wide_checkpoint, out, Chat(), settings={"bits": 4, "group_size": 32})
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    assert len(load_file(source / "model.safetensors")) > 14
