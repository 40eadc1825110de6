"""`params.yaml`, its presets and what is said about bad values."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatloom.config import load_params, load_preset, read_yaml, validate_params
from chatloom.errors import InputError
from tests.conftest import ROOT

DEFAULT = ROOT / "params.yaml"
PRESETS = sorted((ROOT / "params").glob("*.yaml"))


def test_the_presets_that_are_promised_exist() -> None:
    assert {path.stem for path in PRESETS} >= {"smoke", "alpaca-104k", "llama-7b", "llama-13b"}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid_and_changes_something(preset: Path) -> None:
    assert load_preset(preset, DEFAULT) != read_yaml(DEFAULT)


def test_the_llama_7b_preset_is_the_published_recipe() -> None:
    params = validate_params(load_preset(ROOT / "params/llama-7b.yaml", DEFAULT), "llama-7b")
    sft = params.train_sft
    assert (sft.optimizer.lr, sft.batch_size, sft.accumulation_steps) == (2e-5, 4, 8)
    assert (sft.parallel.strategy, sft.parallel.num_processes) == ("colossalai_zero2", 4)
    assert params.train_ppo.parallel.num_processes == 8
    assert params.quantize.group_size == 128


def test_a_preset_overrides_single_keys_and_replaces_lists_and_other_kinds(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "train_sft: {optimizer: {lr: 0.5}}\nbase_model: {source: {kind: path, path: /m}, stop_tokens: [</s>]}\n",
        encoding="utf-8",
    )
    merged, default = load_preset(preset, DEFAULT), read_yaml(DEFAULT)
    assert merged["train_sft"]["optimizer"] == default["train_sft"]["optimizer"] | {"lr": 0.5}
    assert merged["base_model"]["source"] == {"kind": "path", "path": "/m"}
    assert merged["base_model"]["stop_tokens"] == ["</s>"]


def test_overrides_come_last_and_one_key_at_a_time() -> None:
    default = read_yaml(DEFAULT)
    smoke = ROOT / "params/smoke.yaml"
    merged = load_preset(smoke, DEFAULT, ["train_sft.max_steps=3", "base_model.source={kind: path, path: /m}"])
    assert merged["train_sft"]["max_steps"] == 3
    assert merged["base_model"]["source"] == {"kind": "path", "path": "/m"}
    assert merged["train_gold"] == load_preset(smoke, DEFAULT)["train_gold"]
    only = load_preset(None, DEFAULT, ["train_sft.parallel.strategy=ddp"])
    assert only["train_sft"]["parallel"] == default["train_sft"]["parallel"] | {"strategy": "ddp"}
    assert only["train_ppo"] == default["train_ppo"]  # it shares an alias with train_sft


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train_sft.seed", "write key=value"),
        ("train_sft..seed=1", "write key=value"),
        ("train_sft.seed=[", "its value is not valid YAML"),
        ("train_sft.seed=much", "override train_sft.seed=much: train_sft.seed = 'much': "),
        ("train_stf.seed=1", "train_stf: unknown key; did you mean 'train_sft'"),
    ],
)
def test_a_wrong_override_is_explained(override: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        load_preset(None, DEFAULT, [override])


def set_in(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    *path, last = key.split(".")
    inside: Any = changed
    for part in path:
        inside = inside[int(part)] if isinstance(inside, list) else inside[part]
    inside[last] = value
    return changed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_ppo.clip_rang", 0.1, "p.yaml: train_ppo.clip_rang: unknown key; did you mean 'clip_range'?"),
        ("train_sftt", {}, "p.yaml: train_sftt: unknown key; did you mean 'train_sft'?"),
        ("raw_data.sources.0.pathh", "x", "p.yaml: raw_data.sources.0.pathh: unknown key; did you mean 'path'?"),
        ("base_model.source.shasum", "x", "p.yaml: base_model.source.shasum: unknown key"),
        ("train_sft.optimizer.lr", "fast", "p.yaml: train_sft.optimizer.lr = 'fast': input should be a valid number"),
        ("train_sft.batch_size", 0, "p.yaml: train_sft.batch_size = 0: input should be greater than 0"),
        ("train_sft.batch_size", 2.5, "p.yaml: train_sft.batch_size = 2.5: input should be a valid integer"),
        ("train_ppo.lora.base_bits", 8, "p.yaml: train_ppo.lora.base_bits = 8: input should be 4"),
        ("train_sft.lora.base_bits", 4, "lora.base_bits = 4 and method = 'full': only weights that do not train"),
        ("train_ppo.num_minibatches", 5, "num_minibatches = 5 does not divide rollout_batch = 16"),
        ("train_ppo.ptx_batch", 0, "p.yaml: train_ppo: ptx_coef above 0 needs a ptx_batch above 0"),
        ("train_ppo.checkpoint_every", 0, "p.yaml: train_ppo.checkpoint_every = 0: input should be greater than 0"),
        ("train_sft.parallel.num_processes", 4, "needs a parallel.strategy other than 'none'"),
        (
            "train_ppo.parallel",
            {"strategy": "ddp", "num_processes": 3, "tensor_size": 1, "hostfile": None},
            "parallel.num_processes = 3 does not divide rollout_batch / num_minibatches",
        ),
        (
            "train_sft.parallel",
            {"strategy": "colossalai_hybrid", "num_processes": 4, "tensor_size": 3, "hostfile": None},
            "parallel.tensor_size = 3 does not divide parallel.num_processes = 4; give a divisor",
        ),
        (
            "train_sft.parallel",
            {"strategy": "colossalai_zero2", "num_processes": 4, "tensor_size": 2, "hostfile": None},
            "parallel.tensor_size = 2 with parallel.strategy = 'colossalai_zero2': give colossalai_hybrid a size",
        ),
        ("quantize.bits", 5, "p.yaml: quantize.bits = 5: input should be 2, 3, 4 or 8"),
        ("prepare_data.split_weights", {"sft": 1}, "split_weights lacks ['eval', 'ppo', 'ptx', 'reward']"),
        ("train_ppo.generation.kind", "tgi", "train_ppo.generation: input tag 'tgi' found using 'kind' does not match"),
        ("compare.generation", {"kind": "vllm"}, "compare.generation.gpu_memory_utilization: missing; add it"),
        ("compare.generation", {"kind": "vllm", "gpu_memory_utilization": 1.5}, "should be less than 1"),
        ("register.gates.0.min", None, "gate on 'reward/accuracy' has neither min nor max"),
        ("register.licenses.alowed", [], "p.yaml: register.licenses.alowed: unknown key; did you mean 'allowed'?"),
        ("register.gates.0.minimum", 1, "p.yaml: register.gates.0.minimum: unknown key; did you mean 'min'?"),
        ("compare.ranked_by", ["judge"], "compare.judge has to be set where compare.ranked_by names it"),
        ("compare.ranked_by", [], "p.yaml: compare.ranked_by = []: "),
        ("prepare_data.cleaning.pii", "fix", "p.yaml: prepare_data.cleaning.pii = 'fix': input should be 'drop'"),
        ("raw_data.sources.0.hf", "a/b:train", "source 'starter' needs exactly one of path, url, hf"),
    ],
)
def test_bad_values_name_key_value_and_remedy(key: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_params(set_in(read_yaml(DEFAULT), key, value), "p.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("temperature", [0.005, 2.5])
@pytest.mark.parametrize("section", ["compare", "train_ppo"])
def test_a_temperature_that_vllm_would_change_or_refuse(section: str, temperature: float) -> None:
    def sampled_at(temperature: float) -> dict[str, Any]:
        key, value = ("temperatures", [1.0, temperature]) if section == "compare" else ("temperature", temperature)
        return set_in(read_yaml(DEFAULT), f"{section}.{key}", value)

    values = sampled_at(temperature)
    validate_params(values, "p.yaml")
    vllm = {"kind": "vllm", "gpu_memory_utilization": 0.4}
    values[section]["generation"] = vllm
    with pytest.raises(InputError, match=f"p.yaml: {section}: temperature = {temperature}: vLLM samples at 0.01 to 2"):
        validate_params(values, "p.yaml")
    validate_params(set_in(sampled_at(0.7), f"{section}.generation", vllm), "p.yaml")


def test_a_missing_key_is_named() -> None:
    values = read_yaml(DEFAULT)
    del values["train_ppo"]["kl"]["target"]
    with pytest.raises(InputError, match=r"train_ppo\.kl\.target: missing"):
        validate_params(values, "p.yaml")


def test_every_error_is_listed_and_not_only_the_first() -> None:
    values = set_in(set_in(read_yaml(DEFAULT), "quantize.bits", 5), "evaluate.seedd", 1)
    with pytest.raises(InputError) as caught:
        validate_params(values, "p.yaml")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1\n", "expected a mapping of sections, found list"), (None, "no such file")],
)
def test_unreadable_files_are_named(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_params(path)


def test_every_value_has_one_home() -> None:
    """No field has a default in code, but a data source's place: it is one of three, so those may be absent."""
    from chatloom import config

    optional = {"path", "url", "sha256", "hf"}
    for section in vars(config).values():
        if isinstance(section, type) and issubclass(section, config.Section):
            for name, field in section.model_fields.items():
                assert field.is_required() or (section is config.DataSource and name in optional), (section, name)


