from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from chatloom.colossalchat.template import Template, read_template
from tests.colossalchat.factories import CHATML, HUMAN, sentencepiece_tokenizer, write_json
from tests.data.factories import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerBase:
    return sentencepiece_tokenizer()


@pytest.fixture
def chatml(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Template:
    return read_template(write_json(tmp_path / "chatml.json", CHATML), tokenizer)


@pytest.fixture
def human_template(tmp_path: Path, sentencepiece: PreTrainedTokenizerBase) -> Template:
    return read_template(write_json(tmp_path / "human.json", HUMAN), sentencepiece)


@pytest.fixture
def base_model(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A checkpoint folder, as far as an import looks at it."""
    folder = tmp_path / "base"
    tokenizer.save_pretrained(folder)
    return folder
