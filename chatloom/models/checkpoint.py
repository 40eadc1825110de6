"""Loading and saving ordinary Hugging Face checkpoints, 4-bit ones included."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from chatloom.device import Device, resolve_device
from chatloom.errors import InputError
from chatloom.models import attention, four_bit, norm
from chatloom.models.gptq_checkpoint import load_gptq, open_gptq


@dataclass(frozen=True)
class ChatModel:
    """A causal language model with what a chat needs around it."""

    model: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    """Tokens that end an answer; the first one ends training answers."""
    pad_id: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.lm_head.weight.device)


def load_causal_lm(path: Path, runtime_device: str = "auto", dtype: str = "auto") -> ChatModel:
    """Load a checkpoint folder for inference: safetensors only, no remote code.

    Raises:
        InputError: where the folder is missing or no usable checkpoint.
    """
    return load_on(path, resolve_device(runtime_device, dtype, torch.get_num_threads()))


def load_on(path: Path, device: Device, base_bits: Literal[4] | None = None) -> ChatModel:
    """As `load_causal_lm`, on a resolved device.

    Args:
        base_bits: of the weights in its layers, which can be no more than read then (`lora.base_bits` of params); None
            takes them as they are.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise InputError(
            f"{path}: no checkpoint (config.json is missing); run the stage that makes it, or correct the path"
        )
    if base_bits is not None:
        four_bit.require_available(device.device)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if "quantization_config" in config or (path / "quantize_config.json").is_file():
            native = device.device.type == "cpu" and config.get("model_type") == "llama"
            model = load_gptq(open_gptq(path), device.dtype) if native else _load_by_gptqmodel(path, device)
            model.set_attn_implementation(attention.NAME)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=device.dtype,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=attention.NAME,
                **(four_bit.settings(device) if base_bits is not None else {}),
            ).to(device.device)
    except (OSError, json.JSONDecodeError, SafetensorError, KeyError) as error:
        raise InputError(f"{path}: the checkpoint cannot be loaded: {error}") from error
    if base_bits is not None:
        four_bit.keep_gradients(model)
    norm.use_kernels(model)
    model.eval()
    tokenizer = load_tokenizer(path)
    return ChatModel(model, tokenizer, stop_ids(path), int(tokenizer.pad_token_id))


def load_tokenizer(path: Path) -> Any:
    if not (path / "tokenizer.json").is_file():
        raise InputError(f"{path}: no tokenizer.json; the stage base_model writes one")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise InputError(f"{path}: the tokenizer has no chat template; set base_model.chat_template to a Jinja file")
    return tokenizer


def stop_ids(path: Path) -> tuple[int, ...]:
    """The stop tokens a checkpoint declares in generation_config.json."""
    declared = GenerationConfig.from_pretrained(path).eos_token_id
    return tuple(declared) if isinstance(declared, list) else (declared,)


def save_causal_lm(folder: Path, model: Any, source: Path) -> None:
    """Save weights, with tokenizer and generation settings taken from the checkpoint `source`."""
    model.save_pretrained(folder, max_shard_size="4GB")
    save_tokenizer_files(folder, source)


def save_tokenizer_files(folder: Path, source: Path) -> None:
    """Tokenizer, chat template and stop tokens, as the checkpoint `source` has them."""
    load_tokenizer(source).save_pretrained(folder)
    GenerationConfig.from_pretrained(source).save_pretrained(folder)


def _load_by_gptqmodel(path: Path, device: Device) -> Any:
    gptq = import_gptqmodel()
    with quiet():
        loaded = gptq.GPTQModel.load(str(path), device=str(device.device), trust_remote_code=False)
    return loaded.model


def import_gptqmodel() -> Any:
    """The gptqmodel package, with its worker pool sized to this machine (its default fails on two cores)."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(len(os.sched_getaffinity(0))))
    with quiet():
        import gptqmodel
    return gptqmodel


@contextmanager
def quiet() -> Iterator[None]:
    """Without what GPTQModel prints: hundreds of lines a minute, to stdout. Errors come as exceptions all the same."""
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield
