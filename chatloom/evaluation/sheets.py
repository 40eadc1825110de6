"""What one model does with the held-out rows: what it answers, and how well it predicts the reference answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from chatloom.config import EvaluateParams
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.data.templates import encode_prompt, encode_row
from chatloom.errors import InputError
from chatloom.evaluation.perplexity import mean_loss
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import ChatModel
from chatloom.models.generation import generate
from chatloom.models.sampling import Sampling


@dataclass(frozen=True)
class Answers:
    texts: list[str]
    ids: list[list[int]]
    """With the stop token, where the model gave it."""

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]


@dataclass(frozen=True)
class Loss:
    """Of the reference answers of some rows."""

    nats: float
    """In all."""
    tokens: int

    @property
    def mean(self) -> float:
        return self.nats / self.tokens


def answer(
    chat: ChatModel, prompts: Sequence[list[int]], params: EvaluateParams, *, temperature: float | None = None
) -> Answers:
    """One response a prompt; the same seed for every model, so that luck is shared.

    Args:
        temperature: instead of the params'; 0 takes the likeliest token.
    """
    ids = generate(
        chat.model,
        prompts,
        Sampling(params.max_new_tokens, params.temperature if temperature is None else temperature),
        stop_ids=chat.stop_ids,
        generator=torch.Generator().manual_seed(params.seed),
        batch_size=params.generation_batch,
    )
    return Answers([chat.tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids], ids)


def loss(chat: ChatModel, rows: Sequence[PreparedRow], device: torch.device) -> Loss:
    """Cross-entropy of the best answer of each row, over all its tokens."""
    examples = [Example.of_row(row) for row in rows]
    tokens = sum(example.num_predicted for example in examples)
    return Loss(mean_loss(Role(chat.model), examples, device) * tokens, tokens)


def spread(rows: Sequence[PreparedRow], count: int) -> list[PreparedRow]:
    """The first `count` rows, languages taking turns."""
    by_lang: dict[str, list[PreparedRow]] = {}
    for row in rows:
        by_lang.setdefault(row.lang, []).append(row)
    turns = [rows[i] for i in range(max(map(len, by_lang.values()))) for rows in by_lang.values() if i < len(rows)]
    return turns[:count]


def measured_rows(rows: Sequence[PreparedRow], limit: int) -> dict[str, list[PreparedRow]]:
    """By language, up to `limit` rows with an answer."""
    found: dict[str, list[PreparedRow]] = {}
    for row in rows:
        if row.responses and len(found.setdefault(row.lang, [])) < limit:
            found[row.lang].append(row)
    return {lang: found[lang] for lang in sorted(found) if found[lang]}


def in_words_of(chat: ChatModel, rows: Sequence[PreparedRow]) -> list[PreparedRow]:
    """The rows in the tokens of `chat`, whose tokenizer and template may not be those of the rows."""
    encoded = [encode_row(chat.tokenizer, chat.stop_ids[0], row) for row in rows]
    return [replace(row, **own._asdict()) for row, own in zip(rows, encoded, strict=True)]


def read_probes(path: Path) -> list[dict[str, str]]:
    """`{"lang", "prompt"}` of each line of the probe set.

    Raises:
        InputError: naming the line that is none.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; it holds the probe set, a line {{'lang', 'prompt'}} each")
    probes = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            probe = json.loads(line)
            probes.append({"lang": str(probe["lang"]), "prompt": str(probe["prompt"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a JSON object with lang and prompt: {error}") from error
    return probes


def probe_prompts(chat: ChatModel, probes: Sequence[Mapping[str, str]]) -> list[list[int]]:
    """The probes as `chat` is given them."""
    return [encode_prompt(chat.tokenizer, [{"role": "user", "content": probe["prompt"]}]) for probe in probes]
