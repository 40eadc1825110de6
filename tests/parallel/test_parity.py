"""Every strategy that runs on a CPU against one process: the same curves (rules 8 and 10)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chatloom.parallel.ranks import ALONE, connect
from tests.parallel.parity import (
    DIFFERENT,
    LEG,
    RESUMED,
    STEPS,
    Curves,
    difference,
    make_models,
    processes,
    run,
    run_leg,
    run_together,
    states,
)

HYBRID = "sft/full/float32/colossalai_hybrid"
# The largest difference at any step, as a share of the curve's largest value. float32: rounding only; KL is a
# difference of nearly equal numbers, and Adam turns the rounding of tiny gradients into steps.
CASES = {
    "sft/full/float32/colossalai_zero2": 1e-5,
    "reward/lora/float32/ddp": 1e-4,
    "reward/full/float32/colossalai_zero2_cpu": 1e-3,
    "reward/full/float32/colossalai_hybrid": 1e-3,
    "ppo/lora/float32/colossalai_zero1": 1e-3,
    # The gradients of a bfloat16 model are summed over ranks in bfloat16, 8 bits.
    "sft/full/bfloat16/colossalai_gemini": 5e-3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> dict[str, Curves]:
    """What two processes do, started once for all; their leg of the run that is handed on is the last one."""
    of_four = run_together([LEG, HYBRID], 4, folder)
    with connect("parity", processes(1), torch.device("cpu")) as one:
        in_one = run_leg(folder, one)
    return {**run_together([*CASES, LEG, DIFFERENT], 2, folder), "leg of one": in_one, HYBRID: of_four[HYBRID]}


@pytest.mark.smoke
def test_two_processes_train_as_one_does(folder: Path, together: dict[str, Curves]) -> None:
    for case, tolerance in CASES.items():
        alone = run(f"{case.rsplit('/', 1)[0]}/none", folder, ALONE)
        gaps = difference(together[case], alone)
        assert max(gaps.values()) < tolerance, (case, gaps)
        name, curve = next(iter(alone.items()))
        if case in RESUMED:
            assert_goes_on(case, tolerance, together, alone, folder)
        assert max(curve) - min(curve) > 2 * tolerance * max(curve), f"{case}: {name} hardly moves and shows nothing"


def assert_goes_on(case: str, tolerance: float, together: dict[str, Curves], alone: Curves, folder: Path) -> None:
    """Two processes that were killed go on bit for bit, and one process goes on from their state up to rounding."""
    rest = {name: values[-STEPS // 2 :] for name, values in together[case].items()}
    assert together[f"{case} resumed"] == rest
    for newest in (folder / "states" / case).glob(f"*-{STEPS:08d}*"):
        newest.unlink()
    resumed = run(f"{case.rsplit('/', 1)[0]}/none", folder, ALONE, states(case, folder, ALONE))
    gaps = difference(resumed, {name: values[-STEPS // 2 :] for name, values in alone.items()})
    assert max(gaps.values()) < tolerance, (case, gaps)


@pytest.mark.smoke
def test_two_pairs_of_slices_train_as_one_process_does(folder: Path, together: dict[str, Curves]) -> None:
    """Four processes: each model in two slices, the rows shared by two such pairs."""
    gaps = difference(together[HYBRID], run("sft/full/float32/none", folder, ALONE))
    assert max(gaps.values()) < 1e-4, gaps


@pytest.mark.smoke
def test_a_run_goes_from_zero2_on_four_to_ddp_on_one_to_gemini_on_two(
    folder: Path, together: dict[str, Curves]
) -> None:
    """Weights, masters and moments are those that were saved, bit for bit; the rest of the curve is that of one run."""
    assert together["leg of one"] == {"taken over": [0.0] * 4}
    leg = dict(together[LEG])
    assert leg.pop("taken over") == [0.0] * 4
    alone = run("sft/full/bfloat16/none", folder, ALONE)
    gaps = difference(leg, {name: values[-len(leg[name]) :] for name, values in alone.items()})
    assert len(leg["train/loss"]) == STEPS // 2
    assert max(gaps.values()) < 5e-3, gaps


@pytest.mark.smoke
@pytest.mark.usefixtures("together")
def test_ranks_with_other_params_rows_or_weights_are_told_before_the_first_step(folder: Path) -> None:
    for rank in (0, 1):
        said = json.loads((folder / f"told-{rank}.json").read_text())
        assert [message.split(":")[0] for message in said] == [
            "ranks 0 and 1 have different params",
            "ranks 0 and 1 have different rows",
            "ranks 0 and 1 have different weights",
        ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_strategies_train_on_gpus_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every GPU there is: NCCL, streams, offload to the host and placement by free memory are real there."""
    monkeypatch.setattr("tests.parallel.parity.DEVICE", "cuda")
    monkeypatch.setenv("PARITY_DEVICE", "cuda")
    make_models(tmp_path)
    names = ["zero2", "zero2_cpu", "gemini", "gemini_auto"]
    names += ["hybrid"] if torch.cuda.device_count() % 2 == 0 else []
    cases = [f"sft/full/bfloat16/colossalai_{name}" for name in names]
    together = run_together(cases, torch.cuda.device_count(), tmp_path)
    alone = run("sft/full/bfloat16/none", tmp_path, ALONE)
    for case in cases:
        gaps = difference(together[case], alone)
        assert max(gaps.values()) < 2e-2, (case, gaps)
