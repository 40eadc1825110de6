"""The page for people who come from ColossalChat names only what exists here, and leaves no flag of its scripts out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import yaml

from chatloom.cli import app
from chatloom.config import Params, _fields, load_preset, read_yaml, validate_params
from chatloom.errors import InputError
from chatloom.serving.schema import ChatRequest
from tests.conftest import ROOT
from tests.test_config import set_in

PAGE = (ROOT / "docs/from-colossalchat.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES = ("train_sft", "train_reward", "train_ppo")
PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]

# The flags that the scripts' own parsers define, by the heading of the page that has them.
PARALLEL = "tp pp sp enable_sequence_parallelism zero_stage zero_cpu_offload sp_mode"
LOGS = "log_dir use_wandb"
SFT = f"""
    plugin grad_clip weight_decay warmup_steps {PARALLEL} disable_loss_mask pretrain tokenizer_dir dataset eval_dataset
    checkpoint_path save_path max_epochs batch_size max_len mixed_precision lora_config save_interval lr config_file
    accumulation_steps {LOGS} grad_checkpoint use_flash_attn microbatch_size
    lora_rank lora_train_bias merge_lora_weights
    strategy model tokenizer max_datasets_size need_optim_ckpt log_interval
"""
LORA_FINETUNE = f"""
    pretrained dataset plugin save_dir tensorboard_dir config_file num_epochs accumulation_steps batch_size lr
    max_length mixed_precision grad_clip weight_decay warmup_steps use_grad_checkpoint use_flash_attn {PARALLEL} ep
    microbatch_size lora_rank lora_alpha
"""
REWARD = f"""
    plugin grad_clip weight_decay warmup_steps {PARALLEL} pretrain tokenizer_dir dataset eval_dataset checkpoint_path
    config_file save_dir max_length max_epochs batch_size mixed_precision loss_fn lora_config save_interval lr
    accumulation_steps {LOGS} grad_checkpoint use_flash_attn lora_rank lora_train_bias merge_lora_weights
    strategy model tokenizer model_path need_optim_ckpt subset max_datasets_size save_path max_len test
"""
PPO = f"""
    prompt_dataset ptx_dataset plugin conversation_template_config grad_clip weight_decay warmup_steps tokenizer_dir
    {PARALLEL} pretrain rm_pretrain checkpoint_path critic_checkpoint_path rm_checkpoint_path save_path num_episodes
    num_collect_steps num_update_steps save_interval train_batch_size experience_batch_size ptx_batch_size lora_config
    mixed_precision accumulation_steps lr critic_lr kl_coef ptx_coef disable_loss_mask max_length max_seq_len {LOGS}
    grad_checkpoint use_flash_attn lora_rank lora_train_bias merge_lora_weights
    pretrain_dataset max_datasets_size strategy model tokenizer reward_model_tokenizer rm_model rm_path need_optim_ckpt
    save_per_num_episodes max_input_len prompt_path max_timesteps update_timesteps max_epochs
"""
PREPARE = """
    type data_input_dirs tokenizer_dir conversation_template_config data_cache_dir data_jsonl_output_dir
    data_arrow_output_dir max_length num_spliced_dataset_bins num_samples_per_datafile
    dataset_path save_path sample_size dataset
"""
INFERENCE = """
    model_path tokenizer_path conversation_template_config model_max_length max_new_tokens io
    model pretrain input max_length
"""
SERVER = """
    pretrained tokenizer_path quant gptq_checkpoint gptq_group_size http_host http_port profanity_file
    history max_new_tokens temperature top_p top_k repetition_penalty
"""
RUN = """
    host hostfile include exclude num_nodes nproc_per_node master_port master_addr extra_launch_args ssh-port m
"""
LORA_CONFIG = """
    r lora_alpha target_modules linear_lora_dropout embedding_lora_dropout lora_train_bias lora_initialization_method
"""
TEMPLATE = "chat_template system_message end_of_assistant stop_ids"
SHARED = "Flags that the training scripts share"
SECTIONS = {
    "SFT": (SFT, ["SFT", SHARED]),
    "SFT of lora_finetune.py": (LORA_FINETUNE, ["SFT", SHARED]),
    "reward": (REWARD, ["Reward model", SHARED]),
    "PPO": (PPO, ["PPO", SHARED]),
    "preparation": (PREPARE, ["Preparation"]),
    "inference": (INFERENCE, ["In the terminal"]),
    "server": (SERVER, ["Server"]),
    "colossalai run": (RUN, ["`colossalai run`"]),
    "LoRA config and template": (LORA_CONFIG + TEMPLATE, ["Bring your files"]),
}


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Each table as rows of cells by the heading of their column."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        for cells in lines:
            assert len(cells) == len(lines[0]), cells
        yield [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def section(heading: str) -> str:
    parts = [part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if part.startswith(heading)]
    assert len(parts) == 1, heading
    return parts[0]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def here() -> Iterator[str]:
    """Everything in a column `here` of the page or the README, for each stage that it stands for."""
    for row in (row for text in (PAGE, README) for table in tables(text) for row in table if "here" in row):
        assert code(row["here"]) or row["here"] == "—", row
        for token in code(row["here"]):
            yield from {token.replace("<stage>", stage) for stage in STAGES}


def keys_in_the_text() -> Iterator[str]:
    """Whatever looks like a params key, also in notes and paragraphs."""
    for token in re.findall(r"`([^`\n]+)`", PAGE):
        for stage in STAGES:
            key = token.replace("<stage>", stage)
            if key.split(".")[0] in _fields(Params) and not key.endswith(".py"):
                yield key


def require_key(token: str) -> None:
    """A key, or `key: value` with a value that it takes."""
    key, _, value = token.partition(": ")
    inside: Any = Params
    for part in key.split("."):
        fields = _fields(inside)
        assert part in fields, token
        inside = fields[part].annotation
    if value:
        values = read_yaml(ROOT / "params.yaml")
        key = key.replace("sources.", "sources.0.")
        try:
            validate_params(set_in(values, key, yaml.safe_load(value)), "params.yaml")
        except InputError as error:
            raise AssertionError(token) from error


def require_command(text: str) -> None:
    match shlex.split(text.removeprefix(".venv/bin/")):
        case ["chatloom", name, *options]:
            commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
            assert name in commands
            known = {flag for parameter in commands[name].params for flag in parameter.opts}
            assert {word for word in options if word.startswith("--")} <= known
        case ["make", target, *variables]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)
            for variable in variables:
                name, value = variable.split("=")
                assert name == "PRESET"
                load_preset(ROOT / f"params/{value}.yaml", ROOT / "params.yaml")
        case ["python", "-m", "tasks.reproduce", "--preset", preset, "--stage", stage]:
            load_preset(ROOT / f"params/{preset}.yaml", ROOT / "params.yaml")
            assert stage in PIPELINE
        case _:
            raise AssertionError(f"no command known here: {text}")


@pytest.mark.parametrize("token", sorted(set(here())))
def test_what_the_tables_name_exists(token: str) -> None:
    outs = {out for stage in PIPELINE.values() for out in stage["outs"]}
    if token.removeprefix(".venv/bin/").split(" ")[0] in ("chatloom", "make", "python"):
        require_command(token)
    elif token.startswith("POST "):
        path = re.escape(token.removeprefix("POST "))
        assert re.search(rf'\.post\(\s*"{path}"', (ROOT / "chatloom/serving/api.py").read_text("utf-8"))
    elif token.split(".")[0] in _fields(Params):
        require_key(token)
    else:
        assert token in outs or token in ChatRequest.model_fields or (ROOT / token).is_file()


def test_params_keys_in_the_text_exist() -> None:
    keys = set(keys_in_the_text())
    assert len(keys) > 60
    for key in keys:
        require_key(key)


@pytest.mark.parametrize("script", SECTIONS)
def test_every_flag_has_a_row(script: str) -> None:
    flags, headings = SECTIONS[script]
    rows = [row for heading in headings for table in tables(section(heading)) for row in table if "here" in row]
    named = {token.lstrip("-") for row in rows for token in code(next(iter(row.values())))}
    assert set(flags.split()) <= named


def test_the_page_names_no_flag_that_no_script_has() -> None:
    known = {flag for flags, _ in SECTIONS.values() for flag in flags.split()}
    for row in (row for table in tables(PAGE) for row in table if "flag" in row):
        assert {token.lstrip("-") for token in code(row["flag"])} <= known, row
        assert row["in"] in ("new", "old", "both"), row


def test_every_strategy_is_one_of_ours() -> None:
    rows = [row for table in tables(section("Strategies")) for row in table]
    assert {token for row in rows for token in code(row["`--plugin` (new)"])} == {
        *("ddp", "zero2", "zero2_cpu", "gemini", "gemini_auto", "3d", "moe")
    }
    assert {token for row in rows for token in code(row["`--strategy` (old)"])} == {
        *("naive", "ddp", "colossalai_gemini", "colossalai_zero2", "colossalai_zero2_cpu")
    }


def test_the_example_on_the_page_is_a_command() -> None:
    example = re.search(r"^chatloom (?:.*\\\n)*.*$", PAGE, re.MULTILINE)
    assert example is not None
    require_command(example.group().replace("\\\n", " "))
