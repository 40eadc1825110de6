"""A tiny LLaMA that has learnt a few answers by heart, and one that talks without end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from chatloom.config import RandomSource
from chatloom.models.tiny import random_llama
from chatloom.serving.engine import Engine

# Byte-level tokens: with this small vocabulary every one of these characters is several tokens.
ANSWERS = {
    "你好": "你好，世界！龘😀 end",
    "count": "one two three four five six",
}
TEMPLATE = Path(__file__).parents[2] / "data" / "templates" / "chatml.jinja"
SOURCE = RandomSource(kind="random", hidden_size=64, num_layers=1, num_heads=2, vocab_size=262, seed=0)
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


@pytest.fixture(scope="session")
def parrot_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a model trained until it gives `ANSWERS` word for word."""
    torch.set_num_threads(1)
    model, tokenizer = random_llama(SOURCE)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    rows = []
    for question, answer in ANSWERS.items():
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        rows.append((len(prompt), prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(400):
        loss = torch.zeros(())
        for start, ids in rows:
            batch = torch.tensor([ids])
            logits = model(input_ids=batch).logits[0, start - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, batch[0, start:])
        if float(loss.detach()) < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save(tmp_path_factory.mktemp("models") / "parrot", model, tokenizer)


@pytest.fixture(scope="session")
def parrot(parrot_path: Path) -> Engine:
    return Engine(parrot_path, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A random model that nothing ends but the limit, with room for an answer of minutes."""
    torch.set_num_threads(1)
    model, tokenizer = random_llama(SOURCE)
    model.config.max_position_embeddings = 100_000
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    path = save(tmp_path_factory.mktemp("models") / "babbler", model, tokenizer)
    engine = Engine(path, device="cpu", dtype="float32")
    engine.chat_model = replace(engine.chat_model, stop_ids=())
    return engine


def save(path: Path, model: torch.nn.Module, tokenizer: object) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS]
    GenerationConfig(eos_token_id=ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(path)
    return path
