"""Every strategy that runs on a CPU against one process: the same curves (rules 8 and 10)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chatloom.parallel.ranks import ALONE
from tests.parallel.parity import RESUMED, STEPS, Curves, difference, make_models, run, run_together, states

# The largest difference at any step, as a share of the curve's largest value. float32: rounding only; KL is a
# difference of nearly equal numbers, and Adam turns the rounding of tiny gradients into steps.
CASES = {
    "sft/full/float32/colossalai_zero2": 1e-5,
    "reward/lora/float32/ddp": 1e-4,
    "reward/full/float32/colossalai_zero2_cpu": 1e-3,
    "ppo/lora/float32/colossalai_zero1": 1e-3,
    # The gradients of a bfloat16 model are summed over ranks in bfloat16, 8 bits.
    "sft/full/bfloat16/colossalai_gemini": 5e-3,
}


@pytest.mark.smoke
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    make_models(tmp_path)
    together = run_together(list(CASES), 2, tmp_path)
    for case, tolerance in CASES.items():
        alone = run(f"{case.rsplit('/', 1)[0]}/none", tmp_path, ALONE)
        gaps = difference(together[case], alone)
        assert max(gaps.values()) < tolerance, (case, gaps)
        name, curve = next(iter(alone.items()))
        if case in RESUMED:
            assert_goes_on(case, tolerance, together, alone, tmp_path)
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_strategies_train_on_gpus_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every GPU there is: NCCL, streams, offload to the host and placement by free memory are real there."""
    monkeypatch.setattr("tests.parallel.parity.DEVICE", "cuda")
    monkeypatch.setenv("PARITY_DEVICE", "cuda")
    make_models(tmp_path)
    cases = [f"sft/full/bfloat16/colossalai_{name}" for name in ("zero2", "zero2_cpu", "gemini", "gemini_auto")]
    together = run_together(cases, torch.cuda.device_count(), tmp_path)
    alone = run("sft/full/bfloat16/none", tmp_path, ALONE)
    for case in cases:
        gaps = difference(together[case], alone)
        assert max(gaps.values()) < 2e-2, (case, gaps)
