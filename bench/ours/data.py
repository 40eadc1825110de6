"""`raw_data` and `prepare_data` as the stages call them, on one file, with the values of the preset alpaca-104k."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.presets import preset_params
from chatloom.data.prepare import prepare
from chatloom.data.raw import ingest
from chatloom.data.report import render_data_report
from chatloom.data.templates import load_tokenizer


def main(rows: str, checkpoint: str, processes: int, out: str) -> None:
    params = preset_params("alpaca-104k")
    [source] = [source for source in params.raw_data.sources if source.name == "instructions"]
    raw_params = params.raw_data.model_copy(update={"sources": [source.model_copy(update={"path": rows})]})
    raw = Path(out, "raw")
    raw.mkdir()
    read = ingest(raw_params, raw)
    prepare_params = params.prepare_data.model_copy(update={"num_workers": processes})
    prepared = prepare(prepare_params, raw, *load_tokenizer(Path(checkpoint)), Path(out, "prepared"))
    page = render_data_report(read, prepared)
    print(json.dumps({"rows_in": read["rows_in"], "rows": prepared["rows_out"], "page_bytes": len(page)}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
