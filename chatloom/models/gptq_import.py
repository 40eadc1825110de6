"""GPTQ checkpoints of other projects, made ready to be served: checked tensor by tensor, with a chat around them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from chatloom.errors import InputError
from chatloom.files import atomic_dir, read_json, write_json
from chatloom.models.gptq_checkpoint import INDEX, NO_CHECKPOINT, GptqCheckpoint, check_gptq, open_gptq


@dataclass(frozen=True)
class Chat:
    """What a chat needs and a checkpoint may lack; None and nothing take what its tokenizer has."""

    template: Path | None = None
    """A Jinja file."""
    stop_tokens: Sequence[str] = ()
    pad_token: str | None = None


@dataclass(frozen=True)
class Imported:
    checkpoint: GptqCheckpoint
    num_layers: int
    """Quantized linear layers."""


def import_gptq(
    source: Path, out: Path, chat: Chat, *, base: Path | None = None, settings: dict[str, Any] | None = None
) -> Imported:
    """Copy the checkpoint `source` to the new folder `out`, which appears only if every tensor is as it has to be.

    Args:
        source: a folder, or one .safetensors file.
        base: the folder of the model that was quantized: its config.json and tokenizer, where `source` has none.
        settings: `bits`, `group_size` and `checkpoint_format`, over what the checkpoint says of itself.

    Raises:
        InputError: for what is missing, damaged, cut off, or of a kind that is not served.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; name a new folder")
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    with atomic_dir(out) as folder:
        _copy_weights(source, folder)
        write_json(folder / "config.json", _config(source, base, settings or {}))
        checkpoint = open_gptq(folder)
        num_layers = check_gptq(checkpoint)
        _save_chat(_place(source, base, ("tokenizer.json", "tokenizer.model")), folder, chat)
    return Imported(open_gptq(out), num_layers)


def _copy_weights(source: Path, folder: Path) -> None:
    if source.is_file():
        if source.suffix != ".safetensors":
            raise InputError(f"{source}: pickled weights can run code when they are opened: convert to .safetensors")
        shutil.copyfile(source, folder / "model.safetensors")
        return
    for file in source.glob("*.safetensors"):
        shutil.copyfile(file, folder / file.name)
    if (source / INDEX).is_file():
        shutil.copyfile(source / INDEX, folder / INDEX)


def _config(source: Path, base: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    place = _place(source, base, ("config.json",))
    config = read_json(place / "config.json", NO_CHECKPOINT)
    told = config.get("quantization_config")
    beside = (source if source.is_dir() else source.parent) / "quantize_config.json"
    if told is None and beside.is_file():
        told = read_json(beside, NO_CHECKPOINT)
    told = {**(told or {}), **settings}
    for key, option in (("bits", "--bits"), ("group_size", "--group-size")):
        if key not in told:
            raise InputError(f"{source}: neither config.json nor quantize_config.json says its {key}: give {option}")
    return {**config, "quantization_config": {**told, "quant_method": told.get("quant_method", "gptq")}}


def _place(source: Path, base: Path | None, names: Sequence[str]) -> Path:
    """The first folder that has a file of one of these names."""
    folders = [folder for folder in (source if source.is_dir() else source.parent, base) if folder is not None]
    for folder in folders:
        if any((folder / name).is_file() for name in names):
            return folder
    where = " nor ".join(str(folder) for folder in folders)
    raise InputError(f"no {' or '.join(names)} in {where}: give --base, the folder of the model that was quantized")


def _save_chat(source: Path, folder: Path, chat: Chat) -> None:
    """Tokenizer with chat template and pad token, and the stop tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: its tokenizer cannot be loaded: {error}") from error
    if chat.template is not None:
        if not chat.template.is_file():
            raise InputError(f"--chat-template {chat.template}: no such file")
        tokenizer.chat_template = chat.template.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise InputError(f"{source}: the tokenizer has no chat template: give --chat-template, a Jinja file")
    stops = list(chat.stop_tokens) or [tokenizer.eos_token]
    vocabulary = tokenizer.get_vocab()
    for option, token in [*(("--stop-token", stop) for stop in stops), ("--pad-token", chat.pad_token)]:
        if token not in vocabulary and (token is not None or option == "--stop-token"):
            raise InputError(f"{option} {token}: is not in the vocabulary of {source}")
    tokenizer.pad_token = chat.pad_token or tokenizer.pad_token or tokenizer.unk_token
    if tokenizer.pad_token is None or tokenizer.pad_token in stops:
        raise InputError(f"{source}: the tokenizer has no pad token that is no stop token: give --pad-token")
    tokenizer.save_pretrained(folder)
    generation = GenerationConfig(
        eos_token_id=[vocabulary[stop] for stop in stops], pad_token_id=tokenizer.pad_token_id
    )
    generation.save_pretrained(folder)
