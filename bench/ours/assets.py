"""What the measured processes start from: rows as tokens, random models, an untrained reward model."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from bench.presets import ROOT, preset_params
from bench.side import Row
from chatloom.config import BaseModelParams, DataSource, RandomSource, RawDataParams
from chatloom.data.raw import ingest, read_raw
from chatloom.data.schemas import RawRow
from chatloom.data.templates import Encoded, encode_rows
from chatloom.device import Device
from chatloom.files import atomic_dir, atomic_file
from chatloom.models.adapters import Role, add_adapter
from chatloom.models.base import make_base_model
from chatloom.models.checkpoint import load_on, load_tokenizer, stop_ids
from chatloom.models.head import ScalarHead
from chatloom.models.reward_model import ADAPTER, save_reward_model

READ_AT_MOST = 5000


def make_rows(out: Path, checkpoint: str, source: str, max_prompt: int, max_length: int, responses: int) -> None:
    """Tokens of the rows of `source` (any accepted format) with so many responses or more, in an order of their own.

    Args:
        max_prompt: tokens of a prompt, at most.
        max_length: tokens of a prompt with any of its responses, at most: nothing is cut on either side.
    """
    encoded = encode_rows(load_tokenizer(Path(checkpoint)), stop_ids(Path(checkpoint))[0], read_source(source))
    rows = [Row(row.prompt_ids, row.response_ids) for row in encoded if isinstance(row, Encoded)]
    fitting = [
        row
        for row in rows
        if len(row.prompt_ids) <= max_prompt
        and len(row.response_ids) >= responses
        and len(row.prompt_ids) + max(map(len, row.response_ids), default=0) <= max_length
    ]
    random.Random(0).shuffle(fitting)
    write_rows(out, fitting)


def read_source(source: str) -> list[RawRow]:
    """The rows of `source`, in any accepted format."""
    where = DataSource(
        name="bench",
        path=source,
        format="auto",
        lang=None,
        license="",
        splits=["sft"],
        group=None,
        max_rows=READ_AT_MOST,
        weight=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        ingest(RawDataParams(sources=[where], shard_rows=READ_AT_MOST), Path(folder))
        return list(read_raw(Path(folder)))


def make_synthetic_rows(out: Path, length: int, count: int) -> None:
    """Rows of exactly `length` tokens, half of them the response: every model has the first 256 tokens."""
    numbers = random.Random(0)
    half = length // 2
    ids = [[numbers.randrange(256) for _ in range(length)] for _ in range(count)]
    write_rows(out, [Row(row[:half], [row[half:]]) for row in ids])


def write_rows(out: Path, rows: list[Row]) -> None:
    with atomic_file(out) as temporary:
        temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def make_random_model(out: Path, hidden_size: int, num_layers: int) -> None:
    """A LLaMA with random weights, ready for chat."""
    source = RandomSource(
        kind="random", hidden_size=hidden_size, num_layers=num_layers, num_heads=4, vocab_size=1024, seed=0
    )
    template = str(ROOT / "data/templates/chatml.jinja")
    params = BaseModelParams(source=source, pad_token=None, stop_tokens=None, chat_template=template)
    with atomic_dir(out) as folder:
        make_base_model(params, torch.bfloat16, folder)


def make_untrained_reward_model(out: Path, checkpoint: str, preset: str) -> None:
    """What PPO scores with: speed and memory do not depend on what a reward model has learned."""
    lora = preset_params(preset).train_reward.lora
    model = load_on(Path(checkpoint), Device(torch.device("cpu"), torch.bfloat16)).model
    add_adapter(model, ADAPTER, lora, seed=0)
    head = ScalarHead(model.config.hidden_size, torch.Generator().manual_seed(0))
    with atomic_dir(out) as folder:
        save_reward_model(folder, Role(model, ADAPTER, head), lora, Path(checkpoint))


MAKERS = {
    maker.__name__: maker for maker in (make_rows, make_synthetic_rows, make_random_model, make_untrained_reward_model)
}

if __name__ == "__main__":
    name, values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    MAKERS[name](Path(values.pop("out")), **values)
