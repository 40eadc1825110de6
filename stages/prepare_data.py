"""`prepare_data`: raw rows to tokenised splits that share no prompt with the held-out one."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from chatloom.data.prepare import prepare, prepare_metrics
from chatloom.errors import InputError
from stages.run import stage

BASE, RAW, PREPARED = Path("models/base"), Path("data/raw"), Path("data/prepared")


def main() -> None:
    with stage("prepare_data") as run:
        if not BASE.is_dir():
            raise InputError(f"{BASE}: no such folder; run the stage base_model first")
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        with run.out(str(PREPARED)) as folder:
            report = prepare(run.params.prepare_data, RAW, tokenizer, _stop_id(BASE), folder)
        run.report("prepare_data", report)
        run.metrics(prepare_metrics(report))


def _stop_id(model: Path) -> int:
    """The stop token that ends training answers: the first one of the checkpoint."""
    stop = GenerationConfig.from_pretrained(model).eos_token_id
    return int(stop[0] if isinstance(stop, list) else stop)


if __name__ == "__main__":
    main()
