"""A tiny chat model's checkpoint, and an MLflow store of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from transformers import GenerationConfig

from chatloom.config import RandomSource
from chatloom.models.tiny import random_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: what it says is noise, and always the same noise at temperature 0."""
    torch.set_num_threads(1)
    source = RandomSource(kind="random", hidden_size=32, num_layers=1, num_heads=2, vocab_size=300, seed=0)
    model, tokenizer = random_llama(source)
    tokenizer.chat_template = (ROOT / "data" / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("models") / "chat-4bit"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    settings = GenerationConfig(eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id)
    settings.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a fresh sqlite store, set as MLflow's, with an experiment whose artifacts lie beside it."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("tests", artifact_location=(folder / "mlartifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment)
    yield uri
    mlflow.set_tracking_uri(before)
