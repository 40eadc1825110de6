"""`prepare_data`: raw rows to tokenised splits that share no prompt with the held-out one."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from chatloom.data.prepare import prepare, prepare_metrics
from chatloom.data.report import render_data_report
from chatloom.errors import InputError
from chatloom.files import atomic_file
from stages.run import stage

BASE, RAW, PREPARED = Path("models/base"), Path("data/raw"), Path("data/prepared")
RAW_REPORT, PAGE = Path("reports/raw_data.json"), Path("reports/data.html")


def main() -> None:
    with stage("prepare_data") as run:
        if not BASE.is_dir():
            raise InputError(f"{BASE}: no such folder; run the stage base_model first")
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        with run.out(str(PREPARED)) as folder:
            report = prepare(run.params.prepare_data, RAW, tokenizer, _stop_id(BASE), folder)
        run.report("prepare_data", report)
        page = render_data_report(json.loads(RAW_REPORT.read_text(encoding="utf-8")), report)
        with atomic_file(PAGE) as temporary:
            temporary.write_text(page, encoding="utf-8")
        run.metrics(prepare_metrics(report))


def _stop_id(model: Path) -> int:
    """The stop token that ends training answers: the first one of the checkpoint."""
    stop = GenerationConfig.from_pretrained(model).eos_token_id
    return int(stop[0] if isinstance(stop, list) else stop)


if __name__ == "__main__":
    main()
