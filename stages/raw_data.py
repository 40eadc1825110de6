"""`raw_data`: every source of `raw_data.sources`, checked, in one schema with its provenance."""

from __future__ import annotations

from pathlib import Path

from chatloom.data.raw import ingest, raw_metrics
from stages.run import stage

# Outside the outs, which DVC deletes before it runs the stage: a download is kept, and checked again, for the next run.
DOWNLOADS = Path(".state/downloads")


def main() -> None:
    with stage("raw_data") as run:
        with run.out("data/raw") as folder:
            report = ingest(run.params.raw_data, folder, downloads=DOWNLOADS)
        run.report("raw_data", report)
        run.metrics(raw_metrics(report))


if __name__ == "__main__":
    main()