def test_yaml_numbers_in_scientific_notation_are_numbers() -> None:
    # YAML 1.1 reads 1e-5 as text; the files write 1.0e-5.
    for path in (DEFAULT, *PRESETS):
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert "e-" not in " ".join(value for value in _strings(text) if value[:1].isdigit())


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _strings(inner)]
    return [value] if isinstance(value, str) else []


def test_vllm_does_not_sample_from_rounded_weights() -> None:
    values = set_in(read_yaml(DEFAULT), "train_ppo.generation", {"kind": "vllm", "gpu_memory_utilization": 0.4})
    with pytest.raises(InputError, match=r"base_bits = 4 and generation\.kind = 'vllm'.*\{kind: native\}"):
        validate_params(set_in(values, "train_ppo.lora.base_bits", 4), "p.yaml")


def test_vllm_samples_in_one_process() -> None:
    values = set_in(read_yaml(DEFAULT), "train_ppo.generation", {"kind": "vllm", "gpu_memory_utilization": 0.4})
    values = set_in(
        values, "train_ppo.parallel", {"strategy": "ddp", "num_processes": 2, "tensor_size": 1, "hostfile": None}
    )
    with pytest.raises(InputError, match=r"num_processes = 2 and generation\.kind = 'vllm'.*\{kind: native\}"):
        validate_params(values, "p.yaml")
