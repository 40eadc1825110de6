"""Slots of a team's machines, counted by the Prefect server: who trains takes one, the others wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL

from chatloom.config import load_params
from tasks.workspace import Reproduction

GPU, CPU = "gpu", "cpu-train"
LIGHT = ("base_model", "raw_data", "prepare_data")
"""Stages that compute with no model."""


def ensure_slots() -> None:
    """Make the limits that the server lacks, with one slot each; for more: `prefect gcl update gpu --limit 4`."""
    if not _is_counted():
        return
    with get_client(sync_client=True) as client:
        for name in (GPU, CPU):
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                try:
                    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
                except ObjectAlreadyExists:  # another flow was faster
                    continue


@contextmanager
def slot_of(stage: str, reproduction: Reproduction, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the slot that `stage` needs, if any, for the block; wait while none is free.

    The limit has to exist: a missing one is an error, and no licence to start. Without a server that outlives the flow
    nobody counts: Prefect's temporary one forgets the holders, but not the slots, when it is killed.
    """
    if stage in LIGHT or not _is_counted():
        yield
        return
    name = GPU if uses_gpu(reproduction.workspace) else CPU
    say(f"{stage}: takes a slot of {name}")
    # A slot that the server took back, because it was away for minutes, is no reason to lose a training.
    with concurrency(name, strict=True, raise_on_lease_renewal_failure=False):
        yield


def uses_gpu(workspace: Path, devices: Path = Path("/dev")) -> bool:
    """Whether stages of `workspace` compute on a GPU, without loading torch to know."""
    device = load_params(workspace / "params.yaml").runtime.device
    if device != "auto":
        return device == "cuda"
    return any(devices.glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def _is_counted() -> bool:
    return PREFECT_API_URL.value() is not None
