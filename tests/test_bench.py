"""The pure parts of the benchmarks, on invented timings; nothing is timed here."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import data, quantization, serve, seven_b
from bench.load import choices_of
from bench.machine import cpu_fields
from bench.measure import Setup, make_job, parse_result
from bench.ours.arithmetic import training_flops
from bench.ours.training import StepLog
from bench.pages import BENCHMARKS, filled
from bench.parallel import table
from bench.parts import DEFAULTS, OURS, PACKING, PARTS, TUNED, Comparison, Part, Side, select
from bench.plots import plot_ratios, plot_scaling
from bench.report import cells, lines_of, markdown, measured_parts, points_of
from bench.results import Machine, Measurement, Result, Run, read_measurements, write_measurement
from bench.side import Training
from chatloom.data.examples import Example
from chatloom.errors import InputError
from chatloom.parallel.shapes import Shape
from tests.conftest import ROOT

MACHINE = Machine(
    cpu="a processor", cores=2, features=["avx2"], memory_bytes=8 * 2**30, system="Linux 6", python="3.11.1"
)
GIB = 2**30


def result(work: float, seconds: float, peak_gib: float = 1.0, **details: float) -> Result:
    return Result(
        work=work,
        unit="tokens",
        seconds=seconds,
        peak_bytes=int(peak_gib * GIB),
        threads=2,
        versions={"torch": "2"},
        details=dict(details),
    )


def measurement(part: str, *rounds: dict[str, Result], smoke: bool = False) -> Measurement:
    runs = [
        Run(round=number, side=side, load_before=0.5, result=found)
        for number, results in enumerate(rounds, start=1)
        for side, found in results.items()
    ]
    return Measurement(
        part=part, smoke=smoke, finished="2026-01-01T00:00:00+00:00", machine=MACHINE, settings={}, runs=runs
    )


def part_named(name: str) -> Part:
    [part] = [part for part in PARTS if part.name == name]
    return part


def sft_round(ours: float, defaults: float, packing: float, tuned: float) -> dict[str, Result]:
    """Tokens/s of each side, over 10 s."""
    return {
        OURS: result(10 * ours, 10, 3.0),
        DEFAULTS: result(10 * defaults, 10, 12.0),
        PACKING: result(10 * packing, 10, 13.0),
        TUNED: result(10 * tuned, 10, 9.0, loss=2.5),
    }


def test_a_ratio_is_of_one_round_and_the_median_of_the_rounds_counts() -> None:
    rounds = [sft_round(300, 50, 80, 60), sft_round(330, 60, 100, 110), sft_round(100, 25, 20, 10)]
    against_defaults, against_best, memory = lines_of(part_named("sft_full"), measurement("sft_full", *rounds))
    assert against_defaults.ratios == (6.0, 5.5, 4.0)
    assert against_defaults.ratio == 5.5
    assert against_defaults.holds is True  # at least 5
    # The best of the two is packing, then tuned, then packing again.
    assert against_best.ratios == (3.75, 3.0, 5.0)
    assert (against_best.ours, against_best.other) == (300, 80)  # medians of (300, 330, 100) and of (80, 110, 20)
    assert against_best.holds is True
    assert memory.ratios == (0.25, 0.25, 0.25)
    assert memory.holds is True
    assert cells(memory)[1:] == ("3 GiB", "12 GiB", "0.25x (0.25 to 0.25)", "≤ 0.5x", "yes")


@pytest.mark.parametrize(
    ("measure", "target", "ratio", "holds"),
    [
        ("speed", 3.0, 3.0, True),
        ("speed", 3.0, 2.99, False),
        ("memory", 0.5, 0.5, True),
        ("memory", 0.5, 0.51, False),
        ("arithmetic", 0.5, 0.6, True),
        ("speed", None, 9.0, None),
    ],
)
def test_less_is_better_for_memory_alone(measure: Any, target: float | None, ratio: float, holds: bool | None) -> None:
    assert Comparison("", measure, target).holds(ratio) is holds


def test_arithmetic_is_a_share_of_the_rate_of_the_same_process() -> None:
    found = measurement("arithmetic", {OURS: result(1, 4, flops=1.2e12, matmul_flops_per_s=6e11)})
    [line] = lines_of(part_named("arithmetic"), found)
    assert (line.ours, line.other, line.ratio) == (300, 600, 0.5)


def test_useful_operations_of_a_training_step() -> None:
    # Two sequences of 3 and 2 tokens, of which 2 and 1 are predicted. Forward: 10 weights * 5 tokens, 7 head weights *
    # 3 predictions, a multiply-add being two; attention of 4 wide heads in 1 layer: for lengths 3 and 2 half of
    # (9 + 4) * 4 * 2 multiply-adds.
    examples = [Example.of_response([1], [2, 3]), Example.of_response([1], [2])]
    forward = 2 * 50 + 2 * 21 + 13 * 4 * 2
    assert training_flops(10, 7, 4, 1, examples) == 3 * forward


def test_the_log_of_a_loop_times_its_steps_and_nothing_between_them() -> None:
    log = StepLog("train/loss")
    log(0, {"eval/loss_en": 9.0})
    log(1, {"train/loss": 3.0, "train/lr": 0.1})
    log(1, {"eval/loss_en": 8.0})
    with pytest.raises(AssertionError, match="at least two are needed"):
        _ = log.clock.seconds
    log(2, {"train/loss": 2.0, "train/lr": 0.1})
    assert log.clock.seconds > 0
    assert log.values == {"train/loss": [3.0, 2.0]}


def test_a_round_that_was_cut_short_does_not_count() -> None:
    whole = sft_round(300, 50, 80, 60)
    cut = measurement("sft_full", whole, {OURS: result(9999, 1)})
    assert cut.rounds() == [whole]


def test_scaling_points_are_medians_in_the_order_of_the_sides() -> None:
    part = part_named("scaling_size")
    rounds = [
        {side.name: result(work, 1, parameters=1000.0 * place) for place, side in enumerate(part.sides, start=1)}
        for work in (5, 1, 3)
    ]
    points = points_of(part, measurement("scaling_size", *rounds))
    assert [point.value for point in points] == [1000, 2000, 3000, 4000]
    assert [point.per_second for point in points] == [3] * 4


def test_results_survive_the_disk_and_strangers_are_refused(tmp_path: Path) -> None:
    found = measurement("sft_full", sft_round(300, 50, 80, 60))
    write_measurement(tmp_path, found)
    assert read_measurements(tmp_path) == {"sft_full": found}
    values = json.loads((tmp_path / "sft_full.json").read_text())
    (tmp_path / "sft_full.json").write_text(json.dumps(values | {"extra": 1}))
    with pytest.raises(InputError, match=r"sft_full\.json.*(?s:.*)extra"):
        read_measurements(tmp_path)


def test_results_of_other_sides_are_refused() -> None:
    found = measurement("sft_full", {OURS: result(1, 1)})
    with pytest.raises(InputError, match="other sides"):
        measured_parts({"sft_full": found})


def test_the_page_gets_the_tables_between_its_markers_and_keeps_the_rest() -> None:
    measured = measured_parts({"sft_full": measurement("sft_full", sft_round(300, 50, 80, 60))})
    sections = {"results": markdown(measured, ["results/ratios.png"])}
    page = filled("before\n<!-- begin: results -->\nold\n<!-- end: results -->\nafter\n", sections)
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert (
        "| SFT, full: tokens/s over TRL's defaults | 300 tokens/s | 50 tokens/s | 6.00x (6.00 to 6.00) | ≥ 5x | yes |"
        in page
    )
    assert "| sft_full | TRL (tuned) | 60 tokens/s | 9.00 GiB | 2.5 |  |  |" in page
    assert "a processor, 2 cores (avx2), 8 GiB" in page
    assert "![ratios](results/ratios.png)" in page
    assert filled(page, sections) == page
    with pytest.raises(InputError, match="no place"):
        filled("a page without them", sections)


def test_the_documents_page_has_its_markers() -> None:
    page = BENCHMARKS.read_text(encoding="utf-8")
    for name in ("data", "parallel", "serve", "quantization", "results"):
        assert f"new {name}" in filled(page, {name: f"new {name}"})


def test_a_smoke_run_never_gets_into_the_page() -> None:
    measured = measured_parts({"sft_full": measurement("sft_full", sft_round(1, 1, 1, 1), smoke=True)})
    with pytest.raises(InputError, match="smoke"):
        markdown(measured, [])


def test_pictures_are_drawn(tmp_path: Path) -> None:
    lines = lines_of(part_named("sft_full"), measurement("sft_full", sft_round(300, 50, 80, 60)))
    plot_ratios(lines, tmp_path / "ratios.png")
    part = part_named("scaling_length")
    rounds = {side.name: result(100, side.value) for side in part.sides}
    plot_scaling(points_of(part, measurement("scaling_length", rounds)), tmp_path / "scaling.png")
    for name in ("ratios.png", "scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_parts_are_selected_by_their_beginnings() -> None:
    assert [part.name for part in select(["sft", "reward"])] == ["sft_full", "sft_lora", "reward"]
    assert select([]) == list(PARTS)
    with pytest.raises(InputError, match=r"--part nothing.*sft_full"):
        select(["nothing"])


class FakeAssets:
    def checkpoint(self, name: str) -> Path:
        return Path("checkpoints", name)

    def reward_model(self, checkpoint: Path) -> Path:
        return Path("reward", checkpoint.name)

    def rows(self, name: str, checkpoint: Path, max_length: int) -> Path:
        return Path("rows", f"{name}-{checkpoint.name}-{max_length}")


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize(("part", "side"), [(part, side) for part in PARTS for side in part.sides])
def test_every_side_has_a_whole_job_of_at_least_two_steps(part: Part, side: Side, smoke: bool, tmp_path: Path) -> None:
    setup = Setup(tmp_path, "rows", "pairs", tmp_path, tmp_path, 1, smoke)
    job: Any = make_job(part, side, setup, FakeAssets())  # type: ignore[arg-type]
    if isinstance(job, Training):
        assert job.num_rows >= 2 * job.batch_size
    elif hasattr(job, "steps"):
        assert job.steps >= 2
    assert (ROOT / side.module.replace(".", "/")).with_suffix(".py").is_file()


def test_both_sides_of_a_comparison_do_the_same_work(tmp_path: Path) -> None:
    """But for how a peer packs, which is a setting of that peer."""
    setup = Setup(tmp_path, "rows", "pairs", tmp_path, tmp_path, 3, False)
    for part in PARTS:
        if part.comparisons:
            jobs: list[Any] = [make_job(part, side, setup, FakeAssets()) for side in part.sides]  # type: ignore[arg-type]
            same = [replace(job, trainer={}, batch_size=0) if isinstance(job, Training) else job for job in jobs]
            assert same == [same[0]] * len(same)


def test_a_side_that_prints_no_result_is_named() -> None:
    side = Side("the peer", "bench.peers.sft")
    found = result(3, 2)
    assert parse_result(f"a progress line\n{found.model_dump_json()}\n", side) == found
    with pytest.raises(InputError, match="the peer"):
        parse_result("", side)
    with pytest.raises(InputError, match="the peer"):
        parse_result("done\n", side)


def test_the_first_processor_is_described() -> None:
    text = "processor\t: 0\nmodel name\t: One\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: Two\n"
    assert cpu_fields(text) == {"processor": "0", "model name": "One", "flags": "fpu avx2"}


def test_the_peers_have_the_torch_of_the_lock_and_every_version_is_pinned() -> None:
    locked = dict(re.findall(r"^([\w-]+)==([^ \\\n]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    for environment in {side.environment for part in PARTS for side in part.sides} - {OURS}:
        lines = (ROOT / "bench/peers" / f"{environment}.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if not line.startswith("#"))
        assert pins["torch"] == locked["torch"]
        assert pins["trl"].startswith(environment.removeprefix("trl-"))
    served = (ROOT / "bench/peers" / f"{serve.PEERS}.txt").read_text()
    assert f"torch=={locked['torch']}\n" in served
    assert f"transformers[serving]=={locked['transformers']}\n" in served


def test_the_figures_of_the_server_and_whether_they_are_met() -> None:
    def server(rate: float, **more: Any) -> dict[str, Any]:
        times = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
        found = {"tokens_per_second": rate, "lost": 0, "requests": 4, "seconds": times, "first_token_seconds": times}
        return {"streams": found, **more}

    def measured(four_bit: float, ours: float, direct: float) -> dict[str, Any]:
        rates = {
            "4-bit, ours": {"alone": four_bit, "together": 90.0},
            "bf16, generate": {"alone": 10.0, "together": 100.0},
        }
        theirs = {"transformers serve": server(40), "transformers serve, batching": server(20)}
        own = server(ours, alone={"tokens_per_second": 20.0})
        tokens = {"served": [0.110, 0.130, 0.150], "direct": [direct, direct, direct]}
        return {"load_before": 1.0, "decode": rates, "servers": {"ours": own, **theirs}, "first_token": tokens}

    results = {
        "machine": {"cpu": "a processor", "cores": 2},
        "finished": "today",
        "amount": {"clients": 64},
        "rounds": [measured(12, 100, 0.12), measured(9, 50, 0.10), measured(11, 90, 0.11)],
        "soak": {**server(50)["streams"], "requests": 1000, "lost": 1, "rss_before": 200, "rss_after": 220},
    }
    # Medians by hand: 12, 9, 11 over 10; 100, 50, 90 over 20; 130 ms less 120, 100, 110; over 40, the better peer.
    found = [(statistics.median(values), met) for _, values, _, _, met in serve.figures(results)]
    assert [value for value, _ in found] == pytest.approx([1.1, 0.9, 4.5, 20, 1, 1.1, 2.25])
    assert [met for _, met in found] == [True, False, True, False, False, False, True]
    table = serve.markdown(results)
    assert "| 16 streams over one: tokens/s | 4.5x (2.5 to 5) | ≥ 4x | yes |" in table
    assert "| ours, 64 clients, 1000 requests | 50 | 1.00 / 2.00 s | 1.00 / 2.00 / 3.00 s | 1 |" in table


def test_percentiles() -> None:
    assert serve.percentiles([float(number) for number in range(100, 0, -1)]) == {"p50": 51, "p95": 96, "p99": 100}
    assert serve.percentiles([7.0]) == {"p50": 7, "p95": 7, "p99": 7}


def test_lines_of_a_stream() -> None:
    assert choices_of('data: {"choices": [{"delta": {"content": "a"}}]}') == [{"delta": {"content": "a"}}]
    for line in ("", "data: [DONE]", ": comment", 'data: {"error": {}}', "event: x"):
        assert choices_of(line) == []


def test_processes_are_compared_within_a_round_and_the_slowest_counts() -> None:
    def seen(seconds: float, waited: float) -> dict[str, float]:
        found = {"seconds": seconds, "waited": waited, "to_start": 3.0, "to_first_step": 5.0, "loss": 1.5}
        return found | {"peak_bytes": 3 * 2**30, "imported_bytes": 2**30, "most_tokens": 8}

    def ran(*processes: dict[str, float]) -> dict[str, Any]:
        return {"processes": list(processes)}

    rounds = [
        {"none": ran(seen(10, 0)), "ddp": ran(seen(11, 0.1), seen(12, 0.12))},
        {"none": ran(seen(20, 0)), "ddp": ran(seen(30, 0.1), seen(20, 0.3))},
        {"none": ran(seen(10, 0)), "ddp": ran(seen(11, 0.11), seen(11, 0.11))},
    ]
    none, ddp = [line.split(" | ") for line in table(rounds, 6, Shape.named("llama-7b"))[2:]]
    assert none[1:3] == ["2", "1.00x (1.00 to 1.00)"]
    assert ddp[1:4] == ["2.4", "1.20x (1.10 to 1.50)", "1 %"]
    assert none[6:8] == ["3.00 GiB", "2.00 GiB"]
    # 6.738 G parameters: 2 bytes of weights, 4 of gradients in the step, 12 of masters and moments.
    assert float(none[8].removesuffix(" GiB")) == pytest.approx(18 * 6.738415616e9 / GIB, rel=0.01)
    assert ddp[-1] == "yes |"
    assert none[-1] == " |"


def test_the_table_of_quantization_shows_ratios_to_the_full_model() -> None:
    found = {"error/gptq": 0.004, "error/rounded": 0.012, "error/layers_worse": 1, "layers": 210, "agreement/all": 0.75}
    found |= {"ratio_16bit/files": 0.43, "ratio_16bit/linear": 0.27, "seconds": 200}
    found |= {f"perplexity/{kind}_en": value for kind, value in (("full", 10), ("gptq", 11), ("rounded", 15))}
    line = quantization.table({"4 bits": found}, ["en"]).splitlines()[2]
    assert line.startswith("| 4 bits | 10.00 | 1.100x | 1.500x | 0.0040 | 0.0120 | 1 of 210 | 75.0 % | 0.430x |")


def test_data_preparation_is_compared_by_the_median_of_the_rounds() -> None:
    def ran(seconds: float, peak_gib: float) -> dict[str, Any]:
        return {"seconds": seconds, "peak_bytes": peak_gib * GIB, "rows_in": 1000}

    rounds = [{"ours": ran(seconds, 1), "plain": ran(20, 2)} for seconds in (50, 40, 90)]
    page = data.markdown({"rounds": rounds, "sizes": [ran(100, 1.5)]})
    assert "| `raw_data` and `prepare_data` | 50.0 (40.0 to 90.0) | 20 | 1.00 GiB | yes |" in page
    assert "| ours, 1,000 rows | 100.0 | 10 | 1.50 GiB |  |" in page
    assert "2.50 times the plain recipe (2.00 to 4.50)" in page
    slow = [{"ours": ran(61, 1), "plain": ran(30, 2)}]
    assert "| no |" in data.markdown({"rounds": slow, "sizes": []})


def test_the_7b_run_on_a_tiny_model(tmp_path: Path) -> None:
    """Builds, loads in a process of its own, answers, removes what it made; the figures are those of a tiny model."""
    out, folder = tmp_path / "found.json", tmp_path / "checkpoint"
    command = ["--smoke", "--folder", str(folder), "--tokens", "80", "--out", str(out)]
    done = CliRunner().invoke(seven_b.app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert (found["prompt_tokens"], found["new_tokens"]) == (16, 64)
    # 2 layers of 655,360 weights at half a byte, and 2 x 32,000 x 256 numbers of 2 bytes, at least.
    assert found["checkpoint_bytes"] > 33_423_360
    assert found["over_imports_bytes"] == found["peak_bytes"] - found["after_imports_bytes"] > 33_423_360 / 2
    assert not folder.exists()
