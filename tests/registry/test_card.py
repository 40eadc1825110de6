"""What a run cost, and the model card written from facts."""

from __future__ import annotations

import pytest

from chatloom.config import Cost, load_params
from chatloom.registry.card import render_card
from chatloom.registry.cost import stage_costs, total_cost
from chatloom.registry.gates import Verdict
from tests.conftest import ROOT

RATES = Cost(currency="EUR", cpu_hour=0.05, gpu_hour=2.0, cpu_watts=10, gpu_watts=400)
RUNS = {
    "train_sft": {"cost": {"wall_s": 1800.0, "cpu_hours": 1.0, "gpu_hours": 0.5, "peak_gib": 2.0, "tokens": 100.0}},
    "raw_data": {"cost": {"wall_s": 4.0, "cpu_hours": 0.001, "peak_gib": 0.3}},
    "older": {"cost": {}},
}


def test_energy_and_price_follow_from_hours_and_rates() -> None:
    sft, raw, older = stage_costs(RUNS, RATES)
    assert (sft.kwh, sft.price, sft.tokens) == (pytest.approx(0.21), pytest.approx(1.05), 100.0)  # 10 Wh and 200 Wh
    assert (raw.price, raw.gpu_hours, raw.tokens) == (pytest.approx(0.00005), 0.0, 0.0)
    assert (older.wall_s, older.price) == (0.0, 0.0)
    total = total_cost([sft, raw, older])
    assert (total.wall_s, total.peak_gib, total.price) == (1804.0, 2.0, pytest.approx(1.05005))
    assert total_cost([]).peak_gib == 0.0


def test_the_card_says_data_licences_metrics_gates_and_limits() -> None:
    params = load_params(ROOT / "params.yaml")
    facts = {
        "preset": "default",
        "code": {"revision": "abc123", "dirty": "true"},
        "params": params.model_dump(mode="json", by_alias=True),
        "base_model": {"kind": "path", "path": "it's mine"},
        "machine": {"cpu": "EPYC", "cores": 2, "memory_gib": 24.0, "gpus": []},
        "sources": [
            {
                "name": "own",
                "from": "own.jsonl",
                "license": "CC-BY-4.0",
                "rows_in": 9,
                "rows_out": 7,
                "splits": {"sft": 5, "ptx": 2},
            },
            {"name": "web", "from": "x", "license": "MIT", "rows_in": None, "rows_out": None, "splits": {}},
        ],
    }
    metrics = {"ppo": {"kl": 3.0, "kl_low": 2.0, "kl_high": 4.5}, "gold/accuracy": 0.75, "base": {"perplexity_zh": 9.0}}
    verdicts = [
        Verdict("ppo/kl", 3.0, "<= 2", "fail", True),
        Verdict("champion/win_rate", None, ">= 0.5", "pass", False),
    ]
    card = render_card("chat", facts, metrics, verdicts, total_cost(stage_costs(RUNS, RATES)), "EUR")
    for line in (
        "# chat",
        "| own (`own.jsonl`) | 7 of 9 | sft 5, ptx 2 | CC-BY-4.0 |",
        "| web (`x`) | unknown of unknown |  | MIT |",
        "Licences of the data: CC-BY-4.0, MIT. What the base model learned from is not recorded here.",
        "| KL of PPO from SFT, nats a response | 3 | 2 to 4.5 |",
        "| ppo/kl | 3 | <= 2, blocks | fail |",
        "| champion/win_rate |  | >= 0.5 | pass |",
        "Code: git `abc123` with uncommitted changes, preset `default`.",
        "- The code had uncommitted changes: the commit alone does not reproduce it.",
    ):
        assert line in card.splitlines(), card
    assert "it's mine" in card, "no HTML entities"
    assert "right on 75 % of held-out pairs" in card
    assert "1.00 core hours, 0.50 GPU hours" in card
    assert "1.05 EUR" in card
    assert "\n\n\n" not in card
