from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chatloom.config import DataSource
from chatloom.data.raw import ingest
from tests.data.factories import ROOT, byte_tokenizer, raw_params


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = Path(os.environ.get("CHATLOOM_DATA", ROOT / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set CHATLOOM_DATA to its folder")
    return folder


Ingest = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def ingested(tmp_path: Path) -> Ingest:
    """Ingest sources into a fresh folder: `(report, folder)`."""

    def run(*sources: DataSource, **changes: Any) -> tuple[dict[str, Any], Path]:
        out = tmp_path / f"raw-{len(list(tmp_path.glob('raw-*')))}"
        out.mkdir()
        return ingest(raw_params(*sources, **changes), out), out

    return run
