"""ColossalChat's files by hand: templates, LoRA configs, and rows as its `prepare_dataset.py` writes them."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = {
    "chat_template": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "system_message": 'Be "kind".\n',
    "stop_ids": [2],
    "end_of_assistant": "<|im_end|>",
}
# How CHATML begins, and what it writes from question to answer and from answer to question.
OPENING = '<|im_start|>system\nBe "kind".\n<|im_end|>\n<|im_start|>user\n'
TO_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
TO_QUESTION = "\n<|im_start|>user\n"

HUMAN = {
    "chat_template": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% else %}{{ {'user': 'Human', 'assistant': 'Assistant'}[message['role']] }}: "
        "{{ bos_token + message['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {{ bos_token }}{% endif %}"
    ),
    "system_message": "Be kind.",
    "stop_ids": [2],
}
"""Of the older kind: without `end_of_assistant`, on a SentencePiece tokenizer."""

LORA = {
    "r": 8,
    "lora_alpha": 16,
    "linear_lora_dropout": 0.1,
    "embedding_lora_dropout": 0.0,
    "lora_train_bias": "none",
    "lora_initialization_method": "kaiming_uniform",
    "target_modules": ["q_proj", "v_proj"],
}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"from": "assistant", "content": text}


def sentencepiece_tokenizer() -> PreTrainedTokenizerBase:
    """LLaMA's way with white space on a vocabulary of characters: a space before each piece of text."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *(c for c in string.printable if c != " ")]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


Chunk = tuple[str, bool]
"""A piece of text that is tokenised by itself, and whether its tokens have a loss."""


def tokenised(tokenizer: PreTrainedTokenizerBase, chunks: Iterable[Chunk]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    loss: list[bool] = []
    for text, has_loss in chunks:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        loss += [has_loss] * len(piece)
    return ids, loss


def sft_columns(tokenizer: PreTrainedTokenizerBase, *chunks: Chunk) -> dict[str, Any]:
    """What `--type sft` adds to a row."""
    ids, loss = tokenised(tokenizer, chunks)
    return {
        "input_ids": ids,
        "labels": [id if has_loss else -100 for id, has_loss in zip(ids, loss, strict=True)],
        "inputs_decode": tokenizer.decode(ids),
        "labels_decode": [text for text, has_loss in chunks if has_loss],
        "seq_length": len(ids),
        "seq_category": "None",
    }


def prompt_columns(tokenizer: PreTrainedTokenizerBase, *texts: str) -> dict[str, Any]:
    """What `--type prompt` adds to a row."""
    ids, _ = tokenised(tokenizer, [(text, False) for text in texts])
    return {"input_ids": ids, "inputs_decode": tokenizer.decode(ids), "seq_length": len(ids), "seq_category": "None"}


def preference_columns(
    tokenizer: PreTrainedTokenizerBase, context: Iterable[str], chosen: str, rejected: str
) -> dict[str, Any]:
    """What `--type preference` adds to a row: only the last answer has a loss."""
    columns: dict[str, Any] = {}
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        ids, loss = tokenised(tokenizer, [*((text, False) for text in context), (answer, True)])
        columns |= {f"{side}_input_ids": ids, f"{side}_loss_mask": [int(x) for x in loss]}
        columns[f"{side}_label_decode"] = [answer]
    return columns


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path
