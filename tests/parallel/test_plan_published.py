"""The plan against figures that others measured: ColossalChat's memory, 4-bit serving; and docs/scaling.md."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from bench.pages import filled
from bench.scaling import (
    CAPACITY_CARDS,
    CAPACITY_JOBS,
    PAGE,
    PUBLISHED,
    PUBLISHED_4BIT,
    Published,
    capacity,
    llama_like,
    planned_mib,
    tables,
)
from chatloom.cli import app
from chatloom.parallel.hardware import GIB, load_hardware
from chatloom.parallel.plan import plan
from chatloom.parallel.shapes import Shape, quantized_bytes
from tests.conftest import ROOT

HARDWARE = load_hardware()
LLAMA_7B = Shape.named("llama-7b")


@pytest.mark.parametrize("line", PUBLISHED, ids=lambda line: line.label)
def test_memory_of_colossalchats_sft(line: Published) -> None:
    assert planned_mib(line.read, HARDWARE) == pytest.approx(line.mib, rel=0.2)


def test_where_the_labels_can_be_true_the_plan_follows_them() -> None:
    own = [line for line in PUBLISHED if line.read_lora is None and line.label != "4 x zero2_cpu, batch 8"]
    assert len(own) == 4
    for line in own:
        assert planned_mib(line.labelled, HARDWARE) == pytest.approx(line.mib, rel=0.04)


def test_eight_rows_cannot_fit_into_the_figure_of_zero2_cpu() -> None:
    """The least that 8 rows of 2048 tokens need under any optimizer: no gradient, no layer's activations counted.

    By hand: 6,738,415,616 weights of 2 bytes; 32 layer inputs and the logits with their log-softmax for 16,384 tokens.
    """
    tokens = 8 * 2048
    least = 2 * 6_738_415_616 + tokens * (32 * 4096 * 2 + 2 * 32000 * 4)
    [line] = [line for line in PUBLISHED if line.label == "4 x zero2_cpu, batch 8"]
    assert least / 2**20 > 1.07 * line.mib


def test_adapters_of_the_published_lora_run_had_no_moments() -> None:
    """Rank 32 takes 176.44 MiB more than rank 8: 3 bytes an adapter weight, where moments would make it 5."""
    layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    weights = (32 - 8) * (32 * layer + 4096 + 32000)  # ColossalChat adapts the output embedding too
    assert (21344.17 - 21167.73) * 2**20 / weights == pytest.approx(2 + 4 / 4, rel=0.02)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_gives_adapters_under_a_frozen_embedding_no_gradient() -> None:
    embedding, adapter = nn.Embedding(4, 3).requires_grad_(False), nn.Linear(3, 3)
    hidden = checkpoint(adapter, embedding(torch.tensor([1, 2])), use_reentrant=True)
    assert not hidden.requires_grad
    assert checkpoint(adapter, embedding(torch.tensor([1, 2])), use_reentrant=False).requires_grad


@pytest.mark.parametrize(("name", "gib"), PUBLISHED_4BIT.items())
def test_memory_of_4_bit_serving(name: str, gib: float) -> None:
    shape = Shape.named(name)
    assert quantized_bytes(shape, group=None) / GIB == pytest.approx(gib, rel=0.01)
    assert quantized_bytes(shape) / GIB == pytest.approx(gib, rel=0.1)


def test_size_of_a_4_bit_checkpoint_that_was_written_here() -> None:
    """SmolLM2-135M in groups of 64: 115 MB (docs/results.md)."""
    assert quantized_bytes(Shape.named("smollm2-135m"), group=64) / 1e6 == pytest.approx(115, abs=0.5)


def test_llama_like_passes_through_the_published_shapes() -> None:
    assert llama_like(4096) == LLAMA_7B
    assert llama_like(5120) == Shape.named("llama-13b")


@pytest.mark.parametrize("method", CAPACITY_JOBS)
def test_the_largest_model_fits_and_the_next_does_not(method: str) -> None:
    found = capacity(method, "a100-40gb", HARDWARE)
    [width] = [w for w in range(128, 16384, 128) if llama_like(w).total / 1e9 == found.billions]
    job = CAPACITY_JOBS[method]
    assert plan(llama_like(width), job, "a100-40gb", HARDWARE).fits
    beyond = plan(llama_like(width + 128), job, "a100-40gb", HARDWARE)
    assert not beyond.fits
    assert found.host_limited == (beyond.peak <= beyond.room)


def test_offloading_and_adapters_grow_the_capacity_of_every_card() -> None:
    for card in CAPACITY_CARDS:
        plain = capacity("plain", card, HARDWARE).billions
        assert all(capacity(method, card, HARDWARE).billions > 2 * plain for method in ("LoRA r16", "zero2_cpu"))
        adapters, rounded = (capacity(m, card, HARDWARE).billions for m in ("LoRA r16", "LoRA r16, 4 bits"))
        assert rounded > 1.5 * adapters


def test_the_page_says_what_the_plan_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, tables(HARDWARE)) == page, "run python -m bench.scaling"


def test_the_command_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scaling.md shows the command and what it prints."""
    page = PAGE.read_text(encoding="utf-8")
    [command] = [line for line in page.splitlines() if line.startswith("chatloom plan ")]
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, command.split()[1:])
    assert result.exit_code == 0, result.output
    assert f"```\n{result.stdout}```" in page
