"""ColossalChat's LoRA config as params of a training stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chatloom.colossalchat.template import read_object
from chatloom.config import Lora
from chatloom.errors import InputError

LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# An embedding is no linear layer, and logits are taken from the own weight of lm_head.
OUTSIDE = ("embed_tokens", "lm_head")
# ColossalChat's LoraConfig, with its defaults.
DEFAULTS: dict[str, Any] = {
    "r": 0,
    "lora_alpha": 32,
    "linear_lora_dropout": 0.1,
    "embedding_lora_dropout": 0.0,
    "lora_train_bias": "none",
    "lora_initialization_method": "kaiming_uniform",
    "target_modules": None,
}


def read_lora(path: Path, notes: list[str]) -> dict[str, Any]:
    """`method` and `lora` of a training stage; what they cannot say is added to `notes`.

    Raises:
        InputError: naming the file and the key.
    """
    given = read_object(path)
    if unknown := sorted(given.keys() - DEFAULTS.keys()):
        raise InputError(f"{path}: {unknown[0]}: unknown key; ColossalChat's are {', '.join(DEFAULTS)}")
    config = DEFAULTS | given
    if config["r"] == 0:
        return {"method": "full"}
    modules = config["target_modules"]
    if modules is None:
        modules = LLAMA_LAYERS
        notes.append(f"{path}: target_modules = null: adapted are LLaMA's linear layers, no embedding and no lm_head")
    elif isinstance(modules, list):
        left_out = [name for name in modules if name in OUTSIDE]
        modules = [name for name in modules if name not in OUTSIDE]
        notes += [f"{path}: target_modules: {name} is left out, it is no linear layer of a block" for name in left_out]
    for key in ("linear_lora_dropout", "embedding_lora_dropout"):
        if config[key]:
            notes.append(f"{path}: {key} = {config[key]}: adapters have no dropout here")
    if config["lora_train_bias"] != "none":
        notes.append(f"{path}: lora_train_bias = {config['lora_train_bias']!r}: biases stay as they are here")
    if config["lora_initialization_method"] != "kaiming_uniform":
        method = config["lora_initialization_method"]
        notes.append(f"{path}: lora_initialization_method = {method!r}: adapters change nothing at the start here")
    values = {"rank": config["r"], "alpha": config["lora_alpha"], "target_modules": modules}
    values |= {"layers": None, "base_bits": None}
    try:
        return {"method": "lora", "lora": Lora.model_validate(values).model_dump()}
    except ValidationError as error:
        names = {"rank": "r", "alpha": "lora_alpha"}
        first = error.errors()[0]
        key = names.get(str(first["loc"][0]), str(first["loc"][0]))
        raise InputError(f"{path}: {key} = {config[key]!r}: {first['msg'].lower()}") from error
