"""The whole import: ColossalChat's files in, rows that `raw_data` reads, a template and a preset out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from chatloom.cli import app
from chatloom.colossalchat.importer import import_colossalchat
from chatloom.colossalchat.lora import read_lora
from chatloom.config import Params, load_preset, validate_params
from chatloom.data.raw import ingest, read_raw
from chatloom.data.schemas import RawRow
from chatloom.data.templates import encode_row
from chatloom.errors import InputError
from tests.colossalchat.factories import (
    CHATML,
    LORA,
    OPENING,
    TO_ANSWER,
    TO_QUESTION,
    assistant,
    human,
    preference_columns,
    prompt_columns,
    sft_columns,
    write_json,
)
from tests.conftest import ROOT
from tests.data.factories import STOP_ID, write_jsonl

SFT = [(OPENING, False), ("Hi", False), (TO_ANSWER, False), ("Hello<|im_end|>", True)]
SECOND = [(TO_QUESTION, False), ("2+2?", False), (TO_ANSWER, False), ("4<|im_end|>", True)]
TURNS = [human("Hi"), assistant("Hello"), human("2+2?"), assistant("4")]
USER = {"role": "user", "content": "Hi"}
CONTEXT = [USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2+2?"}]


def preset_of(out: Path) -> Params:
    return validate_params(load_preset(out / "params.yaml", ROOT / "params.yaml"), "imported")


def ingested(out: Path, tmp_path: Path) -> list[RawRow]:
    """The rows that the stage raw_data makes of an import with its preset."""
    raw = tmp_path / "raw"
    raw.mkdir()
    ingest(preset_of(out).raw_data, raw)
    return list(read_raw(raw))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["import-colossalchat", *map(str, arguments)])


# --- round trips ----------------------------------------------------------------------------------------------------


def test_prepared_data_comes_back_as_the_conversations_it_was_made_of(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    context = [OPENING, "Hi", TO_ANSWER]
    sft = {"id": "en-1", "messages": TURNS, **sft_columns(tokenizer, *SFT, *SECOND)}
    write_jsonl(tmp_path / "sft/jsonl/part-00000.jsonl", [sft])
    # The second round was left out at --max_length: the text still has it.
    short = {"messages": [human("你好"), *TURNS[1:]], **sft_columns(tokenizer, *SFT)}
    Dataset.from_list([short]).save_to_disk(tmp_path / "sft/arrow/part-00000")
    prompt = {"messages": TURNS, **prompt_columns(tokenizer, *context)}
    DatasetDict({"train": Dataset.from_list([prompt])}).save_to_disk(tmp_path / "prompt")
    preference = {"context": [human("Hi")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    preference |= preference_columns(tokenizer, context, "good<|im_end|>", "bad<|im_end|>")
    Dataset.from_list([preference]).save_to_disk(tmp_path / "preference")

    out = tmp_path / "out"
    data = [tmp_path / name for name in ("sft/jsonl", "sft/arrow", "prompt", "preference")]
    report = import_colossalchat(data, out, license="MIT")
    assert report.rows == {"instructions": 2, "prompts": 1, "preferences": 1}
    assert not report.drops.total
    rows = ingested(out, tmp_path)
    assert [(row.id, row.lang, row.messages, row.responses, row.license, row.splits) for row in rows] == [
        ("en-1", "en", CONTEXT, ["4"], "MIT", ["sft", "ptx", "eval"]),
        (
            "colossalchat-instructions-2",
            "zh",
            [{"role": "user", "content": "你好"}, *CONTEXT[1:]],
            ["4"],
            "MIT",
            ["sft", "ptx", "eval"],
        ),
        ("colossalchat-preferences-1", "en", [USER], ["good", "bad"], "MIT", ["reward"]),
        ("colossalchat-prompts-1", "en", CONTEXT, [], "MIT", ["ppo"]),
    ]


def test_tokens_alone_come_back_as_the_same_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, base_model: Path
) -> None:
    columns = sft_columns(tokenizer, *SFT, *SECOND)
    Dataset.from_list([columns]).save_to_disk(tmp_path / "arrow/part-00000")
    template = write_json(tmp_path / "chatml.json", CHATML)
    out = tmp_path / "out"
    import_colossalchat([tmp_path / "arrow"], out, template=template, base_model=base_model)
    [row] = ingested(out, tmp_path)
    assert (row.messages, row.responses) == (CONTEXT, ["4"])

    params = preset_of(out).base_model
    assert (params.source.kind, params.pad_token, params.stop_tokens) == ("path", None, ["<|im_end|>"])
    assert params.chat_template == str(out / "chat_template.jinja")
    ours = type(tokenizer).from_pretrained(base_model)
    ours.chat_template = Path(params.chat_template).read_text(encoding="utf-8")
    encoded = encode_row(ours, STOP_ID, row)
    assert [*encoded.prompt_ids, *encoded.response_ids[0]] == columns["input_ids"]
    loss = [*encoded.prompt_loss_mask, *([True] * len(encoded.response_ids[0]))]
    assert loss == [label != -100 for label in columns["labels"]]


def test_the_older_versions_files(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text('"act","prompt"\n"Poet","Write ""well"".\nNow."\n"Cook","Cook"\n', "utf-8")
    write_json(tmp_path / "sft.json", [{"instruction": "Add", "input": "2 2", "output": "4", "id": 9}])
    write_jsonl(tmp_path / "lora_sft_data.jsonl", [[USER, {"role": "assistant", "content": "Hello"}]])
    (tmp_path / "more.txt").write_text("One\nTwo\n", encoding="utf-8")
    out = tmp_path / "out"
    files = ("prompts.csv", "sft.json", "lora_sft_data.jsonl", "more.txt")
    assert import_colossalchat([tmp_path / name for name in files], out).rows == {"prompts": 4, "instructions": 2}
    assert [(row.messages[0]["content"], row.responses, row.splits) for row in ingested(out, tmp_path)] == [
        # No preferences were imported, so that the answers serve for them.
        ("Add\n\n2 2", ["4"], ["sft", "reward", "ptx", "eval"]),
        ("Hi", ["Hello"], ["sft", "reward", "ptx", "eval"]),
        ('Write "well".\nNow.', [], ["ppo"]),
        ("Cook", [], ["ppo"]),
        ("One", [], ["ppo"]),
        ("Two", [], ["ppo"]),
    ]


def test_paths_below_data_own_are_named_as_every_workspace_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_model: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    template = write_json(tmp_path / "chatml.json", CHATML)
    import_colossalchat([Path("a.jsonl")], Path("data/own/cc"), template=template, base_model=base_model)
    params = preset_of(tmp_path / "data/own/cc")
    assert params.raw_data.sources[0].path == "data/own/cc/instructions.jsonl"
    assert params.base_model.chat_template == "data/own/cc/chat_template.jinja"


# --- LoRA -----------------------------------------------------------------------------------------------------------


def test_lora(tmp_path: Path) -> None:
    import_colossalchat([], tmp_path / "out", lora=write_json(tmp_path / "lora_config.json", LORA))
    params = preset_of(tmp_path / "out")
    for stage in (params.train_sft, params.train_reward, params.train_ppo):
        assert stage.method == "lora"
        assert stage.lora.model_dump() == {
            "rank": 8,
            "alpha": 16,
            "target_modules": ["q_proj", "v_proj"],
            "layers": None,
            "base_bits": None,
        }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_lora_dropout": 0.0}, []),
        ({}, ["linear_lora_dropout = 0.1"]),
        ({"embedding_lora_dropout": 0.2}, ["linear_lora_dropout", "embedding_lora_dropout = 0.2"]),
        ({"lora_train_bias": "all", "linear_lora_dropout": 0}, ["lora_train_bias = 'all'"]),
        ({"lora_initialization_method": "PiSSA", "linear_lora_dropout": 0}, ["lora_initialization_method = 'PiSSA'"]),
        ({"target_modules": ["q_proj", "embed_tokens"], "linear_lora_dropout": 0}, ["embed_tokens is left out"]),
        ({"target_modules": None, "linear_lora_dropout": 0}, ["target_modules = null"]),
    ],
)
def test_what_has_no_counterpart_is_said(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    notes: list[str] = []
    params = read_lora(write_json(tmp_path / "l.json", LORA | changes), notes)
    assert params["lora"]["target_modules"][0] == "q_proj"
    assert "embed_tokens" not in params["lora"]["target_modules"]
    assert len(notes) == len(words)
    for note, word in zip(notes, words, strict=True):
        assert note.startswith(f"{tmp_path / 'l.json'}: ")
        assert word in note


def test_rank_zero_is_full_training(tmp_path: Path) -> None:
    assert read_lora(write_json(tmp_path / "l.json", {}), []) == {"method": "full"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 8}, "l.json: rank: unknown key; ColossalChat's are r, lora_alpha"),
        ({"r": "many"}, "l.json: r = 'many': input should be a valid integer"),
        ({"r": 8, "lora_alpha": 0}, "l.json: lora_alpha = 0: input should be greater than 0"),
        ({"r": 8, "target_modules": ["embed_tokens"]}, "l.json: target_modules = ['embed_tokens']: "),
        ({"r": 8, "target_modules": "q_proj"}, "l.json: target_modules = 'q_proj': input should be a valid list"),
    ],
)
def test_unusable_lora_configs_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_lora(write_json(tmp_path / "l.json", config), [])
    assert message in str(caught.value)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_what_it_left_out(tmp_path: Path, base_model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": [{"from": "robot", "content": "x"}]}])
    template = write_json(tmp_path / "chatml.json", CHATML | {"reward_signal": ["+"]})
    out = tmp_path / "out"
    result = run(path, "--out", out, "--template", template, "--base-model", base_model)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{out}/instructions.jsonl: 1 rows",
        f"{out}/params.yaml: copy it to params/colossalchat.yaml, then: make repro PRESET=colossalchat",
    ]
    lines = result.stderr.splitlines()
    assert lines[0] == (
        f"left out, unknown_role: 1 rows, as {path}:2: messages[0] has the role 'robot', expected one of "
        "user, human, assistant, gpt, system"
    )
    assert lines[1] == f"note: {template}: keys without a place here: reward_signal"
    assert sorted(file.name for file in out.iterdir()) == ["chat_template.jinja", "instructions.jsonl", "params.yaml"]


def test_the_preset_says_what_it_left_out(tmp_path: Path) -> None:
    run("--out", tmp_path / "out", "--lora", write_json(tmp_path / "lora.json", LORA))
    head = (tmp_path / "out/params.yaml").read_text(encoding="utf-8").splitlines()[:2]
    assert head == [
        "# Written by `chatloom import-colossalchat`. A preset: put it into params/.",
        f"# {tmp_path}/lora.json: linear_lora_dropout = 0.1: adapters have no dropout here",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to import"),
        (["{tmp}/nowhere.jsonl"], "{tmp}/nowhere.jsonl: no such file or folder"),
        (["{tmp}/broken.jsonl"], "{tmp}/broken.jsonl:1: not valid JSON"),
        (["{tmp}/empty.jsonl"], "{tmp}/empty.jsonl: no rows"),
        (["{tmp}/tokens.jsonl"], "{tmp}/tokens.jsonl:1: it holds tokens and no text: give --template and --base-model"),
        (["{tmp}/arrow"], "{tmp}/arrow: `datasets` cannot load it"),
        (["{tmp}/good.jsonl", "--template", "{tmp}/t.json"], "--template and --base-model go together"),
        (["{tmp}/good.jsonl", "--out", "{tmp}"], "{tmp}: exists already"),
        (["--lora", "{tmp}/nowhere.json"], "{tmp}/nowhere.json: no such file"),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_written(arguments: list[str], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", [{"messages": TURNS}])
    write_jsonl(tmp_path / "tokens.jsonl", [{"input_ids": [1, 2], "labels": [1, 2]}])
    (tmp_path / "broken.jsonl").write_text('{"messages": \n', encoding="utf-8")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "arrow").mkdir()
    write_json(tmp_path / "arrow/state.json", {})
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    result = run(*given)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"chatloom: {message.replace('{tmp}', str(tmp_path))}")
    assert not (tmp_path / "out").exists()


def test_rows_are_json_lines_in_the_ranked_and_the_prompt_format(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"lang": "fr", "messages": TURNS}, {"messages": TURNS[:1]}])
    import_colossalchat([tmp_path / "a.jsonl"], tmp_path / "out")
    instructions = (tmp_path / "out/instructions.jsonl").read_text(encoding="utf-8")
    assert json.loads(instructions) == {"lang": "fr", "messages": CONTEXT, "responses": ["4"]}
    assert json.loads((tmp_path / "out/prompts.jsonl").read_text(encoding="utf-8")) == {"messages": [USER]}
