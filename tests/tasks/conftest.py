from __future__ import annotations

from pathlib import Path

import pytest
from toy_pipeline import chain, make_checkout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three stages in a row: `two` changes nothing when `one` changes its second line, `three` follows `two`."""
    for name in ("MLFLOW_TRACKING_URI", "CHATLOOM_REPRODUCTION", "CHATLOOM_PRESET"):
        monkeypatch.delenv(name, raising=False)
    return make_checkout(
        tmp_path / "checkout",
        chain(
            one="mkdir -p out && echo one speaks && cp input.txt out/one.txt",
            two="head -n 1 out/one.txt > out/two.txt",
            three="cp out/two.txt out/three.txt",
        ),
    )
