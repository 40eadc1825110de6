"""Shapes of LLaMA-like decoders: all that their memory and arithmetic depend on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatloom.config import Lora, read_yaml
from chatloom.errors import InputError
from chatloom.files import read_json
from chatloom.models import four_bit

KNOWN = Path(__file__).with_name("shapes.yaml")
LLAMA_LIKE = {"llama", "mistral"}
"""Values of `model_type` whose layers are laid out like LLaMA's."""


@dataclass(frozen=True)
class Shape:
    """Parameters are counted, not bytes. Attention has `heads` of `head_dim`, keys and values `key_value_heads`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the output embedding is the input embedding."""

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of the keys; the values have the same."""
        return self.key_value_heads * self.head_dim

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one decoder layer, by name."""
        return {
            "q_proj": (self.query, self.hidden),
            "k_proj": (self.key_value, self.hidden),
            "v_proj": (self.key_value, self.hidden),
            "o_proj": (self.hidden, self.query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def layer(self) -> int:
        """One decoder layer: its linear layers and two normalisations."""
        return sum(rows * columns for rows, columns in self.linear.values()) + 2 * self.hidden

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """The output embedding as far as it is a tensor of its own."""
        return 0 if self.tied else self.embedding

    @property
    def trunk(self) -> int:
        """Everything but the output embedding."""
        return self.embedding + self.layers * self.layer + self.hidden

    @property
    def total(self) -> int:
        return self.trunk + self.head

    def adapter(self, lora: Lora) -> int:
        """rank * (in + out) of each adapted linear layer (Hu 2021).

        Raises:
            InputError: where the adapter does not fit the model.
        """
        if unknown := sorted(set(lora.target_modules) - set(self.linear)):
            raise InputError(f"lora.target_modules: a layer has no {unknown[0]!r}; it has {sorted(self.linear)}")
        if lora.layers is not None and lora.layers > self.layers:
            raise InputError(f"lora.layers = {lora.layers}: the model has {self.layers} layers; give at most so many")
        in_a_layer = sum(lora.rank * sum(self.linear[name]) for name in set(lora.target_modules))
        return in_a_layer * (self.layers if lora.layers is None else lora.layers)

    @classmethod
    def of_config(cls, values: Mapping[str, Any], where: str) -> Shape:
        """From the values of a config.json.

        Raises:
            InputError: where one is missing, or the model is of another kind.
        """
        kind = values.get("model_type", "llama")
        if kind not in LLAMA_LIKE:
            raise InputError(f"{where}: model_type = {kind!r}: planned are decoders like {sorted(LLAMA_LIKE)} only")
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if missing := [name for name in needed if not isinstance(values.get(name), int)]:
            raise InputError(f"{where}: {missing[0]} is missing or no integer; is this the config.json of a model?")
        heads = values["num_attention_heads"]
        return cls(
            hidden=values["hidden_size"],
            intermediate=values["intermediate_size"],
            layers=values["num_hidden_layers"],
            heads=heads,
            key_value_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            vocabulary=values["vocab_size"],
            tied=bool(values.get("tie_word_embeddings", False)),
        )

    @classmethod
    def named(cls, model: str) -> Shape:
        """Of a known name, a config.json, or a folder that holds one.

        Raises:
            InputError: where it is none of them.
        """
        known = read_yaml(KNOWN)
        if model in known:
            return cls.of_config(known[model], model)
        path = Path(model)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            near = difflib.get_close_matches(model, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(known)}"
            raise InputError(f"--model {model}: neither a known name nor a path to a config.json; {hint}")
        return cls.of_config(read_json(file, "give the config.json of a model"), str(file))


def quantized_bytes(shape: Shape, bits: int = 4, group: int | None = 128) -> int:
    """A GPTQ checkpoint in memory: packed weights of the linear layers, everything else in 16 bits.

    Each group of input weights of an output has a scale of 16 and a zero of `bits` bits; each input has its group's
    number in 32 bits (the AutoGPTQ layout).

    Args:
        group: input weights that share a scale; None: all of them.
    """
    packed = 0.0
    for rows, columns in shape.linear.values():
        groups = 1 if group is None else columns / group
        packed += bits / 8 * rows * columns + (2 + bits / 8) * rows * groups + 4 * columns
    other = 2 * (shape.embedding + shape.head + (2 * shape.layers + 1) * shape.hidden)
    return round(shape.layers * packed + other)


def nf4_bytes(shape: Shape) -> float:
    """A model whose linear layers are in NF4 (`chatloom.models.four_bit`), everything else in 16 bits."""
    rounded = shape.layers * sum(rows * columns for rows, columns in shape.linear.values())
    return four_bit.BYTES * rounded + 2 * (shape.total - rounded)


def cache_bytes(shape: Shape, tokens: int) -> int:
    """Keys and values of `tokens` tokens in 16 bits."""
    return 2 * 2 * shape.key_value * shape.layers * tokens
