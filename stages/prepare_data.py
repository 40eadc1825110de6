"""`prepare_data`: raw rows to tokenised splits that share no prompt with the held-out one."""

from __future__ import annotations

import json
from pathlib import Path

from chatloom.data.prepare import prepare, prepare_metrics
from chatloom.data.report import render_data_report
from chatloom.data.templates import load_tokenizer
from chatloom.files import atomic_file
from stages.run import stage

BASE, RAW, PREPARED = Path("models/base"), Path("data/raw"), Path("data/prepared")
RAW_REPORT, PAGE = Path("reports/raw_data.json"), Path("reports/data.html")


def main() -> None:
    with stage("prepare_data") as run:
        tokenizer, stop_id = load_tokenizer(BASE)
        with run.out(str(PREPARED)) as folder:
            report = prepare(run.params.prepare_data, RAW, tokenizer, stop_id, folder)
        run.report("prepare_data", report)
        page = render_data_report(json.loads(RAW_REPORT.read_text(encoding="utf-8")), report)
        with atomic_file(PAGE) as temporary:
            temporary.write_text(page, encoding="utf-8")
        run.metrics(prepare_metrics(report))


if __name__ == "__main__":
    main()
